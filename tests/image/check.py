"""Run the image that build.sh built as a container would be run, and use it with a real browser.

    sudo tests/image/build.sh && sudo .venv/bin/python -m tests.image.check --output results/image.jsonl

The image's own command runs as its own user on its own files, in a chroot of buildah's. Server and browser share a
network of their own that holds nothing but the loopback device, so whatever works here works offline. Needs root,
buildah and chromium.
"""

import argparse
import os
import re
import subprocess
import sys
import textwrap
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

from tests.image.container import Container, Running
from turboquant.records.base import Record
from turboquant.records.environment import Environment, environment
from turboquant.records.files import append_record

WORK = Path("/var/tmp/turboquant-image")
COMMAND = [sys.executable, "-m", "tests.image.check"]
ALONE = "TURBOQUANT_IMAGE_CHECK_ALONE"
PROMPT = "When does the tide turn, and when can the boats leave the harbour of Arnsey? " * 6
TOKENS = 16


class ImageBench(Record):
    """One image, its sizes in MiB (10^6 bytes are not used anywhere), and one start of it.

    `parts_mib` are files on disk, `archive_mib` all of them as one gzip archive, near what a registry would send.
    Seconds: `healthy_s` from the start of the process to the first good answer of the health check's address,
    `model_s` to the model in memory, `first_result_s` to the result of a Compare that was pressed as soon as the page
    allowed it, `compare_s` from that press to the result, `next_compare_s` the same for a second prompt. `rss_mib` is
    the resident memory of the server's process: with the model loaded, after each Compare; `peak_mib` the highest.
    """

    kind: Literal["bench-image"] = "bench-image"
    environment: Environment
    load_average: float
    image: str
    image_torch: str
    base_mib: int
    parts_mib: dict[str, int]
    archive_mib: int | None
    threads: int
    new_tokens: int
    healthy_s: float
    model_s: float
    first_result_s: float
    compare_s: float
    next_compare_s: float
    rss_mib: list[int]
    peak_mib: int


