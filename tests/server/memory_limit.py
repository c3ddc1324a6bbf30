"""The app in as much memory as Streamlit Community Cloud gives: does a Compare end, and what does it take?

    sudo .venv/bin/python -m tests.server.memory_limit --output results/memory-limit.jsonl

The limit is the kernel's, a memory cgroup around the server and everything it starts: what does not fit is killed, as
it would be there. Page cache counts too and is given up first. Two starts: one that has to convert the built-in model
first, in a process of its own, and one that finds it converted. Needs root and cgroup version 1 (on a machine with
version 2, `systemd-run --scope -p MemoryMax=2575M -p MemorySwapMax=0 make app` sets the same limit).
"""

import argparse
import asyncio
import os
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests.support.process import Server
from tests.support.tab import Tab
from turboquant.records.base import Record
from turboquant.records.environment import Environment, environment
from turboquant.records.files import append_record

LIMIT_MIB = 2575  # 2.7 GB
SETTINGS = {
    "TURBOQUANT_LOCK_MODEL": "1",
    "TURBOQUANT_MAX_NEW_TOKENS": "64",
    "TURBOQUANT_MAX_PROMPT_CHARS": "4000",
    "TURBOQUANT_MAX_CONTEXT_TOKENS": "1024",
    "TURBOQUANT_MAX_QUEUE": "4",
    "TURBOQUANT_MAX_RUNS": "8",
    "TURBOQUANT_MAX_CACHED": "16",
}
"""What docs/operator.md recommends there."""
WORDS = "When does the tide turn, and when can the boats leave the harbour of Arnsey? "


class MemoryLimit:
    """A memory cgroup (version 1) below this process's own, removed at the end; whatever is still in it is killed."""

    def __init__(self, mib: int) -> None:
        self._mib = mib
        self._folder = Path("/sys/fs/cgroup/memory") / own_group() / f"turboquant-{os.getpid()}"

    def __enter__(self) -> Self:
        self._folder.mkdir()
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):  # the second includes swap
            (self._folder / name).write_text(str(self._mib * 2**20))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        end = time.monotonic() + 20
        while (self._folder / "cgroup.procs").read_text().split() and time.monotonic() < end:
            time.sleep(0.1)
        self._folder.rmdir()

    @property
    def before(self) -> list[str]:
        """What to put before a command so that it runs in here."""
        return ["sh", "-c", f'echo $$ >{self._folder}/cgroup.procs && exec "$@"', "sh"]

    def peak_mib(self) -> int:
        """The most that was charged so far, page cache included."""
        return int((self._folder / "memory.max_usage_in_bytes").read_text()) // 2**20

    def rss_mib(self) -> int:
        """What is charged now and in use: memory of processes and files that they map, such as the model's weights."""
        stat = self._folder / "memory.stat"
        return (_line(stat, "total_rss") + _line(stat, "total_mapped_file")) // 2**20

    def kills(self) -> int:
        """How many processes were killed for memory."""
        return _line(self._folder / "memory.oom_control", "oom_kill")


