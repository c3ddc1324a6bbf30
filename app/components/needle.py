"""The Needle page's widgets and blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import streamlit as st

from app import definitions, state
from app.charts import needle as charts
from app.components import figures, page, work
from app.components.panes import escape
from app.jobs import CellsRequest, Job
from app.measure import MAX_SEED, as_json, duration, json_lines, made_with, missing, present, report
from app.measure import needle as measure
from app.measure.needle import DEFAULT, NeedleChoices, Place
from app.requests import RequestError
from turboquant.results import Cell, ExperimentRecord

_URL: Final = "query-params"
RECORDED, HERE = "Recorded", "This tab"
_MOST_METHODS = 3
_PROMPT_ROOM = {"needle": 400, "question": 300, "answer": 100}


def controls() -> NeedleChoices:
    """Draw the settings and return what they say, unchecked."""
    with st.container(border=True):
        left, right = st.columns(2, gap="medium")
        left.pills(
            "Lengths (tokens of the prompt)",
            measure.lengths(state.config()),
            selection_mode="multi",
            default=[length for length in DEFAULT.lengths if length in measure.lengths(state.config())],
            key="needle_lengths",
            bind=_URL,
        )
        right.pills(
            "Depths (0: start, 1: end)",
            measure.DEPTHS,
            selection_mode="multi",
            default=list(DEFAULT.depths),
            key="needle_depths",
            bind=_URL,
            help="Where in the text the needle stands.",
        )
        row = st.container(horizontal=True, vertical_alignment="bottom")
        row.number_input(
            "Repetitions",
            1,
            measure.MAX_REPETITIONS,
            DEFAULT.repetitions,
            key="needle_repetitions",
            bind=_URL,
            width=130,
            help="Prompts at each length and depth, each with its own needle. More give a narrower interval.",
        )
        row.number_input(
            "Seed of the needles",
            0,
            MAX_SEED,
            DEFAULT.seed,
            key="needle_seed",
            bind=_URL,
            width=170,
            help="Chooses words and numbers.",
        )
        row.selectbox(
            "Filler",
            measure.FILLERS,
            key="needle_filler",
            bind=_URL,
            width=220,
            help="The text around the needle: the sentences that RULER repeats, or one of the shipped texts.",
        )
        row.toggle("Own needle", key="needle_own", bind=_URL, help="Hide a sentence of yours and ask about it.")
        if st.session_state.get("needle_own"):
            _own_texts()
    return _said()


def _own_texts() -> None:
    examples = {
        "needle": ("Needle", "The night train to Riga leaves from platform nineteen."),
        "question": ("Question", "From which platform does the night train to Riga leave?"),
        "answer": ("Answer (words of the needle)", "nineteen"),
    }
    for name, (label, example) in examples.items():
        st.text_input(
            label,
            max_chars=_PROMPT_ROOM[name],
            placeholder=example,
            key=f"needle_{name}",
            persist_state="session",
        )
    st.caption("Found: the reply contains the answer, whatever the case. Your texts are no part of the copied link.")


def _said() -> NeedleChoices:
    found: dict[str, Any] = {
        field.name: st.session_state[f"needle_{field.name}"]
        for field in fields(NeedleChoices)
        if st.session_state.get(f"needle_{field.name}") is not None
    }
    found |= {name: tuple(found[name]) for name in ("lengths", "depths") if name in found}
    return NeedleChoices(**found)


@dataclass(frozen=True)
class Plan:
    """What the widgets ask for; without cells where they cannot be measured, and then why."""

    cells: tuple[Cell, ...] = ()
    refusal: str | None = None


def plan(chosen: NeedleChoices) -> Plan:
    """The plan of the widgets' values, with the sidebar's model and methods."""
    try:
        return Plan(measure.cells(chosen, state.choices(), state.config()))
    except RequestError as error:
        return Plan(refusal=str(error))


def run_bar(chosen: NeedleChoices, made: Plan) -> None:
    """The button with what it would do."""
    left = missing(made.cells, state.records())
    if made.refusal:
        disabled: str | None = escape(made.refusal)
    else:
        disabled = None if left else "All these cells are measured; their maps stand below, under This tab."

    def request() -> CellsRequest:
        asked = measure.request(measure.cells(chosen, state.choices(), state.config()), state.records())
        st.session_state["needle_view"] = HERE
        return asked

    work.bar("Measure", request, plan=_plan_line(made, left), key="needle_run", disabled=disabled)


def _plan_line(made: Plan, left: Sequence[Cell]) -> str:
    if not made.cells:
        return ""
    places = {(cell.settings["context"], cell.settings["depth"]) for cell in made.cells}
    methods = {cell.method for cell in made.cells}
    line = f"{len(made.cells)} cells: {len(places)} places, {len(methods)} method{'s' * (len(methods) > 1)}"
    if len(left) < len(made.cells):
        line += f", {len(left)} of them left"
    own = [record for record in state.records().values() if record.cell.experiment == "needle"]
    for known, source in ((own, "this tab's cells"), (state.recorded("needle"), "recorded cells")):
        about = measure.seconds(left, known)
        if about:
            line += f" · about {duration(about)} (estimated from {source})"
            if about > state.config().max_run_s:
                line += f"; a run is stopped after {duration(state.config().max_run_s)} and can be continued"
            return line
    return f"{line} · time not known for this model before its first cell"


def view() -> str:
    """Recorded results, or this tab's."""
    shown = st.segmented_control(
        "Results",
        (RECORDED, HERE),
        default=RECORDED,
        required=True,
        key="needle_view",
        bind=_URL,
    )
    return str(shown)


