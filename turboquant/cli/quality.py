"""`turboquant perplexity` and `turboquant needle`: what a cache does to predictions, and to finding a fact."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turboquant.cli.app import (
    MOST_ANSWER,
    BitsOption,
    MethodsOption,
    ModelOption,
    NoTemplateOption,
    OverwriteOption,
    WeightsOption,
    app,
    check_apart,
    check_writable,
    fail,
    finish,
    read_methods,
    read_settings,
    run_recorded,
)
from turboquant.cli.tables import Column, cells, explain, heads, print_table
from turboquant.records.metrics import metric

if TYPE_CHECKING:
    from turboquant.methods import Method
    from turboquant.records.experiment import ExperimentRecord

DEFAULT = ("turboquant:bits=4", "turboquant:bits=3", "turboquant:bits=2")

TextsOption = Annotated[
    list[str] | None,
    typer.Option("--text", help="Shipped texts or paths of UTF-8 files; default persuasion factbook sqlite."),
]
ChunkOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens fed at once; faster and coarser. Default: exactly as decoding token by token."),
]


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
NEEDLE: tuple[Column, ...] = (
    "bits_per_value",
    "success_pct",
    ("success_low_pct", "success_high_pct"),
    "success_full_pct",
)


@app.command()
def perplexity(
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    bits: BitsOption = None,
    text: TextsOption = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    prefill: Annotated[int, typer.Option(min=1, help="The first of them, read in one call; not measured.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 1,
    start: Annotated[int, typer.Option(min=0, help="Token of the text where the first window begins.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="0: windows in a row; else their places are drawn.")] = 0,
    chunk_tokens: ChunkOption = None,
    weights: WeightsOption = "auto",
    output: Annotated[Path, typer.Option(help="One record a method.")] = Path("results/perplexity.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Read texts through compressed caches: perplexity, KL divergence from the full cache, same top token (%)."""
    started = time.perf_counter()
    methods = read_methods(method, DEFAULT, bits)
    values = {"texts": text, "context": context, "prefill": prefill, "windows": windows, "chunk_tokens": chunk_tokens}
    values |= {"start": start, "seed": seed}
    records = measure_perplexity("perplexity", model, methods, values, weights, output, overwrite)
    measured = [record for record in records if not record.error]
    if measured:
        show_perplexity(measured)
    finish(records, output, started, details={"results": {str(r.cell.method): r.metrics for r in measured}})


def measure_perplexity(
    title: str,
    model: str,
    methods: "Sequence[Method]",
    values: dict[str, Any],
    weights: str,
    output: Path,
    overwrite: bool,
) -> "list[ExperimentRecord]":
    """Return the records of methods under these settings (None for a default), old ones and new."""
    check_writable(output)
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.perplexity import EXPERIMENT

    settings = read_settings(EXPERIMENT.settings, values, texts="--text")
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


@app.command()
def needle(
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    bits: BitsOption = None,
    contexts: Annotated[list[int] | None, typer.Option(min=2, help="Tokens of a prompt; default 1024 2048.")] = None,
    depths: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=1.0, help="Where the needle stands: 0 start, 1 end; default 0 0.5 1."),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Needles for each length and depth.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the needles.")] = 0,
    filler: Annotated[
        str, typer.Option(help="Text around the needle: sentences (RULER's), a shipped text or a UTF-8 file.")
    ] = "sentences",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_ANSWER, help="Tokens of an answer.")] = 16,
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

    if filler != "sentences":
        check_texts([filler], output, "filler")
    shared: dict[str, Any] = {"repetitions": repetitions, "seed": seed, "filler": filler}
    shared |= {"max_new_tokens": max_new_tokens, "chat": not no_chat_template}
    grid = [
        read_settings(
            EXPERIMENT.settings, {"context": context, "depth": depth, **shared}, context="--contexts", depth="--depths"
        )
        for context in contexts or (1024, 2048)
        for depth in depths or (0.0, 0.5, 1.0)
    ]
    cells = cells_for(EXPERIMENT, model, methods, grid, weights)
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
