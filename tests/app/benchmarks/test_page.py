"""The Benchmarks page: recorded figures with their source, the library's medians, and runs that can be stopped."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app.benchmarks import charts
from app.benchmarks import request as measure
from app.benchmarks.request import CONTEXTS, BenchChoices
from app.config import AppConfig
from app.tab import state
from app.tab.requests import Choices, RequestError
from tests.support.bench import ended, opened, said, until
from tests.support.cells import Cells
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.files import read_records

RECORDS = read_records(state.RESULTS / "generation.jsonl")
SINGLE = [record for record in RECORDS if record.cell.settings["batch"] == 1]


def stand_in(cell: Cell) -> ExperimentRecord:
    """A recorded result under another cell, with a step's attention as if it had been timed."""
    base = SINGLE[0]
    timed = {"attention_step_ms": 12.5, "full_attention_step_ms": 5.5}
    return base.model_copy(update={"cell": cell, "metrics": {**base.metrics, **timed}})


@pytest.fixture
def cells() -> Cells:
    return Cells(stand_in)


@pytest.fixture
def page(measuring: AppTest) -> AppTest:
    return measuring


# --- the page


def test_a_cold_link_shows_recorded_figures_with_their_source(page: AppTest, cells: Cells) -> None:
    text = said(opened(page, "benchmarks"))
    for record in SINGLE:
        assert f"{record.cell.method} at 544 tokens: {record.metrics['speed_ratio']:.2f} x the full cache" in text
        assert f"packing took {record.metrics['encode_step_ms']:.2f} ms" in text
    assert "say nothing about the speed of GPU kernels" in text
    sources = page.dataframe[0].value
    assert {"hardware", "date", "commit"} <= set(sources.columns)
    assert sources["results"].sum() == len(RECORDS) + len(measure.recorded_decode(state.recorded_benches()))
    assert any("not measured" in frame.value.to_string() for frame in page.dataframe)
    assert not cells.served


def test_results_come_cell_by_cell_and_stop_keeps_them(page: AppTest, cells: Cells) -> None:
    opened(page, "benchmarks", bench_view="This tab", bench_contexts=["256", "384", "640"], second="turboquant:bits=2")
    assert "6 cells · about" in said(page)
    assert "(estimated from the recorded run" in said(page)
    page.button(key="bench_run").click().run()
    cells.let(2)
    until(lambda: len(cells.served) == 2)
    page.run()
    assert not page.exception
    assert "2 of 6 cells." in said(page)
    assert "attention over codes 12.5 ms instead of 5.5 ms" in said(page)
    page.button(key="bench_run_stop").click().run()
    ended(page)
    assert "2 of 6 results are kept" in said(page)
    cells.let(4)
    page.button(key="bench_run").click().run()
    ended(page)
    assert len(cells.served) == len({cell.key for cell in cells.served}) == 6
    assert "All of it is measured (6 cells)." in said(page)
    assert len(page.get("plotly_chart")) == 6  # of attention the step alone was timed
    assert "Attention, prompt: not measured" in said(page)


@pytest.mark.parametrize(
    "link",
    [
        {"bench_view": "<b>"},
        {"bench_view": "This tab", "bench_contexts": ["1", "x"], "bench_tokens": "-4", "bench_batch": "1e9"},
        {"bench_view": "This tab", "bench_contexts": "", "bench_repeats": "NaN"},
        {"bench_view": "This tab", "second": "full", "residual": "4000"},
    ],
)
def test_a_link_with_nonsense_opens(page: AppTest, link: dict[str, Any]) -> None:
    opened(page, "benchmarks", **link)


# --- cells


