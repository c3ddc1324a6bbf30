"""The harness over compressed caches, in an environment that has the extra `lm-eval`.

The harness is not installed beside the other test packages: it brings forty more (216 MB), and one of them asks for an
older python-dateutil than the app has.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_lm_evaluation_harness(tmp_path: Path) -> None:
    (wanted,) = re.findall(r'^lm-eval = \[.*"(lm-eval[^"]+)"\]$', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    clean = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    subprocess.run([ROOT / "tests/compat/overlay.sh", tmp_path / "with", wanted], cwd=ROOT, env=clean, check=True)
    # The harness's own warnings (chardet's version, for one) are not errors of ours.
    checks = ["-m", "pytest", "-q", "-W", "default", "tests/packaging/lm_eval_checks.py"]
    done = subprocess.run(
        [tmp_path / "with/bin/python", *checks], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout
