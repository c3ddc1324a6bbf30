"""`turboquant sweep`: a grid of models, methods, bits, contexts and seeds, in local processes or on a Ray cluster."""

import functools
import json
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turboquant.cli.app import (
    BitsOption,
    MethodsOption,
    OverwriteOption,
    WeightsOption,
    app,
    fail,
    finish,
    finished,
    read_methods,
    run_recorded,
    say,
)
from turboquant.records.names import recorded, word
from turboquant.records.settings import MOST_RUNS

if TYPE_CHECKING:
    from turboquant.cli.app import Engine
    from turboquant.records.experiment import Cell, ExperimentRecord

METHODS = ("full", "turboquant:bits=4", "turboquant:bits=3", "turboquant:bits=2")


class EngineName(StrEnum):
    """Where cells run."""

    local = "local"
    ray = "ray"


@app.command()
def sweep(
    model: Annotated[list[str] | None, typer.Option(help="Models, one or several (default: smollm2-135m).")] = None,
    experiment: Annotated[list[str] | None, typer.Option(help="Experiments (default: perplexity).")] = None,
    method: MethodsOption = None,
    bits: BitsOption = None,
    contexts: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of each context; one or several.")] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Seeds of the experiments (needles, windows of text); one or several."),
    ] = None,
    rotation_seeds: Annotated[
        list[int] | None, typer.Option(min=0, help="Seeds of the methods' random rotations; one or several.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the experiments' settings; several make an axis.")
    ] = None,
    weights: WeightsOption = "auto",
    output: Annotated[Path, typer.Option(help="Each finished cell is appended here.")] = Path("results/sweep.jsonl"),
    overwrite: OverwriteOption = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=MOST_RUNS, help="Local processes (default: one for each GPU, or one).")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="Local processes, or a Ray cluster.")] = EngineName.local,
    address: Annotated[
        str | None, typer.Option(help="Ray: the cluster's address (default: one is started here).")
    ] = None,
    num_cpus: Annotated[float, typer.Option(min=0, max=MOST_RUNS, help="Ray: CPUs for each task.")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, max=MOST_RUNS, help="Ray: GPUs for each task.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and which are done.")] = False,
) -> None:
    """Measure a grid of cells; a cell that is on disk is not measured again, one that failed is.

    Without --contexts, --seeds or --set the experiments' own defaults hold.
    """
    from turboquant.experiments.registry import EXPERIMENTS

    started = time.perf_counter()
    axes = {"context": contexts or [], "seed": seeds or [], **_read_settings(set_ or [])}
    methods = read_methods(method, METHODS, bits)
    cells = _grid(
        experiment or ["perplexity"], model or ["smollm2-135m"], (methods, rotation_seeds or []), axes, weights
    )
    if dry_run:
        _list(cells, output, overwrite)
        return
    chosen = _engine(engine, workers, address, num_cpus, num_gpus)
    records = run_recorded("sweep", cells, EXPERIMENTS, output, overwrite, show=_show, engine=chosen)
    finish(records, output, started, experiment="sweep")


def _read_settings(given: Sequence[str]) -> dict[str, list[Any]]:
    """Read FIELD=VALUE; a value is JSON where it can be read so, otherwise text."""
    found: dict[str, list[Any]] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier() or name in ("context", "tokens", "seed"):
            fail(f"--set takes FIELD=VALUE (--contexts and --seeds have options of their own), got {item!r}", 2)
        try:
            value = json.loads(text)
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            fail(f"--set takes text in UTF-8, got {item!r}", 2)
        except (ValueError, RecursionError):
            value = text
        found.setdefault(name, []).append(value)
    return found


def _grid(
    names: Sequence[str],
    models: Sequence[str],
    methods: tuple[Sequence[Any], Sequence[int]],
    axes: dict[str, list[Any]],
    weights: str,
) -> "list[Cell]":
    from turboquant.experiments.registry import EXPERIMENTS
    from turboquant.experiments.sweep import grid, with_rotation_seeds
    from turboquant.models.load import WEIGHTS, ModelError
    from turboquant.models.registry import find_spec

    names = [recorded(name) for name in names]
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        fail(f"unknown experiment {unknown[0]!r}: choose from {', '.join(sorted(map(word, EXPERIMENTS)))}", 2)
    if weights not in WEIGHTS:
        fail(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}", 2)
    try:
        for name in models:
            find_spec(name)
        everywhere = with_rotation_seeds(*methods)
        return grid([EXPERIMENTS[name] for name in names], models, everywhere, axes=axes, weights=weights)
    except (ModelError, ValueError) as error:
        fail(error, 2)


def _engine(engine: EngineName, workers: int | None, address: str | None, num_cpus: float, num_gpus: float) -> "Engine":
    if engine is EngineName.local:
        from turboquant.experiments.workers import run_workers

        if address is not None:
            fail("--address goes with --engine ray", 2)
        return functools.partial(run_workers, workers=workers)
    from turboquant.experiments.cluster import RayMissingError, connect, run_ray

    if workers is not None:
        fail("--workers goes with --engine local: a Ray cluster runs as many tasks as it has room for", 2)
    if not num_cpus and not num_gpus:
        fail("a Ray task takes --num-cpus or --num-gpus above 0", 2)
    try:
        connect(address)
    except RayMissingError as error:
        fail(error, 2)
    return functools.partial(run_ray, cpus=num_cpus, gpus=num_gpus)


def _list(cells: "list[Cell]", output: Path, overwrite: bool) -> None:
    from turboquant.experiments.registry import EXPERIMENTS
    from turboquant.models.inputs import reusable

    before = finished(output, set(EXPERIMENTS), False) if output.exists() and not overwrite else []
    latest = {record.cell.key: record for record in before}
    found = reusable(before, cells)
    for line in found.lines():
        say(line)
    done = set(found.records)
    for cell in cells:
        record = latest.get(cell.key)
        state = (
            "done" if cell.key in done else "failed" if record and record.error else "changed" if record else "to do"
        )
        typer.echo(f"{state:7} {cell}")
    count = sum(cell.key in done for cell in cells)
    typer.echo(json.dumps({"cells": len(cells), "done": count, "to_do": len(cells) - count, "output": str(output)}))


def _show(record: "ExperimentRecord") -> None:
    from turboquant.records.metrics import metric
    from turboquant.report.tables import COLUMNS

    names = COLUMNS.get(record.cell.experiment, tuple(record.metrics))
    known = {metric(name): value for name in names if (value := record.metrics.get(name)) is not None}
    say(f"{record.cell}: {', '.join(f'{one.title} {one.said(value)}' for one, value in known.items())}")
