"""The Compare page with two compressed settings, its views, cached results, and links to runs."""

import html
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app.compare import view as result
from app.compare.memory_charts import bytes_by_part
from app.engine.engine import Engine
from app.tab import state
from app.tab.runs import Run
from app.tab.verdict import facts
from app.ui import diff
from tests.app.compare.test_page import ask, request, texts
from tests.support.asked import prompts_asked
from tests.support.bench import MAIN, Bench, until
from tests.support.factory import comparison
from turboquant.cli.compare import _side_line


@pytest.fixture
def two(page: AppTest, bench: Bench) -> AppTest:
    """The page after a comparison of two compressed settings."""
    other = (" the", " stream", " runs", " low")
    bench.result = lambda prompt, method: comparison(
        other=(" the", " brook") if "bits=2" in method else other, prompt=prompt, method=method
    )
    page.query_params["second"] = "turboquant:bits=2"
    page.run()
    return ask(page, "Where does the water go?")


def test_two_settings_stand_side_by_side_with_their_own_figures(two: AppTest) -> None:
    assert not two.exception
    verdicts = [html.unescape(heading.value).replace("\u200b", "") for heading in two.subheader]
    assert verdicts == [
        "A: Identical for 1 token, then 'river' → 'stream'.",
        "B: Identical for 1 token, then 'river' → 'brook'.",
    ]
    assert [text.value for text in two.text][1:] == ["the river runs low", "the stream runs low", "the brook"]
    said = texts(two)
    assert "**:violet[A]** · `turboquant:bits=4`" in said
    assert "**:green[B]** · `turboquant:bits=2`" in said
    assert sum(metric.label == "Mean KL" for metric in two.metric) == 2
    assert len(two.get("plotly_chart")) == 6
    assert len(two.get("download_button")) == 8
    two.segmented_control(key="compare_setting").set_value("B").run()
    assert not two.exception
    assert len(two.get("plotly_chart")) == 6


def test_the_same_setting_twice_is_refused(page: AppTest, bench: Bench) -> None:
    page.query_params["second"] = "turboquant:bits=4"
    page.run()
    ask(page, "hello")
    assert "Both compressed settings are the same" in texts(page)
    assert not bench.served


def test_the_diff_marks_words_by_signs_and_lets_no_markup_through(two: AppTest, bench: Bench) -> None:
    two.segmented_control(key="view").set_value("diff").run()
    said = texts(two)
    assert ":orange-background[[-river-]]" in said
    assert ":blue-background[{+stream+}]" in said
    assert ":blue-background[{+brook+}]" in said
    assert "only in A" in said
    nasty = "<b>x</b> :red[y] [a](http://b) **z**"
    bench.result = lambda prompt, method: comparison((nasty,), (f"{nasty} $q$",), prompt=prompt, method=method)
    ask(two, "again")
    for element in two.markdown:
        assert "<b>" not in str(element.value)
        assert ":red[" not in str(element.value)
        assert "](http" not in str(element.value)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_a_diff_holds_both_texts(first: str, second: str) -> None:
    steps = diff.changes(first, second)
    assert "".join(text for kind, text in steps if kind != "added") == first
    assert "".join(text for kind, text in steps if kind != "removed") == second
    assert not {"<", "`", "*"} & set(diff.marked(steps))


def test_the_focus_view_shows_one_answer_at_a_time(two: AppTest) -> None:
    two.query_params["view"] = "focus"
    two.segmented_control(key="view").set_value("focus").run()
    assert [text.value for text in two.text][1:] == ["the river runs low"]
    two.segmented_control(key="compare_pane").set_value("B").run()
    assert [text.value for text in two.text][1:] == ["the brook"]


def test_a_result_that_was_there_before_says_so(page: AppTest, bench: Bench) -> None:
    page.run()
    ask(page, "hello")
    assert "Cached" not in texts(page)
    ask(page, "hello")
    said = texts(page)
    assert bench.served == ["hello"]
    assert "Cached" in said
    assert "nothing was computed this time" in said


