"""`turboquant validate`: the quantizers on random unit vectors against exact theory and the paper's bounds."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turboquant.cli.app import (
    MOST_RUNS,
    OverwriteOption,
    app,
    check_apart,
    check_writable,
    fail,
    finish,
    read_settings,
    run_recorded,
    say,
)
from turboquant.cli.tables import cells as figures
from turboquant.cli.tables import explain, heads, print_table

if TYPE_CHECKING:
    from turboquant.experiments.base import Watch
    from turboquant.records.experiment import Cell, ExperimentRecord

DIMS = (64, 80, 96, 128, 256)
BITS = tuple(range(1, 9))
QUICK_DIMS, QUICK_BITS, QUICK_SEEDS = (64, 128), (1, 2, 3, 4), 12
COLUMNS = (
    "mse",
    "mse_theory",
    "inner_product_mse",
    "inner_product_prod_gaussian",
    "inner_product_prod_gaussian_theory",
    "inner_product_prod_orthogonal",
    "inner_product_prod_orthogonal_theory",
    "gain_mse",
    "gain_prod_gaussian",
    "recall_full_pct",
    "recall_mse_pct",
    "recall_prod_gaussian_pct",
    "encode_mse_vectors_per_second",
    "decode_mse_vectors_per_second",
    "largest_z",
)
PLOTTED = ("mse", "inner_product_mse", "inner_product_prod_gaussian", "inner_product_prod_orthogonal")
EXPLAINED = ("inner_product", "gain", "recall_pct", "largest_z")


@app.command()
def validate(
    bits: Annotated[list[int] | None, typer.Option(min=1, max=8, help="Bits a coordinate; default 1 to 8.")] = None,
    dims: Annotated[list[int] | None, typer.Option(min=2, help="Head dims; default 64 80 96 128 256.")] = None,
    vectors: Annotated[int, typer.Option(min=2, max=1_000_000, help="Vectors a seed.")] = 256,
    seeds: Annotated[
        int | None, typer.Option(min=3, max=MOST_RUNS, help="Seeds; default 32. Fewer than 12 fail checks by chance.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    rotation: Annotated[str, typer.Option(help="qr or hadamard.")] = "qr",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="One record a (dim, bits).")] = Path("results/validate.jsonl"),
    plot: Annotated[Path | None, typer.Option(help="Write the curves to this HTML file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer dims, bits and seeds.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Check distortion, bias and retrieval of the codes on random unit vectors against exact theory; no model.

    Leaves with code 1 where a check fails.
    """
    started = time.perf_counter()
    _check_options(rotation, device)
    if plot is not None:
        check_writable(plot, read_back=False)
        check_apart(output=output, plot=plot)
        _import_plots()
    seeds = seeds or (QUICK_SEEDS if quick else 32)
    shared = {"vectors": vectors, "seeds": seeds, "seed": seed, "rotation": rotation, "device": device}
    cells = _cells(dims or (QUICK_DIMS if quick else DIMS), bits or (QUICK_BITS if quick else BITS), shared)
    experiments: dict[str, Any] = {"validate": None}
    records = run_recorded("validate", cells, experiments, output, overwrite, engine=_measure)
    done = [record for record in records if not record.error]
    _show_table(done)
    failed = _show_checks(done)
    if plot is not None:
        _write_plot(done, plot)
    checks = sum(len(record.detail["checks"]) for record in done)
    if failed:
        say(f"turboquant: {failed} of {checks} checks failed")
    finish(records, output, started, checks=checks, checks_failed=failed, plot=None if plot is None else str(plot))
    if failed:
        raise typer.Exit(1)


def _check_options(rotation: str, device: str) -> None:
    import torch

    from turboquant.quant.rotation import ROTATIONS

    if rotation not in ROTATIONS:
        fail(f"rotation must be one of {', '.join(ROTATIONS)}, got {rotation!r}", 2)
    if device not in ("cpu", "cuda"):
        fail(f"device must be cpu or cuda, got {device!r}", 2)
    if device == "cuda" and not torch.cuda.is_available():
        fail("device is cuda, but no CUDA device is to be had", 2)


