"""The Compare page in each of its states, without a browser."""

import contextlib
import html
import time

import pytest
from streamlit.testing.v1 import AppTest

from app.compare.request import CompareRequest
from app.config import AppConfig
from app.engine.contract import EngineStatus
from app.engine.engine import Engine
from app.tab import state
from app.tab.examples import BY_NAME
from app.tab.requests import Choices
from app.tab.runs import Run
from app.ui.sidebar import engine_words
from tests.support.asked import compare_asked
from tests.support.bench import MAIN, Bench, until
from tests.support.factory import comparison
from turboquant.records.comparison import Settings


def texts(page: AppTest) -> str:
    """Everything the page says, as a reader sees it."""
    parts = [*page.markdown, *page.caption, *page.info, *page.warning, *page.error, *page.subheader, *page.text]
    said = "\n".join(str(part.value) for part in parts)
    return html.unescape(said).replace("\u200b", "")


def ask(page: AppTest, prompt: str) -> AppTest:
    page.text_area(key="prompt").set_value(prompt)
    page.button(key="compare").click()
    page.run()
    return page.run()  # the first one redraws itself when the job ends, which AppTest shows on top of the old page


def request(prompt: str = "hello", model: str = "smollm2-135m") -> CompareRequest:
    sampling = Settings(max_new_tokens=8, temperature=0.0, top_p=1.0, top_k=0, seed=0)
    return compare_asked(prompt, sampling, model)


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
    said = texts(page)
    assert "Identical for 1 token, then 'river' → 'stream'." in said
    assert "Measured here" in said
    assert "QuantizedCache · turboquant:bits=4 · weights fp32 on cpu · 96 tokens packed, 20 exact" in said
    labels = {metric.label for metric in page.metric}
    assert {
        "KV cache held",
        "Heads at risk",
        "Top-1 match",
        "Cosine of scores",
        "Mean KL",
        "Bits a value held",
    } <= labels
    assert all(metric.help for metric in page.metric)
    assert len(page.get("plotly_chart")) == 6
    assert len(page.get("download_button")) == 4
    assert page.query_params["prompt"] == "Where does the water go?"
    assert page.text_area(key="prompt").value == "Where does the water go?"


def test_every_chart_has_its_table(page: AppTest) -> None:
    page.run()
    ask(page, "hello")
    assert not page.dataframe
    for name in ("kl", "probability", "risk_steps", "risk_map", "bytes_steps", "bytes_parts"):
        page.session_state[f"table_{name}"] = True
    page.run()
    assert len(page.dataframe) == 6


def test_model_text_is_never_markup(page: AppTest, bench: Bench) -> None:
    nasty = ("<script>alert(1)</script>", " :tada: **x** [a](http://b) $y$ `c`", "\n# h")
    bench.result = lambda prompt, method: comparison(nasty, (*nasty[:2], " :red[z]"))
    page.run()
    ask(page, "hello")
    for element in page.markdown:
        assert "<script" not in str(element.value)
        assert ":tada:" not in str(element.value)
        assert "](http" not in str(element.value)
    assert any(text.value == "".join(nasty) for text in page.text)


def test_nothing_packed_shows_no_figure_and_offers_a_way_out(page: AppTest, bench: Bench) -> None:
    bench.result = lambda prompt, method: comparison(packed=0)
    page.run()
    ask(page, "hello")
    assert "Nothing was packed" in page.subheader[0].value
    assert not page.metric
    assert not page.get("plotly_chart")
    assert "4 sinks and 64 recent tokens" in texts(page)
    assert " held" not in texts(page)
    page.button(key="fix_long").click().run()
    assert page.text_area(key="prompt").value == BY_NAME["summary"].prompt
    page.button(key="fix_window").click().run()
    assert page.sidebar.number_input(key="residual").value == 0
    assert page.sidebar.number_input(key="sinks").value == 0


@pytest.mark.parametrize("prompt", ["", "   \n "])
def test_an_empty_prompt_is_refused(page: AppTest, bench: Bench, prompt: str) -> None:
    page.run()
    ask(page, prompt)
    assert "Type a prompt" in page.warning[0].value
    assert not bench.served


