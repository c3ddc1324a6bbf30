"""Many runs and hostile input against the real engine: memory stays flat, nothing of one visitor reaches another."""

import gc
import json
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import backend
from app.contract import Progress
from app.engine import Engine
from app.jobs import CompareRequest
from app.runs import Run, RunError, import_run, recorded_runs
from tests.helpers import tiny_loaded
from turboquant.results import Settings

SETTINGS = Settings(max_new_tokens=3)
METHOD = "turboquant:bits=4,residual_length=8,sink_length=0"
RUNS = 200
MAX_GROWTH_MIB = 40


def load(name: str, *, weights: str, progress: Progress) -> Any:
    """A small model with random weights for every name."""
    del weights
    progress(0.5, name)
    return tiny_loaded("llama", chat_template=None)


@pytest.fixture
def small() -> Iterator[Engine]:
    engine = Engine(load, backend.run, is_expected=backend.is_expected, grace_s=0.05, max_queue=20, max_cached=8)
    yield engine
    engine.close()


def resident_mib() -> float:
    gc.collect()
    return float(psutil.Process(os.getpid()).memory_info().rss) / 2**20


def test_two_hundred_runs_leave_memory_flat(small: Engine) -> None:
    """Each by another visitor who leaves; two models take turns."""
    after_warm_up = 0.0
    for i in range(RUNS):
        prompt = f"Visitor {i} asks about the tide and the boats. " * 2
        request = CompareRequest(f"model-{i // 50 % 2}", "auto", prompt, (METHOD,), SETTINGS)
        job = small.submit(f"visitor-{i}", request)
        assert job.wait(60)
        assert job.view.state == "done", job.view.error
        assert job.results[0][0].compressed.report.compressed_tokens > 0
        small.disconnect(f"visitor-{i}")
        del job
        if i == RUNS // 4:
            after_warm_up = resident_mib()
    growth = resident_mib() - after_warm_up
    print(f"{RUNS - RUNS // 4} runs grew the process by {growth:.1f} MiB from {after_warm_up:.0f} MiB")
    assert growth < MAX_GROWTH_MIB


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=200))
def test_any_prompt_is_answered_or_refused_in_one_sentence(small: Engine, prompt: str) -> None:
    job = small.submit("me", CompareRequest("model", "auto", prompt, (METHOD,), SETTINGS))
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
