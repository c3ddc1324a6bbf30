"""The Memory page: its figures are the library's, from a cold link, without a model."""

import html
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app.memory import charts
from app.memory import request as sizing
from app.memory.presets import FOLDER, presets
from app.memory.request import OWN, Choices, Plan, make_plan, measured_points
from app.tab.requests import RequestError, recipes
from app.tab.runs import Run
from app.tab.verdict import human_bytes
from tests.support.bench import Bench
from tests.support.factory import comparison
from turboquant import parse_method
from turboquant.sizing import MOST_TOKENS, kv_bytes

PAGE = "../pages/memory.py"
ODD = {"model_type": "gpt2", "n_layer": 4, "n_embd": 132, "n_head": 4}
LLAMA = json.loads((FOLDER / "llama-3.1-8b.json").read_text())["config"]


def opened(page: AppTest, **link: object) -> AppTest:
    """The page from a cold link."""
    for name, value in link.items():
        page.query_params[name] = str(value)
    page.switch_page(PAGE)
    page.run()
    assert not page.exception
    return page


def cards(page: AppTest) -> dict[str, tuple[str, str]]:
    return {metric.label: (metric.value, metric.delta) for metric in page.metric}


def said(page: AppTest) -> str:
    parts = [*page.markdown, *page.caption, *page.info, *page.warning]
    return html.unescape("\n".join(str(part.value) for part in parts)).replace("\u200b", "")


def run_of(plan: Plan, tokens: int = 500) -> Run:
    """A run whose model has the plan's shape."""
    base = comparison()
    shape = plan.shape
    same = {"layers": len(shape.layers), "query_heads": shape.query_heads, "kv_heads": shape.first.kv_heads}
    model = base.model.model_copy(update={**same, "head_dim": shape.first.key_dim, "dtype": "float32"})
    report = base.compressed.report.model_copy(update={"tokens": tokens, "bytes": 12_345_678})
    compressed = base.compressed.model_copy(update={"report": report})
    return Run(comparison=base.model_copy(update={"model": model, "compressed": compressed}))


# --- the page


def test_a_cold_link_shows_the_librarys_figures_and_loads_no_model(page: AppTest, bench: Bench) -> None:
    link = {"mem_model": "phi-2", "mem_keys": 3, "mem_values": 2, "mem_context": "2K", "mem_gpu": "T4-16GB"}
    shown = cards(opened(page, **link))
    plan = make_plan(Choices(model="phi-2", keys=3, values=2, context="2K", gpu="T4-16GB"))
    method = parse_method("turboquant:key_bits=3,value_bits=2")
    assert plan.tokens == 2048
    held, full = (kv_bytes(plan.shape, m, 2048).bytes for m in (method, parse_method("full")))
    assert shown["KV cache"] == (human_bytes(held), f"full: {human_bytes(full)}")
    assert shown["Longest context"] == (f"{plan.longest(method):,}", f"full: {plan.longest(plan.full):,}")
    assert shown["Largest batch"] == (f"{plan.rows(method):,}", f"full: {plan.rows(plan.full):,}")
    assert "2.78 billion" in shown["Weights"][1]
    assert len(page.get("plotly_chart")) == 2
    assert len(page.dataframe[0].value) == 1 + len(recipes())
    assert not bench.loads


def test_every_setting_reaches_the_figures(page: AppTest) -> None:
    opened(page)
    seen = [cards(page)]
    for change in (
        lambda: page.selectbox(key="mem_model").set_value("qwen2.5-7b"),
        lambda: page.selectbox(key="mem_method").set_value("kivi"),
        lambda: page.select_slider(key="mem_context").set_value("128K"),
        lambda: page.button_group(key="mem_keys").set_value(2),
        lambda: page.button_group(key="mem_values").set_value(3),
        lambda: page.button_group(key="mem_weights").set_value(8),
        lambda: page.number_input(key="mem_batch").set_value(2),
        lambda: page.number_input(key="mem_reserve").set_value(3.0),
        lambda: page.toggle(key="mem_growing").set_value(True),
        lambda: page.selectbox(key="mem_gpu").set_value("A100-40GB"),
        lambda: page.selectbox(key="mem_gpu").set_value("other"),  # 24 GB until another number is given
        lambda: page.number_input(key="mem_gb").set_value(30.0),
    ):
        change()
        page.run()
        assert not page.exception
        seen.append(cards(page))
    for before, after in itertools.pairwise(seen):
        assert before != after


