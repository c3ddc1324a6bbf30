"""Strangers' input, made by hypothesis from what is nearly right, and in `make nightly` by a coverage-guided fuzzer."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import ROOT, TARGETS, seeds, words

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
MANY = settings(FEW, max_examples=20_000, derandomize=False, database=None, print_blob=True)
SECONDS = 60


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """A good input with some of its pieces replaced, repeated, moved or lost."""
    known = seeds(name)
    piece = st.one_of(
        st.sampled_from([word.encode() for word in words(name)]),
        st.integers().map(lambda number: str(number).encode()),
        st.floats().map(lambda number: repr(number).encode()),
        st.text(max_size=8).map(lambda text: text.encode(errors="replace")),
        st.binary(max_size=4),
    )
    change = st.tuples(st.floats(0, 1), st.floats(0, 0.02), piece)

    def changed(seed: bytes, changes: list[tuple[float, float, bytes]]) -> bytes:
        for place, length, new in changes:
            start = int(place * len(seed))
            seed = seed[:start] + new + seed[start + int(length * len(seed)) :]
        return seed

    return st.builds(changed, st.sampled_from(known), st.lists(change, min_size=1, max_size=5))


def fuzz(name: str, profile: settings) -> None:
    """Hand a target as many inputs as the profile says."""

    @profile
    @given(inputs(name))
    def understood_or_refused(data: bytes) -> None:
        TARGETS[name](data)

    understood_or_refused()


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_understood(name: str) -> None:
    for seed in seeds(name):
        TARGETS[name](seed)


@pytest.mark.parametrize("name", TARGETS)
def test_anything_is_understood_or_refused_in_a_sentence(name: str) -> None:
    fuzz(name, FEW)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_much_more_is_understood_or_refused_in_a_sentence(name: str) -> None:
    fuzz(name, MANY)


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no wheel for this machine")
@pytest.mark.parametrize("name", TARGETS)
def test_a_coverage_guided_fuzzer_finds_nothing(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.coverage_guided", name, "--seconds", str(SECONDS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS * 10,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (runs,) = re.findall(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    print(f"{name}: {runs} inputs in {SECONDS} s")
    assert int(runs) > 1000
