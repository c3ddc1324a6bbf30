"""`turboquant needle`: whether a fact in a long text is still found."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant.cli.app import (
    BitsOption,
    MethodsOption,
    ModelOption,
    NoTemplateOption,
    OverwriteOption,
    WeightsOption,
    app,
    check_writable,
    finish,
    read_methods,
    run_recorded,
)
from turboquant.cli.options import Asked, takes
from turboquant.cli.perplexity import DEFAULT, check_texts
from turboquant.cli.tables import Column, cells, heads, print_table
from turboquant.records.settings import SENTENCES, NeedleSettings

if TYPE_CHECKING:
    from turboquant.records.experiment import ExperimentRecord

NEEDLE: tuple[Column, ...] = (
    "bits_per_value",
    "success_pct",
    ("success_low_pct", "success_high_pct"),
    "success_full_pct",
)


@app.command()
@takes(
    NeedleSettings,
    several={"context": (1024, 2048), "depth": (0.0, 0.5, 1.0)},
    flags={"context": "--contexts", "depth": "--depths"},
    without=("chunk_tokens", "chat", "needle", "question", "answer"),
)
def needle(
    *,
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    bits: BitsOption = None,
    asked: Asked,
    no_chat_template: NoTemplateOption = False,
    weights: WeightsOption = "auto",
    output: Annotated[Path, typer.Option(help="One record a method, length and depth.")] = Path("results/needle.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Hide a number in a long text and ask for it, with the full cache and with compressed ones."""
    started = time.perf_counter()
    methods = read_methods(method, DEFAULT, bits)
    check_writable(output)
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.needle import EXPERIMENT

    if asked.values["filler"] != SENTENCES:
        check_texts([asked.values["filler"]], output, "filler")
    cells = cells_for(EXPERIMENT, model, methods, asked.grid(chat=not no_chat_template), weights)
    records = run_recorded("needle", cells, {"needle": EXPERIMENT}, output, overwrite)
    measured = [record for record in records if not record.error]
    if measured:
        show_needles(measured)
    finish(records, output, started, success_pct=_needle_totals(measured))


def _needle_totals(records: "Sequence[ExperimentRecord]") -> dict[str, float]:
    """Return the share of needles found by each method over all lengths and depths, in percent."""
    counts: dict[str, tuple[float, float]] = {}
    for record in records:
        found, asked = counts.get(str(record.cell.method), (0.0, 0.0))
        repetitions = record.metrics["repetitions"] or 0.0
        counts[str(record.cell.method)] = (
            found + (record.metrics["success_pct"] or 0.0) / 100 * repetitions,
            asked + repetitions,
        )
    return {method: round(100 * found / asked, 2) for method, (found, asked) in counts.items()}


def show_needles(records: "Sequence[ExperimentRecord]") -> None:
    """Print one line a method, length and depth."""
    rows = [
        [
            str(record.cell.method),
            f"{record.cell.settings['context']:,}",
            f"{record.cell.settings['depth']:g}",
            *cells(record.metrics, NEEDLE),
        ]
        for record in records
    ]
    print_table(("method", "tokens", "depth", *heads(NEEDLE)), rows)
