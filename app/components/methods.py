"""The Methods page's widgets and blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import streamlit as st

from app import definitions, state
from app.charts import methods as charts
from app.components import figures, page, work
from app.components.panes import escape
from app.jobs import CellsRequest, Job
from app.measure import as_json, duration, json_lines, made_with, missing, report
from app.measure import methods as measure
from app.measure.methods import DEFAULT, FULL, MethodsChoices
from app.requests import RequestError
from turboquant.results import Cell, ExperimentRecord

_URL: Final = "query-params"
RECORDED, HERE = "Recorded", "This tab"
HELD, PACKED = "bits held", "packed bits"


def view() -> str:
    """Recorded results, or this tab's."""
    shown = st.segmented_control(
        "Results", (RECORDED, HERE), default=RECORDED, required=True, key="methods_view", bind=_URL
    )
    return str(shown)


def controls(shown: str) -> MethodsChoices:
    """Draw the settings of a run and return what they say, unchecked."""
    config = state.config()
    with st.expander("What to measure here", icon=":material/tune:", expanded=shown == HERE):
        st.multiselect(
            "Methods",
            measure.offered(state.recorded("methods")),
            default=list(DEFAULT.methods),
            max_selections=max(1, config.max_cells - 1),
            accept_new_options=True,
            key="methods_chosen",
            bind=_URL,
            help="Pick some, or type one, such as turboquant:key_bits=4,value_bits=2. The full cache is measured too.",
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
    return _said()


def _said() -> MethodsChoices:
    keys = {field.name: f"methods_{field.name}" for field in fields(MethodsChoices)} | {"methods": "methods_chosen"}
    found: dict[str, Any] = {
        name: st.session_state[key] for name, key in keys.items() if st.session_state.get(key) is not None
    }
    found |= {name: tuple(map(str, found[name])) for name in ("methods", "texts") if name in found}
    return MethodsChoices(**found)


@dataclass(frozen=True)
class Plan:
    """What the widgets ask for; without cells where they cannot be measured, and then why."""

    cells: tuple[Cell, ...] = ()
    refusal: str | None = None


def plan(chosen: MethodsChoices) -> Plan:
    """The plan of the widgets' values, with the sidebar's model."""
    try:
        return Plan(measure.cells(chosen, state.choices(), state.config()))
    except RequestError as error:
        return Plan(refusal=str(error))


def run_bar(chosen: MethodsChoices, made: Plan) -> None:
    """The button with what it would do."""
    left = missing(made.cells, state.records())
    if made.refusal:
        disabled: str | None = escape(made.refusal)
    else:
        disabled = None if left else "All these methods are measured; they stand below, under This tab."

    def request() -> CellsRequest:
        asked = measure.request(measure.cells(chosen, state.choices(), state.config()), state.records())
        st.session_state["methods_view"] = HERE
        return asked

    work.bar("Measure", request, plan=_plan_line(made, left), key="methods_run", disabled=disabled)


def _plan_line(made: Plan, left: Sequence[Cell]) -> str:
    if not made.cells:
        return ""
    line = f"{len(made.cells) - 1} methods and the full cache"
    if len(left) < len(made.cells):
        line += f", {len(left)} of {len(made.cells)} left"
    own = [record for record in state.records().values() if record.cell.experiment == "perplexity"]
    for known, source in ((own, "this tab's methods"), (state.recorded("methods"), "recorded methods")):
        about = measure.seconds(left, known)
        if about:
            line += f" · about {duration(about)} (estimated from {source})"
            if about > state.config().max_run_s:
                line += f"; a run is stopped after {duration(state.config().max_run_s)} and can be continued"
            return line
    return f"{line} · time not known for this model before its first method"


def working(job: Job | None) -> Job | None:
    """The live job of this page, if there is one."""
    return job if job is not None and job.live and job.request.page == "methods" else None


def watch(job: Job) -> None:
    """Show how far the job is; the page, and with it the plot, is drawn again whenever there is another result."""
    known = len(job.results)

    def look() -> None:
        if len(job.results) > known:
            st.rerun(scope="app")

    work.watch(job, look)


def here(made: Plan, job: Job | None) -> list[ExperimentRecord]:
    """What this tab measured under the plan's settings, or under the live job's."""
    cells = job.request.cells if job is not None and isinstance(job.request, CellsRequest) else made.cells
    return measure.alike(cells, state.records())


def _bits() -> charts.Bits:
    return "packed" if st.session_state.get("methods_bits") == PACKED else "held"


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
        (HELD, PACKED),
        default=HELD,
        required=True,
        key="methods_bits",
        bind=_URL,
        help=f"Held: {definitions.METHOD_HELD} Packed: {definitions.METHOD_PACKED}",
    )


def table(records: Sequence[ExperimentRecord]) -> str | None:
    """The sortable table; returns the method of the selected row."""
    rows = measure.rows(records)
    st.markdown("**All methods**")
    number = st.column_config.NumberColumn
    found = st.dataframe(
        charts.methods_table(rows, _bits()),
        hide_index=True,
        key="methods_table",
        on_select="rerun",
        selection_mode="single-row",
        alt="Every method with its KL, agreement, change of perplexity and bits a value.",
        column_config={
            "KL": number(format="%.4g", help=definitions.METHOD_KL),
            "same top": number("same top, percent", format="%.1f", help=definitions.METHOD_SAME_TOP),
            "perplexity change": number("perplexity change, percent", format="%+.2f", help=definitions.METHOD_PPL),
            "bits held": number(format="%.2f", help=definitions.METHOD_HELD),
            "packed bits": number(format="%.2f", help=definitions.METHOD_PACKED),
            "times smaller": number(format="%.2f", help=definitions.METHOD_SMALLER),
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


def source(records: Sequence[ExperimentRecord], shown: str) -> None:
    """Where the figures come from, the link, and the files."""
    kept = list(records)
    measured = [record for record in kept if record.error is None]
    with st.container(horizontal=True, vertical_alignment="center"):
        page.tag("recorded" if shown == RECORDED else "measured")
        job = state.job()
        if shown == HERE and job is not None and job.request.page == "methods" and job.cached:
            page.tag("cached", f"{len(job.cached)} of {job.request.items} methods of the last run")
        page.copy_link()
        page.downloads(
            "methods",
            [
                page.File("Table as CSV", ".csv", "text/csv", lambda: _csv(measured)),
                page.File("Records as JSONL", ".jsonl", "application/jsonl", lambda: json_lines(kept)),
                page.File("Records as JSON", ".json", "application/json", lambda: as_json(kept)),
                page.File("Report as HTML", ".html", "text/html", lambda: report(kept)),
            ],
            disabled=not measured,
        )
    if measured:
        st.caption(escape(f"{made_with(measured)} {measure.what_was_read(measured)}."))


def _csv(records: Sequence[ExperimentRecord]) -> str:
    return charts.methods_table(measure.rows(records)).to_csv(index=False)
