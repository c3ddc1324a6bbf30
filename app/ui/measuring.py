"""What the pages that measure cells have in common: recorded results or this tab's, the button, the time it takes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import streamlit as st

from app.config import AppConfig
from app.engine.job import Job
from app.engine.library import import_library
from app.tab import state
from app.tab.measure import CellsRequest, Plan, made_with, missing
from app.tab.requests import Choices, RequestError
from app.ui import page, work
from app.ui.panes import escape
from turboquant.records.experiment import Cell, ExperimentRecord

RECORDED, HERE = "Recorded", "This tab"
C = TypeVar("C")


def counted(number: int, name: str) -> str:
    """How many of something there are: 1 cell, 2 cells."""
    return f"{number} {name}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Measurement(Generic[C]):
    """A page of measurements. Its widgets' keys are `prefix_field`, one for each field of `start`.

    Attributes:
        name: The page's address.
        prefix: What the keys of its widgets begin with.
        start: The widgets' values at first.
        experiment: The name of its experiment in records.
        recorded: The name of the shipped records.
        cells: Checks the widgets' values and makes the cells.
        private: Do the widgets' values hold something that the visitor wrote? Then its results are for nobody else.
        seconds: About how long cells take by what is known; None where that says nothing.
        describe: What the cells are, in the app's own words.
    """

    name: str
    prefix: str
    start: C
    experiment: str
    recorded: str
    cells: Callable[[C, Choices, AppConfig], tuple[Cell, ...]]
    private: Callable[[C], bool]
    seconds: Callable[[Sequence[Cell], Iterable[ExperimentRecord]], float | None]
    describe: Callable[[Sequence[Cell]], str] = lambda cells: counted(len(cells), "cell")

    def view(self) -> str:
        """Draw the switch between recorded results and this tab's; return which is shown."""
        shown = st.segmented_control(
            "Results",
            (RECORDED, HERE),
            default=RECORDED,
            required=True,
            key=f"{self.prefix}_view",
            bind="query-params",
        )
        return HERE if shown == HERE else RECORDED

    def said(self) -> C:
        """What the widgets say, unchecked; one that is not there keeps its first value."""
        found: dict[str, Any] = {}
        for field in fields(self.start):  # type: ignore[arg-type]
            value = st.session_state.get(f"{self.prefix}_{field.name}")
            if value is not None:
                found[field.name] = tuple(value) if isinstance(value, list) else value
        return type(self.start)(**found)

    def plan(self) -> Plan:
        """What the widgets and the sidebar ask for."""
        import_library()
        said = self.said()
        try:
            return Plan(self.cells(said, state.choices(), state.config()), self.private(said))
        except RequestError as error:
            return Plan((), self.private(said), refusal=str(error))

    def run_bar(self, plan: Plan, *, shortcuts: bool = True) -> None:
        """Draw the buttons with what would be done and how long it takes; see `work.bar`."""
        disabled = escape(plan.refusal) if plan.refusal else None
        left = missing(plan.cells, state.current_records())
        if not (disabled or left):
            disabled = f"All of it is measured ({self.describe(plan.cells)}). Change a setting to measure more."
        words = "" if disabled else self._words(plan, left)
        key = f"{self.prefix}_run"
        work.bar("Measure", self._request, plan=words, key=key, disabled=disabled, shortcuts=shortcuts)

    def _request(self) -> CellsRequest:
        asked = self.plan().request(state.current_records(), self.name)
        st.session_state[f"{self.prefix}_view"] = HERE
        return asked

    def _words(self, plan: Plan, left: Sequence[Cell]) -> str:
        there = len(plan.cells) - len(left)
        line = self.describe(plan.cells) + (f", {there} of {len(plan.cells)} measured" if there else "")
        if before := len(left) - len(missing(left, state.records())):
            line += f" · {left[0].model} has changed since {counted(before, 'cell')} were measured"
        own = [record for record in state.records().values() if record.cell.experiment == self.experiment]
        for known, source in (
            (own, "what this tab measured"),
            (state.recorded(self.recorded), "the recorded run; another machine takes another time"),
        ):
            about = self.seconds(left, known)
            if about:
                most = state.config().max_run_s
                more = f"; a run is stopped after {work.duration(most)} and can be continued" if about > most else ""
                return f"{line} · about {work.duration(about)} (estimated from {source}){more}"
        return f"{line} · time not known before the first of them"

    def working(self) -> Job | None:
        """The live job of this page, if there is one."""
        newest = state.job_of(CellsRequest)
        return newest[0] if newest and newest[1].page == self.name and newest[0].live else None

    def asked(self, plan: Plan) -> tuple[Cell, ...]:
        """The plan's cells; while others are being measured, those."""
        newest, planned = state.job_of(CellsRequest), {cell.key for cell in plan.cells}
        if newest is None or self.working() is None:
            return plan.cells
        measured = newest[1].cells
        return plan.cells if all(cell.key in planned for cell in measured) else measured

    def ending(self) -> None:
        """Say what was wrong with the last click, and how the newest measurement here ended if not well."""
        work.ending(CellsRequest, self.name)

    def source(
        self, records: Sequence[ExperimentRecord], shown: str, files: Sequence[page.File], words: str = ""
    ) -> None:
        """Where the figures come from, the link, and the files. `words` go before the rest; they are not Markdown."""
        good = [record for record in records if record.error is None]
        with st.container(horizontal=True, vertical_alignment="center"):
            if good:
                page.tag("recorded" if shown == RECORDED else "measured")
            job = state.job()
            if shown == HERE and job is not None and job.request.page == self.name and job.cached:
                page.tag("cached", f"{len(job.cached)} of {job.request.items} of the last run")
            page.copy_link()
            page.downloads(self.name, files, disabled=not good)
        if good:
            st.caption(escape(f"{words} {made_with(good)}".strip()))
