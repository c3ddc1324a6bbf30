"""The Seeds page: recorded spreads are the library's; what is measured here comes cell by cell and is never lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app.config import AppConfig
from app.seeds import charts
from app.seeds import request as measure
from app.seeds.request import FIGURES, SeedsChoices, findings
from app.tab import state
from app.tab.requests import Choices, RequestError
from app.ui.measuring import Measurement
from tests.support.bench import ended, newest, opened, said, until
from tests.support.cells import Cells
from turboquant.experiments import seeds as variance
from turboquant.methods import parse_method
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.files import read_records
from turboquant.texts import TEXTS

RECORDS = read_records(state.RESULTS / "variance.jsonl")
SMALL = {"seeds_view": "This tab", "seeds_against": "none", "seeds_rotations": "2", "seeds_samplings": "1"}


def stand_in(cell: Cell) -> ExperimentRecord:
    """A record of the same kind, with the figures of another."""
    greedy = cell.settings["seed"] is None
    kind = [r for r in RECORDS if (r.cell.settings["seed"] is None) == greedy]
    return kind[len(str(cell.method)) % len(kind)].model_copy(update={"cell": cell})


@pytest.fixture
def cells() -> Cells:
    return Cells(stand_in)


@pytest.fixture
def page(measuring: AppTest) -> AppTest:
    return measuring


# --- the page


def test_a_cold_link_shows_the_recorded_spreads_of_the_library(page: AppTest, cells: Cells) -> None:
    text = said(opened(page, "seeds", seeds_metric="Same top token"))
    for bits in (3, 4):
        method = parse_method(f"turboquant:bits={bits}")
        spread = variance.spreads(RECORDS, method)["same_top_pct"]
        assert f"{method}, text: mean {spread.mean:.1f} % over {spread.count} rotation seeds" in text
        assert f"{spread.low:.1f} % to {spread.high:.1f} %" in text
    assert "That is too few pairs to tell" in text
    assert str(RECORDS[0].environment.commit) in text
    assert "cpu: AMD EPYC" in text
    assert not cells.served


def test_a_real_difference_is_called_real_with_its_p(page: AppTest) -> None:
    methods = [parse_method(f"turboquant:bits={bits}") for bits in (3, 4)]
    gap = variance.differences(RECORDS, *methods)["kl_mean over text"]
    assert gap.real
    text = said(opened(page, "seeds"))
    assert f"less turboquant:bits=4 is {gap.difference:+.4f} nats" in text
    assert f"The difference is real: turboquant:bits=4 is better (p = {gap.p_value:.2g})" in text


def test_results_come_cell_by_cell_stop_keeps_them_and_another_click_measures_the_rest(
    page: AppTest, cells: Cells
) -> None:
    opened(page, "seeds", **SMALL)
    assert "4 cells · about" in said(page)
    assert "(estimated from the recorded run" in said(page)
    page.button(key="seeds_run").click().run()
    assert page.button(key="seeds_run").disabled
    assert not page.get("plotly_chart")
    cells.let(1)
    until(lambda: len(cells.served) == 1)
    page.run()
    assert not page.exception
    assert "1 of 4 cells" in said(page)
    assert "no interval yet" in said(page)
    assert page.get("plotly_chart")
    page.button(key="seeds_run_stop").click().run()
    ended(page)
    assert "Stopped" in said(page)
    assert "1 of 4 results are kept" in said(page)
    assert "4 cells, 1 of 4 measured" in said(page)
    cells.let(3)
    page.button(key="seeds_run").click().run()
    ended(page)
    assert len(cells.served) == len({cell.key for cell in cells.served}) == 4
    assert "4 of 4 cells" in said(page)
    assert "All of it is measured (4 cells)." in said(page)
    assert page.button(key="seeds_run").disabled


def test_a_result_that_comes_while_the_page_is_drawn_is_shown_at_once(
    page: AppTest, cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(page, "seeds", **SMALL)
    page.button(key="seeds_run").click().run()
    job, working = newest(page), Measurement.working

    def late(self: Any) -> Any:
        if not job.results:
            cells.let(1)
            until(lambda: job.results)
        return working(self)

    monkeypatch.setattr(Measurement, "working", late)
    page.run()
    assert not page.exception
    assert "1 of 4 cells" in said(page)


def test_a_cell_that_failed_is_said_and_asked_for_again(page: AppTest, cells: Cells) -> None:
    cells.make = lambda cell: stand_in(cell).model_copy(update={"metrics": {}, "error": "the text is *too* short"})
    opened(page, "seeds", **SMALL)
    cells.let(4)
    page.button(key="seeds_run").click().run()
    ended(page)
    assert "Failed cells: 4. The first one said: the text is *too* short" in said(page)
    assert "*too*" not in page.warning[0].value  # escaped
    assert "4 cells · about" in said(page)  # all of them again
    assert not page.button(key="seeds_run").disabled


@pytest.mark.parametrize(
    "link",
    [
        {"seeds_view": "<b>", "seeds_metric": "nope"},
        {"seeds_view": "This tab", "seeds_rotations": "99999", "seeds_samplings": "-1", "seeds_bits": "x"},
        {"seeds_view": "This tab", "seeds_texts": "/etc/passwd", "seeds_context": "7", "seeds_against": "[]"},
        {"seeds_view": "This tab", "seeds_rotations": "16", "seeds_samplings": "8"},
        {"seeds_view": "This tab", "bits": "9", "residual": "4000"},
    ],
)
def test_a_link_with_nonsense_opens_and_reads_no_path(page: AppTest, link: dict[str, str]) -> None:
    opened(page, "seeds", **link)
    assert "passwd" not in said(page)


def test_too_much_is_refused_in_words(page: AppTest) -> None:
    opened(page, "seeds", seeds_view="This tab", seeds_rotations="16", seeds_samplings="8")
    assert "At most 200 cells can be measured at once, got 288" in said(page)
    assert page.button(key="seeds_run").disabled


# --- cells


def test_the_cells_are_those_of_the_command_line() -> None:
    from turboquant.cli.options import Asked
    from turboquant.cli.seeds import _cells
    from turboquant.records.settings import SeedsSettings

    own = SeedsChoices(bits=3, against="4", rotations=3, samplings=2, context=512)
    cells = measure.cells(own, Choices(weights="fp32"), AppConfig())
    methods = [parse_method(f"turboquant:bits={bits}") for bits in (3, 4)]
    asked = Asked(SeedsSettings, {"texts": own.texts, "context": 512, "prefill": 256}, {})
    expected, _ = _cells("smollm2-135m", methods, asked, range(3), range(2), "fp32", Path("seeds.jsonl"))
    assert {cell.key for cell in cells} == {cell.key for cell in expected}
    assert [cell.settings["seed"] for cell in cells[:6]] == [None] * 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": ("/etc/passwd",)}, "Texts must be among"),
        ({"texts": ("../hamlet.txt",)}, "Texts must be among"),
        ({"texts": ()}, "Choose at least one"),
        ({"texts": tuple(TEXTS)}, "Choose at most 3 texts"),
        ({"rotations": 1}, "rotation seeds must be a whole number from 2 to 16"),
        ({"rotations": 17}, "rotation seeds must be a whole number"),
        ({"samplings": 9}, "sampling seeds must be a whole number"),
        ({"context": 16384}, "context must be a whole number"),
        ({"bits": 9}, "Bits must be a whole number"),
        ({"against": "9"}, "Compare with must be one of"),
    ],
)
def test_what_a_browser_may_not_send_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        measure.cells(SeedsChoices(**changes), Choices(), AppConfig())


def test_an_exact_window_that_leaves_nothing_to_pack_is_refused() -> None:
    with pytest.raises(RequestError, match="packs none of the 256 tokens of a window"):
        measure.cells(SeedsChoices(), Choices(residual=210), AppConfig())


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("bits", "against", "rotations", "samplings", "context"), anything)
    ),
    st.lists(st.sampled_from([*TEXTS]) | st.text(max_size=20), max_size=4),
)
def test_any_choice_gives_cells_of_shipped_texts_or_one_sentence(values: dict[str, Any], texts: list[str]) -> None:
    own = replace(SeedsChoices(), **values, texts=tuple(texts))
    try:
        cells = measure.cells(own, Choices(), AppConfig())
    except RequestError:
        return
    assert 0 < len(cells) <= 200
    assert all(set(cell.settings["texts"]) <= set(TEXTS) for cell in cells)


def test_time_is_estimated_from_what_the_same_model_took() -> None:
    cells = tuple(record.cell for record in RECORDS)
    taken = sum(record.timing["elapsed"] for record in RECORDS)
    assert measure.seconds(cells, RECORDS) == pytest.approx(taken)
    other = [cell.model_copy(update={"model": "pythia-70m"}) for cell in cells]
    assert measure.seconds(other, RECORDS) is None


# --- findings and charts


def test_every_answer_is_counted_once() -> None:
    found = findings(RECORDS)
    assert [sum(one.counts) for one in found.greedy] == [16, 16]
    assert [sum(one.counts) for one in found.sampled] == [64, 64]
    never = [p for r in RECORDS if r.cell.settings["seed"] is None for p in r.detail["first_divergence"] if p is None]
    assert sum(one.counts[-1] for one in found.greedy) == len(never)
    chart = charts.first_divergence(found.greedy)
    assert len({trace.marker.pattern.shape for trace in chart.figure.data}) == 2
    assert list(chart.table.columns) == ["first differing token", *found.methods]


def test_dots_are_the_cells_and_intervals_the_librarys() -> None:
    found = findings(RECORDS)
    chart = charts.strips("kl_mean", found.strips["KL"])
    assert sorted(chart.table["KL"]) == sorted(
        value for r in RECORDS if (value := r.metrics.get("kl_mean")) is not None
    )
    spread = found.spreads["turboquant:bits=3"]["kl_mean"]
    mean = next(trace for trace in chart.figure.data if "interval" in trace.name)
    assert mean.x[0] == spread.mean
    assert mean.x[0] + mean.error_x.array[0] == pytest.approx(spread.high)
    sampled = [strip for strip in found.strips["First divergence"] if strip.answers == "sampled answers"]
    assert [len(strip.means) for strip in sampled] == [2, 2]
    assert len(measure.seed_words(found)) == 2


@pytest.mark.parametrize("count", [1, 2, 9, 17, 39])
def test_any_part_of_the_records_can_be_shown(count: int) -> None:
    found = findings(RECORDS[:count])
    for label, name in FIGURES.items():
        assert charts.strips(name, found.strips[label]).table[label].notna().all()
