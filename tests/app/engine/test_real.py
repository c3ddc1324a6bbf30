"""The real engine, model and comparison behind the queue: nothing here is a stand-in."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.compare.request import compare_request
from app.config import AppConfig
from app.engine import backend
from app.engine.engine import Engine
from app.tab.requests import defaults
from app.tab.runs import Run, import_run
from tests.support.bench import MAIN

ROOT = Path(__file__).resolve().parents[3]
CONFIG = AppConfig(warm_up=False)


@pytest.fixture(scope="module")
def real() -> Iterator[Engine]:
    engine = backend.build_engine(CONFIG)
    yield engine
    engine.close()


def test_a_real_comparison_goes_through_queue_record_and_export(real: Engine) -> None:
    choices = replace(defaults(CONFIG), tokens=6, residual=0, sinks=0, bits=3)
    prompt = "The tide table says when the boats can leave. " * 6
    job = real.submit("s", compare_request(choices, prompt, CONFIG))
    assert job.wait(120)
    assert job.view.error is None
    run = Run(comparison=job.results[0][0])
    assert run.packed
    assert run.comparison.compressed.report.compressed_layers == 30
    assert run.comparison.heads is not None
    assert run.comparison.tokens is not None
    assert job.view.sides[0].text == run.comparison.original.text
    assert job.view.sides[1].cache_bytes == run.comparison.compressed.cache_bytes[-1]
    assert import_run(run.to_json()).comparison == run.comparison
    assert real.status().model == "smollm2-135m"


COLD = """
import sys
from streamlit.testing.v1 import AppTest
page = AppTest.from_file(sys.argv[1], default_timeout=60).switch_page(f"../pages/{sys.argv[2]}.py").run()
assert not page.exception, page.exception
"""


@pytest.mark.parametrize("name", ["needle", "seeds"])
def test_the_first_visit_of_a_page_that_measures_does_not_meet_the_model_library_half_made(name: str) -> None:
    """The engine warms up on its thread while the page plans on another; both import the model library."""
    done = subprocess.run([sys.executable, "-c", COLD, MAIN, name], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_stop_is_quick_and_keeps_the_text(real: Engine) -> None:
    job = real.submit(
        "s", compare_request(replace(defaults(CONFIG), tokens=400), "Count from one to two hundred.", CONFIG)
    )
    for _ in job.stream():
        if job.view.sides[1].tokens >= 3:
            break
    real.cancel(job)
    assert job.wait(1.5)
    assert job.view.state == "stopped"
    (stopped,) = job.results[0]
    assert stopped.original.finish == "cancelled"
    assert stopped.original.text
    assert stopped.heads is None


def test_a_prompt_longer_than_the_context_names_both_numbers(real: Engine) -> None:
    config = AppConfig(max_prompt_chars=100_000)
    job = real.submit("s", compare_request(defaults(config), "word " * 9000, config))
    assert job.wait(60)
    assert job.view.state == "failed"
    assert "8,192" in str(job.view.error)


def test_a_model_that_is_no_model_gives_one_sentence_and_the_next_run_works(real: Engine, tmp_path: object) -> None:
    config = AppConfig(warm_up=False, models=("smollm2-135m", str(tmp_path)))
    job = real.submit("s", compare_request(replace(defaults(config), model=str(tmp_path)), "hello", config))
    assert job.wait(60)
    assert job.view.state == "failed"
    assert job.view.error
    assert "\n" not in job.view.error
    again = real.submit("s", compare_request(replace(defaults(CONFIG), tokens=2), "hello", CONFIG))
    assert again.wait(60)
    assert again.view.state == "done"
    assert again.results[0][0].notes
    assert again.results[0][0].heads is None