def test_a_choice_that_cannot_run_is_refused_and_the_page_goes_on(
    page: AppTest, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.run()
    with monkeypatch.context() as patch:
        patch.setattr(state, "choices", lambda: Choices(model="no/such/model"))
        ask(page, "hello")
    assert "'no/such/model' is no known model and no hub id such as org/name" in texts(page)
    assert not bench.served
    ask(page, "hello")
    assert not page.warning
    assert bench.served == ["hello"]


def test_a_failed_run_gives_its_sentence_and_keeps_the_last_result(page: AppTest, bench: Bench) -> None:
    page.run()
    ask(page, "hello")
    bench.run_error = LookupError("phi-2 has sliding layers only; pick another model")
    ask(page, "again")
    assert "phi-2 has sliding layers only; pick another model" in html.unescape(page.error[0].value)
    assert "Identical for 1 token" in texts(page)
    bench.run_error = None
    ask(page, "third")
    assert not page.error


def test_an_attached_page_draws_a_job_that_is_already_running(page: AppTest, engine: Engine, bench: Bench) -> None:
    page.run()
    bench.hold_run.clear()
    job = engine.submit(page.session_state["session_id"], request())
    until(lambda: job.view.sides[0].tokens == 4)
    bench.hold_run.set()
    page.run()
    assert "Identical for 1 token" in texts(page)
    assert job.view.state == "done"


def test_stop_keeps_the_partial_text(page: AppTest, engine: Engine, bench: Bench) -> None:
    page.run()
    bench.hold_run.clear()
    job = engine.submit(page.session_state["session_id"], request())
    until(lambda: job.view.sides[0].tokens == 4)
    engine.cancel(job)
    assert job.wait(1)
    page.run()
    said = texts(page)
    assert "Stopped after 1 token; identical so far" in said
    assert [text.value for text in page.text] == ["hello", "half", "half"]
    assert "Quality was not measured" in said
    assert not page.button(key="compare").disabled


def test_a_run_that_ends_while_the_page_is_drawn_is_shown(
    page: AppTest, engine: Engine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop redraws the page at once, and the worker ends in the middle of that: the result must not be missed."""
    page.run()
    bench.hold_run.clear()
    job = engine.submit(page.session_state["session_id"], request())
    until(lambda: job.view.state == "running")
    collect = state.collect

    def collect_then_end() -> None:
        collect()
        bench.hold_run.set()
        assert job.wait(5)

    monkeypatch.setattr(state, "collect", collect_then_end)
    page.run()
    assert [run.comparison.prompt for run in page.session_state["runs"].all()] == ["hello"]
    assert page.metric


def test_a_page_run_that_is_ended_while_it_collects_loses_nothing(
    page: AppTest, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamlit can end a page's run at any use of the session's state; the next run must still find the result."""
    page.run()
    job = engine.submit(page.session_state["session_id"], request())
    assert job.wait(5)
    reached = []

    class Ending(dict[str, object]):
        """A session state whose n-th use ends the page's run."""

        last = 0

        def _use(self) -> None:
            reached.append(1)
            if len(reached) == self.last:
                raise InterruptedError

        def __getitem__(self, key: str) -> object:
            self._use()
            return super().__getitem__(key)

        def __setitem__(self, key: str, value: object) -> None:
            self._use()
            super().__setitem__(key, value)

    monkeypatch.setattr(state, "session_id", lambda: job.session)
    for last in range(1, 12):
        session = Ending()
        session.last = last
        monkeypatch.setattr(state.st, "session_state", session)
        reached.clear()
        with contextlib.suppress(InterruptedError):
            state.collect()
        session.last = 0
        state.collect()
        assert len(state.runs().all()) == 1, f"ended at use {last}"
        assert session[state.SHOWN] == state.runs().all()[0].id


def test_stopped_in_the_queue_says_that_nothing_was_computed(page: AppTest, engine: Engine, bench: Bench) -> None:
    page.run()
    bench.hold_run.clear()
    other = engine.submit("somebody", request("first"))
    until(lambda: other.view.state == "running")
    mine = engine.submit(page.session_state["session_id"], request())
    engine.cancel(mine)
    page.run()
    assert "Stopped before it began" in texts(page)


def test_a_second_submit_is_refused_while_one_is_live(page: AppTest, engine: Engine, bench: Bench) -> None:
    """The button is disabled then; a request that comes all the same is refused by the engine."""
    page.run()
    bench.hold_run.clear()
    session = page.session_state["session_id"]
    job = engine.submit(session, request())
    until(lambda: job.view.state == "running")
    with pytest.raises(Exception, match="already at work"):
        engine.submit(session, request())
    bench.hold_run.set()
    assert job.wait(5)


def test_a_recorded_run_shows_at_once_and_is_marked(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(id="shipped", origin="recorded", comparison=comparison())
    monkeypatch.setattr(state, "recordings", lambda: [run])
    page.run()
    said = texts(page)
    assert ":gray-badge[" in said
    assert "Recorded" in said
    assert "2026-01-02, cpu: test, 2 threads, commit abc1234" in said
    assert "press Compare to measure your own" in said
    ask(page, "hello")
    assert "Measured here" in texts(page)
    assert page.selectbox(key=state.SHOWN).options[-1].endswith("(recorded)")


def test_the_address_sets_everything(page: AppTest) -> None:
    page.query_params.update(
        {
            "bits": "2",
            "tokens": "16",
            "seed": "7",
            "temperature": "0.5",
            "residual": "32",
            "sinks": "0",
            "example": "code",
        }
    )
    page.query_params["recipe"] = "turboquant"
    page.query_params["key_bits"] = "8"
    page.run()
    choices = page.session_state
    assert [choices[key] for key in ("bits", "tokens", "seed", "residual", "sinks", "key_bits")] == [
        2,
        16,
        7,
        32,
        0,
        "8",
    ]
    assert page.text_area(key="prompt").value == BY_NAME["code"].prompt
    assert "turboquant:key_bits=8,value_bits=2" in texts(page)


def test_the_paper_recipe_by_its_name_in_the_address(page: AppTest) -> None:
    page.query_params.update({"recipe": "turboquant-paper", "bits": "2", "rotation": "5", "chat": "false"})
    page.run()
    assert "`turboquant-paper:bits=2,seed=5` against the full cache" in texts(page)
    assert page.sidebar.number_input(key="residual").disabled
    assert page.sidebar.toggle(key="chat").value is False


@pytest.mark.parametrize(
    "nonsense",
    [
        {"bits": "17", "tokens": "-4", "seed": "x", "temperature": "hot", "recipe": "magic", "weights": "1bit"},
        {"bits": "", "residual": "1e99", "sinks": "NaN", "key_bits": "9", "chat": "perhaps", "example": "nope"},
        {"bits": "<script>", "unknown": "1", "rotation": "99999999999999999999", "prompt": "\x00"},
    ],
)
def test_nonsense_in_the_address_is_ignored(page: AppTest, bench: Bench, nonsense: dict[str, str]) -> None:
    page.query_params.update(nonsense)
    page.run()
    assert not page.exception
    assert "turboquant:bits=4 against the full cache · up to 128 new tokens each · greedy" in texts(page).replace(
        "`", ""
    )
    ask(page, "hello")
    assert not page.exception
    assert bench.served == ["hello"]


def test_a_model_in_the_address_is_checked_by_the_server(
    page: AppTest, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "config", lambda: AppConfig(models=("smollm2-135m",), allow_any_model=False))
    page.query_params["model"] = "evil/model"
    page.run()
    assert page.sidebar.selectbox(key="model").value == "smollm2-135m"
    ask(page, "hello")
    assert bench.loads == ["smollm2-135m"]


def test_the_link_holds_what_differs_from_the_start(page: AppTest) -> None:
    page.query_params["bits"] = "3"
    page.run()
    page.button_group(key=state.EXAMPLE).set_value("fact").run()
    ask(page, BY_NAME["fact"].prompt)
    assert page.code[0].value.endswith("?bits=3&example=fact")


def test_charts_can_be_drawn_from_an_imported_run(page: AppTest) -> None:
    page.run()
    page.session_state["runs"] = state.RunStore(4)
    run = page.session_state["runs"].add(Run(origin="imported", comparison=comparison()))
    page.session_state[state.SHOWN] = run.id
    page.run()
    assert "Imported" in texts(page)
    assert not page.exception


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (EngineStatus("empty"), "No model is loaded yet"),
        (EngineStatus("ready", "m", "fp32", "cpu"), "Ready · m · fp32 · cpu"),
        (EngineStatus("running", "m", "fp32", "cpu", waiting=2), "2 waiting"),
    ],
)
def test_the_engine_line_has_words(status: EngineStatus, words: str) -> None:
    assert words in engine_words(status)


def test_a_first_page_is_quick(page: AppTest) -> None:
    page.run()
    begun = time.monotonic()
    AppTest.from_file(MAIN, default_timeout=30).run()
    assert time.monotonic() - begun < 5
