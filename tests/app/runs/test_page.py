"""The Runs page from a cold link: history, two runs side by side, import, export, deletion."""

import html
import io
import zipfile

import pytest
from streamlit.testing.v1 import AppTest

from app.config import AppConfig
from app.runs.charts import figure_table, kl_of_both, settings_apart
from app.tab import state
from app.tab.requests import Choices, method_text, read_choices
from app.tab.runs import Run, RunError, RunStore, import_run, together, zipped
from app.ui.share import settings_query
from tests.support.factory import comparison

PAGE = "../pages/runs.py"
NASTY = "<script>alert(1)</script> ![i](http://b/c.png) :red[x] `c`"


def shipped(name: str = "01-shipped") -> Run:
    return Run(id=name, origin="recorded", comparison=comparison(prompt="A recorded prompt"))


@pytest.fixture
def runs(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    """The page of a tab with two runs of its own, next to a recorded one."""
    monkeypatch.setattr(state, "recordings", lambda: [shipped()])
    store = RunStore(8)
    store.add(Run(id="old", comparison=comparison(prompt="An old prompt")))
    store.add(Run(id="new", cached=True, comparison=comparison(prompt=NASTY, method="turboquant:bits=2", packed=64)))
    page.session_state["runs"] = store
    page.switch_page(PAGE)
    return page


def texts(page: AppTest) -> str:
    parts = [*page.markdown, *page.caption, *page.info, *page.warning, *page.error, *page.subheader]
    return html.unescape("\n".join(str(part.value) for part in parts)).replace("\u200b", "")


def choose(page: AppTest, row: int) -> None:
    """Choose a row of the history."""
    page.session_state[f"runs_table_{len(page.dataframe[0].value)}_0"] = {
        "selection": {"rows": [row], "columns": [], "cells": []}
    }
    page.run()


def test_an_empty_tab_says_where_runs_come_from(page: AppTest) -> None:
    page.switch_page(PAGE).run()
    assert not page.exception
    assert "No run yet. Compare a prompt, or import a run." in texts(page)
    assert "Nothing of it is stored on the server beyond this tab" in texts(page)


def test_the_history_lists_own_runs_first_and_marks_the_others(runs: AppTest) -> None:
    runs.run()
    assert not runs.exception
    table = runs.dataframe[0].value
    assert table["from"].tolist() == ["this tab, cached", "this tab", "recorded"]
    assert table["method"].tolist()[0] == "turboquant:bits=2"
    assert table["when"].dt.year.tolist() == [2026, 2026, 2026]
    assert (table["mean KL"] == 0.025).all()


def test_two_runs_of_the_address_stand_side_by_side(runs: AppTest) -> None:
    runs.query_params["runs_a"] = "01-shipped"
    runs.query_params["runs_b"] = "new"
    runs.run()
    assert not runs.exception
    assert [runs.selectbox(key=key).value for key in ("runs_a", "runs_b")] == ["01-shipped", "new"]
    said = texts(runs)
    assert "method: `turboquant:bits=4` in A, `turboquant:bits=2` in B" in said
    assert "Mean KL is 0.0250 nats in A and 0.0250 in B" in said
    figures = runs.dataframe[1].value.set_index("figure")
    assert figures.loc["KV cache held", "A"] == "4.53 KiB"
    assert figures.loc["KV cache held", "B minus A"] == "-1.25 KiB"
    assert figures.loc["KV cache held", "better"] == "B"
    assert figures.loc["Prompt tokens", "better"] == ""
    assert runs.query_params["runs_b"] == "new"
    runs.selectbox(key="runs_b").set_value("01-shipped").run()
    assert "A and B are the same run" in texts(runs)


def test_a_pin_of_another_tab_is_said_to_be_gone(runs: AppTest) -> None:
    runs.query_params["runs_a"] = "deadbeef"
    runs.run()
    assert not runs.exception
    assert "not kept here" in texts(runs)
    assert runs.selectbox(key="runs_a").value == "new"


def test_what_others_wrote_is_never_markup(runs: AppTest) -> None:
    runs.run()
    choose(runs, 0)
    assert any(text.value == NASTY for text in runs.text)
    for element in [*runs.markdown, *runs.caption]:
        assert "<script" not in str(element.value)
        assert "](http" not in str(element.value)
        assert ":red[" not in str(element.value)


def test_a_chosen_run_is_pinned_exported_and_deleted(runs: AppTest) -> None:
    runs.run()
    choose(runs, 1)
    assert not runs.exception
    assert len(runs.get("download_button")) == 5
    runs.button(key="runs_pin_b").click().run()
    assert runs.selectbox(key="runs_b").value == "old"
    runs.button(key="runs_delete_one").click().run()
    assert not runs.exception
    assert runs.dataframe[0].value["from"].tolist() == ["this tab, cached", "recorded"]
    assert "No run" not in texts(runs)


def test_recorded_runs_cannot_be_deleted_and_all_own_ones_can(runs: AppTest) -> None:
    runs.run()
    choose(runs, 2)
    assert not [button for button in runs.button if button.key == "runs_delete_one"]
    runs.button(key="runs_delete_all").click().run()
    assert not runs.exception
    assert runs.dataframe[0].value["from"].tolist() == ["recorded"]
    assert not runs.session_state["runs"].all()


def test_a_file_that_is_no_run_is_refused_in_words(runs: AppTest) -> None:
    runs.run()
    runs.file_uploader(key="upload").set_value(("run.json", b"{}", "application/json")).run()
    assert "The file is JSON, but no run" in texts(runs)
    again = Run(id="theirs", comparison=comparison(prompt="From elsewhere")).to_json().encode()
    runs.file_uploader(key="upload").set_value(("run.json", again, "application/json")).run()
    assert not runs.exception
    assert runs.dataframe[0].value["from"].tolist()[0] == "imported"
    assert not runs.warning


def test_a_zip_holds_every_run_and_is_not_read_back() -> None:
    kept = [Run(id=name, comparison=comparison(prompt=name)) for name in ("one", "two")]
    data = zipped(kept)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert names == ["comparison-one.json", "comparison-two.json"]
        assert [import_run(archive.read(name)).comparison for name in names] == [run.comparison for run in kept]
    with pytest.raises(RunError, match="zip"):
        import_run(data)


def test_the_difference_is_b_minus_a_and_missing_figures_stay_missing() -> None:
    full, none = Run(comparison=comparison()), Run(comparison=comparison(packed=0))
    table = figure_table(full, none).set_index("figure")
    assert table.loc["Mean KL"].tolist() == ["0.0250 nats", "not measured", "", ""]
    assert table.loc["Bits a value held", "B"] == "not measured"
    assert table.loc["Prompt tokens", "B minus A"] == "0"
    assert settings_apart(full, full) == []
    assert "not measured in both" in kl_of_both(full, none).alt


def test_curves_of_different_answers_are_not_called_the_same() -> None:
    first, other = Run(comparison=comparison()), Run(comparison=comparison((" an", " other")))
    assert "same original answer" in kl_of_both(first, first).alt
    chart = kl_of_both(first, other)
    assert "Their original answers differ" in chart.alt
    assert chart.table["B"].isna().tolist() == [False, False, True, True]


def test_runs_of_one_request_stand_together_and_those_of_a_set_do_not() -> None:
    first, second = (Run(group="g", comparison=comparison(method=f"turboquant:bits={bits}")) for bits in (4, 2))
    other = Run(group="g", comparison=comparison(prompt="another", method="turboquant:bits=3"))
    alone = Run(comparison=comparison(method="turboquant:bits=3"))
    everything = [first, alone, other, second]
    assert together(first, everything) == [first, second]
    assert together(second, everything) == [first, second]
    assert together(other, everything) == [other]
    assert together(alone, everything) == [alone]


@pytest.mark.parametrize(
    "choices",
    [
        Choices(bits=3, tokens=32, seed=5, temperature=0.5),
        Choices(recipe="turboquant-paper", bits=2, rotation=7, chat=False),
        Choices(key_bits="8", value_bits="2", residual=0, sinks=0),
    ],
)
def test_the_link_of_a_run_asks_for_the_same_again(choices: Choices) -> None:
    from urllib.parse import parse_qsl

    made = comparison(method=method_text(choices)).model_copy(update={"chat": choices.chat})
    sampling = {"max_new_tokens": choices.tokens, "seed": choices.seed, "temperature": choices.temperature}
    made = made.model_copy(update={"settings": made.settings.model_copy(update=sampling)})
    query = settings_query(made, AppConfig())
    assert query is not None
    said = dict(parse_qsl(query))
    kinds = {key: type(value) for key, value in vars(Choices()).items()}
    values = {key: said[key] == "true" if kinds[key] is bool else kinds[key](said[key]) for key in said if key in kinds}
    back = read_choices(values, AppConfig())
    assert method_text(back) == method_text(choices)
    assert (back.tokens, back.seed, back.temperature, back.chat) == (
        choices.tokens,
        choices.seed,
        choices.temperature,
        choices.chat,
    )
    assert said["prompt"] == made.prompt


def test_a_run_that_the_pages_cannot_ask_for_has_no_link() -> None:
    assert settings_query(comparison(method="turboquant:bits=4,groups=7"), AppConfig()) is None
    assert settings_query(comparison(method="full"), AppConfig()) is None
