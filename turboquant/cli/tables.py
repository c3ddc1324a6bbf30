"""Tables for people, on standard output."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from turboquant.report import Table


def number(value: float | None, form: str) -> str:
    """Format a metric; one that could not be had is a dash."""
    return "-" if value is None else format(value, form)


def interval(low: float | None, high: float | None) -> str:
    """Format an interval; one that could not be had is a dash."""
    return "-" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for first, *rest in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        typer.echo("  ".join([first.ljust(widths[0]), *cells]))


def show(table: "Table") -> None:
    """Print a table of a report with the note below it."""
    print_table(table.columns, [[cell.replace("`", "") for cell in row] for row in table.rows])
    if table.note:
        typer.echo(table.note)
