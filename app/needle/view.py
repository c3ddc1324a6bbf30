"""The Needle page's widgets and blocks."""

from collections.abc import Callable, Sequence
from typing import Final

import streamlit as st

from app.needle import charts
from app.needle import request as measure
from app.needle.request import DEFAULT, Place
from app.tab import state
from app.tab.measure import MAX_SEED, as_json, json_lines, report
from app.ui import definitions, figures, page
from app.ui.measuring import Measurement, counted
from app.ui.panes import escape
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.metrics import metric

_URL: Final = "query-params"
_MOST_METHODS = 3
_PROMPT_ROOM = {"needle": 400, "question": 300, "answer": 100}


def _describe(cells: Sequence[Cell]) -> str:
    places = counted(len({(cell.settings["context"], cell.settings["depth"]) for cell in cells}), "place")
    return f"{counted(len(cells), 'cell')}: {places}, {counted(len({cell.method for cell in cells}), 'method')}"


MEASUREMENT = Measurement(
    name="needle",
    prefix="needle",
    start=DEFAULT,
    experiment="needle",
    recorded="needle",
    cells=measure.cells,
    private=lambda chosen: chosen.own,
    seconds=measure.seconds,
    describe=_describe,
)


def controls() -> None:
    """Draw the settings."""
    with st.container(border=True):
        st.pills(  # side by side, pills would not wrap on a narrow screen
            "Lengths (tokens of the prompt)",
            measure.lengths(state.config()),
            selection_mode="multi",
            default=[length for length in DEFAULT.lengths if length in measure.lengths(state.config())],
            key="needle_lengths",
            bind=_URL,
        )
        st.pills(
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
    figures.show(
        f"{title}: {metric('success_pct').title}",
        charts.found_map(found, name, share, spots),
        key,
        help=definitions.NEEDLE_FOUND,
    )


def _totals(found: Sequence[Place]) -> None:
    st.markdown("**All places together**", help=definitions.NEEDLE_TOTAL)
    totals, bits = measure.totals(found), metric("bits_per_value")
    if not totals:
        st.caption("Nothing is measured yet.")
        return
    st.dataframe(
        charts.totals_table(totals),
        hide_index=True,
        alt="How often each cache found the needle over all lengths and depths, with Wilson intervals.",
        column_config={
            "percent": st.column_config.NumberColumn(format="%.0f"),
            bits.column: st.column_config.TextColumn(help=bits.help),
        },
    )


def _failures(found: Sequence[Place]) -> None:
    errors = dict.fromkeys((place.method, place.error) for place in found if place.error)
    for method, error in errors:
        st.warning(f"{escape(method)}: {escape(str(error))}", icon=":material/error:")


def files(records: Sequence[ExperimentRecord]) -> list[page.File]:
    """The exports."""
    return [
        page.File("Cells as CSV", ".csv", "text/csv", lambda: _csv(records)),
        page.File("Records as JSONL", ".jsonl", "application/jsonl", lambda: json_lines(records)),
        page.File("Records as JSON", ".json", "application/json", lambda: as_json(records)),
        page.File("Report as HTML", ".html", "text/html", lambda: report(records)),
    ]


def _csv(records: Sequence[ExperimentRecord]) -> str:
    return charts.places_table(measure.places(records)).to_csv(index=False)


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
