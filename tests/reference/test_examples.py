"""Every script in examples/ runs as a reader would run it, and prints what it says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    return subprocess.run(command, cwd=folder, env=paths, capture_output=True, text=True, timeout=200)


def printed(name: str, folder: Path, *arguments: str) -> str:
    done = run(name, folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(pattern: str, text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(pattern, text, flags=re.MULTILINE)]


def test_two_answers_side_by_side(tmp_path: Path) -> None:
    out = printed("compare.py", tmp_path)
    first, second = re.findall(r"^    (['\"].*['\"])$", out, flags=re.MULTILINE)
    assert ("Identical for all" in out) == (first == second)
    (packed,) = figures(r"^(\d+) of \d+ tokens are packed", out)
    assert packed > 128
    (kl,) = figures(r"^KL ([\d.]+) nats", out)
    assert 0 < kl < 1


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    out = printed("own_model.py", tmp_path)
    assert figures(r"(\d+) of \d+ tokens packed", out) == [0, 128, 128]
    full, four, one = figures(r"^    ([\d,]+) bytes", out)
    assert full > four > one
    same = figures(r"bytes, (\d+) of 16 tokens", out)
    assert same[0] == 16
    assert same[1] > same[2]


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    out = printed("own_method.py", tmp_path)
    own, one, two = figures(r": KL ([\d.]+), ", out)
    assert own > one > two > 0
    assert figures(r"([\d.]+) bits$", out)[0] == 1.25  # 1 + 16 / 64


@pytest.mark.nightly
def test_from_a_limit_to_a_setting_in_use(tmp_path: Path) -> None:
    out = printed("recommend.py", tmp_path)
    (found,) = re.findall(r"^(\S+) stays within the limits", out, flags=re.MULTILINE)
    (confirmed,) = re.findall(rf"^confirm: {re.escape(found)}: KL ([\d.]+), .*: within the limits$", out, re.MULTILINE)
    assert 0 < float(confirmed) <= 0.01
    lines = [line for line in out.splitlines() if line.endswith("tokens packed")]
    assert [line.split(": ")[0] for line in lines] == ["full", found]
    full, packed = figures(r"([\d,]+) bytes held, \d", out)
    none, some = figures(r"(\d+) tokens packed$", out)
    assert none == 0
    assert some > 100
    assert packed < full


def test_the_harness_is_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    """Where it is there, tests/packaging/lm_eval_checks.py runs the example."""
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed")
    done = run("lm_evaluation.py", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "This example needs the extra lm-eval: pip install '.[lm-eval]'\n"


def test_every_example_is_run_and_says_how() -> None:
    tested = Path(__file__).read_text()
    for path in EXAMPLES:
        assert f'"{path.name}"' in tested
        assert f"    .venv/bin/python examples/{path.name}" in path.read_text()
        assert path.stem != "lm_eval", "it would be imported in place of the harness"
