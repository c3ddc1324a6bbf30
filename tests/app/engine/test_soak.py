"""Many runs and hostile input against the real engine: memory stays flat, nothing of one visitor reaches another."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.engine.engine import Engine
from app.tab.runs import Run, RunError, import_run, recorded_runs
from tests.support.asked import compare_asked
from tests.support.process import ROOT
from tests.support.soak import METHOD, SETTINGS, SoakBench, measure, sentence, small_engine

MAX_GROWTH_MIB = 200
RECORDS = ROOT / "results" / "soak.jsonl"


@pytest.fixture
def small() -> Iterator[Engine]:
    engine = small_engine()
    yield engine
    engine.close()


@pytest.mark.nightly
def test_two_hundred_runs_leave_memory_flat(small: Engine) -> None:
    record = measure(small, 200)
    assert record.growth_mib_per_1000_runs < MAX_GROWTH_MIB, record.rss_mib


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_thousands_of_runs_leave_memory_flat(small: Engine) -> None:
    record = measure(small, 2000)
    print(sentence(record))
    assert record.growth_mib_per_1000_runs < MAX_GROWTH_MIB / 10


def test_the_words_are_those_of_the_newest_record() -> None:
    record = SoakBench.model_validate_json(RECORDS.read_text().splitlines()[-1])
    page = " ".join((ROOT / "docs" / "endurance.md").read_text().split())
    assert sentence(record) in page


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=200))
def test_any_prompt_is_answered_or_refused_in_one_sentence(small: Engine, prompt: str) -> None:
    job = small.submit("me", compare_asked(prompt, SETTINGS, "model", METHOD))
    assert job.wait(60)
    assert job.view.state in ("done", "failed")
    if job.view.state == "failed":
        assert job.view.error
        assert "\n" not in job.view.error
        assert "Error)" not in job.view.error, "an unexpected failure"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def exported() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(recorded_runs()[-1].to_json())
    return document


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_run_file_with_anything_in_it_is_read_or_refused(exported: dict[str, Any], data: st.DataObject) -> None:
    """One value somewhere in a real run is replaced by something else."""
    document = json.loads(json.dumps(exported))
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(min(len(place), 50)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    try:
        run = import_run(json.dumps(document))
    except RunError as error:
        said = str(error)
    else:
        assert isinstance(run, Run)
        said = run.label
        assert run.origin == "imported"
        for make in (run.to_json, run.to_markdown, run.to_csv, run.heads_csv):
            assert make()
    assert said
    assert "\n" not in said


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 50_000, "NaN", '{"comparison": 1e999}', "\x00", b"\xff\xfe\x00", b"\x80\x04\x95pickle"],
)
def test_hostile_files_are_refused_in_words(text: str | bytes) -> None:
    with pytest.raises(RunError):
        import_run(text)
