"""A model folder that changes under a running server: nothing of what it was is given as what it is."""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from app.compare.request import CompareRequest
from app.config import AppConfig
from app.engine import backend
from app.engine.engine import Engine
from app.engine.job import Job, Request
from app.methods.request import MethodsChoices
from app.recommend.request import RecommendChoices
from app.recommend.request import request as recommend_request
from app.session.conversation import begin, turn_request
from app.tab import state
from app.tab.examples import EXAMPLES
from app.tab.requests import Choices
from tests.support.asked import compare_asked, prompts_asked
from tests.support.bench import MAIN, ended, newest, opened, said, until
from tests.support.models import save_tiny
from turboquant.records.comparison import Settings

SETTINGS = Settings(max_new_tokens=6, temperature=0.0, top_p=1.0, top_k=0, seed=0)
METHOD = "turboquant:bits=2,residual_length=8"
PROMPT = EXAMPLES[0].prompt[:200]
TEXT = "".join(
    f"On day {i} the keeper wrote {i * 37 % 101} ships and a tide of {i * i % 89} feet.\n" for i in range(24)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("models")
    return {seed: save_tiny(root / str(seed), num_hidden_layers=2, seed=seed) for seed in (4, 5)}


@pytest.fixture
def folder(saved: dict[int, Path], tmp_path: Path) -> Path:
    return shutil.copytree(saved[4], tmp_path / "tiny")


@pytest.fixture
def config(folder: Path) -> AppConfig:
    return AppConfig(models=(str(folder),), default_model=str(folder), warm_up=False)


@pytest.fixture
def engine(config: AppConfig) -> Iterator[Engine]:
    engine = backend.build_engine(config)
    yield engine
    engine.close()


def change(folder: Path, saved: dict[int, Path], seed: int = 5) -> None:
    """Write other weights over a model, as `cp` does."""
    shutil.copyfile(saved[seed] / "model.safetensors", folder / "model.safetensors")


def done(engine: Engine, request: Request, session: str = "me") -> Job:
    job = engine.submit(session, request)
    assert job.wait(60)
    return job


def logits(job: Job) -> Any:
    (comparison,) = job.results[0]
    return comparison.tokens.probability_full


def test_a_comparison_is_that_of_the_model_as_it_is(engine: Engine, folder: Path, saved: dict[int, Path]) -> None:
    request = compare_asked(PROMPT, SETTINGS, str(folder), METHOD)
    first = done(engine, request)
    assert first.view.error is None
    assert not first.cached
    again = done(engine, request)
    assert again.cached == {0}
    change(folder, saved)
    changed = done(engine, request)
    assert not changed.cached
    assert logits(changed) != logits(first)
    assert done(engine, request).cached == {0}
    change(folder, saved, seed=4)
    back = done(engine, request)
    assert not back.cached
    assert logits(back) == logits(first)


def test_a_folder_that_has_gone_is_said_and_nothing_old_is_given(engine: Engine, folder: Path) -> None:
    request = compare_asked(PROMPT, SETTINGS, str(folder), METHOD)
    done(engine, request)
    shutil.rmtree(folder)
    gone = done(engine, request)
    assert not gone.cached
    assert gone.view.error == f"There is no folder {folder} on this machine."


def test_a_run_in_two_turns_is_of_one_model(
    config: AppConfig, folder: Path, saved: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short work goes first between two prompts; before the run goes on, the folder has changed."""
    first_item = threading.Event()

    def run(loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        if isinstance(job.request, CompareRequest):
            change(folder, saved)
            return backend.run(loaded, job, cancelled, yielding)
        backend.run(loaded, job, cancelled, lambda: first_item.wait(60) and yielding())

    engine = Engine(backend.load, run, is_expected=backend.is_expected)
    try:
        prompts = tuple(example.prompt[:200] for example in EXAMPLES[:2])
        long = engine.submit("me", prompts_asked(prompts, SETTINGS, str(folder), METHOD))
        until(lambda: long.view.state == "running", 60)
        short = engine.submit("you", compare_asked(PROMPT, SETTINGS, str(folder), METHOD))
        first_item.set()
        assert short.wait(60)
        assert long.wait(60)
    finally:
        engine.close()
    assert long.view.state == "failed"
    assert str(long.view.error).startswith("The files of the model have changed since this run began")
    assert list(long.results) == [0]


def test_a_conversation_does_not_go_on_with_other_weights(
    engine: Engine, config: AppConfig, folder: Path, saved: dict[int, Path]
) -> None:
    choices = replace(Choices(), model=str(folder), tokens=4, residual=0, sinks=0)
    talk = begin(choices, config)
    assert done(engine, turn_request(talk, PROMPT, choices, config)).view.error is None
    change(folder, saved)
    second = done(engine, turn_request(talk, "Go on.", choices, config))
    assert second.view.error == (
        "The files of tiny (fp32, cpu) have changed since the conversation began. Start a new conversation."
    )
    assert len(talk.turns) == 1


def test_a_search_uses_only_what_it_measured_on_the_model_as_it_is(
    engine: Engine, config: AppConfig, folder: Path, saved: dict[int, Path]
) -> None:
    known: dict[str, Any] = {}
    chosen = RecommendChoices(own=True, text=TEXT, same=1, kl="0.1")
    request = recommend_request(chosen, MethodsChoices(), replace(Choices(), model=str(folder)), config, known)
    few = request.settings.model_copy(update={"recipes": ("turboquant",), "layers": False})
    request = replace(request, settings=few)
    first = done(engine, request)
    assert first.view.error is None
    before = {record.inputs["model"] for record in known.values()}
    change(folder, saved)
    second = done(engine, request)
    assert second.view.error is None
    assert not second.cached
    assert second.results[0].reused == 0
    tried = {one.method: one.kl for one in first.results[0].tried}
    assert all(tried.get(one.method) != one.kl for one in second.results[0].tried)
    assert {record.inputs["model"] for record in known.values()} - before


def test_a_page_measures_again_and_says_why(
    engine: Engine, config: AppConfig, folder: Path, saved: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    st.cache_resource.clear()
    monkeypatch.setattr(state, "engine", lambda: engine)
    monkeypatch.setattr(state, "config", lambda: config)
    monkeypatch.setattr(state, "recordings", lambda: [])
    link = {"methods_chosen": ["turboquant:bits=2"], "methods_measured": "64", "methods_view": "This tab"}
    page = opened(AppTest.from_file(MAIN, default_timeout=60), "methods", **link)
    page.button(key="methods_run").click().run()
    until(lambda: not newest(page).live, 60)
    ended(page)
    assert page.button(key="methods_run").disabled
    before = page.dataframe[0].value.set_index("method")["KL"]["turboquant:bits=2"]

    change(folder, saved)
    page.run()
    assert f"{folder} has changed since 2 cells were measured" in said(page)
    assert not page.button(key="methods_run").disabled
    assert "Nothing is measured in this tab with these settings yet" in said(page)
    page.button(key="methods_run").click().run()
    until(lambda: not newest(page).live, 60)
    ended(page)
    assert not newest(page).cached
    assert page.button(key="methods_run").disabled
    assert page.dataframe[0].value.set_index("method")["KL"]["turboquant:bits=2"] != before
    st.cache_resource.clear()