def own_group() -> str:
    """This process's memory cgroup, without a leading slash.

    Raises:
        LookupError: There is none of version 1.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return path.strip("/")
    raise LookupError("this machine has no memory cgroup of version 1")


def _line(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name)


class Start(Record):
    """One server under the limit, MiB and seconds.

    `rss_mib` is the resident memory of all its processes: with the model loaded, after each Compare. `peak_mib` is the
    most that was charged to the limit, with page cache, which is given up when room is needed. `compare_s` are from the
    press to the result on the page.
    """

    converts: bool
    model_s: float
    rss_mib: list[int]
    peak_mib: int
    compare_s: list[float]


class MemoryLimitBench(Record):
    """Starts of the server in `limit_mib` of memory, with `settings`; no process was killed.

    Each start does two Compares: `prompt_tokens` long, with `new_tokens` new tokens on each side.
    """

    kind: Literal["bench-memory-limit"] = "bench-memory-limit"
    environment: Environment
    load_average: float
    limit_mib: int
    settings: dict[str, str]
    prompt_tokens: list[int]
    new_tokens: int
    starts: list[Start]


async def compares(server: Server, limit: MemoryLimit, tokens: int) -> tuple[list[float], list[int]]:
    """A short Compare, then the longest that the settings allow: seconds, and memory after each."""

    def done(runs: int) -> bool:
        return len(server.events("job_done")) == runs

    seconds, memory = [], []
    tab = await Tab(server.address, tokens=tokens).open()
    await tab.until(lambda: tab.first_run_s)
    for index, prompt in enumerate((WORDS * 6, (WORDS * 200)[: int(SETTINGS["TURBOQUANT_MAX_PROMPT_CHARS"])]), 1):
        begun = time.monotonic()
        await tab.press("Compare", tab.text_area("Prompt", prompt))
        await tab.until(partial(done, index), 900)
        await tab.until(lambda: "Measured here" in tab.text, 60)
        seconds.append(round(time.monotonic() - begun, 1))
        memory.append(limit.rss_mib())
    assert not tab.exceptions
    await tab.close()
    return seconds, memory


def start(limit_mib: int, cache: Path, tokens: int) -> tuple[Start, list[int]]:
    """Start a server under the limit and use it; returns what it took and the prompts' lengths in tokens."""
    converts = not any(cache.iterdir())
    log = Path(tempfile.mkdtemp()) / "log.txt"
    settings = {**SETTINGS, "TURBOQUANT_CACHE": str(cache)}
    with MemoryLimit(limit_mib) as limit, Server(log, settings, before=limit.before) as server:
        begun = time.monotonic()
        while not server.events("model_loaded"):
            assert not server.events("model_load_failed"), log.read_text()
            assert server.healthy(), log.read_text()
            time.sleep(0.2)
        model_s, loaded = time.monotonic() - begun, limit.rss_mib()
        try:
            seconds, memory = asyncio.run(compares(server, limit, tokens))
        finally:
            assert not limit.kills(), f"{limit_mib} MiB are not enough: the kernel killed a process"
        taken = Start(
            converts=converts,
            model_s=round(model_s, 1),
            rss_mib=[loaded, *memory],
            peak_mib=limit.peak_mib(),
            compare_s=seconds,
        )
        return taken, [event["prompt_tokens"] for event in server.events("job_done")]


def measure(limit_mib: int = LIMIT_MIB, tokens: int = int(SETTINGS["TURBOQUANT_MAX_NEW_TOKENS"])) -> MemoryLimitBench:
    """Start twice on a cache folder that is empty at first."""
    average = os.getloadavg()[1]
    with tempfile.TemporaryDirectory() as cache:
        starts = [start(limit_mib, Path(cache), tokens) for _ in range(2)]
    return MemoryLimitBench(
        environment=environment(),
        load_average=round(average, 2),
        limit_mib=limit_mib,
        settings=SETTINGS,
        prompt_tokens=starts[0][1],
        new_tokens=tokens,
        starts=[taken for taken, _ in starts],
    )


def table(record: MemoryLimitBench) -> str:
    """The record as a table in Markdown."""
    env, (short, long) = record.environment, record.prompt_tokens
    what = (
        f"The server with everything it starts in a memory cgroup of {record.limit_mib:,} MiB; no process was killed. "
        f"Both Compares have {record.new_tokens} new tokens on each side, their prompts {short:,} and {long:,} tokens. "
        f"On {env.device}, load average {record.load_average} before it, {env.created[:10]}, commit {env.commit}."
    )
    head = f"| MiB | model loaded | after {short:,} tokens | after {long:,} tokens | peak, page cache included |"
    names = {True: "converts the built-in model first", False: "finds it converted"}
    rows = [[f"{value:,}" for value in (*one.rss_mib, one.peak_mib)] for one in record.starts]
    lines = [f"| {names[s.converts]} | {' | '.join(row)} |" for s, row in zip(record.starts, rows, strict=True)]
    return "\n".join([textwrap.fill(what, 120), "", head, "|---|---|---|---|---|", *lines])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mib", type=int, default=LIMIT_MIB)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="only print the newest record of this file as a table")
    given = parser.parse_args()
    if given.table is not None:
        print(table(MemoryLimitBench.model_validate_json(given.table.read_text().splitlines()[-1])))
        return
    record = measure(given.limit_mib)
    print(record.model_dump_json(indent=1))
    if given.output is not None:
        append_record(record, given.output)


if __name__ == "__main__":
    main()
