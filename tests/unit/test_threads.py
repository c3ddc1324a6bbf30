"""Whoever starts PyTorch here tells its OpenMP not to spin; what the user has set stays.

What that is worth on a busy machine is measured by `turboquant bench decode --busy`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.process import Server
from turboquant.threads import SPINS

STARTS = {
    "command": [sys.executable, "-m", "turboquant", "methods", "--list"],
    "app": [sys.executable, "-c", "import app, torch"],
    "lm-eval": [sys.executable, "-c", "import turboquant.integrations as i; i.lm_eval()"],
}


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
