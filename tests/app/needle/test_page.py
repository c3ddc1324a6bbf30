"""The Needle page: recorded maps from a cold link, measuring cell by cell, stopping and going on, an own needle."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app.config import AppConfig
from app.engine import backend
from app.engine.engine import Engine
from app.needle import charts
from app.needle import request as needle
from app.needle.request import NeedleChoices
from app.tab import state
from app.tab.measure import Plan, missing, report
from app.tab.requests import Choices, RequestError
from tests.support.bench import MAIN, ended, newest, opened, said, until
from tests.support.cells import HERE, Cells
from tests.support.models import tiny_loaded
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.texts import TEXTS

CONFIG = AppConfig()
OWN = {"needle": "The key is under the blue pot.", "question": "Where is the key?", "answer": "blue pot"}


def record(cell: Cell, found: int = 1, text: str = " 1234567.") -> ExperimentRecord:
    """A record made by hand; nothing was measured."""
    asked = cell.settings["repetitions"]
    own, full = 100 * found / asked, 100.0
    shares = {"": own, "_low": own / 2, "_high": own}
    return ExperimentRecord(
        cell=cell,
        metrics={
            **{f"success{end}_pct": value for end, value in shares.items()},
            **{f"success_full{end}_pct": full for end in shares},
            "repetitions": float(asked),
            "bits_per_value": 5.0,
        },
        timing={"elapsed": 3.0, "full": 2.0, "method": 1.0},
        detail={
            "repetitions": [
                {"word": "calm-dragon", "answer": "1234567", "needle_start": 9, "text": text, "found": i < found}
                | {"text_full": " 1234567.", "found_full": True}
                for i in range(asked)
            ]
        },
        environment=HERE,
    )


@pytest.fixture
def cells() -> Cells:
    return Cells(record)


@pytest.fixture
def page(measuring: AppTest) -> AppTest:
    return measuring


SMALL = {"needle_lengths": ["256", "512"], "needle_depths": ["0.1", "0.9"], "needle_repetitions": "1"}


# --- the page


def test_a_cold_link_shows_the_recorded_maps_with_their_source(page: AppTest, cells: Cells) -> None:
    opened(page, "needle", needle_methods=["turboquant:bits=3"])
    recorded = [r for r in state.recorded("needle") if r.cell.method == "turboquant:bits=3"]
    total = needle.totals(needle.places(recorded))[1]
    assert f"With turboquant:bits=3 the model finds {total.found} of {total.asked} needles" in said(page)
    assert str(recorded[0].environment.commit) in said(page)
    assert recorded[0].environment.created[:10] in said(page)
    assert len(page.get("plotly_chart")) == 3  # the full cache, the method, what it changes
    assert recorded[0].detail["repetitions"][0]["text"].strip() in said(page)
    assert not cells.served


def test_a_run_measures_the_chosen_cells_and_shows_them(page: AppTest, cells: Cells) -> None:
    opened(page, "needle", second="turboquant:bits=2", **SMALL)
    assert "8 cells: 4 places, 2 methods" in said(page)
    assert "(estimated from the recorded run" in said(page)
    cells.let()
    page.button(key="needle_run").click().run()
    ended(page)
    assert [(c.settings["context"], c.settings["depth"], c.method) for c in cells.served] == [
        (context, depth, method)
        for context in (256, 512)
        for depth in (0.1, 0.9)
        for method in ("turboquant:bits=4", "turboquant:bits=2")
    ]
    assert page.session_state["needle_view"] == "This tab"
    assert "With turboquant:bits=2 the model finds 4 of 4 needles." in said(page)
    assert len(page.get("plotly_chart")) == 5
    assert page.button(key="needle_run").disabled
    assert "All of it is measured (8 cells: 4 places, 2 methods). Change" in said(page)


def test_partial_results_show_stop_keeps_them_and_the_rest_is_measured_later(page: AppTest, cells: Cells) -> None:
    cells.let(2)
    opened(page, "needle", **SMALL)
    page.button(key="needle_run").click().run()
    until(lambda: len(cells.served) == 2)
    page.run()
    assert "With turboquant:bits=4 the model finds 2 of 2 needles." in said(page)
    assert "2 of 4 measured" in said(page)
    page.button(key="needle_run_stop").click().run()
    ended(page)
    assert "2 of 4 results are kept" in said(page)
    first = [cell.key for cell in cells.served]
    cells.let()
    page.button(key="needle_run").click().run()
    ended(page)
    assert len(cells.served) == 4
    assert len({cell.key for cell in cells.served}) == 4
    assert not {cell.key for cell in cells.served[2:]} & set(first)
    assert "finds 4 of 4 needles" in said(page)


def test_failed_cells_are_said_in_words_and_asked_for_again(page: AppTest, cells: Cells) -> None:
    def make(cell: Cell) -> ExperimentRecord:
        if cell.settings["context"] == 512:
            return ExperimentRecord(cell=cell, environment=HERE, error="no *room* for it")
        return record(cell)

    cells.make = make
    opened(page, "needle", **SMALL)
    cells.let()
    page.button(key="needle_run").click().run()
    ended(page)
    assert "turboquant:bits=4: no *room* for it" in said(page)
    assert "finds 2 of 2 needles" in said(page)
    assert "2 of 4 measured" in said(page)
    assert not page.button(key="needle_run").disabled


def test_an_own_needle_reaches_the_cells_is_private_and_not_in_the_link(page: AppTest, cells: Cells) -> None:
    opened(page, "needle", needle_own="true", **SMALL)
    assert page.button(key="needle_run").disabled
    assert "Write the needle and the question and the answer of your own needle." in said(page)
    for name, text in OWN.items():
        page.text_input(key=f"needle_{name}").set_value(text)
    page.run()
    cells.let()
    page.button(key="needle_run").click().run()
    ended(page)
    assert {name: cells.served[0].settings[name] for name in OWN} == OWN
    request = newest(page).request
    assert request.private == frozenset(range(request.items))
    link = next(code.value for code in page.code if "needle_own=true" in code.value)
    assert "needle_lengths=256&needle_lengths=512" in link
    assert "blue" not in link


def test_what_the_model_wrote_is_shown_as_it_is(page: AppTest, cells: Cells) -> None:
    cells.make = lambda cell: record(cell, text="<b>**bold**</b> :smile:")
    opened(page, "needle", **SMALL)
    cells.let()
    page.button(key="needle_run").click().run()
    ended(page)
    assert "<b>**bold**</b> :smile:" in [text.value for text in page.text]
    assert not any("**bold**" in str(part.value) for part in [*page.markdown, *page.caption])


def test_a_small_real_model_is_asked_from_the_page(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("llama", num_hidden_layers=2, max_position_embeddings=1024)
    real = Engine(lambda name, *, weights, progress: loaded, backend.run, is_expected=backend.is_expected)
    monkeypatch.setattr(state, "engine", lambda: real)
    try:
        opened(page, "needle", needle_lengths=["256", "512"], needle_depths=["0.5"], needle_repetitions="1")
        page.button(key="needle_run").click().run()
        until(lambda: not real.job(page.session_state["session_id"]).live, 60)
        page.run()
        (good,) = [one for one in state_records(page) if one.error is None]
        assert good.cell.settings["context"] == 512
        (reply,) = needle.replies(good)
        assert reply.method in [text.value for text in page.text]
        assert reply.hidden in said(page)
        assert "a prompt with a needle has at least" in said(page)  # 256 letters are too few
    finally:
        real.close()


def state_records(page: AppTest) -> list[ExperimentRecord]:
    return list(page.session_state["records"].values())


WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from(["256", "0.5", "/etc/passwd", "true", "-1", "1e9", "nan", "<b>"])
)


NAMES = [f"needle_{name}" for name in ("lengths", "depths", "repetitions", "seed", "filler", "own", "view", "methods")]
NAMES += ["second", "model", "bits"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    link=st.dictionaries(st.sampled_from(NAMES), st.lists(WORDS, min_size=1, max_size=3), max_size=6),
)
def test_no_address_crashes_the_page(page: AppTest, link: dict[str, list[str]]) -> None:
    fresh = AppTest.from_file(MAIN, default_timeout=60)
    opened(fresh, "needle", **link)
    assert fresh.title[0].value == "Is a fact in a long text still found?"


# --- the server's own checks


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"filler": "/etc/passwd"}, "Filler must be among sentences, persuasion"),
        ({"filler": "../results/needle.jsonl"}, "Filler must be among"),
        ({"lengths": ("100",)}, "Lengths must be among 256"),
        ({"lengths": ("16384",)}, "Lengths must be among 256"),
        ({"lengths": ()}, "Choose at least one of lengths"),
        ({"depths": ("2",)}, "Depths must be among"),
        ({"repetitions": 11}, "Repetitions must be a whole number from 1 to 10, got 11"),
        ({"repetitions": 1.5}, "Repetitions must be a whole number"),
        ({"seed": -1}, "Seed of the needles must be a whole number"),
        ({"own": True, **OWN, "answer": "red"}, "the answer must occur in the needle"),
        ({"own": True, **OWN, "needle": "blue pot " * 60}, "at most 400 characters"),
        ({"own": True, **OWN, "answer": "blue"}, "stands in the filler sentences as well"),
        ({"own": True, **OWN, "answer": " "}, "Write the answer of your own needle"),
        ({"own": True, **OWN, "repetitions": 6}, "5 different prompts"),
    ],
)
def test_what_a_browser_may_not_send_is_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        needle.cells(NeedleChoices(**chosen), Choices(), CONFIG)
    assert message in str(error.value)


def test_a_file_is_never_a_filler(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("The password is tulip. " * 50)
    monkeypatch.chdir(tmp_path)
    for name in ("secret", str(tmp_path / "secret"), "./secret"):
        with pytest.raises(RequestError, match="Filler must be among"):
            needle.cells(NeedleChoices(filler=name), Choices(), CONFIG)
    for name in TEXTS:
        assert needle.cells(NeedleChoices(filler=name), Choices(), CONFIG)


def test_more_cells_than_allowed_are_refused() -> None:
    with pytest.raises(RequestError, match="At most 5 cells can be measured at once, got 6"):
        needle.cells(NeedleChoices(), Choices(), AppConfig(max_cells=5))


def test_everything_measured_is_nothing_to_request() -> None:
    planned = needle.cells(NeedleChoices(), Choices(), CONFIG)
    records = {cell.key: record(cell) for cell in planned}
    assert missing(planned, records) == ()
    with pytest.raises(RequestError, match="measured already"):
        Plan(planned, private=True).request(records, "needle")
    del records[planned[1].key]
    asked = Plan(planned, private=True).request(records, "needle")
    assert (asked.title, asked.cells, asked.private) == ("Needle", planned[1:2], {0})
    assert Plan(planned, private=False).request(records, "needle").private == frozenset()


def test_the_estimate_of_recorded_cells_is_near_what_they_took() -> None:
    records = state.recorded("needle")
    took = sum(one.timing["elapsed"] for one in records)
    assert needle.seconds([one.cell for one in records], records) == pytest.approx(took, rel=0.1)
    other = needle.cells(NeedleChoices(), Choices(model="org/other"), CONFIG)
    assert needle.seconds(other, records) is None


# --- charts


def test_maps_say_what_the_records_say() -> None:
    cells = needle.cells(NeedleChoices(lengths=("256", "512"), depths=("0", "1")), Choices(), CONFIG)
    places = needle.places([record(cells[0], 2), record(cells[1], 0), record(cells[2], 1)])
    spots = [(cell.settings["context"], cell.settings["depth"]) for cell in cells]
    own = charts.found_map(places, "it", lambda place: place.own, spots)
    heat, text = own.figure.data
    assert [list(row) for row in heat.z] == [[100.0, 50.0], [0.0, None]]
    assert list(text.text) == [
        "<b>100 %</b><br>50 to 100",
        "<b>50 %</b><br>25 to 50",
        "<b>0 %</b><br>0 to 0",
        "not yet",
    ]
    assert own.alt == "With it the model finds 3 of 6 needles; fewest at 256 tokens, depth 1: 0 %."
    change = charts.change_map(places, "it", spots)
    assert [list(row) for row in change.figure.data[0].z] == [[0.0, -50.0], [-100.0, None]]
    assert "at 2 of 3 places" in change.alt
    assert len(own.table) == len(change.table) == 3
    assert needle.totals(places)[1].found == 3


def test_exports_hold_every_cell() -> None:
    records = state.recorded("needle")[:6]
    assert len(charts.places_table(needle.places(records))) == 6
    text = report(records)
    assert "turboquant:bits=2" in text
    assert json.loads(records[0].model_dump_json())["cell"]["experiment"] == "needle"
