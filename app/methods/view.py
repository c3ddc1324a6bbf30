"""The Methods page's widgets and blocks."""

from collections.abc import Sequence
from typing import Final

import streamlit as st

from app.methods import charts
from app.methods import request as measure
from app.methods.request import DEFAULT, FULL, HELD, PACKED
from app.tab import state
from app.tab.measure import as_json, json_lines, report
from app.ui import columns, definitions, figures, page
from app.ui.measuring import HERE, Measurement, counted
from app.ui.panes import escape
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import metric

_URL: Final = "query-params"
BITS = {metric(name).column: name for name in (HELD, PACKED)}
"""Which bits count, by what they are called on the page."""

MEASUREMENT = Measurement(
    name="methods",
    prefix="methods",
    start=DEFAULT,
    experiment="perplexity",
    recorded="methods",
    cells=measure.cells,
    private=lambda chosen: False,  # shipped texts and numbers
    seconds=measure.seconds,
    describe=lambda cells: f"{counted(len(cells) - 1, 'method')} and the full cache",
)


def controls(shown: str) -> None:
    """Draw the settings of a run."""
    config = state.config()
    with st.expander("What to measure here", icon=":material/tune:", expanded=shown == HERE):
        st.pills(
            "Methods",
            measure.offered(state.recorded("methods")),
            selection_mode="multi",
            default=list(DEFAULT.chosen),
            key="methods_chosen",
            bind=_URL,
            help="The full cache is always measured too.",
        )
        st.text_input(
            "Other methods",
            key="methods_more",
            bind=_URL,
            max_chars=measure.MAX_MORE_CHARS,
            placeholder="turboquant:key_bits=4,value_bits=2",
            help="Typed, with spaces between them; options follow a colon, with commas between them.",
        )
        st.pills(
            "Texts",
            measure.TEXT_NAMES,
            selection_mode="multi",
            default=list(DEFAULT.texts),
            key="methods_texts",
            bind=_URL,
            help="Each is read from its beginning; more texts take longer and say more.",
        )
        left, right = st.columns(2, gap="medium")
        left.selectbox(
            "Context (tokens)",
            measure.contexts(config),
            key="methods_context",
            bind=_URL,
            help="Tokens of a text that are read.",
        )
        right.selectbox(
            "Measured tokens",
            measure.MEASURED,
            index=measure.MEASURED.index(DEFAULT.measured),
            key="methods_measured",
            bind=_URL,
            help="The last ones of them, read through the cache. Those before are read in one call, as a prompt is.",
        )


def _bits() -> str:
    return BITS.get(str(st.session_state.get("methods_bits")), HELD)


def plot(records: Sequence[ExperimentRecord]) -> None:
    """The Pareto plot over the chosen bits, and what failed."""
    figures.show(
        "Quality against memory",
        charts.pareto(measure.rows(records), _bits()),
        "methods_pareto",
        help=definitions.PARETO,
    )
    for method, error in measure.failures(records):
        st.warning(f"{escape(method)} could not be measured: {escape(error)}", icon=":material/error:")


def bits_switch() -> None:
    """Which bits the plot counts."""
    st.segmented_control(
        "Bits counted",
        list(BITS),
        default=metric(HELD).column,
        required=True,
        key="methods_bits",
        bind=_URL,
        help=f"Held: {metric(HELD).definition} Packed: {metric(PACKED).definition}",
    )


def table(records: Sequence[ExperimentRecord]) -> str | None:
    """The sortable table; returns the method of the selected row."""
    rows = measure.rows(records)
    st.markdown("**All methods**")
    found = st.dataframe(
        charts.methods_table(rows, _bits()),
        hide_index=True,
        key="methods_table",
        on_select="rerun",
        selection_mode="single-row",
        alt="Every method with its KL, agreement, change of perplexity and bits a value.",
        column_config={
            **columns.figures(*charts.FIGURES),
            "front": st.column_config.TextColumn(help=definitions.METHOD_FRONT),
        },
    )
    chosen = list(found.get("selection", {}).get("rows", []))
    return rows[chosen[0]].method if chosen and chosen[0] < len(rows) else None


def details(method: str | None) -> None:
    """What the selected method is, and the way to Compare with it."""
    if method is None:
        st.caption("Select a row to read what the method does and to use it in Compare.")
        return
    about = measure.about(method)
    with st.container(border=True):
        st.markdown(f"**`{method}`**{f' · {about.title}' if about else ''}")
        if about is None:
            st.caption("This method is no longer part of the library.")
            return
        st.markdown(about.summary)
        st.caption(f"{about.reference}" + (f" · [paper]({about.paper})" if about.paper else ""))
        # A link's parameters would not reach the sidebar's widgets, which are on this page already.
        if method != FULL and st.button(
            "Use it in Compare",
            icon=":material/compare:",
            key="methods_use",
            on_click=state.use,
            kwargs=measure.compare_settings(method, state.choices()),
        ):
            st.switch_page(page.PAGES / "compare.py", query_params={})  # bound parameters cannot be cleared otherwise


def files(records: Sequence[ExperimentRecord]) -> list[page.File]:
    """The exports."""
    return [
        page.File("Table as CSV", ".csv", "text/csv", lambda: _csv(records)),
        page.File("Records as JSONL", ".jsonl", "application/jsonl", lambda: json_lines(records)),
        page.File("Records as JSON", ".json", "application/json", lambda: as_json(records)),
        page.File("Report as HTML", ".html", "text/html", lambda: report(records)),
    ]


def _csv(records: Sequence[ExperimentRecord]) -> str:
    return charts.methods_table(measure.rows(records)).to_csv(index=False)