def test_a_cache_that_is_larger_is_said_to_be(page: AppTest, bench: Bench) -> None:
    made = comparison(packed=8)
    held = made.compressed.report.model_copy(update={"bytes": 3 * 2**20, "full_precision_bytes": 2**20})
    larger = made.model_copy(update={"compressed": made.compressed.model_copy(update={"report": held})})
    bench.result = lambda prompt, method: larger
    words = "larger by 2.00 MiB than a 16-bit cache: only 8 of 28 tokens are packed"
    page.run()
    ask(page, "hello")
    cards = {metric.label: metric.value for metric in page.metric}
    assert cards["Larger than 16 bit"] == "2.00 MiB"
    assert "Times smaller" not in cards
    assert f"The compressed cache is {words}." in texts(page)
    assert ("Beside the baseline", words) in facts(larger)
    assert words in bytes_by_part(larger).alt
    assert words in Run(comparison=larger).to_markdown()


def test_a_cache_that_is_smaller_is_said_to_be(two: AppTest) -> None:
    assert [metric.value for metric in two.metric if metric.label == "Times smaller"] == ["4.00", "4.00"]
    assert "4.00 times smaller than a 16-bit cache, everything counted" in bytes_by_part(comparison()).alt


def test_what_captured_steps_take_stands_beside_the_cache() -> None:
    """In the words and the table, on the page and on the command line; without a GPU there is nothing to say."""
    found = comparison()
    report = found.compressed.report.model_copy(update={"graph_bytes": 3 * 2**20})
    side = found.compressed.model_copy(update={"report": report})
    chart = bytes_by_part(found.model_copy(update={"compressed": side}))
    assert "captured decode steps take 3.00 MiB more" in chart.alt
    assert list(chart.table["bytes"])[-3:] == [report.bytes, report.full_precision_bytes, 3 * 2**20]
    assert _side_line(side, True).endswith("3.00 MiB more for captured steps")
    assert "captured" not in bytes_by_part(found).alt + _side_line(found.compressed, True)


def test_a_link_names_the_run_to_show(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = [Run(id=f"0{n}", origin="recorded", comparison=comparison(prompt=f"prompt {n}")) for n in (1, 2)]
    monkeypatch.setattr(state, "recordings", lambda: shipped)
    page.query_params["run"] = "02"
    page.run()
    assert page.selectbox(key=state.SHOWN).value == "02"
    ask(page, "hello")
    assert page.text[0].value == "hello"
    assert "run" not in page.query_params
    page.query_params["run"] = "deadbeef"
    page.run()
    assert "not kept here" in texts(page)


def test_work_of_another_page_leaves_the_result_alone(page: AppTest, engine: Engine, bench: Bench) -> None:
    page.run()
    ask(page, "hello")
    bench.hold_run.clear()
    asked = prompts_asked(("one", "two"), request().settings, "smollm2-135m")
    job = engine.submit(page.session_state["session_id"], asked)
    until(lambda: job.view.state == "running")
    page.run()
    assert not page.exception
    assert "Prompts is at work in this tab" in texts(page)
    assert page.button(key="compare").disabled
    assert page.metric


def test_charts_are_made_once_for_a_run(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of the work of the page: those of a recorded run serve every visitor, a tab's own its next run."""
    made: list[str] = []
    make = result._made

    def counted(run: Run) -> Any:
        made.append(run.id)
        return make(run)

    monkeypatch.setattr(result, "_made", counted)
    shipped = Run(id="shipped", origin="recorded", comparison=comparison())
    monkeypatch.setattr(state, "recordings", lambda: [shipped])
    for visitor in (page.run(), AppTest.from_file(MAIN, default_timeout=30).run()):
        visitor.number_input(key="seed").set_value(3).run()
        assert len(visitor.get("plotly_chart")) == 6
    assert made == ["shipped"]
    tab = AppTest.from_file(MAIN, default_timeout=30)
    tab.session_state["runs"] = store = state.RunStore(4)
    for name in ("second", "first"):  # the newest is shown first
        store.add(Run(id=name, comparison=comparison()))
    tab.run()
    tab.number_input(key="seed").set_value(3).run()
    tab.selectbox(key=state.SHOWN).set_value("second").run()
    assert not tab.exception
    assert made == ["shipped", "first", "second"]
