"""`turboquant models`: the models that have a name, and which families of models work."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant.cli.app import OverwriteOption, app, check_writable, fail, finish, run_recorded, say

if TYPE_CHECKING:
    from turboquant.records.experiment import ExperimentRecord

TOP = 20
"""Families that `top` stands for."""


@app.command()
def models(
    check: Annotated[
        list[str] | None,
        typer.Option(
            help="Check families instead: `all`, `top` (the twenty with the most users) or names; one or several. Each "
            "is a tiny model with random weights."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="One record a family that is checked.")] = Path("results/models.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """List the models that have a name, and which of them are on this machine; or check which families work.

    A check leaves with code 1 where a family neither works nor is refused with a reason.
    """
    if check:
        _check(check, output, overwrite)
    else:
        _list()


def _list() -> None:
    from turboquant.models.hub import available_models
    from turboquant.models.registry import MODELS

    here = set(available_models())
    for name, spec in MODELS.items():
        where, licence = "here" if name in here else "", spec.licence
        typer.echo(f"{name:24} {where:5} {spec.hub_id:44} {licence:16} {spec.note}")


def _check(asked: Sequence[str], output: Path, overwrite: bool) -> None:
    started = time.perf_counter()
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.families import FAMILY
    from turboquant.models.families import FAMILIES
    from turboquant.records.settings import FamilySettings

    sets = {"all": list(FAMILIES), "top": list(FAMILIES)[:TOP]}
    names = [name for one in asked for name in sets.get(one, [one])]
    if unknown := [name for name in names if name not in FAMILIES]:
        fail(f"there is no family {unknown[0]!r}: choose from all, top, {', '.join(FAMILIES)}", 2)
    check_writable(output)
    cells = cells_for(FAMILY, None, [], [FamilySettings(family=name) for name in names])
    records = run_recorded("models", cells, {FAMILY.name: FAMILY}, output, overwrite, show=_say)
    found = Counter(str(record.detail.get("outcome")) for record in records)
    own = Counter(str(record.detail.get("own_outcome")) for record in records)
    faults = [name for name in ("WRONG", "CRASH") if found[name] or own[name]]
    finish(records, output, started, outcomes=dict(found), own_models=dict(own))
    if faults:
        raise typer.Exit(1)


def _say(record: "ExperimentRecord") -> None:
    """Print what became of a family, as soon as it is known."""
    detail = record.detail
    own = detail.get("own_outcome")
    other = f"; own model {own}: {detail.get('own_reason')}" if own not in (None, detail["outcome"]) else ""
    why = f": {detail['reason']}" if detail["reason"] else _layers(record)
    say(f"{record.cell.settings['family']:20} {detail['outcome']}{why}{other}")


def _layers(record: "ExperimentRecord") -> str:
    figures = record.metrics
    return (
        f", {figures['compressed_layers']:.0f} of {figures['layers']:.0f} layers; logits differ by "
        f"{figures['lossless_logit_error']:.1g} lossless, {figures['logit_error']:.2g} at 8 bits"
    )
