"""The kernels compile for an H100, without one, and their inner loops stay within the instructions they are given."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
BUDGET = {"turboquant:bits=4": 3.3, "turboquant:bits=3": 3.1, "turboquant:bits=2": 2.65}
"""Instructions an element of the decode loop; docs/kernels.md says what the memory of an H100 leaves room for."""


def compiled(*arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.sass", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check(printed: str, spec: str) -> None:
    assert not re.findall(r"^.*spilled +[1-9].*$", printed, flags=re.MULTILINE)
    loops = dict(re.findall(r"(split|score_keys) .*?: ([\d.]+) an element", printed))
    assert set(loops) == {"split", "score_keys"}
    assert all(float(count) < BUDGET[spec] for count in loops.values())


def test_kernels_compile_for_an_h100_within_their_budget() -> None:
    check(compiled("turboquant:bits=4"), "turboquant:bits=4")


@pytest.mark.nightly
@pytest.mark.parametrize("spec", ["turboquant:bits=3", "turboquant:bits=2"])
def test_other_widths_compile_within_their_budget(spec: str) -> None:
    check(compiled(spec), spec)


@pytest.mark.nightly
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_shape_compiles(dim: int) -> None:
    for groups in (1, 8, 16):
        printed = compiled(
            "turboquant:key_bits=4,value_bits=2",
            "turboquant:key_bits=1,value_bits=3",
            "turboquant-paper:bits=3",
            f"--head-dim={dim}",
            f"--groups={groups}",
        )
        assert printed.count("split") == 3
