"""`turboquant theory`: the quantizers on random unit vectors against exact theory and the paper's bounds."""

import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turboquant.cli.app import (
    OverwriteOption,
    app,
    check_apart,
    check_writable,
    fail,
    finish,
    run_recorded,
    say,
)
from turboquant.cli.options import Asked, takes
from turboquant.cli.tables import cells as figures
from turboquant.cli.tables import explain, heads, print_table
from turboquant.records.settings import MOST_RUNS, TheorySettings

if TYPE_CHECKING:
    from turboquant.records.experiment import ExperimentRecord

DIMS = (64, 80, 96, 128, 256)
BITS = tuple(range(1, 9))
QUICK, QUICK_SEEDS = {"dim": [64, 128], "bits": [1, 2, 3, 4]}, 12
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
@takes(
    TheorySettings,
    several={"dim": DIMS, "bits": BITS},
    flags={"dim": "--dims"},
    without=("seeds",),
)
def theory(
    *,
    asked: Asked,
    seeds: Annotated[
        int | None, typer.Option(min=3, max=MOST_RUNS, help="Seeds; default 32. Fewer than 12 fail checks by chance.")
    ] = None,
    output: Annotated[Path, typer.Option(help="One record a (dim, bits).")] = Path("results/validate.jsonl"),
    plot: Annotated[Path | None, typer.Option(help="Write the curves to this HTML file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer dims, bits and seeds.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Check distortion, bias and retrieval of the codes on random unit vectors against exact theory; no model.

    Leaves with code 1 where a check fails.
    """
    started = time.perf_counter()
    check_writable(output)
    if plot is not None:
        check_writable(plot, read_back=False)
        check_apart(output=output, plot=plot)
        _import_plots()
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.theory import THEORY

    fewer = {name: found for name, found in QUICK.items() if quick and name not in asked.given}
    cells = cells_for(THEORY, None, [], asked.grid(seeds=seeds or (QUICK_SEEDS if quick else 32), **fewer))
    records = run_recorded("theory", cells, {THEORY.name: THEORY}, output, overwrite)
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


def _import_plots() -> None:
    """Leave with code 2 where plotly is missing; asked before the work starts."""
    try:
        import turboquant.report.plots  # noqa: F401
    except ImportError as error:
        fail(f"--plot needs plotly ({error}): pip install 'turboquant-lab[plots]'", 2)


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
    head = "<!doctype html><html lang='en'><meta charset='utf-8'><title>turboquant theory</title>"
    path.write_text(f"{head}<body>{''.join(parts)}</body></html>", encoding="utf-8")
    say(f"the curves are in {path}")