@pytest.mark.parametrize("name", [*presets()])
def test_every_preset_opens(page: AppTest, name: str) -> None:
    opened(page, mem_model=name)
    assert f"**{presets()[name].title}.**" in said(page)
    assert cards(page)["KV cache"]


def test_a_link_with_nonsense_opens_with_the_defaults(page: AppTest) -> None:
    opened(page, mem_model="nope", mem_keys=99, mem_batch=-5, mem_context="7", mem_gpu="<b>", mem_reserve="NaN")
    assert "Llama" in said(page)
    assert cards(page)["KV cache"]


def test_a_joint_latent_is_said_and_counted(page: AppTest) -> None:
    opened(page, mem_model="deepseek-v2-lite")
    assert "All 27 layers keep every token (one joint latent of 512 numbers and a rotary part of 64" in said(page)
    value, full = cards(page)["KV cache"]
    assert full != f"full: {value}"


def test_sliding_and_recurrent_layers_are_said(page: AppTest) -> None:
    opened(page, mem_model="gemma-2-9b")
    assert "Of 42 layers 21 keep every token (8 KV heads, head_dim 256); 21 keep the last 4,096, which" in said(page)
    page.selectbox(key="mem_model").set_value("qwen3-next-80b").run()
    assert "36 are recurrent and keep no tokens; recurrent states take 74.25 MiB a row" in said(page)
    assert "recurrent states = 74.25 MiB" in page.code[-1].value


def test_weights_that_do_not_fit_are_said(page: AppTest) -> None:
    opened(page, mem_model="gpt-oss-20b", mem_gpu="8GB")
    assert "do not fit in this GPU" in page.warning[0].value
    assert cards(page)["Longest context"] == ("0", "full: 0")


def test_an_own_config_is_counted_refused_or_asked_for(page: AppTest) -> None:
    opened(page, mem_model=OWN)
    assert "Paste a config.json" in page.info[0].value
    assert not page.metric
    box = page.text_area(key="memory_config")
    box.set_value(json.dumps(LLAMA)).run()
    own = cards(page)
    assert "not part of the link" in said(page)
    page.text_area(key="memory_config").set_value('{"model_type": "llama", "num_hidden_layers": "many"}').run()
    assert "'num&#95;hidden&#95;layers' expected int, got str" in page.warning[0].value
    assert not page.metric
    page.selectbox(key="mem_model").set_value("llama-3.1-8b").run()
    assert cards(page) == own


def test_what_a_config_says_is_never_markup(page: AppTest) -> None:
    opened(page, mem_model=OWN)
    nasty = {**LLAMA, "model_type": "[x](http://y) <b> :tada:", "sliding_window": 64, "head_dim": 64}
    page.text_area(key="memory_config").set_value(json.dumps(nasty)).run()
    assert "](http" not in page.warning[0].value
    assert "<b>" not in page.warning[0].value
    assert ":tada:" not in page.warning[0].value


def test_a_method_that_a_model_rules_out_is_left_out_with_the_reason(page: AppTest) -> None:
    opened(page, mem_model=OWN)
    page.text_area(key="memory_config").set_value(json.dumps(ODD)).run()
    assert not page.exception
    assert len(page.dataframe[0].value) == len(recipes())
    assert "polarquant needs an even head_dim, got 33" in said(page)
    page.selectbox(key="mem_method").set_value("polarquant").run()
    assert not page.exception
    assert "polarquant needs an even head_dim" in html.unescape(page.info[0].value)


# --- plans


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nope"}, "model must be one of"),
        ({"method": "hf-quanto"}, "method must be one of"),
        ({"keys": 5}, "keys must be one of"),
        ({"keys": True}, "keys must be one of"),
        ({"context": "33K"}, "context must be one of"),
        ({"batch": 0}, "batch must be a number from 1"),
        ({"batch": 10**9}, "batch must be a number from 1"),
        ({"reserve": float("nan")}, "reserve must be a number from 0"),
        ({"gb": "lots"}, "gb must be a number from 1"),
    ],
)
def test_what_a_browser_may_not_send_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        make_plan(Choices(**changes))


