"""Records of experiments: a cell, and what was measured of it."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from turboquant.records.base import Record
from turboquant.records.comparison import CacheReport, ModelInfo
from turboquant.records.environment import Environment


class Spread(Record):
    """Median and 20th and 80th percentile of repeated timings."""

    median: float
    p20: float
    p80: float

    def metrics(self, name: str, side: str = "") -> dict[str, float | None]:
        """Return it as metrics of a record: `us`, `p20_us`, `p80_us`; or `full_us`, `full_p20_us`, `full_p80_us`."""
        parts = {"": self.median, "p20_": self.p20, "p80_": self.p80}
        return {f"{side}{part}{name}": value for part, value in parts.items()}

    @classmethod
    def of(cls, metrics: Mapping[str, float | None], name: str, side: str = "") -> "Spread":
        """Read it from the metrics of a record; NaN stands for what the record does not have."""
        found = [metrics.get(f"{side}{part}{name}") for part in ("", "p20_", "p80_")]
        median, p20, p80 = (float("nan") if value is None else value for value in found)
        return cls(median=median, p20=p20, p80=p80)


class Cell(Record):
    """What an experiment measures once, in the words of who asks: records of one cell and equal inputs are alike.

    `model` and `weights` are as asked for, `method` is `str(method)`, `settings` are the experiment's own (context,
    seed, text ...). Synthetic experiments have no model.
    """

    experiment: str
    model: str | None = None
    weights: str = "auto"
    method: str | None = None
    settings: dict[str, Any] = Field({})

    @property
    def key(self) -> str:
        """One text a cell; equal cells have equal keys."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def __str__(self) -> str:
        named = [f"{name}={_short(value)}" for name, value in self.settings.items()]
        return " ".join(filter(None, (self.experiment, self.model, self.method, *named)))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class ExperimentRecord(Record):
    """One finished cell: what was measured, what the cache held, how long it took, where; or its `error` alone.

    `metrics` are the headline numbers by name (percentages end in `_pct`, milliseconds in `_ms`, bytes in `_bytes`),
    None where one could not be had; `timing` is in seconds; `detail` is the experiment's own (per layer, per head ...).
    """

    kind: Literal["experiment"] = "experiment"
    schema_version: Literal[1] = 1
    cell: Cell
    model: ModelInfo | None = None
    metrics: dict[str, float | None] = Field({})
    cache: CacheReport | None = None
    timing: dict[str, float] = Field({})
    detail: dict[str, Any] = Field({})
    inputs: dict[str, str] = Field({})  # what the cell's names stood for: fingerprints, see `turboquant.models.inputs`
    environment: Environment
    error: str | None = None
