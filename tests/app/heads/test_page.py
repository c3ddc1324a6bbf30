"""The Heads page: from a cold link to the sentence that says why a head flips, and every state that has no answer."""

import pytest
from streamlit.testing.v1 import AppTest

from app.tab import state
from app.tab.runs import Run
from tests.support.attention_factory import explained
from tests.support.factory import comparison

PAGE = "../pages/heads.py"


@pytest.fixture
def recorded(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    """The page from a cold start with two recorded runs, the first without detail."""
    plain = Run(id="01-plain", origin="recorded", comparison=comparison(prompt="Without detail"))
    full = Run(id="02-full", origin="recorded", comparison=explained())
    monkeypatch.setattr(state, "recordings", lambda: [plain, full])
    page.switch_page(PAGE)
    return page


def texts(at: AppTest) -> str:
    return " ".join(str(part.value) for kind in ("markdown", "caption", "info") for part in getattr(at, kind))


def test_without_a_run_the_page_says_so(page: AppTest) -> None:
    page.switch_page(PAGE).run()
    assert not page.exception
    assert "No run yet. Compare a prompt first, or open the recorded example." in texts(page)


def test_a_deep_link_opens_run_head_and_position(recorded: AppTest) -> None:
    recorded.query_params["heads_run"] = "02-full"
    recorded.query_params["heads_head"] = "Layer 2, head 2"
    recorded.query_params["heads_position"] = "7"
    recorded.run()
    assert not recorded.exception
    assert recorded.selectbox(key="heads_run").value == "02-full"
    assert recorded.selectbox(key="heads_head").value == "Layer 2, head 2"
    assert "leads “ runs”" in texts(recorded)
    assert len(recorded.get("plotly_chart")) == 4


def test_the_worst_head_is_shown_first_and_a_run_without_detail_says_why(recorded: AppTest) -> None:
    recorded.run()
    assert recorded.selectbox(key="heads_run").value == "01-plain"
    assert recorded.selectbox(key="heads_head").value == "Layer 2, head 3"
    assert "keeps no scores of its heads" in texts(recorded)
    assert len(recorded.get("plotly_chart")) == 1
    recorded.selectbox(key="heads_run").set_value("02-full").run()
    assert not recorded.exception
    assert recorded.query_params["heads_run"] == "02-full"
    assert "the head flips here" in texts(recorded)


def test_part_metric_and_head_change_what_is_shown(recorded: AppTest) -> None:
    recorded.query_params["heads_run"] = "02-full"
    recorded.run()
    recorded.selectbox(key="heads_metric").set_value("Cosine of weights").run()
    assert "Cosine of weights, layer by query head" in texts(recorded)
    recorded.segmented_control(key="heads_part").set_value("As served").run()
    assert "1 sinks and 2 recent ones" in texts(recorded)
    recorded.selectbox(key="heads_head").set_value("Layer 0, head 0").run()
    assert not recorded.exception
    assert "Choose one of them to see its attention" in texts(recorded)
    assert "layer 2, head 3" in texts(recorded)


def test_a_link_to_a_run_of_another_tab_is_said_to_be_gone(recorded: AppTest) -> None:
    recorded.query_params["heads_run"] = "deadbeef"
    recorded.run()
    assert not recorded.exception
    assert "not kept here" in texts(recorded)
    assert recorded.selectbox(key="heads_run").value == "01-plain"


def test_a_run_that_packed_nothing_shows_its_note(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Run(id="nothing", origin="recorded", comparison=comparison(packed=0))
    monkeypatch.setattr(state, "recordings", lambda: [nothing])
    page.switch_page(PAGE).run()
    assert not page.exception
    assert "No token was packed" in texts(page)
