"""The Seeds page's blocks: what is shown, what can be measured here, and what the records say."""

from collections.abc import Sequence
from dataclasses import fields

import streamlit as st

from app import definitions, state
from app.charts import seeds as charts
from app.components import figures, page, work
from app.components.panes import escape
from app.jobs import CellsRequest
from app.measure import as_json, duration, made_with, missing, present
from app.measure import seeds as measure
from app.measure.seeds import AGAINST, BITS, CONTEXTS, METRICS, Findings, Plan, SeedsChoices
from app.requests import RequestError
from app.runs import csv_text
from turboquant.results import ExperimentRecord
from turboquant.texts import TEXTS

RECORDED, HERE = "Recorded", "Run here"
_START = SeedsChoices()
_ICONS = {True: ":material/check_circle:", False: ":material/casino:", None: ":material/hourglass_empty:"}


def chooser() -> tuple[str, str]:
    """Draw what is shown (recorded results or those of this tab) and which figure; return both."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    show = row.segmented_control(
        "Results", (RECORDED, HERE), default=RECORDED, required=True, key="seeds_show", bind="query-params"
    )
    metric = row.selectbox(
        "Figure", list(METRICS), key="seeds_metric", bind="query-params", help=definitions.SEED_METRICS, width=220
    )
    with row:
        page.copy_link()
    return (show if show == HERE else RECORDED), (metric if metric in METRICS else next(iter(METRICS)))


def controls() -> None:
    """Draw what can be measured here."""
    with st.container(border=True):
        row = st.container(horizontal=True, vertical_alignment="bottom")
        row.selectbox("Bits", BITS, BITS.index(_START.bits), key="seeds_bits", bind="query-params", width=90)
        row.selectbox(
            "Compare with (bits)",
            AGAINST,
            AGAINST.index(_START.against),
            key="seeds_against",
            bind="query-params",
            width=150,
        )
        for name, words, (low, high), help in (
            ("rotations", "Rotation seeds", measure.ROTATIONS, "Random rotations of each method."),
            ("samplings", "Sampling seeds", measure.SAMPLINGS, "Sampled answers to each prompt; 0: greedy only."),
        ):
            row.number_input(
                words, low, high, getattr(_START, name), key=f"seeds_{name}", bind="query-params", help=help, width=150
            )
        row.select_slider(
            "Context (tokens)",
            CONTEXTS,
            value=_START.context,
            key="seeds_context",
            bind="query-params",
            help="Tokens of each text whose perplexity and KL are measured; half of them are read in one call.",
            width=220,
        )
        st.pills(
            "Texts",
            list(TEXTS),
            selection_mode="multi",
            default=list(_START.texts),
            key="seeds_texts",
            bind="query-params",
            help="Public-domain texts that come with the app. Prompts are cut from behind the measured window.",
        )
        st.caption("Model, recipe and exact tokens are those of the sidebar; bits and rotation seeds are chosen here.")


def said() -> SeedsChoices:
    """What the widgets say, unchecked; one that is not there keeps its default."""
    found = {
        field.name: st.session_state[f"seeds_{field.name}"]
        for field in fields(SeedsChoices)
        if st.session_state.get(f"seeds_{field.name}") is not None
    }
    return SeedsChoices(**{**found, "texts": tuple(found.get("texts", _START.texts))})


def request() -> CellsRequest:
    """The cells that are missing for what the widgets say now."""
    return plan_now().request(state.records(), "Seeds", "seeds")


def plan_now() -> Plan:
    """The cells of what the widgets say now, checked."""
    return measure.make_plan(said(), state.choices(), state.config())


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
            refusal = f"All {there} cells are measured. Ask for more seeds or other settings to go on."
    work.bar("Measure", request, plan=words, key="seeds_run", disabled=None if state.busy() else refusal)
    return plan


def _time(plan: Plan) -> str:
    own = list(state.records().values())
    for known, source in (
        ([r for r in own if r.cell.experiment == "variance"], "cells measured in this tab"),
        (state.recorded("variance"), "the recorded run; another machine takes another time"),
    ):
        seconds = measure.estimate_s(missing(plan.cells, state.records()), plan.model, known)
        if seconds is not None:
            return f":orange-badge[:material/calculate: Estimated] about {duration(seconds)}, from {source}."
    return "How long it takes is not known before the first cell of this model."


def recorded(metric: str) -> None:
    """Show the measurements that ship with the app."""
    sets = measure.record_sets(state.recorded("variance"))
    if not sets:
        page.empty("No recorded measurement comes with this copy of the app. Choose Run here to make one.")
        return
    name = next(iter(sets))
    if len(sets) > 1:
        name = st.selectbox("Recorded settings", list(sets), key="seeds_set", bind="query-params")
    records = sets.get(name) or next(iter(sets.values()))
    with st.container(horizontal=True, vertical_alignment="center"):
        page.tag("recorded")
        st.caption(escape(f"{name}. {made_with(records)}"), width="stretch")
    _results(records, metric)


def measured(plan: Plan | None, metric: str) -> None:
    """Show what this tab has measured of the plan."""
    records = present(plan.cells, state.records()) if plan else []
    good = [record for record in records if record.error is None]
    if plan is None or not records:
        page.empty(
            "The first cell is on its way; dots appear cell by cell."
            if state.busy()
            else "Nothing is measured yet for these settings. Press Measure; dots appear cell by cell."
        )
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        page.tag("measured")
        st.caption(escape(f"{len(good)} of {len(plan.cells)} cells. {made_with(good)}"), width="stretch")
    if failed := [record for record in records if record.error]:
        words = f"Failed cells: {len(failed)}. The first one said: {failed[0].error}"
        st.warning(escape(words), icon=":material/error:")
    if good:
        _results(good, metric)


@st.cache_data(max_entries=64, show_spinner=False)
def _findings(keys: tuple[str, ...], _records: Sequence[ExperimentRecord]) -> Findings:
    del keys
    return measure.findings(_records)


def _results(records: Sequence[ExperimentRecord], label: str) -> None:
    found = _findings(tuple(f"{r.cell.key} {r.environment.created} {r.metrics}" for r in records), records)
    metric = METRICS[label]
    if strips := found.strips[label]:
        figures.show(
            f"{label}, seed by seed", charts.strips(metric, strips), "seeds_strip", help=definitions.SEED_STRIP
        )
        if any(spread.low is None for strip in strips for _, spread in strip.means):
            st.caption("An interval needs at least two seeds; more make it narrower.")
    else:
        page.empty("No cell with this figure yet: it comes with the cells without a sampling seed, which go first.")
    _gaps(found, label)
    if moved := measure.seed_words(found):
        st.markdown("**Which seed moves answers more?**", help=definitions.SEED_STRIP)
        for one in moved:
            st.markdown(f"- {escape(one)}")
    parts = [(one, words) for one, words in ((found.greedy, "greedy"), (found.sampled, "sampled")) if one]
    for column, (histograms, words) in zip(st.columns(max(len(parts), 1)), parts, strict=False):
        with column:
            title = f"Where answers first differ, {words}"
            chart = charts.first_divergence(histograms)
            figures.show(title, chart, f"seeds_first_{words}", help=definitions.DIVERGENCE_HISTOGRAM)
    table = measure.table_rows(found)
    with st.expander("All figures over seeds", icon=":material/table_rows:"):
        st.dataframe(table, hide_index=True, alt="Mean, standard deviation and interval of every figure over seeds.")
    head = list(table[0]) if table else []
    page.downloads(
        "seeds",
        [
            page.File("Figures as CSV", ".csv", "text/csv", lambda: csv_text(head, [[*row.values()] for row in table])),
            page.File("Records as JSON", ".json", "application/json", lambda: as_json(records)),
        ],
    )


def _gaps(found: Findings, label: str) -> None:
    """Say whether the methods differ on the figure shown."""
    if len(found.methods) < 2:
        return
    st.markdown("**Is the difference real?**", help=definitions.SEED_GAPS)
    for gap in found.gaps[label]:
        icon = {True: ":material/check_circle:", False: ":material/casino:", None: ":material/hourglass_empty:"}[
            gap.real
        ]
        st.markdown(f"- {icon} {escape(gap.words)}")
    if not found.gaps[label]:
        words = (
            "is not tested for itself; see First divergence" if label == "Identical answers" else "needs both methods"
        )
        st.markdown(f"- {label} {words}.")
