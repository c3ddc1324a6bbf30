"""The Methods page's search: what may be asked, a real search on a tiny model, letting others go first, the result."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from app.compare.request import compare_request
from app.config import AppConfig
from app.engine import backend
from app.engine.engine import Engine
from app.engine.job import Job
from app.methods.request import MethodsChoices
from app.recommend import charts
from app.recommend import request as measure
from app.recommend.request import RecommendChoices, RecommendRequest
from app.tab import state
from app.tab.requests import Choices, RequestError, read_choices
from tests.support.bench import MAIN, ended, newest, opened, said, until
from tests.support.models import tiny_loaded
from turboquant.experiments.recommendation import Recommendation
from turboquant.records.experiment import ExperimentRecord

TEXT = "\n".join(
    f"On day {i} the keeper wrote {i * 37 % 101} ships and a tide of {i * i % 89} feet." for i in range(24)
)
LINK = {"recommend_own": "true", "recommend_kl": "0.01", "recommend_same": "50", "methods_context": "512"}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_loaded("llama", num_hidden_layers=2, max_position_embeddings=2048)


@pytest.fixture
def real(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine that really measures, with a tiny model."""
    engine = Engine(lambda name, *, weights, progress: loaded, backend.run, is_expected=backend.is_expected)
    st.cache_resource.clear()
    monkeypatch.setattr(state, "engine", lambda: engine)
    monkeypatch.setattr(state, "recordings", lambda: [])
    yield engine
    engine.close()
    st.cache_resource.clear()


def request(
    chosen: RecommendChoices = RecommendChoices(),  # noqa: B008
    known: dict[str, ExperimentRecord] | None = None,
    config: AppConfig = AppConfig(),  # noqa: B008
    **page: Any,
) -> RecommendRequest:
    return measure.request(chosen, MethodsChoices(**page), Choices(), config, {} if known is None else known)


def search(page: AppTest, text: str = TEXT) -> AppTest:
    page.text_area(key="recommend_text").set_value(text).run()
    page.button(key="recommend_run").click().run()
    until(lambda: not newest(page).live, 90)
    page.run()
    assert not page.exception
    return page


# --- the page


def test_a_search_ends_with_a_method_its_evidence_and_what_it_holds(real: Engine) -> None:
    page = opened(AppTest.from_file(MAIN, default_timeout=90), "methods", **LINK)
    assert "Paste a text of yours" in said(page)
    assert page.button(key="recommend_run").disabled
    search(page)
    found, cached = page.session_state["recommendations"][0]
    assert not cached
    assert isinstance(found, Recommendation)
    assert found.method is not None
    assert found.method in [code.value for code in page.code]
    assert "stays within the limits (KL at most 0.01 nats, the same top token at 50 % or more)" in said(page)
    assert f"{found.measured} of 72 methods were measured" in said(page)
    *_, memory, evidence = (frame.value for frame in page.dataframe)
    assert len(evidence) == len(found.tried)
    assert set(memory["where from"]) == {"measured", "estimated"}
    assert TEXT[:40] not in "".join(code.value for code in page.code), "the text is no part of the link"

    page.button(key="recommend_run").click().run()
    ended(page)
    assert page.session_state["recommendations"][0][1], "the same search again is not measured again"

    page.button(key="recommend_use").click().run()
    assert not page.exception
    names = ("recipe", "bits", "key_bits", "value_bits", "residual", "sinks", "second")
    chosen = {name: page.session_state[name] for name in names if name in page.session_state}
    assert found.method in compare_request(read_choices(chosen, AppConfig()), TEXT, AppConfig()).methods


def test_where_nothing_passes_the_page_says_so(real: Engine) -> None:
    page = opened(AppTest.from_file(MAIN, default_timeout=90), "methods", **{**LINK, "recommend_same": "100"})
    search(page, TEXT)
    found, _ = page.session_state["recommendations"][0]
    if found.method is None:
        assert "None of 72 methods stays within the limits" in said(page)
        assert "recommend_use" not in [button.key for button in page.button]
    else:
        assert found.evidence("confirm").same_top_pct == 100


