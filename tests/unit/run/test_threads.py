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
from turboquant.run.threads import SPINS, busy_processes

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
