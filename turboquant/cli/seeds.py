"""`turboquant seeds`: how far results move with rotation and sampling seeds, and whether a difference is real."""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turboquant.cli.app import (
    BitsOption,
    MethodsOption,
    ModelOption,
    OverwriteOption,
    WeightsOption,
    app,
    check_writable,
    fail,
    finish,
    read_method,
    read_methods,
    run_recorded,
    say,
)
from turboquant.cli.options import Asked, takes
from turboquant.cli.perplexity import TEXTS, check_texts
from turboquant.cli.tables import interval, print_table
from turboquant.records.metrics import metric
from turboquant.records.settings import MOST_RUNS, SeedsSettings

if TYPE_CHECKING:
    from turboquant.methods import Method
    from turboquant.records.experiment import Cell, ExperimentRecord
    from turboquant.records.spread import Difference, Spread95

SPREADS = ("metric", "seeds", "mean", "sd", "min", "max", "95 % interval of the mean")
SHOWN = (
    "kl_mean",
    "kl_p99",
    "delta_ppl_pct",
    "same_top_pct",
    "agreed_tokens",
    "agreed_tokens_median",
    "identical_pct",
    "sampled_agreed_tokens",
    "sampled_agreed_tokens_by_rotation",
    "sampled_agreed_tokens_by_sampling",
)


@app.command()
@takes(SeedsSettings, flags=TEXTS, without=("seed",))
def seeds(
    *,
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    bits: BitsOption = None,
    against: Annotated[str | None, typer.Option(help="Compare each method with this one; default the first.")] = None,
    rotation_seeds: Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Rotations of each method.")] = 8,
    sampling_seeds: Annotated[int, typer.Option(min=0, max=MOST_RUNS, help="Sampled answers to each prompt.")] = 8,
    asked: Asked,
    weights: WeightsOption = "auto",
    output: Annotated[Path, typer.Option(help="One record a method, rotation and sampling seed.")] = Path(
        "results/variance.jsonl"
    ),
    overwrite: OverwriteOption = False,
) -> None:
    """Measure methods under many rotation and sampling seeds: spreads, first differences, which gaps are real.

    A run that is stopped shows what it has; the same command goes on from there.
    """
    started = time.perf_counter()
    methods, reference = _methods(method, bits, against)
    check_writable(output)
    cells, experiment = _cells(model, methods, asked, range(rotation_seeds), range(sampling_seeds), weights, output)
    try:
        records = run_recorded("seeds", cells, {experiment.name: experiment}, output, overwrite)
    except typer.Exit as stopped:
        if stopped.exit_code == 1:
            _show_partial(cells, methods, reference, output)
        raise
    done = [record for record in records if not record.error]
    found = _show(done, methods, reference)
    finish(records, output, started, details=found)


def _methods(
    specs: Sequence[str] | None, bits: Sequence[int] | None, against: str | None
) -> "tuple[list[Method], Method]":
    """Return all methods, without their seeds, and the one that the others are compared with; or leave with code 2."""
    from turboquant.experiments.seeds import with_seeds

    named = [with_seeds(one, [0])[0] for one in read_methods(specs, ("turboquant:bits=4",), bits)]
    reference = named[0] if against is None else with_seeds(read_method(against), [0])[0]
    methods = list({str(one): one for one in [*named, reference]}.values())
    if against is not None and len(methods) == 1:
        fail(f"--against {against} is the only method", 2)
    return methods, reference


def _cells(
    model: str,
    methods: "Sequence[Method]",
    asked: Asked,
    rotations: Sequence[int],
    samplings: Sequence[int],
    weights: str,
    output: Path,
) -> "tuple[list[Cell], Any]":
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.seeds import EXPERIMENT, with_seeds

    settings = asked.one()
    check_texts(settings.texts, output)
    for one in methods:
        for what, tokens in (("context", settings.context), ("prompt", settings.prompt_tokens + settings.new_tokens)):
            if one.compresses and not one.packs(tokens - 1):
                fail(f"{one} packs none of {tokens} tokens of {what}: give more, or a smaller window", 2)
    turned = [one for method in methods for one in with_seeds(method, rotations)]
    every = [settings.model_copy(update={"seed": seed}) for seed in (None, *samplings)]
    return cells_for(EXPERIMENT, model, turned, every, weights), EXPERIMENT