def test_an_uploaded_file_is_limited() -> None:
    with pytest.raises(RequestError, match="at most 1,000,000 bytes"):
        make_plan(Choices(model=OWN), b" " * 1_000_001)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_upload_is_counted_or_refused(data: bytes | str) -> None:
    with pytest.raises(RequestError):
        make_plan(Choices(model=OWN), data)


def test_weights_that_do_not_fit_leave_nothing() -> None:
    plan = make_plan(Choices(gpu="8GB"))
    assert plan.longest(plan.full) == plan.rows(plan.method) == 0
    assert "do not fit" in charts.growth(plan, []).alt


def test_32_bit_weights_make_32_bit_values() -> None:
    wide, usual = (make_plan(Choices(weights=bits)) for bits in (32, 16))
    assert wide.held(wide.full).bytes == 2 * usual.held(usual.full).bytes
    assert wide.held(wide.method).key_bytes == usual.held(usual.method).key_bytes


def test_the_sums_add_up() -> None:
    plan = make_plan(Choices(model="gemma-2-9b", context="8K", batch=3))
    text = "\n".join(sizing.sums(plan))
    held = plan.held(plan.method)
    for size in (held.bytes, held.key_bytes, held.scale_bytes, held.exact_bytes, held.spare_bytes):
        assert f"= {human_bytes(size)}" in text
    assert "min" not in text
    assert "21 sliding layers x 8 KV heads x (256 + 256) numbers x 2 bytes x 4,096 tokens x 3 rows = 1.97 GiB" in text


# --- charts


def test_lines_end_in_the_same_figures_and_cross_where_the_context_no_longer_fits() -> None:
    plan = make_plan(Choices(keys=3, values=2))
    chart = charts.growth(plan, [])
    crossings = {t.name: t.x[0] for t in chart.figure.data if "fills the GPU" in t.name}
    assert crossings["Full cache, 16 bits fills the GPU"] == plan.longest(plan.full)
    assert len(crossings) == 5  # full, 4, 3 and 2 bits, and the chosen pair
    row = chart.table[chart.table["context"] == plan.tokens].iloc[0]
    assert row["Full cache, 16 bits: bytes"] == plan.held(plan.full).bytes
    assert len({(t.line.color, t.line.dash) for t in chart.figure.data if t.mode == "lines"}) == 5


def test_parts_add_up_to_what_is_held() -> None:
    plan = make_plan(Choices())
    table = charts.by_part(plan).table
    for _, row in table.iterrows():
        assert row.iloc[1:7].sum() == row["everything held"]


def test_measured_runs_of_the_same_shape_stand_on_the_chart() -> None:
    plan = make_plan(Choices(model="smollm2-135m"))
    run, other = run_of(plan), Run(comparison=comparison())
    points = measured_points(plan, [run, other])
    assert [(point.tokens, point.method) for point in points] == [(116, "full"), (500, "turboquant:bits=4")]
    chart = charts.growth(plan, points)
    traces = {t.name: t for t in chart.figure.data}
    assert list(traces["measured, compressed"].y) == [12_345_678]
    assert list(traces["measured, full"].x) == [116]
    assert chart.table["measured bytes"].dropna().tolist() == [points[0].bytes, 12_345_678]
    assert "2 points are measured" in chart.alt
    assert not measured_points(make_plan(Choices(model="smollm2-135m", batch=2)), [run])
    assert not measured_points(make_plan(Choices(model="phi-2")), [run])


def test_what_nothing_limits_is_left_empty() -> None:
    sliding = {**LLAMA, "model_type": "mistral", "sliding_window": 1024}
    plan = make_plan(Choices(model=OWN), json.dumps(sliding))
    assert plan.longest(plan.full) == MOST_TOKENS
    assert charts.methods_table(plan)["longest context"].isna().all()
    assert "no limit" in charts.growth(plan, []).alt
