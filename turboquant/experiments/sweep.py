"""Sweeps: a grid of cells, run by local worker processes (`workers`) or by a Ray cluster (`cluster`).

Both engines run what `experiments.base.run_cells` runs, and whoever calls them writes the records: one process alone
writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

from pydantic import ValidationError

from turboquant.experiments.base import Experiment, cells_for
from turboquant.methods import Method
from turboquant.records.base import Record, first_error
from turboquant.records.experiment import Cell

CONTEXT_FIELDS = ("context", "tokens")
"""What the settings of experiments call the number of tokens in all."""


def with_rotation_seeds(methods: Iterable[Method], seeds: Sequence[int]) -> list[Method]:
    """Return every method under every rotation seed; methods without a seed, and all if there are no seeds, once."""
    found = [
        replace(method, **{"seed": seed}) if any(field.name == "seed" for field in fields(method)) else method
        for method in methods
        for seed in (seeds or [getattr(method, "seed", 0)])
    ]
    return list({str(method): method for method in found}.values())


def grid(
    experiments: Sequence[Experiment[Any]],
    models: Sequence[str],
    methods: Sequence[Method],
    *,
    axes: Mapping[str, Sequence[Any]],
    weights: str = "auto",
) -> list[Cell]:
    """Return the cells of models x experiments x settings x methods, those that share work side by side.

    Args:
        experiments: What is measured.
        models: Names as `load_model` takes them.
        methods: Every one is measured in every place.
        axes: Values by the name of a setting; "context" also means the field `tokens`. An experiment without such a
            setting is measured once for all values. An empty axis leaves the default.
        weights: Weight precision of the models.

    Raises:
        ValueError: If no experiment has a setting of that name, or if a value is refused.
    """
    axes = {name: values for name, values in axes.items() if values}
    for name in axes:
        if not any(_field(one, name) for one in experiments):
            raise ValueError(f"no experiment of {', '.join(one.name for one in experiments)} has a setting {name!r}")
    cells = [
        cell
        for model in models
        for experiment in experiments
        for cell in cells_for(experiment, model, methods, _settings(experiment, axes), weights)
    ]
    return list({cell.key: cell for cell in cells}.values())


def _field(experiment: Experiment[Any], name: str) -> str | None:
    names = CONTEXT_FIELDS if name == "context" else (name,)
    return next((one for one in names if one in experiment.settings.model_fields), None)


def _settings(experiment: Experiment[Any], axes: Mapping[str, Sequence[Any]]) -> list[Record]:
    own = {field: values for name, values in axes.items() if (field := _field(experiment, name))}
    try:
        return [experiment.settings(**dict(zip(own, values, strict=True))) for values in product(*own.values())]
    except ValidationError as error:
        raise ValueError(f"{experiment.name}: {first_error(error)}") from None
