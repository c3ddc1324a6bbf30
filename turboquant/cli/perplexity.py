"""`turboquant perplexity`: what a cache does to predictions on texts."""

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
    check_apart,
    check_writable,
    fail,
    finish,
    read_methods,
    run_recorded,
)
from turboquant.cli.options import Asked, takes
from turboquant.cli.tables import Column, cells, explain, heads, print_table
from turboquant.records.metrics import metric
from turboquant.records.settings import PerplexitySettings

if TYPE_CHECKING:
    from turboquant.methods import Method
    from turboquant.records.experiment import ExperimentRecord

DEFAULT = ("turboquant:bits=4", "turboquant:bits=3", "turboquant:bits=2")

TEXTS = {"texts": "--text"}
"""The option that names texts."""


def check_texts(texts: Sequence[str], output: Path, option: str = "text") -> None:
    """Leave with code 2 where a text cannot be read, counts twice or is the output; asked before a model is loaded."""
    from turboquant.texts import TEXTS, read_texts

    try:
        read_texts(texts)
    except ValueError as error:
        fail(error, 2)
    for text in texts:
        if text not in TEXTS:
            check_apart(**{option: Path(text)}, output=output)


PERPLEXITY: tuple[Column, ...] = (
    "bits_per_value",
    "packed_bits_per_value",
    "ppl",
    "delta_ppl_pct",
    "kl_mean",
    ("kl_low", "kl_high"),
    "kl_p99",
    "same_top_pct",
)


@app.command()
@takes(PerplexitySettings, flags=TEXTS)
def perplexity(
    *,
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    bits: BitsOption = None,
    asked: Asked,
    weights: WeightsOption = "auto",
    output: Annotated[Path, typer.Option(help="One record a method.")] = Path("results/perplexity.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Read texts through compressed caches: perplexity, KL divergence from the full cache, same top token (%)."""
    started = time.perf_counter()
    methods = read_methods(method, DEFAULT, bits)
    records = measure_perplexity("perplexity", model, methods, asked, weights, output, overwrite)
    measured = [record for record in records if not record.error]
    if measured:
        show_perplexity(measured)
    finish(records, output, started, details={"results": {str(r.cell.method): r.metrics for r in measured}})


def measure_perplexity(
    title: str,
    model: str,
    methods: "Sequence[Method]",
    asked: Asked,
    weights: str,
    output: Path,
    overwrite: bool,
) -> "list[ExperimentRecord]":
    """Return the records of methods under these settings, old ones and new."""
    check_writable(output)
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.perplexity import EXPERIMENT

    settings = asked.one()
    check_texts(settings.texts, output)
    cells = cells_for(EXPERIMENT, model, methods, [settings], weights)
    return run_recorded(title, cells, {EXPERIMENT.name: EXPERIMENT}, output, overwrite)


def describe(record: "ExperimentRecord") -> None:
    """Print on what a table was measured."""
    assert record.model is not None
    settings = record.cell.settings
    typer.echo(
        f"{record.model.name} {record.model.dtype} on {record.environment.device}; {', '.join(settings['texts'])}: "
        f"{metric('measured_tokens').text(record.metrics['measured_tokens'])} tokens behind {settings['prefill']}; "
        f"{metric('ppl_full').title} {metric('ppl_full').text(record.metrics['ppl_full'])}"
    )


def show_perplexity(records: "Sequence[ExperimentRecord]") -> None:
    """Print the table with what it was measured on."""
    describe(records[0])
    print_table(
        ("method", *heads(PERPLEXITY)),
        [[str(record.cell.method), *cells(record.metrics, PERPLEXITY)] for record in records],
    )
    explain(("bits_per_value", "packed_bits_per_value"))
