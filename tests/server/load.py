"""Many browser sessions against one server: latency, refusals, lost results, memory.

    python -m tests.server.load --sessions 100 --waves 3 --output results/load.jsonl

Every session opens the Compare page over a real websocket, changes a setting and stays. Each fifth starts a real run of
the built-in model; where the queue is full it reads why, and asks again until it is taken. Half of those lose their
connection in the middle of the run and come back. Meanwhile a real browser opens the page, if there is one. When all
have what they asked for, every session acts at the same moment; then all leave, and the next wave comes.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.support.process import Server
from tests.support.tab import Tab
from turboquant.records.base import Record
from turboquant.records.environment import Environment, environment
from turboquant.records.files import append_record

SESSION_TTL_S = 10
RUN_EVERY = 5
TOKENS = 4
PATIENCE_S = 600.0
CHROMIUM = Path("/usr/bin/chromium")
TEXT = "asks when the tide turns and when the boats can leave the harbour of Arnsey. " * 8


class Latency(Record):
    """Seconds; `count` is how many were measured."""

    count: int
    median: float
    p95: float
    worst: float


class LoadBench(Record):
    """One load on one machine, server and clients together.

    `first_element` and `first_run` are from opening the socket to the first element and to the end of the page's first
    script run, with sessions arriving one after the other; `change` is from a widget's change to the end of its run;
    `burst` is the same with all sessions acting at once. `first_paint` and `heading` are a browser's, from navigation,
    with sessions coming and runs at work; `idle_first_paint` is before the first session came. `run` is from the click
    that was taken to the result on the page. `lost` counts runs that were taken and whose result did not reach their
    own page, `dropped` connections that nobody cut. `rss_mib` is the server's memory with the model loaded, then after
    each wave when its sessions have gone.
    """

    kind: Literal["bench-load"] = "bench-load"
    environment: Environment
    load_average: float
    sessions: int
    waves: int
    arrive_s: float
    max_queue: int
    runs: int
    new_tokens: int
    refused: int
    came_back: int
    dropped: int
    lost: int
    first_element: Latency
    first_run: Latency
    change: Latency
    burst: Latency
    run: Latency
    idle_first_paint: Latency | None
    first_paint: Latency | None
    heading: Latency | None
    rss_mib: list[float]
    growth_mib_per_100_sessions: float | None


@dataclass
class Seen:
    """What the visitors of all waves have seen, in seconds and counts."""

    first_element: list[float] = field(default_factory=list)
    first_run: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    burst: list[float] = field(default_factory=list)
    run: list[float] = field(default_factory=list)
    idle_first_paint: list[float] = field(default_factory=list)
    first_paint: list[float] = field(default_factory=list)
    heading: list[float] = field(default_factory=list)
    refused: int = 0
    came_back: int = 0
    dropped: int = 0
    lost: list[str] = field(default_factory=list)


def latency(seconds: Sequence[float]) -> Latency:
    """Median, 95th percentile and worst of some times."""
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    rounded = [round(value, 3) for value in (statistics.median(seconds), p95, max(seconds))]
    return Latency(count=len(seconds), median=rounded[0], p95=rounded[1], worst=rounded[2])


ROWS = {
    "first_element": "page over the socket: first element",
    "first_run": "page over the socket: end of its first run",
    "change": "a changed setting",
    "burst": "a changed setting, all sessions at once",
    "run": "a run, from the click that was taken to the result",
    "idle_first_paint": "browser: first paint, before the load",
    "first_paint": "browser: first paint, under the load",
    "heading": "browser: heading, under the load",
}


def table(record: LoadBench) -> str:
    """The record as a table in Markdown."""
    lines = ["| seconds | median | 95 % | worst | measured |", "|---|---|---|---|---|"]
    for name, words in ROWS.items():
        if times := getattr(record, name):
            lines.append(f"| {words} | {times.median:.2f} | {times.p95:.2f} | {times.worst:.2f} | {times.count} |")
    env, rss = record.environment, record.rss_mib
    what = (
        f"{record.waves} waves of {record.sessions} sessions, each wave arriving over {record.arrive_s:.0f} s; "
        f"{record.runs} runs of {record.new_tokens} tokens were taken by a queue of {record.max_queue}, "
        f"{record.refused} were refused in words and asked for again, {record.came_back} sessions lost their "
        f"connection in a run and came back, {record.dropped} connections broke under the load and were opened again, "
        f"{record.lost} results were lost. The server's memory was {rss[0]:.0f} MiB "
        f"with the model loaded and {', '.join(f'{value:.0f}' for value in rss[1:])} MiB after the waves: "
        f"{record.growth_mib_per_100_sessions} MiB for 100 sessions more."
    )
    where = (
        f"Server and clients on {env.device}, load average {record.load_average} before it, "
        f"{env.created[:10]}, commit {env.commit}."
    )
    return "\n".join([textwrap.fill(f"{what} {where}", 120), "", *lines])


async def change(tab: Tab, label: str, value: float, seen: Seen) -> float:
    """Change a number and wait for the run's end; returns the seconds.

    Where the connection is lost meanwhile, it is opened again, as a browser does by itself, and the seconds go on.
    """
    begun, runs = time.monotonic(), tab.runs
    await tab.rerun(tab.number(label, value))
    while True:
        try:
            await tab.until(lambda: tab.runs > runs, PATIENCE_S)
        except AssertionError:
            if tab.connected:
                raise
            seen.dropped += 1
            await tab.open()
        else:
            return time.monotonic() - begun


async def taken(tab: Tab, prompt: str) -> bool:
    """Press Compare; whether the run was taken, not refused in words."""
    runs = tab.runs
    await tab.press("Compare", tab.text_area("Prompt", prompt))
    await tab.until(lambda: tab.has("button", "Stop this run") or tab.runs > runs, PATIENCE_S)
    return "runs are waiting already" not in tab.text


async def compare(tab: Tab, name: str, cut: bool, seen: Seen) -> None:
    """Run a comparison: read a refusal and ask again; lose the connection and come back; check whose result it is."""
    prompt, begun = f"{name} {TEXT}", time.monotonic()
    while not await taken(tab, prompt):
        seen.refused += 1
        await asyncio.sleep(3)
        begun = time.monotonic()
    if cut:
        await asyncio.sleep(1)
        await tab.cut()
        await asyncio.sleep(2)
        await tab.open()
        seen.came_back += 1
    try:
        await tab.until(lambda: "Measured here" in tab.text and name in tab.text, PATIENCE_S)
    except AssertionError as error:
        seen.lost.append(f"{name}: {error}")
        return
    seen.run.append(time.monotonic() - begun)
    others = [word for word in tab.text.split() if "visitor-" in word and name not in word]
    if others:
        seen.lost.append(f"{name} sees {others[0]}")


async def visitor(address: str, wave: int, number: int, seen: Seen) -> Tab:
    """One session up to the end of what it came for; its tab is still open."""
    tab = await Tab(address, tokens=TOKENS).open()
    await tab.until(lambda: tab.first_run_s, PATIENCE_S)
    seen.first_element.append(tab.first_element_s or 0.0)
    seen.first_run.append(tab.first_run_s or 0.0)
    seen.change.append(await change(tab, "Seed", 1 + number, seen))
    if number % RUN_EVERY == 0:
        await compare(tab, f"visitor-{wave}-{number}-", number % (2 * RUN_EVERY) == 0, seen)
    return tab


def browse(address: str, visits: int) -> list[tuple[float, float]]:
    """Open the page in a real browser, each time as a new visitor: seconds to the first paint and to the heading."""
    from playwright.sync_api import sync_playwright

    paint = "performance.getEntriesByName('first-contentful-paint').map(e => e.startTime)[0]"
    found = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        for visit in range(visits + 1):
            page = browser.new_context().new_page()
            begun = time.monotonic()
            page.goto(f"{address}/compare")
            page.get_by_role("heading", level=1).first.wait_for(timeout=60_000)
            heading = time.monotonic() - begun
            if visit:  # the browser itself starts with the first one
                found.append((page.evaluate(paint) / 1000, heading))
            page.context.close()
        browser.close()
    return found


async def wave(server: Server, index: int, sessions: int, arrive_s: float, visits: int, seen: Seen) -> None:
    """All sessions of a wave come, act and leave."""
    tasks = []
    for number in range(sessions):
        tasks.append(asyncio.create_task(visitor(server.address, index, number, seen)))
        await asyncio.sleep(arrive_s / sessions)
    if visits:
        for paint, heading in await asyncio.to_thread(browse, server.address, visits):
            seen.first_paint.append(paint)
            seen.heading.append(heading)
    tabs = await asyncio.gather(*tasks)
    seen.burst += await asyncio.gather(*(change(tab, "Seed", 1000 + i, seen) for i, tab in enumerate(tabs)))
    seen.lost += ["a page shows an exception" for tab in tabs if tab.exceptions]
    await asyncio.gather(*(tab.close() for tab in tabs))
    await asyncio.sleep(SESSION_TTL_S + 25)  # and the 20 s for which a closed tab's run goes on


def measure(sessions: int, waves: int, arrive_s: float, visits: int) -> tuple[LoadBench, list[str]]:
    """Put the load on a server of its own; returns the record and what was lost."""
    seen, average = Seen(), os.getloadavg()[1]
    settings = {"STREAMLIT_SERVER_DISCONNECTED_SESSION_TTL": str(SESSION_TTL_S)}
    log = Path(tempfile.mkdtemp()) / "log.txt"
    with Server(log, settings) as server:
        while not server.events("model_loaded"):
            time.sleep(0.2)
        visits = visits if CHROMIUM.exists() else 0
        if visits:
            seen.idle_first_paint = [paint for paint, _ in browse(server.address, visits)]
        memory = [server.rss_mib()]
        for index in range(waves):
            asyncio.run(wave(server, index, sessions, arrive_s, visits, seen))
            memory.append(server.rss_mib())
            print(
                f"wave {index + 1} of {waves}: {memory[-1]:.0f} MiB, {len(seen.run)} runs, {seen.refused} refused",
                flush=True,
            )
        queue = server.events("server_started")[0]["queue"]
    if "Traceback" in log.read_text():
        seen.lost.append(f"the log has a traceback: {log}")
    growth = (memory[-1] - memory[1]) / (waves - 1) / sessions * 100 if waves > 1 else None
    timed = {name: latency(getattr(seen, name)) for name in ("first_element", "first_run", "change", "burst", "run")}
    browser = ("idle_first_paint", "first_paint", "heading")
    painted = {name: latency(found) if (found := getattr(seen, name)) else None for name in browser}
    record = LoadBench(
        environment=environment(),
        load_average=round(average, 2),
        sessions=sessions,
        waves=waves,
        arrive_s=arrive_s,
        max_queue=queue,
        runs=len(seen.run) + len(seen.lost),
        new_tokens=TOKENS,
        refused=seen.refused,
        came_back=seen.came_back,
        dropped=seen.dropped,
        lost=len(seen.lost),
        rss_mib=[round(value, 1) for value in memory],
        growth_mib_per_100_sessions=None if growth is None else round(growth, 1),
        **timed,
        **painted,
    )
    return record, seen.lost


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--waves", type=int, default=3)
    parser.add_argument("--arrive-s", type=float, default=60.0, help="over how long a wave arrives")
    parser.add_argument("--visits", type=int, default=4, help="of a browser in each wave; 0 uses none")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="only print the newest record of this file as a table")
    given = parser.parse_args()
    if given.table is not None:
        print(table(LoadBench.model_validate_json(given.table.read_text().splitlines()[-1])))
        return
    record, lost = measure(given.sessions, given.waves, given.arrive_s, given.visits)
    print(record.model_dump_json(indent=1), *lost, sep="\n")
    if given.output is not None:
        append_record(record, given.output)


if __name__ == "__main__":
    main()
