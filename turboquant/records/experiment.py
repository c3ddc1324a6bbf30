"""Records of experiments and benchmarks: a cell, and what was measured of it."""

import json
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


class DecodeBench(Record):
    """Decode speed of two caches in one process, sides alternated. `ratio` compares medians, method over full.

    `busy_processes` spun meanwhile, on a machine otherwise idle. `openmp_spins` is how long PyTorch's threads spun
    before they slept (`run.threads`); None where their OpenMP was left as it is. The worst steps are the longest of all
    runs.
    """

    kind: Literal["bench-decode"] = "bench-decode"
    environment: Environment
    model: ModelInfo
    method: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    full_tokens_per_second: Spread
    tokens_per_second: Spread
    ratio: float
    full_prefill_ms: Spread
    prefill_ms: Spread
    full_worst_step_ms: float | None = None
    worst_step_ms: float | None = None
    busy_processes: int = 0
    openmp_spins: int | None = None
    report: CacheReport

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for records of the same case on the same device, made under the same conditions."""
        return (*self.case, self.busy_processes, self.openmp_spins)

    @property
    def case(self) -> tuple[object, ...]:
        """Equal for records that differ only in what other processes did and how long threads spun."""
        return (self.model.name, self.method, self.prompt_tokens, self.new_tokens, self.environment.device)


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
