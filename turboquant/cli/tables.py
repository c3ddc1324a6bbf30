"""Tables for people, on standard output."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from turboquant.records.metrics import NONE, metric

if TYPE_CHECKING:
    from turboquant.report import Table


LINE, NARROW = 120, 7
"""Characters of a line of text, and of a heading that is not broken into lines."""

Column = str | tuple[str, str]
"""A metric by its name in records, or the two ends of an interval."""


def heads(columns: Sequence[Column]) -> list[str]:
    """Return what stands above columns of metrics."""
    ends = {True: "95 % interval", False: "20 % to 80 %"}
    return [metric(one).head if isinstance(one, str) else ends["low" in one[0]] for one in columns]


def cells(figures: Mapping[str, float | None], columns: Sequence[Column]) -> list[str]:
    """Return the figures of a row; one that could not be had is a dash."""
    return [
        metric(one).text(figures.get(one)) if isinstance(one, str) else interval(one[0], *map(figures.get, one))
        for one in columns
    ]


def interval(name: str, low: float | None, high: float | None) -> str:
    """Return both ends of a metric's interval; one that could not be had is a dash."""
    return NONE if low is None or high is None else f"{metric(name).text(low)} to {metric(name).text(high)}"


def explain(names: Sequence[str], say: Callable[[str], None] = typer.echo) -> None:
    """Print what metrics mean."""
    for name in names:
        say(textwrap.fill(f"{metric(name).column}: {metric(name).definition}", LINE))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns, the first to the left; headings wider than their column take several lines."""
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    widths = [
        max(min(len(name), NARROW), *map(len, (*name.split(), *column)))
        for name, column in zip(header, columns, strict=True)
    ]
    named = [textwrap.wrap(name, width) for name, width in zip(header, widths, strict=True)]
    height = max(map(len, named))
    lines = zip(*([""] * (height - len(name)) + name for name in named), strict=True)
    for first, *rest in (*lines, *rows):
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        typer.echo("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def show(table: "Table") -> None:
    """Print a table of a report with the note below it."""
    print_table(table.columns, [[cell.replace("`", "") for cell in row] for row in table.rows])
    if table.note:
        typer.echo(table.note)