def working(job: Job | None) -> Job | None:
    """The live job of this page, if there is one."""
    return job if job is not None and job.live and job.request.page == "needle" else None


def watch(job: Job) -> None:
    """Show how far the job is; the page, and with it the maps, is drawn again whenever there is another result."""
    known = len(job.results)

    def look() -> None:
        if len(job.results) > known:
            st.rerun(scope="app")

    work.watch(job, look)


def planned(made: Plan, job: Job | None) -> tuple[Cell, ...]:
    """The cells that this tab's maps show: the plan's, or the job's where the plan has moved on."""
    if job is None or not isinstance(job.request, CellsRequest):
        return made.cells
    keys = {cell.key for cell in made.cells}
    return made.cells if all(cell.key in keys for cell in job.request.cells) else job.request.cells


def recorded() -> list[ExperimentRecord]:
    """The recorded results of the methods chosen among them."""
    records = state.recorded("needle")
    if not records:
        return []
    methods = list(dict.fromkeys(str(record.cell.method) for record in records))
    families = {method.partition(":")[0]: method for method in reversed(methods)}
    first = [method for method in methods if method in families.values()][:_MOST_METHODS]
    chosen = st.pills(
        "Recorded methods",
        methods,
        selection_mode="multi",
        default=first,
        help=f"Maps of the first {_MOST_METHODS} that are chosen stand below.",
        key="needle_methods",
        bind=_URL,
    )
    return [record for record in records if record.cell.method in chosen[:_MOST_METHODS]]


def here(cells: Sequence[Cell]) -> list[ExperimentRecord]:
    """This tab's results of some cells."""
    return present(cells, state.records())


def maps(records: Sequence[ExperimentRecord], cells: Sequence[Cell] = ()) -> None:
    """The full cache's map with the totals beside it, then for each method its map and what it changes."""
    found = measure.places(records)
    spots = sorted({(cell.settings["context"], cell.settings["depth"]) for cell in cells})
    left, right = st.columns(2, gap="medium")
    with left:
        _found("Full cache", _once(found), "the full cache", lambda place: place.full, spots, "needle_full")
    with right:
        _totals(found)
    methods = [str(cell.method) for cell in cells] or [place.method for place in found]
    for number, method in enumerate(dict.fromkeys(methods)):
        own = [place for place in found if place.method == method]
        left, right = st.columns(2, gap="medium")
        with left:
            _found(f"`{method}`", own, method, lambda place: place.own, spots, f"needle_own_{number}")
        with right:
            figures.show(
                f"`{method}` less full cache, points",
                charts.change_map(own, method, spots),
                f"needle_change_{number}",
                help=definitions.NEEDLE_CHANGE,
            )
    _failures(found)