def compare(running: Running, shot: Path) -> tuple[float, float, float, list[int]]:
    """Compare two prompts in a browser: seconds from start to result, of both runs, and memory after each."""
    from playwright.sync_api import expect, sync_playwright

    from tests.e2e.conftest import CHROMIUM, FLAGS, SECONDS, main, visit, wait_until_still

    ends, seconds, memory = [], [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = visit(browser, f"{running.address}/compare?tokens={TOKENS}&bits=3&residual=16")
        for runs, prompt in enumerate((PROMPT, f"Once more: {PROMPT}"), 1):
            wait_until_still(page)
            page.get_by_label("Prompt").fill(prompt)
            page.get_by_label("Prompt").press("Control+Enter")
            begun = time.time()
            running.until(partial(running.has_done, runs))
            expect(main(page).get_by_text("Measured here").first).to_be_visible(timeout=180 * SECONDS)
            ends.append(time.time() - running.begun)
            seconds.append(time.time() - begun)
            memory.append(running.rss_mib())
        expect(page.get_by_text(re.compile("CompressedCache · turboquant:bits=3"))).to_be_visible()
        expect(page.get_by_test_id("stException")).to_have_count(0)
        page.screenshot(path=shot)
        browser.close()
    return ends[0], seconds[0], seconds[1], memory


def written(container: Container, since: float) -> list[str]:
    """Files of the home folder that were written later than this."""
    files = (path for path in (container.root / "home/user").rglob("*") if path.is_file() and not path.is_symlink())
    return [str(path.relative_to(container.root)) for path in files if path.stat().st_mtime > since]


def measure(work: Path, image: str, threads: int, archive: bool) -> ImageBench:
    """Start the image once, use it, stop it; every claim about it that fails is an error."""
    average, log = os.getloadavg()[1], work / "log.txt"
    assert [line.split(":")[1].strip() for line in subprocess.getoutput("ip -oneline link").splitlines()] == ["lo"]
    with Container(work, image) as container:
        container.set("OMP_NUM_THREADS", str(threads))
        assert container.config["User"] == "user"
        assert "7860/tcp" in container.config["ExposedPorts"]
        base, parts = container.parts()
        archive_mib = container.archive_mib() if archive else None
        version = container.command("python", "-c", "import torch; print(torch.__version__)")
        torch = subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()
        with Running(container, log) as running:
            first, once, again, memory = compare(running, work / "compare.png")
            (loaded,) = running.events("model_loaded")
            assert running.server.uids().real == 1000
            assert running.passes_its_health_check()
            peak = running.peak_mib()
            running.stop()
            assert not running.passes_its_health_check()
        late = written(container, running.begun)
        assert not late, f"written at run time, though the image could have brought it along: {late}"
    model_s = datetime.fromisoformat(loaded["time"]).timestamp() - running.begun
    return ImageBench(
        environment=environment(),
        load_average=round(average, 2),
        image=image,
        image_torch=torch,
        base_mib=base,
        parts_mib=parts,
        archive_mib=archive_mib,
        threads=threads,
        new_tokens=TOKENS,
        healthy_s=round(running.healthy_s, 1),
        model_s=round(model_s, 1),
        first_result_s=round(first, 1),
        compare_s=round(once, 1),
        next_compare_s=round(again, 1),
        rss_mib=memory,
        peak_mib=peak,
    )


ROWS = {
    "healthy_s": "process started to healthy",
    "model_s": "process started to the model in memory",
    "first_result_s": "process started to the result of a Compare pressed at once",
    "compare_s": "that Compare itself",
    "next_compare_s": "a Compare of another prompt",
}


def table(record: ImageBench) -> str:
    """The record as tables in Markdown."""
    env, rss = record.environment, record.rss_mib
    total = record.base_mib + sum(record.parts_mib.values())
    packed = f"; as one gzip archive {record.archive_mib:,} MiB" if record.archive_mib else ""
    what = (
        f"Image `{record.image}` with PyTorch {record.image_torch}: {total:,} MiB on disk{packed}. "
        f"A Compare here is {record.new_tokens} new tokens on each side; PyTorch threads: {record.threads}. "
        f"The server held {rss[0]:,} MiB after the first and {rss[1]:,} MiB after the second, {record.peak_mib:,} MiB "
        f"at most. Run offline, as uid 1000, on {env.device}, load average {record.load_average} before it, "
        f"{env.created[:10]}, commit {env.commit}."
    )
    parts = {"Debian and Python (made with debootstrap)": record.base_mib, **record.parts_mib}
    lines = [textwrap.fill(what, 120), "", "| part of the image | MiB |", "|---|---|"]
    lines += [f"| {name} | {size:,} |" for name, size in parts.items()]
    lines += ["", "| start | seconds |", "|---|---|"]
    return "\n".join([*lines, *(f"| {words} | {getattr(record, name):.1f} |" for name, words in ROWS.items())])


def main() -> None:
    """The command line; it starts itself anew in a network that holds nothing but the loopback device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="build.sh's folder")
    parser.add_argument("--image", default="turboquant:cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch (OMP_NUM_THREADS)")
    parser.add_argument("--archive", action="store_true", help="measure the size of a gzip archive (minutes)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="only print the newest record of this file as tables")
    given = parser.parse_args()
    if given.table is not None:
        print(table(ImageBench.model_validate_json(given.table.read_text().splitlines()[-1])))
        return
    if os.environ.pop(ALONE, None) is None:
        words = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", *COMMAND]
        os.execvpe("unshare", ["unshare", "--net", *words, *sys.argv[1:]], {**os.environ, ALONE: "1"})
    record = measure(given.work, given.image, given.threads, given.archive)
    print(record.model_dump_json(indent=1))
    if given.output is not None:
        append_record(record, given.output)


if __name__ == "__main__":
    main()
