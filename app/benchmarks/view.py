"""The Benchmarks page's blocks: where numbers come from, what can be measured here, speed and memory in charts."""

from collections.abc import Sequence

import streamlit as st

from app.benchmarks import charts
from app.benchmarks import request as measure
from app.benchmarks.request import BATCHES, CONTEXTS, REPEATS, BenchChoices, Row
from app.tab import state
from app.tab.measure import Plan, as_json, present
from app.tab.runs import csv_text
from app.ui import definitions, figures, page
from app.ui.measuring import HERE, RECORDED, Measurement, counted
from app.ui.panes import escape
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import metric

_START = BenchChoices()
DRAWN = (
    "tokens_per_second",
    "time_to_first_token_ms",
    "encode_share_pct",
    "encode_prompt_ms",
    "attention_step_ms",
    "attention_prompt_ms",
)
"""What is drawn against the context."""

MEASUREMENT = Measurement(
    name="benchmarks",
    prefix="bench",
    start=_START,
    experiment="generation",
    recorded="generation",
    cells=measure.cells,
    private=lambda chosen: False,  # shipped texts and numbers
    seconds=measure.seconds,
)


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


def recorded() -> None:
    """Show the measurements that ship with the app, one row a source, then what was chosen of them."""
    records = state.recorded("generation")
    benches = state.recorded_benches()
    decode = measure.recorded_decode(benches)
    if not records and not decode:
        page.empty("No recorded benchmark comes with this copy of the app. Choose This tab to make one.")
        return
    named = [("generation, with its parts", record.environment) for record in records]
    named += [("decoding only", record.environment) for record in decode]
    MEASUREMENT.source(records, RECORDED, _files([*records, *decode]))
    st.dataframe(measure.sources(named), hide_index=True, alt="Where and when the recorded results were measured.")
    st.subheader("Generation: speed, packing, memory", anchor=False)
    caution(records)
    for batch in sorted({record.cell.settings["batch"] for record in records}):
        part = [record for record in records if record.cell.settings["batch"] == batch]
        st.markdown(f"**{batch} {'row' if batch == 1 else 'rows'}**")
        results(part, f"recorded_{batch}")
    if decode:
        st.subheader("Decoding alone: other methods and a longer prompt", anchor=False)
        table(measure.rows(decode))
    tables = measure.recorded_tables(benches)
    if tables:
        st.subheader("Kernels alone", anchor=False)
        st.markdown("Speed and memory only: models of a known shape with random weights say nothing about answers.")
    for title, note, lines in tables:
        st.markdown(f"**{title}**")
        st.dataframe(lines, hide_index=True, alt=f"{title}, recorded.")
        st.caption(escape(note))


def measured(plan: Plan) -> None:
    """Show what this tab has measured of the plan."""
    cells = MEASUREMENT.asked(plan)
    records = present(cells, state.current_records())
    good = [record for record in records if record.error is None]
    MEASUREMENT.source(records, HERE, _files(good), f"{len(good)} of {counted(len(cells), 'cell')}.")
    if not records:
        page.empty(
            "The first cell is on its way; results appear cell by cell."
            if state.busy()
            else "Nothing is measured yet for these settings. Press Measure; results appear cell by cell."
        )
        return
    for record in records:
        if record.error:
            st.warning(escape(f"{record.cell}: {record.error}"), icon=":material/error:")
    caution(good)
    if good:
        results(good, "here")


def results(records: Sequence[ExperimentRecord], key: str) -> None:
    """Draw the rows of some records of one batch: sentences, charts and table."""
    rows = measure.rows(records)
    for row in rows:
        st.markdown(f"- {escape(measure.words(row))}")
    figures.show(
        metric("tokens_per_second").heading, charts.speed(rows), f"bench_speed_{key}", help=definitions.BENCH_SPEED
    )
    if len({row.context for row in rows}) > 1:
        _against_context(rows, key)
    table(rows)


def caution(records: Sequence[ExperimentRecord]) -> None:
    """Say what speeds of a CPU are not."""
    if records and all(record.environment.device.startswith("cpu") for record in records):
        st.info("These are speeds of a CPU. They say nothing about the speed of GPU kernels.", icon=":material/info:")


def _against_context(rows: Sequence[Row], key: str) -> None:
    left, right = st.columns(2, gap="medium")
    for number, name in enumerate(DRAWN):
        shown = metric(name)
        with (left, right)[number % 2]:
            chart = charts.against_context(rows, name)
            if chart is None:
                st.caption(f"{shown.heading}: not measured.")
            else:
                figures.show(f"{shown.heading} against context", chart, f"bench_{number}_{key}", help=shown.help)


def table(rows: Sequence[Row]) -> None:
    """Every row with its hardware, date and commit; what was not measured says so."""
    shown = [_cells(row) for row in rows]
    memory = [metric(name) for name in ("bytes", "peak_memory_bytes", "byte_floor")]
    st.markdown("**All figures**", help=" ".join(f"{one.heading}: {one.help}" for one in memory))
    st.dataframe(
        shown,
        hide_index=True,
        column_config={memory[-1].column: st.column_config.TextColumn(help=memory[-1].help)},
        alt="Speed, memory and time of every method and context, with hardware, date and commit.",
    )


def _files(records: Sequence[ExperimentRecord]) -> list[page.File]:
    return [
        page.File("Figures as CSV", ".csv", "text/csv", lambda: _csv(records)),
        page.File("Records as JSON", ".json", "application/json", lambda: as_json(records)),
    ]


def _csv(records: Sequence[ExperimentRecord]) -> str:
    lines = measure.table_rows(measure.rows(records))
    return csv_text(list(lines[0]), [[*one.values()] for one in lines])


def _cells(row: Row) -> dict[str, str | int]:
    return {
        "method": row.method,
        "context": row.context,
        "rows": row.batch,
        **{metric(name).column: metric(name).said(value) for name, value in measure.figures(row).items()},
        "measured on": row.where,
        "date": row.environment.created[:10],
        "commit": row.environment.commit or "no commit",
    }
