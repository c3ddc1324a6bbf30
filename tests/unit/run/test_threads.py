"""Whoever starts PyTorch here tells its OpenMP not to spin; what the user has set stays.

What that is worth on a busy machine is measured by `turboquant bench decode --busy`.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.process import Server
from turboquant.run import threads
from turboquant.run.threads import SPINS, busy_processes, quota

STARTS = {
    "command": [sys.executable, "-m", "turboquant", "methods", "--list"],
    "app": [sys.executable, "-c", "import app, torch"],
    "lm-eval": [sys.executable, "-c", "import turboquant.integrations as i; i.lm_eval()"],
}

LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


def environment(**settings: str) -> dict[str, str]:
    """With OpenMP told to print, when it starts, what it has read; without what this process has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    return {**kept, "OMP_DISPLAY_ENV": "verbose", **settings}


def spins(printed: str) -> int:
    """How long OpenMP will spin, by what it has printed."""
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", printed)
    if found is None:
        pytest.skip("PyTorch has another OpenMP than GCC's")
    return int(found.group(1))


@pytest.mark.parametrize("start", STARTS)
def test_threads_soon_sleep(start: str) -> None:
    done = subprocess.run(STARTS[start], env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert spins(done.stderr) == SPINS


@pytest.mark.parametrize("settings", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "77"}])
def test_what_the_user_has_set_stays(settings: dict[str, str]) -> None:
    done = subprocess.run(
        STARTS["app"], env=environment(**settings), capture_output=True, text=True, timeout=120, check=True
    )
    assert spins(done.stderr) != SPINS


def group(root: Path, own: str, files: dict[str, str]) -> Path:
    """A machine whose process is in the control group `own`, with these files below /sys/fs/cgroup."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": own}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/pod/box\n", {"pod/cpu.max": "200000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 2.0),
        ("0::/pod/box\n", {"pod/cpu.max": "400000 100000\n", "pod/box/cpu.max": "300000 100000\n"}, 3.0),
        ("2:memory:/\n1:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("1:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/elsewhere\n", {}, None),
    ],
)
def test_quotas_of_containers(tmp_path: Path, own: str, files: dict[str, str], expected: float | None) -> None:
    assert quota(group(tmp_path, own, files)) == expected


def test_a_machine_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert quota(tmp_path) is None


@pytest.mark.parametrize(
    ("granted", "own", "expected"),
    [(1.5, None, "1"), (0.5, None, "1"), (3.9, None, "3"), (9.0, None, None), (None, None, None), (2.0, "6", "6")],
)
def test_threads_stay_within_the_quota(
    monkeypatch: pytest.MonkeyPatch, granted: float | None, own: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(threads, "quota", lambda: granted)
    monkeypatch.setattr(threads, "affinity", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    threads.stay_within_quota()
    assert os.environ.get("OMP_NUM_THREADS") == expected


@LINUX
def test_pytorch_has_a_thread_for_each_processor_allowed() -> None:
    code = "import app, torch; print(torch.get_num_threads())"
    one = sorted(os.sched_getaffinity(0))[:1]
    command = ["taskset", "-c", ",".join(map(str, one)), sys.executable, "-c", code]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "1"


def test_importing_the_library_alone_changes_nothing() -> None:
    """The waits of somebody else's program are theirs to set."""
    code = "import turboquant, os; turboquant.parse_method('full'); print('GOMP_SPINCOUNT' in os.environ)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_served_app_does_not_spin(tmp_path: Path) -> None:
    """Streamlit has imported nothing that starts OpenMP before the app does."""
    with Server(tmp_path / "log.txt", {"OMP_DISPLAY_ENV": "verbose"}) as server:
        assert spins(server.log.read_text()) == SPINS


def children() -> set[str]:
    """The processes that this one has started and not seen end."""
    return {one for task in Path("/proc/self/task").iterdir() for one in (task / "children").read_text().split()}


@LINUX
def test_busy_processes_end_with_the_block() -> None:
    before = children()
    with busy_processes(2):
        assert len(children() - before) == 2
    assert children() <= before


@LINUX
def test_busy_processes_end_when_their_parent_is_killed() -> None:
    code = "import os\nfrom turboquant.run.threads import busy_processes\nwith busy_processes(1):\n"
    code += "    print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\n    os.kill(os.getpid(), 9)"
    started = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    path = Path(f"/proc/{started.stdout.strip()}/stat")
    deadline = time.monotonic() + 30
    while path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it still spins"
        time.sleep(0.05)