def _show_partial(cells: "Sequence[Cell]", methods: "Sequence[Method]", reference: "Method", output: Path) -> None:
    """Show what a stopped run has measured."""
    from turboquant.models.inputs import reusable
    from turboquant.records.files import RecordFileError, read_records

    try:
        done = list(reusable(read_records(output), cells).records.values())
    except RecordFileError:
        return
    if done:
        say(f"what {len(done)} of {len(cells)} records show:")
        _show(done, methods, reference)


def _show(records: "Sequence[ExperimentRecord]", methods: "Sequence[Method]", reference: "Method") -> dict[str, Any]:
    """Print spreads and differences; return them for the JSON line."""
    from turboquant.experiments.seeds import differences, spreads

    all_spreads, all_differences = {}, {}
    for method in methods:
        found = spreads(records, method)
        if found:
            typer.echo(f"\n{method}")
            print_table(SPREADS, [_spread_row(name, found[name]) for name in SHOWN if name in found])
            _show_first_differences(records, method)
        all_spreads[str(method)] = {name: one.model_dump() for name, one in found.items()}
    for method in methods:
        if str(method) == str(reference):
            continue
        gaps = differences(records, method, reference)
        typer.echo(f"\n{method} less {reference}")
        for name, gap in gaps.items():
            typer.echo(_difference_line(name, gap, (str(method), str(reference))))
        all_differences[str(method)] = {name: {**gap.model_dump(), "real": gap.real} for name, gap in gaps.items()}
    return {"against": str(reference), "spreads": all_spreads, "differences": all_differences}


def _spread_row(name: str, found: "Spread95") -> list[str]:
    figures = map(metric(name).text, (found.mean, found.sd, found.minimum, found.maximum))
    return [metric(name).label, str(found.count), *figures, interval(name, found.low, found.high)]


def _show_first_differences(records: "Sequence[ExperimentRecord]", method: "Method") -> None:
    """Print how the first differing tokens are distributed, greedy and sampled answers apart."""
    from turboquant.experiments.seeds import by_rotation, sampling_seeds

    for title, seeds in (("greedy", [None]), ("sampled", sampling_seeds(records))):
        cells = [record for seed in seeds for record in by_rotation(records, method, seed).values()]
        parted = [place for record in cells for place in record.detail["first_divergence"]]
        if not parted:
            continue
        length = cells[0].cell.settings["new_tokens"]
        edges = sorted({round(length * part / 4) for part in range(5)})
        counts = [
            f"{start}-{stop - 1}: {sum(place is not None and start <= place < stop for place in parted)}"
            for start, stop in pairwise(edges)
        ]
        none = sum(place is None for place in parted)
        typer.echo(f"first differing token, {title}, {len(parted)} answers: {', '.join(counts)}, none: {none}")


def _difference_line(name: str, gap: "Difference", sides: tuple[str, str]) -> str:
    """Say how large a difference is, whether it is real, and which of the two methods is the better one then."""
    figure, over = metric(name.partition(" ")[0]), name.partition(" ")[2]
    size, low, high = (figure.text(value, sign=True) for value in (gap.difference, gap.low, gap.high))
    start = f"  {figure.label}, {over}: {size}"
    if gap.real is None:
        return f"{start} ({gap.pairs} pairs are too few to tell)"
    best = figure.best((gap.difference, 0.0))
    better = "" if best is None else f", {sides[best]} is better"
    verdict = f"real{better}" if gap.real else "not shown to be real"
    return f"{start}, 95 % interval {low} to {high}, p {gap.p_value:.2g} ({gap.pairs} pairs): {verdict}"
