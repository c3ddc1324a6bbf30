"""Lines of benchmarks from before there was one kind of record, read as the records of experiments that they are.

Each such line had a kind and fields of its own. The table says which experiment it is one of now, which of its fields
are settings, and what its figures are called.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from turboquant.records.experiment import Spread

Line = Mapping[str, Any]


class _Kind(NamedTuple):
    """One kind of line: its experiment, settings by today's names, and figures that have another name today.

    Figures that stand in neither keep their names: numbers and spreads of timings as metrics, all else as detail.
    """

    experiment: str
    settings: Mapping[str, str | Callable[[Line], Any]]
    renamed: Mapping[str, str] = {}


def _shape(line: Line) -> str:
    return str(line["model"]).removesuffix(" shape, random weights")


Settings = Mapping[str, str | Callable[[Line], Any]]
_KERNEL: Settings = {"shape": "shape", "batch": "batch", "repeats": "repeats"}
_SIDES = {"ratio": "speed_ratio", "bytes": "cache_bytes", "full_bytes": "full_cache_bytes"}
_MODEL: Settings = {"shape": _shape, "weights": "weights"}
_DETAIL = ("query_heads", "kv_heads", "head_dim", "sets")
"""Numbers that are no figures."""
OLD: dict[str, _Kind] = {
    "bench-decode": _Kind(
        "decode",
        {
            "prompt_tokens": "prompt_tokens",
            "new_tokens": "new_tokens",
            "repeats": "repeats",
            "busy": lambda line: line.get("busy_processes", 0),
            "openmp_spins": lambda line: line.get("openmp_spins"),
        },
        {
            "ratio": "speed_ratio",
            "prefill_ms": "time_to_first_token_ms",
            "full_prefill_ms": "full_time_to_first_token_ms",
        },
    ),
    "bench-attention": _Kind(
        "kernel-attention", {**_KERNEL, "context": "context", "query_tokens": "query_tokens"}, _SIDES
    ),
    "bench-scores": _Kind("kernel-scores", {**_KERNEL, "context": "context"}, _SIDES),
    "bench-encode": _Kind("kernel-encode", {**_KERNEL, "tokens": "tokens"}, {"bytes": "moved_bytes"}),
    "bench-model": _Kind(
        "model-speed",
        {**_MODEL, "batch": "batch", "context": "context", "run": "run", "repeats": "steps"},
        {"peak_bytes": "peak_memory_bytes"},
    ),
    "bench-memory": _Kind(
        "longest-context",
        {**_MODEL, "budget_gb": lambda line: line["budget_bytes"] / 1e9, "repeats": lambda line: 4},
        {"context": "longest_context"},
    ),
    "bench-metrics": _Kind(
        "metrics-speed",
        {"heads": "query_heads", **{n: n for n in ("kv_heads", "head_dim", "tokens", "queries", "repeats")}},
        {"ratio": "speed_ratio"},
    ),
}
OTHER = ("bench-image", "bench-load", "bench-memory-limit", "bench-soak")
"""Lines about the app's image and endurance, which are no experiments."""


def modern(line: Line) -> dict[str, Any] | None:
    """Return a line of a file of records as an experiment record has it; None where it is about something else.

    Raises:
        KeyError: If an old line lacks a field that says what was measured.
    """
    kind = str(line.get("kind"))
    if kind in OTHER:
        return None
    return _converted(line, OLD[kind]) if kind in OLD else dict(line)


def _converted(line: Line, kind: _Kind) -> dict[str, Any]:
    named = {name: line[source] if isinstance(source, str) else source(line) for name, source in kind.settings.items()}
    environment = line["environment"]
    used = {source for source in kind.settings.values() if isinstance(source, str)}
    used |= {"kind", "environment", "method", "model", "report", "busy_processes", "openmp_spins", "budget_bytes"}
    metrics: dict[str, float | None] = {}
    detail: dict[str, Any] = {}
    for name in [name for name in line if name not in used or name in kind.renamed]:
        value, (side, plain) = line[name], _side(kind.renamed.get(name, name))
        if isinstance(value, dict) and value.keys() == {"median", "p20", "p80"}:
            metrics |= Spread.model_validate(value).metrics(plain, side)
        elif isinstance(value, int | float) and name not in _DETAIL:
            metrics[side + plain] = float(value)
        elif value is not None:
            detail[name] = value
    report, model = line.get("report"), line.get("model")
    if isinstance(report, dict):
        metrics["cache_bytes"] = float(report["bytes"])
    loaded = model if isinstance(model, dict) else None
    cell: dict[str, Any] = {"experiment": kind.experiment, "settings": {**named, "device": environment["device"]}}
    cell |= {"method": line.get("method")}
    cell |= {"model": loaded["name"], "weights": loaded["weights"]} if loaded else {}
    return {
        "kind": "experiment",
        "cell": cell,
        "model": loaded,
        "metrics": metrics,
        "cache": report if isinstance(report, dict) else None,
        "detail": detail,
        "inputs": {"the program": environment["commit"]} if environment.get("commit") else {},
        "environment": environment,
    }


def _side(name: str) -> tuple[str, str]:
    return ("full_", name.removeprefix("full_")) if name.startswith("full_") else ("", name)