def _import_plots() -> None:
    """Leave with code 2 where plotly is missing; asked before the work starts."""
    try:
        import turboquant.report.plots  # noqa: F401
    except ImportError as error:
        fail(f"--plot needs plotly ({error}): pip install 'turboquant-lab[plots]'", 2)


def _cells(dims: Sequence[int], bits: Sequence[int], shared: dict[str, Any]) -> "list[Cell]":
    from turboquant.experiments.theory import SyntheticSettings
    from turboquant.records.experiment import Cell

    settings = [
        read_settings(SyntheticSettings, {"dim": dim, "bits": b, **shared}, dim="--dims")
        for dim in dict.fromkeys(dims)
        for b in dict.fromkeys(bits)
    ]
    return [Cell(experiment="validate", settings=one.model_dump(mode="json")) for one in settings]


def _measure(
    cells: "Sequence[Cell]", experiments: Mapping[str, Any], watch: "Watch", stopping: Callable[[], bool]
) -> "Iterator[ExperimentRecord]":
    from turboquant.experiments.theory import SyntheticSettings, validate
    from turboquant.records.environment import environment
    from turboquant.records.experiment import ExperimentRecord

    for i, cell in enumerate(cells):
        if stopping():
            return
        part = watch.part(i / len(cells), (i + 1) / len(cells))
        settings = SyntheticSettings.model_validate(cell.settings)
        text = f"{settings.bits} bits in {settings.dim} dimensions"
        begun = time.perf_counter()
        found = validate(settings, lambda done, part=part, text=text: part.progress(done, text))  # type: ignore[misc]
        yield ExperimentRecord(
            cell=cell,
            metrics=found.metrics(),
            timing={"elapsed": time.perf_counter() - begun},
            detail=found.model_dump(mode="json", exclude={"settings"}),
            environment=environment(settings.device),
        )


def _show_table(records: "Sequence[ExperimentRecord]") -> None:
    rows = []
    for record in records:
        settings, checks = record.cell.settings, record.detail["checks"]
        passed = sum(check["passed"] for check in checks)
        verdict = "pass" if passed == len(checks) else f"FAIL {len(checks) - passed}"
        rows.append([str(settings["dim"]), str(settings["bits"]), *figures(record.metrics, COLUMNS), verdict])
    print_table(("dim", "bits", *heads(COLUMNS), "checks"), rows)
    explain(EXPLAINED)


def _show_checks(records: "Sequence[ExperimentRecord]") -> int:
    """Print a line for each kind of check with its worst case, and each that failed; return how many failed."""
    from turboquant.experiments.theory import TOLERANCE

    typer.echo(f"\nA check passes below {TOLERANCE:g} standard errors. Its worst case:")
    rows = [(check, record.cell.settings) for record in records for check in record.detail["checks"]]
    rows.sort(key=lambda row: row[0]["name"])
    failed = 0
    for name, group in groupby(rows, key=lambda row: row[0]["name"]):
        found = list(group)
        passed = sum(check["passed"] for check, _ in found)
        failed += len(found) - passed
        typer.echo(f"{'pass' if passed == len(found) else 'FAIL'}  {name:38} {passed} of {len(found)}; {_worst(found)}")
        for check, settings in found:
            if not check["passed"]:
                typer.echo(f"      failed: {_worst([(check, settings)])}")
    return failed


def _worst(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    check, settings = max(rows, key=lambda row: row[0]["z"])
    figure = f"{check['measured']:.5g} ± {check['standard_error']:.2g}, expected {check['expected']}"
    return f"{figure}, z {check['z']:.1f} ({settings['bits']} bits, dim {settings['dim']})"


def _write_plot(records: "Sequence[ExperimentRecord]", path: Path) -> None:
    """Write the curves of MSE and of inner products as one page that works offline."""
    from turboquant.report.plots import validate_figure

    parts = [
        validate_figure(records, name).to_html(full_html=False, include_plotlyjs=number == 0)
        for number, name in enumerate(PLOTTED)
    ]
    head = "<!doctype html><html lang='en'><meta charset='utf-8'><title>turboquant validate</title>"
    path.write_text(f"{head}<body>{''.join(parts)}</body></html>", encoding="utf-8")
    say(f"the curves are in {path}")
