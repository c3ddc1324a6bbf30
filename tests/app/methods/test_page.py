"""The Methods page: the recorded comparison from a cold link, a run of one's own, what each method is."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app.compare.request import compare_request
from app.config import AppConfig
from app.engine import backend
from app.engine.engine import Engine
from app.methods import charts
from app.methods import request as methods
from app.methods import view as components
from app.methods.request import START, MethodsChoices
from app.tab import state
from app.tab.measure import as_json, json_lines, made_with, report
from app.tab.requests import Choices, RequestError
from tests.support.bench import MAIN, ended, opened, said, until
from tests.support.cells import HERE, Cells
from tests.support.factory import report as cache_report
from tests.support.models import tiny_loaded
from turboquant.methods import METHODS, parse_method
from turboquant.records.experiment import Cell, ExperimentRecord

CONFIG = AppConfig()
RECORDED = [str(record.cell.method) for record in state.recorded("methods")]
SMALL = {"methods_chosen": ["turboquant:bits=2", "rtn:bits=4"], "methods_measured": "64"}


def record(cell: Cell) -> ExperimentRecord:
    """A record made by hand; nothing was measured."""
    method = parse_method(str(cell.method))
    bits = 32.0 if method.payload_bits is None or method.name == "full" else method.payload_bits + 1
    kl = 0.0 if method.name == "full" else 2.0**-bits
    names = ("kl_low", "kl_high", "same_top_pct", "ppl", "delta_ppl_pct")
    return ExperimentRecord(
        cell=cell,
        metrics={"kl_mean": kl, "bits_per_value": bits, "packed_bits_per_value": None, **dict.fromkeys(names, 1.0)},
        cache=cache_report("CompressedCache", 64, 80),
        timing={"elapsed": 3.0, "full": 2.0, "method": 3.0},
        environment=HERE,
    )


@pytest.fixture
def cells() -> Cells:
    return Cells(record)


@pytest.fixture
def page(measuring: AppTest) -> AppTest:
    return measuring


# --- the page


def test_a_cold_link_shows_the_recorded_comparison_with_its_source(page: AppTest, cells: Cells) -> None:
    opened(page, "methods")
    recorded = state.recorded("methods")
    table = page.dataframe[0].value
    assert set(table["method"]) == {record.cell.method for record in recorded}
    by_method = {record.cell.method: record for record in recorded}
    for row in table.to_dict("records"):
        assert row["KL"] == by_method[row["method"]].metrics["kl_mean"]
        assert row["bits held"] == by_method[row["method"]].metrics["bits_per_value"]
    assert str(recorded[0].environment.commit) in said(page)
    assert "2,048 tokens each" in said(page)
    assert len(page.get("plotly_chart")) == 1
    assert not cells.served


def test_the_switch_changes_what_the_front_counts(page: AppTest) -> None:
    opened(page, "methods")
    held = page.dataframe[0].value["front"].tolist()
    page.button_group(key="methods_bits").set_value("packed bits").run()
    assert not page.exception
    assert page.dataframe[0].value["front"].tolist() != held


def test_a_run_shows_every_method_and_goes_on_where_it_stopped(page: AppTest, cells: Cells) -> None:
    cells.let(2)
    opened(page, "methods", **SMALL)
    assert "2 methods and the full cache" in said(page)
    assert "(estimated from the recorded run" in said(page)
    page.button(key="methods_run").click().run()
    until(lambda: len(cells.served) == 2)
    page.run()
    assert "On the front, from the fewest bits up: turboquant:bits=2 (3.00 bits)." in said(page)
    page.button(key="methods_run_stop").click().run()
    ended(page)
    assert "2 of 3 results are kept" in said(page)
    assert "2 of 3 measured" in said(page)
    cells.let()
    page.button(key="methods_run").click().run()
    ended(page)
    assert [cell.method for cell in cells.served] == ["full", "turboquant:bits=2", "rtn:bits=4"]
    assert cells.served[0].settings["prefill"] == 448
    assert page.dataframe[0].value["method"].tolist() == ["turboquant:bits=2", "rtn:bits=4", "full"]
    assert page.button(key="methods_run").disabled


def test_a_method_that_fails_is_said_in_words_and_the_rest_stays(page: AppTest, cells: Cells) -> None:
    def make(cell: Cell) -> ExperimentRecord:
        if cell.method == "rtn:bits=4":
            return ExperimentRecord(cell=cell, environment=HERE, error="heads of *80* do not fit groups of 32")
        return record(cell)

    cells.make = make
    opened(page, "methods", **SMALL)
    cells.let()
    page.button(key="methods_run").click().run()
    ended(page)
    assert "rtn:bits=4 could not be measured: heads of *80* do not fit groups of 32" in said(page)
    assert page.dataframe[0].value["method"].tolist() == ["turboquant:bits=2", "full"]


def test_a_method_typed_wrongly_is_refused_in_one_sentence(page: AppTest) -> None:
    opened(page, "methods", methods_more="kivi turboquant:bits=99")
    assert "turboquant:bits=99 cannot be used: bits must be" in said(page)
    assert page.button(key="methods_run").disabled


def test_the_link_keeps_every_method(page: AppTest) -> None:
    opened(page, "methods", methods_more="kivi:bits=2 turboquant:key_bits=4,value_bits=2", **SMALL)
    link = next(code.value for code in page.code if "methods_chosen=" in code.value)
    assert link.count("methods_chosen=") == 2
    assert "methods_more=kivi%3Abits%3D2+turboquant%3Akey_bits%3D4%2Cvalue_bits%3D2" in link
    assert "methods_measured=64" in link
    assert "4 methods and the full cache" in said(page)


WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from(["512", "64", "kivi", "hf-quanto:bits=3", "/etc/passwd", "nan"])
)
NAMES = [f"methods_{name}" for name in ("chosen", "more", "texts", "context", "measured", "view", "bits")]
NAMES += ["model", "second", "weights"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(link=st.dictionaries(st.sampled_from(NAMES), st.lists(WORDS, min_size=1, max_size=3), max_size=6))
def test_no_address_crashes_the_page(page: AppTest, link: dict[str, list[str]]) -> None:
    fresh = AppTest.from_file(MAIN, default_timeout=60)
    opened(fresh, "methods", **link)
    assert fresh.title[0].value == "What quality costs in bits"


def test_a_small_real_model_is_measured_from_the_page(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("llama", num_hidden_layers=2)
    real = Engine(lambda name, *, weights, progress: loaded, backend.run, is_expected=backend.is_expected)
    monkeypatch.setattr(state, "engine", lambda: real)
    try:
        opened(
            page,
            "methods",
            methods_chosen=["turboquant:bits=2", "turboquant:bits=4"],
            methods_more="rtn:residual_length=600",
        )
        page.button(key="methods_run").click().run()
        until(lambda: not real.job(page.session_state["session_id"]).live, 60)
        page.run()
        table = page.dataframe[0].value.set_index("method")
        assert list(table.index) == ["turboquant:bits=2", "turboquant:bits=4", "full"]
        assert 0 < table["KL"]["turboquant:bits=4"] < table["KL"]["turboquant:bits=2"]
        assert table["bits held"]["full"] == 32
        assert "packs none of 512 tokens" in said(page)
        assert "512 tokens each, the first 384 read in one call, the last 128 measured" in said(page)
    finally:
        real.close()


# --- the server's own checks


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"texts": ("/etc/passwd",)}, "Texts must be among persuasion"),
        ({"texts": ()}, "Choose at least one of texts"),
        ({"chosen": ()}, "Choose at least one method"),
        ({"chosen": ("nope",)}, "nope cannot be used"),
        ({"more": "rtn" + ",bits=4" * 50}, "A method has at most 200 characters"),
        ({"chosen": START * 100}, "At most 199 methods can be measured at once, got 600"),
        ({"context": "700"}, "Context must be among 512"),
        ({"context": "16384"}, "Context must be among 512"),
        ({"measured": "1"}, "Measured tokens must be among 64"),
        ({"measured": "512"}, "Measured tokens must be fewer than the context"),
    ],
)
def test_what_a_browser_may_not_send_is_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        methods.cells(MethodsChoices(**chosen), Choices(), CONFIG)
    assert message in str(error.value)


def test_the_full_cache_is_measured_once_and_first() -> None:
    cells = methods.cells(MethodsChoices(chosen=("rtn",), more=" rtn:bits=4  full "), Choices(), CONFIG)
    assert [cell.method for cell in cells] == ["full", "rtn:bits=4"]


def test_the_estimate_of_the_recorded_run_is_near_what_it_took() -> None:
    records = state.recorded("methods")
    took = sum(one.timing["elapsed"] for one in records)
    assert methods.seconds([one.cell for one in records], records) == pytest.approx(took, rel=0.2)
    assert methods.seconds(methods.cells(MethodsChoices(), Choices(model="org/other"), CONFIG), records) is None


# --- what a method is, and the way to Compare


def test_every_recorded_method_is_explained_in_two_sentences() -> None:
    for name in {str(record.cell.method).partition(":")[0] for record in state.recorded("methods")} | set(METHODS):
        about = methods.about(name)
        assert about is not None
        assert about.summary.count(". ") >= 1, name
        assert about.summary.endswith(".")
        assert about.reference
    tq = methods.about("turboquant:bits=2")
    assert tq is not None
    assert tq.paper == "https://arxiv.org/abs/2504.19874"
    assert methods.about("gone:bits=2") is None


@pytest.mark.parametrize("method", [m for m in RECORDED if m != "full"])
def test_compare_is_given_the_method(method: str) -> None:
    found = methods.compare_settings(method, Choices(residual=96, second="rtn:bits=4"))
    choices = Choices(**{**found, "second": found["second"] or ""})
    assert compare_request(choices, "Hello", CONFIG).methods[-1] == method
    assert bool(choices.second) == (method.startswith("hf-") or "qjl=" in method or "rotation=" in method)


def test_the_button_opens_compare_with_the_selected_method(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "table", lambda records: "kivi:bits=2")
    opened(page, "methods", bits="3")
    assert METHODS["kivi"].summary in said(page)
    page.button(key="methods_use").click().run()
    assert not page.exception
    assert page.title[0].value != "What quality costs in bits"
    assert [page.session_state[name] for name in ("recipe", "bits", "residual", "sinks")] == ["kivi", 2, 128, 0]


# --- charts and exports


def test_the_plot_draws_every_point_and_the_front() -> None:
    rows = methods.rows(state.recorded("methods"))
    chart = charts.pareto(rows)
    line, *families = chart.figure.data
    drawn = [method for trace in families for method, *_ in trace.customdata]
    assert sorted(drawn) == sorted(row.method for row in rows if row.figures["kl_mean"])
    looks = [(trace.marker.color, trace.marker.symbol) for trace in families]
    assert len(set(looks)) == len(looks)
    assert list(line.x) == sorted(line.x)
    assert list(line.y) == sorted(line.y, reverse=True)
    assert "turboquant:bits=4" in chart.alt
    assert charts.pareto([]).alt == "No compressed method is measured yet."


def test_exports_hold_every_method() -> None:
    records = state.recorded("methods")
    assert len(json_lines(records).splitlines()) == len(records)
    assert ", ".join(charts.methods_table([]).columns) == (
        "method, KL, same top, perplexity change, bits held, packed bits, times smaller, front"
    )
    assert as_json(records).count('"experiment": "perplexity"') == len(records)
    assert "kivi:bits=2" in report(records)
    assert "1 thread" in made_with(records)
