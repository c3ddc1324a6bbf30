"""`turboquant methods`: every method on the same texts, quality against the bits that it really holds."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant.cli.app import (
    BitsOption,
    MethodsOption,
    ModelOption,
    OverwriteOption,
    WeightsOption,
    app,
    finish,
    read_methods,
    say,
)
from turboquant.cli.options import Asked, takes
from turboquant.cli.perplexity import (
    PERPLEXITY,
    TEXTS,
    describe,
    measure_perplexity,
)
from turboquant.cli.tables import cells, explain, heads, print_table
from turboquant.records.settings import PerplexitySettings

if TYPE_CHECKING:
    from turboquant.methods import Method
    from turboquant.records.experiment import ExperimentRecord


def usable(grid: Sequence[str]) -> "tuple[list[Method], dict[str, str]]":
    """Return the methods that can run here, and why each of the others cannot."""
    from turboquant.methods import parse_method

    methods: list[Method] = []
    skipped: dict[str, str] = {}
    for spec in grid:
        try:
            method = parse_method(spec)
            method.check_available()
            methods.append(method)
        except (ValueError, ImportError) as error:
            skipped[spec] = str(error)
    return methods, skipped


def list_methods() -> None:
    """Print the methods there are with their default options."""
    from turboquant.methods import METHODS

    for cls in METHODS.values():
        typer.echo(f"{cls()}\n    {cls.title}. {cls.summary}\n    {cls.reference}")


@app.command()
@takes(PerplexitySettings, flags=TEXTS, without=("start", "seed"))
def methods(
    *,
    listed: Annotated[
        bool, typer.Option("--list", help="List the methods with their options; measure nothing.")
    ] = False,
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    bits: BitsOption = None,
    asked: Asked,
    weights: WeightsOption = "auto",
    output: Annotated[Path, typer.Option(help="One perplexity record a method.")] = Path("results/methods.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Measure all methods side by side (perplexity, KL), sorted by the bits that they hold, with the Pareto front.

    Without --method or --bits a grid from 2 to 8 bits is measured.
    """
    if listed:
        list_methods()
        return
    from turboquant.methods import settings_of

    started = time.perf_counter()
    chosen, skipped = (read_methods(method, [], bits), {}) if method or bits else usable(settings_of("grid"))
    for spec, reason in skipped.items():
        say(f"left out: {spec}: {reason}")
    records = measure_perplexity("methods", model, chosen, asked, weights, output, overwrite)
    measured = sorted(
        (record for record in records if not record.error), key=lambda record: record.metrics["bits_per_value"] or 0.0
    )
    front = show(measured) if measured else {}
    finish(records, output, started, left_out=skipped, pareto_front=[name for name, mark in front.items() if mark])


def show(records: "Sequence[ExperimentRecord]") -> dict[str, str]:
    """Print the table; return by method on which Pareto fronts (KL against bits held, packed) it is."""
    from turboquant.records.pareto import front_of

    fronts = [
        front_of([record.metrics for record in records], cost) for cost in ("bits_per_value", "packed_bits_per_value")
    ]
    marks = [
        " ".join(name for name, on in zip(("held", "packed"), pair, strict=True) if on)
        for pair in zip(*fronts, strict=True)
    ]
    describe(records[0])
    rows = [
        [str(record.cell.method), *cells(record.metrics, PERPLEXITY), mark]
        for record, mark in zip(records, marks, strict=True)
    ]
    print_table(("method", *heads(PERPLEXITY), "front"), rows)
    explain(("bits_per_value", "packed_bits_per_value"))
    typer.echo("front: No other method has both fewer of these bits and less KL.")
    return {str(record.cell.method): mark for record, mark in zip(records, marks, strict=True)}
