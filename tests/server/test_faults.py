"""Faults made for real: no memory, no disk, a killed server, a cut connection, a clock that jumps."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.engine.backend import run as run_job
from app.engine.engine import Engine
from tests.support.asked import compare_asked
from tests.support.models import tiny_loaded
from tests.support.process import ROOT, Server
from tests.support.system import enlarge, file_system
from tests.support.tab import Tab
from turboquant.records.comparison import Settings
from turboquant.records.faults import UNMEASURED, out_of_disk, out_of_memory

TEXT = "The tide table says when the boats can leave the harbour of Arnsey. " * 6
METHOD = "turboquant:bits=4,residual_length=8,sink_length=0"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 KiB."""
    with file_system(tmp_path / "disk", "12k") as place:
        yield place


def python(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


# --- memory


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", ["prefill", "decode", "metrics"])
def test_memory_that_runs_out(phase: str) -> None:
    """The kernel refuses more address space in that phase; the next run, with memory again, works."""
    done = python("-m", "tests.server.memory_shortage", phase, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["next"], said["next_error"]) == ("done", None)
    if phase == "metrics":
        assert (said["state"], said["notes"], said["measured"]) == ("done", [[UNMEASURED], []], [False, True])
        return
    assert said["state"] == "failed"
    assert said["error"].startswith("Not enough memory for this run")
    assert said["given_back"] > 500 * 2**20, "the model was not let go"
    if phase == "decode":
        assert said["tokens"] > 1


def test_a_measurement_without_memory_keeps_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation that really is refused, in the middle of the measurement."""

    def refused(*_: object) -> None:
        import torch

        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("turboquant.run.compare.token_metrics", refused)
    engine = Engine(lambda name, **_: tiny_loaded("llama", chat_template=None), run_job)
    request = compare_asked(TEXT, Settings(max_new_tokens=3), "tiny", METHOD)
    job = engine.submit("me", request)
    assert job.wait(30)
    assert job.view.state == "done"
    (comparison,) = job.results[0]
    assert comparison.notes == [UNMEASURED]
    assert comparison.tokens is None
    assert len(comparison.original.token_ids) == 3
    monkeypatch.undo()
    again = engine.submit("me", request)
    assert again.wait(30)
    assert again.cached == frozenset(), "what is half measured is not shown again"
    assert again.results[0][0].tokens is not None
    engine.close()


def test_the_words_of_the_libraries_are_known() -> None:
    import torch

    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(refused.value)
    assert out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not out_of_memory(OSError(28, "No space left on device"))
    assert not out_of_memory(RuntimeError("shapes differ"))
    assert out_of_disk(OSError(28, "No space left on device"))


# --- disk


@pytest.mark.nightly
def test_a_full_disk_for_records(small_disk: Path) -> None:
    """What was finished is kept, and the same command goes on when there is room."""
    output = small_disk / "v.jsonl"
    command = ["-m", "turboquant", "validate", "--bits", "2", "3", "4", "--dims", "64", "--vectors", "32"]
    command += ["--seeds", "12", "--output", str(output)]
    full = python(*command)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1] == f"turboquant: {output} cannot be written: No space left on device"
    enlarge(small_disk, "200k")
    more = python(*command)
    assert "1 of 3 records are in" in more.stderr
    assert json.loads(more.stdout.splitlines()[-1])["records"] == 3


@pytest.mark.nightly
def test_a_full_disk_for_a_report_and_a_comparison(small_disk: Path) -> None:
    report = python("-m", "turboquant", "report", "--html", str(small_disk / "r.html"))
    assert report.returncode == 1
    assert "Traceback" not in report.stderr
    assert "cannot be written: No space left on device" in report.stderr
    shown = python(
        "-m", "turboquant", "compare", "Hello", "--max-new-tokens", "2", "--output", str(small_disk / "c.jsonl")
    )
    assert shown.returncode == 1
    assert "cannot be written: No space left on device; the record follows" in shown.stderr
    assert json.loads(shown.stdout.splitlines()[-1])["prompt"] == "Hello"


async def compare(server: Server, text: str = TEXT, **query: Any) -> Tab:
    """A tab with a finished comparison."""
    tab = await Tab(server.address, **{"tokens": 4, **query}).open()
    await tab.until(lambda: tab.first_run_s)
    await tab.press("Compare", tab.text_area("Prompt", text))
    await tab.sees("Measured here", 120)
    return tab


@pytest.mark.nightly
def test_a_full_disk_for_the_cache_folder_and_the_log(tmp_path: Path, small_disk: Path) -> None:
    """The converted model has no room: the visitor is told; the log has none either: the server goes on."""
    environment = {"TURBOQUANT_CACHE": str(small_disk), "TURBOQUANT_WARM_UP": "0", "TURBOQUANT_LOG": "info"}

    async def visit(server: Server) -> None:
        tab = await Tab(server.address, tokens=4).open()
        await tab.until(lambda: tab.first_run_s)
        for _ in range(2):
            await tab.press("Compare", tab.text_area("Prompt", TEXT))
            await tab.sees("GiB of disk")
            await tab.rerun()
        await tab.close()

    log = small_disk / "log.txt"
    with Server(log, environment) as server:
        (small_disk / "fill").write_bytes(b"\0" * 4096)
        with pytest.raises(OSError, match="No space"):
            (small_disk / "rest").write_bytes(b"\0" * 12288)
        asyncio.run(visit(server))
        assert server.healthy()
        server.send(signal.SIGTERM)
        assert server.wait(20) == 128 + signal.SIGTERM
    assert "Traceback" not in log.read_text()


# --- a killed server


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_killed_server_starts_again_and_tabs_come_back(tmp_path: Path) -> None:
    """Killed in the middle of making the model's copy, then in the middle of a run."""
    environment = {"TURBOQUANT_CACHE": str(tmp_path / "cache")}
    server = Server(tmp_path / "log.txt", environment)

    def kill() -> None:
        family = server.family()
        server.send(signal.SIGKILL)
        server.wait(10)
        time.sleep(1)
        left = [process for process in family if process.is_running() and process.status() != "zombie"]
        assert not left, "a process outlived the server"

    async def visit() -> None:
        tab = await Tab(server.address, tokens=300).open()
        await tab.until(lambda: tab.first_run_s)
        await tab.press("Compare", tab.text_area("Prompt", TEXT))
        await tab.sees("Both sides answer", 120)
        old = tab.session
        await asyncio.to_thread(kill)
        await tab.until(lambda: not tab.connected)
        await asyncio.to_thread(server.start)
        runs = tab.runs
        await tab.open()  # the browser asks for the old session, which nobody knows any more
        await tab.until(lambda: tab.session != old and tab.runs > runs)
        assert tab.element("text_area", "Prompt").value == TEXT, "the prompt is in the address"
        assert not tab.exceptions
        await tab.press("Compare", tab.number("Max new tokens", 4))
        await tab.sees("Measured here", 120)
        await tab.close()

    with server:
        end = time.monotonic() + 60
        while len(server.family()) < 2:
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(3)
        kill()
        server.start()
        asyncio.run(visit())
    assert "Traceback" not in server.log.read_text()
    folders = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert folders == ["smollm2-135m"], "a half-made copy was left"


@pytest.mark.nightly
def test_a_cut_connection_loses_nothing(tmp_path: Path) -> None:
    """Cut in mid-stream: the run goes on, and the tab that comes back has its result, once."""

    async def visit(server: Server) -> None:
        tab = await Tab(server.address, tokens=24).open()
        await tab.until(lambda: tab.first_run_s)
        await tab.press("Compare", tab.text_area("Prompt", TEXT))
        await tab.sees("Both sides answer", 120)
        await tab.cut()
        session = tab.session
        await asyncio.sleep(2)
        await tab.open()
        await tab.sees("Measured here", 120)
        assert tab.session == session
        (done,) = server.events("job_done")
        assert done["generated_tokens"] == 48
        await tab.cut()
        await tab.open()
        await tab.sees("Measured here", 20)
        assert len(server.events("job_done")) == 1
        assert not tab.exceptions
        await tab.close()

    with Server(tmp_path / "log.txt", {}) as server:
        asyncio.run(visit(server))
    assert "Traceback" not in server.log.read_text()


# --- the clock


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that shifts the wall clock of the process it is loaded into."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = str(tmp_path_factory.mktemp("clock") / "jump.so")
    source = str(Path(__file__).with_name("jump.c"))
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.nightly
@pytest.mark.parametrize("days", [3, -3])
def test_a_clock_that_jumps(tmp_path: Path, jumping_clock: str, days: int) -> None:
    """The wall clock jumps in the middle of a run: no limit strikes, no duration is wrong."""
    jump = tmp_path / "jump"
    jump.write_text("0")
    environment = {"LD_PRELOAD": jumping_clock, "CLOCK_JUMP": str(jump), "TURBOQUANT_MAX_RUN_S": "120"}

    async def visit(server: Server) -> None:
        tab = await Tab(server.address, tokens=24).open()
        await tab.until(lambda: tab.first_run_s)
        await tab.press("Compare", tab.text_area("Prompt", TEXT))
        await tab.sees("Both sides answer", 120)
        jump.write_text(str(days * 86400))
        await tab.cut()
        await asyncio.sleep(1)
        await tab.open()
        await tab.sees("Measured here", 120)
        assert not tab.exceptions
        await tab.close()

    with Server(tmp_path / "log.txt", environment) as server:
        asyncio.run(visit(server))
        before, after = server.events("job_started")[0], server.events("job_done")[0]
        apart = datetime.fromisoformat(after["time"]) - datetime.fromisoformat(before["time"])
        assert abs(apart - timedelta(days=days)) < timedelta(minutes=5), "the clock did not jump"
        assert 0 < after["work_s"] <= after["total_s"] < 120
        server.send(signal.SIGTERM)
        assert server.wait(20) == 128 + signal.SIGTERM


def test_durations_come_from_a_clock_that_does_not_jump() -> None:
    found = []
    for path in [*(ROOT / "app").rglob("*.py"), *(ROOT / "turboquant").rglob("*.py")]:
        found += [path.name for word in ("time.time(", "utcnow(", "datetime.now()") if word in path.read_text()]
    assert not found
