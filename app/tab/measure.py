"""Measurements asked for on a page: the widgets' values as checked cells, and the records of them as rows."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.config import AppConfig
from app.engine.job import Job, Request
from app.tab.requests import RequestError
from turboquant.records.experiment import Cell, ExperimentRecord

if TYPE_CHECKING:
    from app.tab.results import Results
    from turboquant.experiments.base import Watch

MAX_SEED = 2**31 - 1
MAX_RECORDS = 2_000


def check_each(name: str, values: Iterable[object], allowed: Sequence[str]) -> tuple[str, ...]:
    """The chosen values in the order of the offered ones, if each of them is offered.

    Raises:
        RequestError: One is not, or there are none.
    """
    chosen = [str(value) for value in values]
    if wrong := next((value for value in chosen if value not in allowed), None):
        raise RequestError(f"{name} must be among {', '.join(allowed)}, got {wrong[:40]!r}.")
    if not chosen:
        raise RequestError(f"Choose at least one of {name.lower()}.")
    return tuple(value for value in allowed if value in chosen)


def check_count(cells: Sequence[Cell], config: AppConfig) -> None:
    """Raise RequestError where there are more cells than this deployment measures at once."""
    if len(cells) > config.max_cells:
        raise RequestError(f"At most {config.max_cells} cells can be measured at once, got {len(cells)}.")


def missing(cells: Iterable[Cell], records: Mapping[str, ExperimentRecord]) -> tuple[Cell, ...]:
    """The cells without a result; those that failed are asked for again."""
    return tuple(cell for cell in cells if cell.key not in records or records[cell.key].error is not None)


def present(cells: Iterable[Cell], records: Mapping[str, ExperimentRecord]) -> list[ExperimentRecord]:
    """The records of the cells that were measured or tried, in the cells' order."""
    return [records[cell.key] for cell in cells if cell.key in records]


@dataclass(frozen=True, kw_only=True)
class CellsRequest(Request):
    """Cells of experiments; each result is an ExperimentRecord, those that failed with their error."""

    cells: tuple[Cell, ...]

    @property
    def items(self) -> int:
        """One a cell."""
        return len(self.cells)

    def key(self, item: int) -> str | None:
        """The cell's identity."""
        return self.cells[item].key

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        """Measure the cells that are left, one group that shares its forward passes after the other."""
        from turboquant.experiments.base import Models, groups, run_group
        from turboquant.experiments.registry import EXPERIMENTS
        from turboquant.run.generate import CancelledError

        models = Models(lambda name, weights: loaded)
        item_of = {self.cells[item].key: item for item in job.pending}
        for group in groups([self.cells[item] for item in job.pending]):
            watch = _watch(job, len(group), cancelled, yielding)
            try:
                for record in run_group(EXPERIMENTS[group[0].experiment], group, models, watch):
                    job.add(item_of[record.cell.key], record)
            except CancelledError:
                return
            if yielding():
                return

    def keep(self, tab: "Results", job: Job, item: int) -> str | None:
        """A record by its cell; the oldest go where there are too many."""
        record: ExperimentRecord = job.results[item]
        tab.records[record.cell.key] = record
        while len(tab.records) > MAX_RECORDS:
            del tab.records[next(iter(tab.records))]
        return None


def _watch(job: Job, size: int, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> "Watch":
    """Report the progress of `size` cells; stop between methods for others, but not before one is measured."""
    from turboquant.experiments.base import Watch

    known = len(job.results)
    return Watch(
        progress=lambda fraction, text: job.progress(known + size * fraction, text),
        cancelled=cancelled,
        stopping=lambda: len(job.results) > known and yielding(),
    )


@dataclass(frozen=True)
class Plan:
    """What a page's widgets ask for; without cells where they cannot be measured, and then why.

    `private` says that the cells hold something that the visitor wrote.
    """

    cells: tuple[Cell, ...]
    private: bool
    refusal: str | None = None

    def request(self, records: Mapping[str, ExperimentRecord], page: str) -> CellsRequest:
        """The cells that are not measured yet.

        Raises:
            RequestError: There are none, or the widgets' values are refused.
        """
        if self.refusal:
            raise RequestError(self.refusal)
        left = missing(self.cells, records)
        if not left:
            raise RequestError("All of this is measured already; change a setting to measure more.")
        return CellsRequest(
            model=left[0].model or "",
            weights=left[0].weights,
            private=frozenset(range(len(left)) if self.private else ()),
            methods=tuple(sorted({cell.method for cell in left if cell.method})),
            title=page.capitalize(),
            page=page,
            cells=left,
        )


def made_with(records: Sequence[ExperimentRecord]) -> str:
    """Model, machine, date and commit of some records, in one line."""
    from turboquant.report.summary import measured_on

    models = {record.model.name: record.model for record in records if record.model}
    said = [f"{one.name} (weights {one.weights_said}, {one.dtype})" for one in models.values()]
    parts = [f"{', '.join(said)}."] if said else []
    return " ".join([*parts, measured_on(record.environment for record in records)]) if records else ""


def json_lines(records: Iterable[ExperimentRecord]) -> str:
    """The records as the command line writes them."""
    return "".join(record.model_dump_json() + "\n" for record in records)


def as_json(records: Iterable[ExperimentRecord]) -> str:
    """The records as one JSON list."""
    return json.dumps([record.model_dump(mode="json") for record in records], indent=1)


def report(records: Sequence[ExperimentRecord]) -> str:
    """The records as one HTML page that works offline: tables and figures."""
    from turboquant.report.page import build_report, to_html
    from turboquant.report.summary import Results

    results = Results(records=tuple((record, Path("records.jsonl")) for record in records))
    return to_html(build_report(results, plots=True))
