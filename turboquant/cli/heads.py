"""`turboquant heads` (in the methodology: `evaluate`): attention under compressed caches over long contexts."""

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
    check_apart,
    check_writable,
    fail,
    fail_model,
    finish,
    read_methods,
    run_recorded,
    say,
)
from turboquant.cli.options import Asked, takes
from turboquant.cli.perplexity import check_texts
from turboquant.cli.tables import cells as figures
from turboquant.cli.tables import explain, heads, print_table
from turboquant.records.settings import HeadsSettings

if TYPE_CHECKING:
    from turboquant.cli.app import Store
    from turboquant.records.experiment import Cell, ExperimentRecord

CONTEXTS = (2048, 4096, 8192)
COLUMNS = (
    "bits_per_value",
    "compression_ratio",
    "cosine_similarity",
    "top1_match_pct",
    "top5_match_pct",
    "packed_top1_match_pct",
    "kl_mean",
    "same_top_pct",
    "needle_rank",
    "needle_rank_full",
)


@app.command("heads")
@takes(
    HeadsSettings,
    several={"context": CONTEXTS},
    flags={"context": "--contexts"},
    without=("chat",),
    help={"context": "Tokens of each context."},
)
def evaluate(
    *,
    model: ModelOption = "smollm2-135m",
    bits: BitsOption = None,
    method: MethodsOption = None,
    asked: Asked,
    output: Annotated[Path, typer.Option(help="The JSON file; running again goes on with it.")] = Path(
        "results/evaluate.json"
    ),
    no_chat_template: NoTemplateOption = False,
    weights: WeightsOption = "auto",
    overwrite: OverwriteOption = False,
    records: Annotated[Path | None, typer.Option(help="Append the records to this JSONL file as well.")] = None,
) -> None:
    """Compare attention under compressed caches with the full cache's, over long contexts with a hidden needle.

    Also: the needle's rank by attention, and how far the next token's probabilities move (KL divergence, nats). All
    methods and bits share one forward pass a context. The file has model, bits and by_context with measured figures.
    """
    started = time.perf_counter()
    methods = read_methods(method, ["turboquant:bits=4"], bits)
    asked.values["context"].sort()
    filler: str = asked.values["filler"]
    check_writable(output)
    if records is not None:
        _check_records(records)
        check_apart(output=output, records=records)
    if filler != "sentences":
        check_texts([filler], output, "filler")
    _check_machine(model, weights, asked.values["context"][-1])
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.heads import EXPERIMENT

    cells = cells_for(EXPERIMENT, model, methods, asked.grid(chat=not no_chat_template), weights)
    store = _store(output, overwrite, cells, records)

    found = run_recorded(f"evaluate {model}", cells, {EXPERIMENT.name: EXPERIMENT}, output, overwrite, store=store)
    _table(found)
    finish(found, output, started)


def _check_records(path: Path) -> None:
    """Leave with code 2 where records cannot be appended to a file, or it is no file of records."""
    from turboquant.records.files import RecordFileError, read_records

    check_writable(path)
    try:
        read_records(path)
    except RecordFileError as error:
        fail(f"{error}: give another --records", 2)


def _check_machine(model: str, weights: str, context: int) -> None:
    """Leave where the model has no such context (code 2) or this machine no memory for it, before anything loads."""
    from turboquant.models.checks import free_bytes
    from turboquant.models.load import ModelError, estimate_bytes, read_config, resolve
    from turboquant.run.generate import PromptError
    from turboquant.run.memory import check_context

    try:
        precision, device = resolve(weights)
        config = read_config(model)
        free = free_bytes(device) - estimate_bytes(config, precision)
        check_context(model, config, context, precision, free)
    except ModelError as error:
        fail_model(error)
    except PromptError as error:
        fail(error, 2)


def _store(output: Path, overwrite: bool, cells: "Sequence[Cell]", also: Path | None) -> "Store":
    """Return what the output holds and how a record is added; leave with code 2 for a file of something else.

    That is also a file with results from before a change that would stay beside new ones.
    """
    from turboquant.models.inputs import reusable
    from turboquant.records.files import append_record
    from turboquant.report.methodology import EvaluationFileError, difference, read_document, write_document

    try:
        before = [] if overwrite else read_document(output)
    except (EvaluationFileError, OSError) as error:
        fail(f"{error}: give another --output, or --overwrite", 2)
    if unlike := difference(before, cells[0]):
        fail(f"{output} holds results of {unlike}: give another --output, or --overwrite", 2)
    asked = {cell.key for cell in cells}
    for line in reusable(before, [one.cell for one in before if one.cell.key not in asked]).lines("not asked for"):
        fail(f"{line} and would stay in {output} beside new ones: give another --output, or --overwrite", 2)
    held = {record.cell.key: record for record in before}

    def keep(record: "ExperimentRecord") -> None:
        if not record.error:
            held[record.cell.key] = record
            write_document(list(held.values()), output)
        if also is not None:
            append_record(record, also)

    return before, keep


def _table(records: "Sequence[ExperimentRecord]") -> None:
    """Print the headline figures for people."""
    good = [record for record in records if not record.error]
    if not good:
        return
    rows = [
        [record.cell.method or "", f"{record.cell.settings['context']:,}", *figures(record.metrics, COLUMNS)]
        for record in good
    ]
    print_table(["method", "context", *heads(COLUMNS)], rows)
    explain(("top1_match_pct", "top5_match_pct", "needle_rank"), say)