def _once(found: Sequence[Place]) -> list[Place]:
    """One place for each length and depth: the full cache answers the same for all methods."""
    return list({(place.context, place.depth): place for place in reversed(found) if place.full}.values())[::-1]


def _found(
    title: str,
    found: Sequence[Place],
    name: str,
    share: Callable[[Place], measure.Share | None],
    spots: Sequence[charts.Spot],
    key: str,
) -> None:
    figures.show(f"{title}: found", charts.found_map(found, name, share, spots), key, help=definitions.NEEDLE_FOUND)


def _totals(found: Sequence[Place]) -> None:
    st.markdown("**All places together**", help=definitions.NEEDLE_TOTAL)
    totals = measure.totals(found)
    if not totals:
        st.caption("Nothing is measured yet.")
        return
    st.dataframe(
        charts.totals_table(totals),
        hide_index=True,
        alt="How often each cache found the needle over all lengths and depths, with Wilson intervals.",
        column_config={
            "percent": st.column_config.NumberColumn(format="%.0f"),
            "bits held": st.column_config.TextColumn(help=definitions.METHOD_HELD),
        },
    )


def _failures(found: Sequence[Place]) -> None:
    errors = dict.fromkeys((place.method, place.error) for place in found if place.error)
    for method, error in errors:
        st.warning(f"{escape(method)}: {escape(str(error))}", icon=":material/error:")


def source(records: Sequence[ExperimentRecord], shown: str) -> None:
    """Where the figures come from, the link, and the files."""
    with st.container(horizontal=True, vertical_alignment="center"):
        page.tag("recorded" if shown == RECORDED else "measured")
        _cached(shown)
        page.copy_link()
        kept = list(records)
        page.downloads(
            "needle",
            [
                page.File("Cells as CSV", ".csv", "text/csv", lambda: _csv(kept)),
                page.File("Records as JSONL", ".jsonl", "application/jsonl", lambda: json_lines(kept)),
                page.File("Records as JSON", ".json", "application/json", lambda: as_json(kept)),
                page.File("Report as HTML", ".html", "text/html", lambda: report(kept)),
            ],
            disabled=not kept,
        )
    if records:
        st.caption(escape(made_with([record for record in records if record.error is None])))


def _csv(records: Sequence[ExperimentRecord]) -> str:
    return charts.places_table(measure.places(records)).to_csv(index=False)


def _cached(shown: str) -> None:
    job = state.job()
    if shown == HERE and job is not None and job.request.page == "needle" and job.cached:
        page.tag("cached", f"{len(job.cached)} of {job.request.items} cells of the last run")


def replies(records: Sequence[ExperimentRecord]) -> None:
    """What was answered at one place, as it was written."""
    named = {measure.place_name(record): record for record in records if record.error is None}
    if not named:
        return
    st.markdown("**Replies at one place**")
    chosen = st.selectbox("Place and method", list(named), key="needle_reply", persist_state="session")
    for number, reply in enumerate(measure.replies(named[chosen]) if chosen in named else [], start=1):
        with st.container(border=True):
            st.caption(f"Needle {number}, hidden: {escape(reply.hidden)}")
            for column, name, text, found in zip(
                st.columns(2),
                ("**:blue[Full cache]**", "**:violet[Compressed]**"),
                (reply.full, reply.method),
                (reply.full_found, reply.method_found),
                strict=True,
            ):
                column.markdown(f"{name} · {':material/check: found' if found else ':material/close: not found'}")
                column.text(text or "(no text)")
