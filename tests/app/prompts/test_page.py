"""The Prompts page from a cold link: a set runs, rows come sorted, a row opens as a run."""

import html

import pytest
from streamlit.testing.v1 import AppTest

from app.config import AppConfig
from app.engine.engine import Engine
from app.prompts.request import read_file
from app.tab import state
from app.tab.examples import EXAMPLES
from app.tab.requests import RequestError
from tests.support.bench import Bench, until
from tests.support.factory import comparison
from turboquant.records.comparison import Comparison

PAGE = "../pages/prompts.py"


@pytest.fixture
def prompts(page: AppTest) -> AppTest:
    page.switch_page(PAGE)
    return page


def texts(page: AppTest) -> str:
    parts = [*page.markdown, *page.caption, *page.info, *page.warning, *page.error, *page.subheader]
    return html.unescape("\n".join(str(part.value) for part in parts)).replace("\u200b", "")


def damaged(prompt: str, method: str) -> Comparison:
    made = comparison(prompt=prompt, method=method, packed=0 if prompt == "short" else 96)
    if made.tokens is None:
        return made
    return made.model_copy(update={"tokens": made.tokens.model_copy(update={"mean_kl": len(prompt) / 100})})


def run(page: AppTest, text: str, engine: Engine) -> AppTest:
    page.text_area(key="prompts_text").set_value(text).run()
    page.button(key="prompts_run").click().run()
    job = engine.job(page.session_state["session_id"])
    assert job is not None
    assert job.wait(10)
    return page.run()


def test_a_cold_page_offers_the_examples_and_says_how_prompts_run(prompts: AppTest) -> None:
    prompts.run()
    assert not prompts.exception
    said = texts(prompts)
    assert "one after the other, each through both caches; they are not padded into one batch" in said
    assert f"{len(EXAMPLES)} prompts · `turboquant:bits=4` against the full cache" in said
    assert "time unknown until a first run" in said
    assert not prompts.button(key="prompts_run").disabled
    assert "No set has run in this tab yet" in said


def test_a_set_runs_and_its_rows_come_by_damage(prompts: AppTest, engine: Engine, bench: Bench) -> None:
    bench.result = damaged
    prompts.query_params["prompts_source"] = "Typed"
    prompts.run()
    assert prompts.button(key="prompts_run").disabled
    run(prompts, "tiny\na longer one\nshort\nthe longest of them all", engine)
    assert not prompts.exception
    assert bench.served == ["tiny", "a longer one", "short", "the longest of them all"]
    rows = prompts.dataframe[0].value
    assert rows["prompt"].tolist() == ["the longest of them all", "a longer one", "tiny", "short"]
    assert rows["note"].tolist() == ["", "", "", "nothing packed"]
    assert len(prompts.get("plotly_chart")) == 1
    assert len(prompts.get("download_button")) == 3
    assert "estimated from the last set" in texts(prompts)
    assert {kept.comparison.prompt for kept in prompts.session_state["runs"].all()} == set(bench.served)


def test_rows_come_while_the_set_runs_and_stop_keeps_them(prompts: AppTest, engine: Engine, bench: Bench) -> None:
    prompts.query_params["prompts_source"] = "Typed"
    prompts.run()
    prompts.text_area(key="prompts_text").set_value("one\ntwo\nthree").run()

    def hold_the_next(prompt: str, method: str) -> Comparison:
        bench.hold_run.clear()
        return comparison(prompt=prompt, method=method)

    bench.result = hold_the_next
    prompts.button(key="prompts_run").click().run()
    job = engine.job(prompts.session_state["session_id"])
    assert job is not None
    until(lambda: len(job.results) == 1 and job.view.state == "running")
    prompts.run()
    assert prompts.dataframe[0].value["note"].tolist() == ["", "at work", "waiting"]
    assert "1 of 3 done" in html.unescape(str(prompts.get("progress")[0].proto.text))
    prompts.button(key="prompts_run_stop").click().run()
    assert job.wait(5)
    prompts.run()
    assert not prompts.exception
    assert "Stopped: 2 of 3 results are kept" in texts(prompts)
    assert "stopped" in prompts.dataframe[0].value["note"].tolist()
    assert not prompts.button(key="prompts_run").disabled


def test_what_was_measured_before_is_marked_as_cached(prompts: AppTest, engine: Engine, bench: Bench) -> None:
    prompts.query_params["prompts_source"] = "Typed"
    prompts.run()
    run(prompts, "one\ntwo", engine)
    run(prompts, "two\nthree", engine)
    assert bench.served == ["one", "two", "three"]
    rows = prompts.dataframe[0].value.set_index("prompt")
    assert rows.loc["two", "note"] == "cached"
    assert rows.loc["three", "note"] == ""


def test_a_row_opens_as_a_run_in_compare(prompts: AppTest, engine: Engine, bench: Bench) -> None:
    bench.result = damaged
    prompts.query_params["prompts_source"] = "Typed"
    prompts.run()
    run(prompts, "tiny\na longer one", engine)
    chosen = next(kept for kept in prompts.session_state["runs"].all() if kept.comparison.prompt == "tiny")
    prompts.switch_page("../pages/compare.py")
    prompts.query_params[state.SHOWN] = chosen.id
    prompts.run()
    assert not prompts.exception
    assert prompts.selectbox(key=state.SHOWN).value == chosen.id
    assert prompts.text[0].value == "tiny"


def test_a_set_survives_other_work(prompts: AppTest, engine: Engine) -> None:
    prompts.query_params["prompts_source"] = "Typed"
    prompts.run()
    run(prompts, "one\ntwo", engine)
    prompts.switch_page("../pages/compare.py").run()
    prompts.text_area(key="prompt").set_value("hello")
    prompts.button(key="compare").click()
    prompts.run()
    prompts.switch_page(PAGE).run()
    assert not prompts.exception
    assert prompts.dataframe[0].value["prompt"].tolist() == ["one", "two"]


def test_too_many_prompts_are_refused_in_words(prompts: AppTest, bench: Bench) -> None:
    prompts.query_params["prompts_source"] = "Typed"
    prompts.run()
    prompts.text_area(key="prompts_text").set_value("\n".join(f"prompt {n}" for n in range(40))).run()
    assert "There are 40 prompts; the limit here is 32 in one set." in texts(prompts)
    assert prompts.button(key="prompts_run").disabled
    assert not bench.served


def test_prompts_of_visitors_are_never_markup(prompts: AppTest, engine: Engine, bench: Bench) -> None:
    prompts.query_params["prompts_source"] = "Typed"
    prompts.run()
    run(prompts, "<script>alert(1)</script> :red[x] ![i](http://b/c.png)", engine)
    for element in [*prompts.markdown, *prompts.caption]:
        assert "<script" not in str(element.value)
        assert "](http" not in str(element.value)


def test_what_is_wrong_with_a_file_is_never_markup(prompts: AppTest) -> None:
    with pytest.raises(RequestError, match="no column is named prompt") as refused:
        read_file(b"id,![i](http://b/c.png)\n1,2\n", "a.csv", AppConfig())
    prompts.session_state["prompts_read"] = ("a.csv", (), str(refused.value))
    prompts.query_params["prompts_source"] = "File"
    prompts.run()
    assert str(refused.value) in texts(prompts)
    assert not [one for one in prompts.markdown if "](http" in str(one.value)]