def test_every_context_has_a_cell_of_every_method() -> None:
    cells = measure.cells(BenchChoices(), Choices(second="turboquant:bits=2"), AppConfig())
    assert [(cell.settings["context"], cell.method) for cell in cells] == [
        (context, f"turboquant:bits={bits}") for context in (256, 640, 1024) for bits in (4, 2)
    ]
    assert all(cell.settings["text"] == "persuasion" for cell in cells)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contexts": ()}, "Choose from 1 to"),
        ({"contexts": (256, 16384)}, "A context must be a whole number"),
        ({"contexts": ("256",)}, "A context must be a whole number"),
        ({"contexts": (4096,), "batch": 8}, "8 rows of 4,096 tokens are more than the 8,192"),
        ({"contexts": (256,), "tokens": 256}, "New tokens must be fewer than the shortest context of 256"),
        ({"tokens": 1}, "New tokens must be a whole number"),
        ({"repeats": 11}, "Rounds must be a whole number"),
        ({"batch": 0}, "Rows must be a whole number"),
    ],
)
def test_what_a_browser_may_not_send_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        measure.cells(BenchChoices(**changes), Choices(), AppConfig())


def test_a_method_that_would_pack_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="packs none of 256 tokens"):
        measure.cells(BenchChoices(), Choices(residual=300), AppConfig())


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("tokens", "batch", "repeats"), anything)),
    st.lists(st.sampled_from(CONTEXTS) | anything, max_size=7),
)
def test_any_choice_gives_cells_or_one_sentence(values: dict[str, Any], contexts: list[Any]) -> None:
    try:
        cells = measure.cells(replace(BenchChoices(), **values, contexts=tuple(contexts)), Choices(), AppConfig())
    except RequestError:
        return
    assert 0 < len(cells) <= len(CONTEXTS)


# --- rows and charts


def test_the_floor_is_the_codes_alone() -> None:
    cache = SINGLE[0].cache
    assert cache is not None
    values = cache.full_precision_bytes / 2
    assert measure.byte_floor(cache) == pytest.approx(cache.bytes / (values * 2 / 8))  # 2-bit codes
    assert measure.byte_floor(None) is None
    assert measure.byte_floor(cache.model_copy(update={"payload_ratio": None})) is None


def test_words_say_measured_facts_only() -> None:
    row = measure.row(SINGLE[0])
    assert "slower in 2 rounds. A step takes" in measure.words(row)
    assert "attention" not in measure.words(row)
    close = replace(row, tokens_per_second=row.full_tokens_per_second, ratio=1.0)
    assert "no clear difference, the rounds overlap" in measure.words(close)
    assert "a single round does not tell" in measure.words(replace(row, rounds=1))
    decode = measure.row(measure.recorded_decode(state.recorded_benches())[0])
    assert "its parts were not measured" in measure.words(decode)


def test_bars_and_whiskers_are_the_records() -> None:
    rows = measure.rows(SINGLE)
    chart = charts.speed(rows)
    full, own, _ = chart.figure.data
    m = rows[0].tokens_per_second
    assert full.y[0] == SINGLE[0].metrics["full_tokens_per_second"]
    assert own.y[0] == m.median
    assert own.y[0] + own.error_y.array[0] == pytest.approx(m.p80)
    assert own.y[0] - own.error_y.arrayminus[0] == pytest.approx(m.p20)
    assert len({trace.marker.pattern.shape for trace in chart.figure.data}) == 3
    assert charts.against_context(rows, "attention_step_ms") is None


def test_a_share_of_a_step() -> None:
    row = measure.row(SINGLE[0])
    m: dict[str, Any] = SINGLE[0].metrics
    assert measure.encode_share(row) == pytest.approx(0.1 * m["encode_step_ms"] * m["tokens_per_second"])


def test_failed_cells_have_no_row() -> None:
    failed = SINGLE[0].model_copy(update={"metrics": {}, "error": "too long"})
    assert measure.rows([failed]) == []
    assert len(measure.table_rows(measure.rows(RECORDS))) == len(RECORDS)


def test_recorded_kernels_are_on_the_page() -> None:
    *kernels, (title, _, heads) = measure.recorded_tables(state.recorded_benches())
    words = [title.split()[0] for title, *_ in kernels]
    assert words == ["One", "Attention", "Attention", "Packing", "Decode", "The"]
    assert title.startswith("Comparing")
    assert len(heads) >= 2
    for _, note, lines in kernels:
        assert "NVIDIA H" in note
        assert {line["GPU"] for line in lines} <= {"H100", "H200"}
        assert "driver" in note
        assert all("`" not in line["method"] for line in lines)
    assert measure.recorded_tables([]) == []
