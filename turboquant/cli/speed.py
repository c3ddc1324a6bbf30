"""`turboquant speed`: speed and memory of the whole generation loop, with compression in the loop."""

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
    check_writable,
    finish,
    read_methods,
    run_recorded,
)
from turboquant.cli.options import Asked, takes
from turboquant.cli.perplexity import check_texts
from turboquant.cli.tables import Column, heads, print_table
from turboquant.cli.tables import cells as figures
from turboquant.records.settings import SpeedSettings

if TYPE_CHECKING:
    from turboquant.records.experiment import ExperimentRecord

COLUMNS: tuple[Column, ...] = (
    "tokens_per_second",
    ("p20_tokens_per_second", "p80_tokens_per_second"),
    "full_tokens_per_second",
    "speed_ratio",
    "time_to_first_token_ms",
    "full_time_to_first_token_ms",
    "encode_prompt_ms",
    "encode_step_ms",
    "cache_bytes",
    "full_cache_bytes",
    "peak_memory_bytes",
    "full_peak_memory_bytes",
)


@app.command()
@takes(SpeedSettings, several={"batch": (1, 4)}, without=("context",))
def speed(
    *,
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    bits: BitsOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    asked: Asked,
    weights: WeightsOption = "auto",
    output: Annotated[Path, typer.Option(help="One record a method and batch.")] = Path("results/generation.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Generate with the full cache and with compressed ones: tokens a second, first token, packing, memory."""
    started = time.perf_counter()
    methods = read_methods(method, ("turboquant:bits=4",), bits)
    check_writable(output)
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.speed import EXPERIMENT

    check_texts([asked.values["text"]], output)
    grid = asked.grid(context=prompt_tokens + asked.values["new_tokens"])
    cells = cells_for(EXPERIMENT, model, methods, grid, weights)
    records = run_recorded("speed", cells, {EXPERIMENT.name: EXPERIMENT}, output, overwrite)
    measured = [record for record in records if not record.error]
    if measured:
        show(measured)
    ratios = [[str(r.cell.method), r.cell.settings["batch"], r.metrics["speed_ratio"]] for r in measured]
    finish(records, output, started, speed_ratios=ratios)


def show(records: "Sequence[ExperimentRecord]") -> None:
    """Print one line a method and batch."""
    first = records[0]
    assert first.model is not None
    typer.echo(
        f"{first.model.name} {first.model.dtype} on {first.environment.device}, {first.environment.cpu_threads} "
        f"threads; medians of {first.cell.settings['repeats']} rounds; peak memory: {first.detail['peak_memory']}"
    )
    print_table(("method", "rows", "tokens", *heads(COLUMNS)), [_row(record) for record in records])


def _row(record: "ExperimentRecord") -> list[str]:
    settings = record.cell.settings
    tokens = f"{settings['context'] - settings['new_tokens']} + {settings['new_tokens']}"
    return [str(record.cell.method), str(settings["batch"]), tokens, *figures(record.metrics, COLUMNS)]
