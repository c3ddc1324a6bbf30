"""Measurements asked for on a page: the widgets' values as checked cells, and the records of them as rows."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.config import AppConfig
from app.engine.job import CellsRequest
from app.tab.requests import RequestError
from turboquant.records.results import Cell, ExperimentRecord

MAX_SEED = 2**31 - 1


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


@dataclass(frozen=True)
class Plan:
    """What a page's widgets ask for; without cells where they cannot be measured, and then why."""

    cells: tuple[Cell, ...] = ()
    refusal: str | None = None

    def request(
        self, records: Mapping[str, ExperimentRecord], title: str, page: str, *, private: bool = False
    ) -> CellsRequest:
        """The cells that are not measured yet.

        Raises:
            RequestError: There are none, or the widgets' values are refused.
        """
        if self.refusal:
            raise RequestError(self.refusal)
        left = missing(self.cells, records)
        if not left:
            raise RequestError("All of this is measured already; change a setting to measure more.")
        return CellsRequest(left[0].model or "", left[0].weights, left, title, page, private)


def made_with(records: Sequence[ExperimentRecord]) -> str:
    """Model, machine, date and commit of some records, in one line."""
    from turboquant.report.summary import measured_on

    models = {record.model.name: record.model for record in records if record.model}
    said = [f"{one.name} (weights {one.weights}, {one.dtype})" for one in models.values()]
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