def test_a_text_that_is_too_short_is_one_sentence(real: Engine) -> None:
    page = opened(AppTest.from_file(MAIN, default_timeout=90), "methods", **LINK)
    search(page, "Too short. " * 10)
    assert "the text typed in has 110 tokens, too few to choose on one half and confirm on the other" in said(page)
    assert newest(page).view.state == "failed"


# --- the engine


def test_a_search_lets_short_work_go_first_and_goes_on(loaded: Any) -> None:
    known: dict[str, ExperimentRecord] = {}
    asked = request(RecommendChoices(own=True, text=TEXT, same=50), known)
    turns, yielded = 0, threading.Event()

    def run(model: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        nonlocal turns
        turns += 1
        before = len(known)
        wanted = (lambda: len(known) >= before + 3) if turns < 3 else yielding
        backend.run(model, job, cancelled, wanted)
        if job.pending:
            assert len(known) == before + 3
            yielded.set()

    job = Job("me", asked)
    for _ in range(3):
        run(loaded, job, lambda: False, lambda: False)
    assert yielded.is_set()
    assert not job.pending
    whole = Job("you", request(RecommendChoices(own=True, text=TEXT, same=50)))
    backend.run(loaded, whole, lambda: False, lambda: False)
    assert whole.results[0].tried == job.results[0].tried
    assert whole.results[0].method == job.results[0].method


def test_a_stopped_search_keeps_what_it_measured(loaded: Any) -> None:
    known: dict[str, ExperimentRecord] = {}
    job = Job("me", request(RecommendChoices(own=True, text=TEXT, same=50), known))
    backend.run(loaded, job, lambda: len(known) == 2, lambda: False)
    assert not job.results
    assert len(known) == 2


def test_only_searches_in_shipped_texts_are_shared() -> None:
    shipped, own = request(), request(RecommendChoices(own=True, text=TEXT))
    assert shipped.private == frozenset()
    assert own.private == {0}
    assert shipped.key(0) == request().key(0) != request(RecommendChoices(kl="0.1")).key(0)
    assert own.key(0) != request(RecommendChoices(own=True, text=TEXT + ".")).key(0)


# --- the server's own checks


@pytest.mark.parametrize(
    ("chosen", "page", "config", "message"),
    [
        ({"kl": "nan"}, {}, {}, "The limit of KL must be among 0.001"),
        ({"same": 101}, {}, {}, "These limits cannot be used"),
        ({"own": True}, {}, {}, "Paste a text of yours"),
        (
            {"own": True, "text": "x" * 30},
            {},
            {"max_prompt_chars": 20},
            "The text has 30 characters; the limit here is 20",
        ),
        ({}, {"texts": ("/etc/passwd",)}, {}, "Texts must be among persuasion"),
        ({}, {"texts": ()}, {}, "Choose at least one of texts"),
        ({}, {"context": "4096"}, {"max_context_tokens": 1024}, "Context must be among 512, 1024"),
        ({}, {}, {"max_cells": 10}, "A search may take 100 measurements, and this deployment allows 10"),
    ],
)
def test_what_a_browser_may_not_send_is_refused(
    chosen: dict[str, Any], page: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as error:
        request(RecommendChoices(**chosen), config=AppConfig(**config), **page)
    assert message in str(error.value)


def test_widgets_of_the_wrong_type_are_left_at_their_start() -> None:
    assert measure.said({"recommend_kl": 3, "recommend_same": "x", "recommend_own": None}) == RecommendChoices()
    assert measure.said({"recommend_kl": "0.1", "recommend_same": 75}) == RecommendChoices(kl="0.1", same=75)


def test_the_evidence_table_says_what_was_measured(loaded: Any) -> None:
    job = Job("me", request(RecommendChoices(own=True, text=TEXT, kl="0.001", same=50)))
    backend.run(loaded, job, lambda: False, lambda: False)
    found = job.results[0]
    table = charts.evidence(found)
    assert list(table["estimated size"]) == sorted(table["estimated size"])
    assert {*table["within limits"]} == {"yes", "no"}
    for _, row in table.iterrows():
        one = found.evidence("confirm" if row["measured on"] == "held-out half" else "choose", row["method"])
        assert (row["KL"], row["bits held"]) == (one.kl, one.bits_per_value)
        assert (row["within limits"] == "no") == (one.kl > 0.001 or one.same_top_pct < 50)
