"""The Benchmarks page's blocks: where numbers come from, what can be measured here, speed and memory in charts."""

from collections.abc import Sequence
from dataclasses import fields

import streamlit as st

from app import definitions, state
from app.charts import benchmarks as charts
from app.components import figures, page, work
from app.components.page import Tag
from app.components.panes import escape
from app.jobs import CellsRequest
from app.measure import as_json, duration, made_with, missing, present
from app.measure import benchmarks as measure
from app.measure.benchmarks import BATCHES, CONTEXTS, REPEATS, BenchChoices, Plan, Row
from app.requests import RequestError
from app.runs import csv_text
from app.verdict import human_bytes
from turboquant.results import ExperimentRecord

RECORDED, HERE = "Recorded", "Run here"
_START = BenchChoices()


def chooser() -> str:
    """Draw what is shown: recorded results or those of this tab."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    show = row.segmented_control(
        "Results", (RECORDED, HERE), default=RECORDED, required=True, key="bench_show", bind="query-params"
    )
    with row:
        page.copy_link()
    return HERE if show == HERE else RECORDED


def controls() -> None:
    """Draw what can be measured here."""
    config = state.config()
    with st.container(border=True):
        st.pills(
            "Contexts (tokens a row)",
            CONTEXTS,
            selection_mode="multi",
            default=list(_START.contexts),
            key="bench_contexts",
            bind="query-params",
            help="Prompt and new tokens together. One cell a context and method.",
        )
        row = st.container(horizontal=True, vertical_alignment="bottom")
        most = min(measure.MOST_NEW_TOKENS, config.max_new_tokens)
        for name, words, (low, high), help in (
            ("tokens", "New tokens", (2, most), "Generated for every row, past any end of text."),
            ("batch", "Rows", BATCHES, "Prompts that are answered at once."),
            ("repeats", "Rounds", REPEATS, "Timed rounds; all sides take turns in each. One more run warms up."),
        ):
            start = min(getattr(_START, name), high)
            row.number_input(words, low, high, start, key=f"bench_{name}", bind="query-params", help=help, width=130)
        st.caption("Model, method and second method are those of the sidebar; the full cache is always measured too.")


def said() -> BenchChoices:
    """What the widgets say, unchecked; one that is not there keeps its default."""
    found = {
        field.name: st.session_state[f"bench_{field.name}"]
        for field in fields(BenchChoices)
        if st.session_state.get(f"bench_{field.name}") is not None
    }
    return BenchChoices(**{**found, "contexts": tuple(found.get("contexts", _START.contexts))})


def plan_now() -> Plan:
    """The cells of what the widgets say now, checked."""
    return measure.make_plan(said(), state.choices(), state.config())


def request() -> CellsRequest:
    """The cells that are missing for what the widgets say now."""
    return plan_now().request(state.records(), "Benchmarks", "benchmarks")


def run_bar() -> Plan | None:
    """Draw the buttons with what would be done; return the plan, or None where it cannot be done."""
    try:
        plan, refusal = plan_now(), None
    except RequestError as error:
        plan, refusal = None, escape(str(error))
    words = ""
    if plan is not None:
        left = missing(plan.cells, state.records())
        there = len(plan.cells) - len(left)
        words = f"{there} of {len(plan.cells)} cells are measured. {_time(plan)}" if left else ""
        if not left:
            refusal = f"All {there} cells are measured. Choose other contexts or settings to go on."
    work.bar("Measure", request, plan=words, key="bench_run", disabled=None if state.busy() else refusal)
    return plan


def _time(plan: Plan) -> str:
    own = [record for record in state.records().values() if record.cell.experiment == "generation"]
    for known, source in ((own, "cells measured in this tab"), (state.recorded("generation"), "a recorded run")):
        seconds = measure.estimate_s(missing(plan.cells, state.records()), known)
        if seconds is not None:
            return f":orange-badge[:material/calculate: Estimated] about {duration(seconds)}, from {source}."
    return "How long it takes is not known before the first cell of this model."


def recorded() -> None:
    """Show the measurements that ship with the app, one row a source, then what was chosen of them."""
    records = state.recorded("generation")
    decode = measure.recorded_decode(state.RESULTS)
    metrics = measure.recorded_metrics(state.RESULTS)
    if not records and not decode:
        page.empty("No recorded benchmark comes with this copy of the app. Choose Run here to make one.")
        return
    named = [("generation, with its parts", record.environment) for record in records]
    named += [("decoding only", bench.environment) for bench in decode]
    page.tag("recorded")
    st.dataframe(measure.sources(named), hide_index=True, alt="Where and when the recorded results were measured.")
    st.subheader("Generation: speed, packing, memory", anchor=False)
    _tagged("recorded", made_with(records))
    caution(records)
    for batch in sorted({record.cell.settings["batch"] for record in records}):
        part = [record for record in records if record.cell.settings["batch"] == batch]
        st.markdown(f"**{batch} {'row' if batch == 1 else 'rows'}**")
        results(part, f"recorded_{batch}")
    if decode:
        st.subheader("Decoding alone: other methods and a longer prompt", anchor=False)
        table([measure.decode_row(bench) for bench in decode], "decode")
    if metrics:
        st.subheader("How fast heads are compared", anchor=False)
        st.markdown(
            "Not a model: the time to compare one layer's attention heads, full against compressed, all at once and "
            "in a plain loop over heads and queries. It says why a run with its head scores takes no longer."
        )
        st.dataframe(metrics, hide_index=True, alt="Time to compare the heads of one layer, on a GPU and on a CPU.")


def measured(plan: Plan | None) -> None:
    """Show what this tab has measured of the plan."""
    records = present(plan.cells, state.records()) if plan else []
    good = [record for record in records if record.error is None]
    if plan is None or not records:
        page.empty(
            "The first cell is on its way; results appear cell by cell."
            if state.busy()
            else "Nothing is measured yet for these settings. Press Measure; results appear cell by cell."
        )
        return
    _tagged("measured", f"{len(good)} of {len(plan.cells)} cells. {made_with(good)}")
    for record in records:
        if record.error:
            st.warning(escape(f"{record.cell}: {record.error}"), icon=":material/error:")
    caution(good)
    if good:
        results(good, "here")


def _tagged(kind: Tag, words: str) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        page.tag(kind)
        st.caption(escape(words), width="stretch")


def results(records: Sequence[ExperimentRecord], key: str) -> None:
    """Draw the rows of some records of one batch: sentences, charts, table and files."""
    rows = measure.rows(records)
    for row in rows:
        st.markdown(f"- {escape(measure.words(row))}")
    figures.show("Speed", charts.speed(rows), f"bench_speed_{key}", help=definitions.BENCH_SPEED)
    if len({row.context for row in rows}) > 1:
        _against_context(rows, key)
    table(rows, key, records)


def caution(records: Sequence[ExperimentRecord]) -> None:
    """Say what speeds of a CPU are not."""
    if records and all(record.environment.device.startswith("cpu") for record in records):
        st.info("These are speeds of a CPU. They say nothing about the speed of GPU kernels.", icon=":material/info:")


def _against_context(rows: Sequence[Row], key: str) -> None:
    left, right = st.columns(2, gap="medium")
    drawn = (
        (
            left,
            "Tokens/s against context",
            definitions.BENCH_SPEED,
            lambda r: r.tokens_per_second.median,
            lambda r: r.full_tokens_per_second.median,
            "tokens/s",
        ),
        (
            right,
            "Time to first token",
            definitions.BENCH_FIRST,
            lambda r: r.first_ms.median,
            lambda r: r.full_first_ms.median,
            "ms",
        ),
        (left, "Encode, share of a step", definitions.BENCH_PARTS, measure.encode_share, None, "%"),
        (right, "Encode of the prompt", definitions.BENCH_PARTS, lambda r: r.encode_prompt_ms, None, "ms"),
        (
            left,
            "Attention, a step",
            definitions.BENCH_PARTS,
            lambda r: r.attention_step_ms,
            lambda r: r.full_attention_step_ms,
            "ms",
        ),
        (
            right,
            "Attention of the prompt",
            definitions.BENCH_PARTS,
            lambda r: r.attention_prompt_ms,
            lambda r: r.full_attention_prompt_ms,
            "ms",
        ),
    )
    for number, (column, title, help, own, full, unit) in enumerate(drawn):
        with column:
            chart = charts.against_context(rows, own, full, title, unit)
            if chart is None:
                st.caption(f"{title}: not measured.")
            else:
                figures.show(title, chart, f"bench_{number}_{key}", help=help)


def table(rows: Sequence[Row], key: str, records: Sequence[ExperimentRecord] = ()) -> None:
    """Every row with its hardware, date and commit; what was not measured says so. And the files."""
    shown = [_cells(row) for row in rows]
    st.markdown("**All figures**", help=f"{definitions.BENCH_MEMORY} {definitions.BYTE_FLOOR}")
    st.dataframe(
        shown,
        hide_index=True,
        column_config={"x byte floor": st.column_config.TextColumn(help=definitions.BYTE_FLOOR)},
        alt="Speed, memory and time of every method and context, with hardware, date and commit.",
    )
    lines = measure.table_rows(rows)
    files = [
        page.File(
            "Figures as CSV", ".csv", "text/csv", lambda: csv_text(list(lines[0]), [[*one.values()] for one in lines])
        )
    ]
    if records:
        files.append(page.File("Records as JSON", ".json", "application/json", lambda: as_json(records)))
    page.downloads(f"benchmarks-{key}", files)


def _cells(row: Row) -> dict[str, str | int]:
    def number(value: float | None, digits: int, unit: str = "") -> str:
        return "not measured" if value is None else f"{value:,.{digits}f}{unit}"

    def size(value: int | None) -> str:
        return "not measured" if value is None else human_bytes(value)

    return {
        "method": row.method,
        "context": row.context,
        "rows": row.batch,
        "tokens/s": number(row.tokens_per_second.median, 1),
        "full, tokens/s": number(row.full_tokens_per_second.median, 1),
        "ratio": number(row.ratio, 2),
        "first token": number(row.first_ms.median, 0, " ms"),
        "full, first token": number(row.full_first_ms.median, 0, " ms"),
        "encode, a step": number(row.encode_step_ms, 2, " ms"),
        "attention, a step": number(row.attention_step_ms, 1, " ms"),
        "full, attention": number(row.full_attention_step_ms, 1, " ms"),
        "held": size(row.bytes),
        "full, held": size(row.full_bytes),
        "x byte floor": number(row.floor, 2),
        "peak": size(row.peak_bytes),
        "full, peak": size(row.full_peak_bytes),
        "measured on": row.where,
        "date": row.environment.created[:10],
        "commit": row.environment.commit or "no commit",
    }
