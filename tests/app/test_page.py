"""The Compare page in each of its states, without a browser."""

from dataclasses import replace

import pytest
from streamlit.testing.v1 import AppTest

from app import state
from app.engine import Engine
from app.examples import BY_NAME
from app.runs import Run
from tests.app.conftest import Bench, until
from tests.app.factory import comparison


def texts(page: AppTest) -> str:
    """Everything the page says."""
    parts = [*page.markdown, *page.caption, *page.info, *page.warning, *page.error, *page.subheader, *page.text]
    return "\n".join(str(part.value) for part in parts)


def ask(page: AppTest, prompt: str) -> AppTest:
    page.text_area(key="prompt").set_value(prompt)
    page.button(key="compare").click()
    return page.run()


def test_empty_page_says_what_to_do(page: AppTest) -> None:
    page.run()
    assert not page.exception
    assert page.title[0].value == "Same prompt, two caches"
    assert "No run yet" in texts(page)
    assert page.sidebar.selectbox(key="model").value == "smollm2-135m"
    assert not page.button(key="compare").disabled
    assert page.button(key="stop").disabled


def test_example_pill_fills_the_prompt(page: AppTest) -> None:
    page.run()
    page.button_group(key=state.EXAMPLE).set_value("needle").run()
    assert page.text_area(key="prompt").value == BY_NAME["needle"].prompt


def test_a_finished_run_shows_verdict_figures_and_charts(page: AppTest) -> None:
    page.run()
    ask(page, "Where does the water go?")
    assert not page.exception
    assert "Identical for 1 token, then" in page.subheader[0].value
    labels = {metric.label for metric in page.metric}
    assert {"KV cache held", "Heads at risk", "Top-1 match", "Cosine of scores", "Mean KL", "Bits per value"} <= labels
    assert len(page.get("plotly_chart")) == 6
    assert "QuantizedCache" in texts(page).replace("&#46;", ".")
    assert all(metric.help for metric in page.metric)
    assert page.query_params["prompt"] == ["Where does the water go?"]
