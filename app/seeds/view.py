"""The Seeds page's blocks: what is shown, what can be measured here, and what the records say."""

from collections.abc import Sequence

import streamlit as st

from app.seeds import charts
from app.seeds import request as measure
from app.seeds.request import AGAINST, BITS, CONTEXTS, FIGURES, Findings, SeedsChoices
from app.tab import state
from app.tab.measure import Plan, as_json, present
from app.tab.runs import csv_text
from app.ui import definitions, figures, page
from app.ui.measuring import HERE, RECORDED, Measurement, counted
from app.ui.panes import escape
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import metric
from turboquant.texts import TEXTS

_START = SeedsChoices()
_ICONS = {True: ":material/check_circle:", False: ":material/casino:", None: ":material/hourglass_empty:"}

MEASUREMENT = Measurement(
    name="seeds",
    prefix="seeds",
    start=_START,
    experiment="variance",
    recorded="variance",
    cells=measure.cells,
    private=lambda chosen: False,  # shipped texts and numbers
    seconds=measure.seconds,
)


def chooser() -> tuple[str, str]:
    """Draw what is shown (recorded results or those of this tab) and which figure; return both."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        shown = MEASUREMENT.view()
        label = st.selectbox(
            "Figure", list(FIGURES), key="seeds_metric", bind="query-params", help=_meanings(), width=220
        )
    return shown, (label if label in FIGURES else next(iter(FIGURES)))


def _meanings() -> str:
    return " ".join(f"{label}: {metric(name).definition}" for label, name in FIGURES.items())


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


def recorded(metric: str) -> None:
    """Show the measurements that ship with the app."""
    sets = measure.record_sets(state.recorded("variance"))
    if not sets:
        page.empty("No recorded measurement comes with this copy of the app. Choose This tab to make one.")
        return
    name = next(iter(sets))
    if len(sets) > 1:
        name = st.selectbox("Recorded settings", list(sets), key="seeds_set", bind="query-params")
    records = sets.get(name) or next(iter(sets.values()))
    MEASUREMENT.source(records, RECORDED, _files(records), f"{name}.")
    _results(records, metric)


def measured(plan: Plan, metric: str) -> None:
    """Show what this tab has measured of the plan."""
    cells = MEASUREMENT.asked(plan)
    records = present(cells, state.current_records())
    good = [record for record in records if record.error is None]
    MEASUREMENT.source(records, HERE, _files(good), f"{len(good)} of {counted(len(cells), 'cell')}.")
    if not records:
        page.empty(
            "The first cell is on its way; dots appear cell by cell."
            if state.busy()
            else "Nothing is measured yet for these settings. Press Measure; dots appear cell by cell."
        )
        return
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
    if strips := found.strips[label]:
        figures.show(
            f"{label}, seed by seed", charts.strips(FIGURES[label], strips), "seeds_strip", help=definitions.SEED_STRIP
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


def _files(records: Sequence[ExperimentRecord]) -> list[page.File]:
    return [
        page.File("Figures as CSV", ".csv", "text/csv", lambda: _csv(records)),
        page.File("Records as JSON", ".json", "application/json", lambda: as_json(records)),
    ]


def _csv(records: Sequence[ExperimentRecord]) -> str:
    table = measure.table_rows(measure.findings(records))
    return csv_text(list(table[0]), [[*row.values()] for row in table])


def _gaps(found: Findings, label: str) -> None:
    """Say whether the methods differ on the figure shown."""
    if len(found.methods) < 2:
        return
    st.markdown("**Is the difference real?**", help=definitions.SEED_GAPS)
    for gap in found.gaps[label]:
        st.markdown(f"- {_ICONS[gap.real]} {escape(gap.words)}")
    if not found.gaps[label]:
        alone = f"is not tested for itself; see {metric('agreed_tokens').heading}"
        words = alone if FIGURES[label] == "identical_pct" else "needs both methods"
        st.markdown(f"- {label} {words}.")
