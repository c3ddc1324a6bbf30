"""Tables of the benchmarks of kernels and of model shapes, from records of those experiments."""

from collections.abc import Iterable
from pathlib import Path

from turboquant.records.environment import Environment
from turboquant.records.experiment import ExperimentRecord, Spread
from turboquant.records.metrics import NONE, metric
from turboquant.report.tables import Table, code

LARGE = "llama-3.1-8b", 8, 32_768, 1
Records = Iterable[ExperimentRecord]


def where(environments: Iterable[Environment]) -> str:
    """Say on which machine, with which versions and when this was measured."""
    found = {
        ", ".join(
            (
                e.device,
                f"torch {e.torch}",
                *([f"triton {e.triton}"] if e.triton else []),
                *([f"driver {e.driver}"] if e.driver else []),
                e.created[:10],
                e.commit or "no commit",
            )
        )
        for e in environments
    }
    return f"Measured on {'; '.join(sorted(found))}." if found else ""


def _device(record: ExperimentRecord) -> str:
    """The GPU's name without its maker and memory; other devices as they are named."""
    name = record.environment.device
    return name.removeprefix("cuda: NVIDIA ").split(" ")[0] if name.startswith("cuda: NVIDIA ") else name


def _of(records: Records, experiment: str, size: str = "context") -> list[ExperimentRecord]:
    """Return the good records of an experiment by device, shape, rows and length."""

    def key(record: ExperimentRecord) -> tuple[object, ...]:
        s = record.cell.settings
        return _device(record), s["shape"], s["batch"] * s[size], s["batch"], str(record.cell.method)[::-1]

    return sorted((r for r in records if r.cell.experiment == experiment and not r.error), key=key)


def _figure(record: ExperimentRecord, name: str, digits: int = 1) -> str:
    value = record.metrics.get(name)
    return NONE if value is None else f"{value:,.{digits}f}"


def _percent(record: ExperimentRecord, name: str) -> str:
    value = record.metrics.get(name)
    return NONE if value is None else f"{100 * value:.0f} %"


def _gigabytes(record: ExperimentRecord, name: str) -> str:
    value = record.metrics.get(name)
    return NONE if value is None else f"{value / 1e9:.2f}"


def _spread(record: ExperimentRecord, name: str) -> str:
    found = Spread.of(record.metrics, name)
    return f"{found.p20:,.1f} to {found.p80:,.1f}"


def _sides(record: ExperimentRecord, full: str = "") -> tuple[str, ...]:
    """Full, compressed, its spread, and how many times as fast."""
    return (
        f"{_figure(record, 'full_us')}{full}",
        _figure(record, "us"),
        _spread(record, "us"),
        _figure(record, "speed_ratio", 2),
    )


def _against_full(records: Iterable[ExperimentRecord], floor: bool) -> Table:
    chosen = list(records)
    rows = tuple(
        (
            _device(r),
            r.cell.settings["shape"],
            f"{r.cell.settings['batch']} x {r.cell.settings['context']:,}",
            *(() if floor else (f"{r.cell.settings['query_tokens']:,}",)),
            code(r.cell.method),
            *_sides(r, f" ({r.detail['full']})"),
            *((_percent(r, "floor_fraction"),) if floor else ()),
        )
        for r in chosen
    )
    place = ("GPU", "heads of", "batch x context", *(() if floor else ("chunk",)), "method")
    names = ("full, us", "compressed, us", "20 % to 80 %", "times as fast", *(("byte floor",) if floor else ()))
    return Table("", (*place, *names), rows, where(r.environment for r in chosen))


def _steps(records: Records, one: bool) -> list[ExperimentRecord]:
    """Return attention from one query token a row, or from several."""
    return [r for r in _of(records, "kernel-attention") if (r.cell.settings["query_tokens"] == 1) == one]


def attention_table(records: Records) -> Table:
    """Return the time of one layer's decode attention, full against compressed."""
    return _against_full(_steps(records, one=True), floor=True)


def speed_table(records: Records) -> Table:
    """Return the rows of `attention_table` that the README shows: one large case on every GPU."""
    names = ("shape", "batch", "context", "query_tokens")
    chosen = (r for r in _steps(records, one=True) if tuple(r.cell.settings[name] for name in names) == LARGE)
    return _against_full(chosen, floor=True)


def prefill_table(records: Records) -> Table:
    """Return the time of one layer's attention from a chunk of query tokens, full against compressed."""
    return _against_full(_steps(records, one=False), floor=False)


def scores_table(records: Records) -> Table:
    """Return the time of attention scores alone, float32 keys against packed ones."""
    chosen = _of(records, "kernel-scores")
    rows = tuple(
        (
            _device(r),
            r.cell.settings["shape"],
            f"{r.cell.settings['batch']} x {r.cell.settings['context']:,}",
            code(r.cell.method),
            *_sides(r),
        )
        for r in chosen
    )
    names = ("GPU", "heads of", "batch x context", "method", "float32 keys, us", "packed, us", "20 % to 80 %")
    return Table("", (*names, "times as fast"), rows, where(r.environment for r in chosen))


def encode_table(records: Records) -> Table:
    """Return the time of packing keys and values."""
    chosen = _of(records, "kernel-encode", "tokens")
    rows = tuple(
        (
            _device(r),
            r.cell.settings["shape"],
            _figure(r, "vectors", 0),
            code(r.cell.method),
            _figure(r, "us"),
            _spread(r, "us"),
            _figure(r, "gb_per_second", 0),
            _percent(r, "copy_fraction"),
        )
        for r in chosen
    )
    names = ("GPU", "heads of", "vectors", "method", "us", "20 % to 80 %", "GB/s", "of a copy")
    return Table("", names, rows, where(r.environment for r in chosen))


RUNS = {
    "calls": "step by step",
    "graph": "CUDA graph",
    "generate": "`generate()`",
    "static": "`generate()`, compiled StaticCache",
}
"""What a run of `bench model` is called."""


def _model(record: ExperimentRecord) -> str:
    return f"{record.cell.settings['shape']} shape, random weights, {record.cell.settings['weights']}"


def model_table(records: Records) -> Table:
    """Return decode steps of whole models."""
    chosen = sorted(
        (r for r in records if r.cell.experiment == "model-speed" and not r.error),
        key=lambda r: (
            _device(r),
            *(r.cell.settings[name] for name in ("shape", "weights", "context", "batch", "run")),
            r.cell.method,
        ),
    )
    rows = tuple(
        (
            _device(r),
            _model(r),
            f"{r.cell.settings['batch']} x {r.cell.settings['context']:,}",
            RUNS[r.cell.settings["run"]],
            code(r.cell.method),
            _figure(r, "step_ms", 2),
            metric("tokens_per_second").text(r.metrics.get("tokens_per_second")),
            _gigabytes(r, "cache_bytes"),
            _gigabytes(r, "peak_memory_bytes"),
        )
        for r in chosen
    )
    names = ("GPU", "model, weights", "batch x context", "run", "method", "ms a step")
    held = (metric("tokens_per_second").label, "cache, GB", "peak, GB")
    return Table("", (*names, *held), rows, where(r.environment for r in chosen))


def context_table(records: Records) -> Table:
    """Return the longest contexts that were reached in a budget of memory."""
    chosen = sorted(
        (r for r in records if r.cell.experiment == "longest-context" and not r.error),
        key=lambda r: (_device(r), r.cell.settings["shape"], r.metrics["longest_context"]),
    )
    rows = tuple(
        (
            _device(r),
            _model(r),
            code(r.cell.method),
            f"{r.cell.settings['budget_gb']:.0f}",
            _gigabytes(r, "weight_bytes"),
            _figure(r, "longest_context", 0),
            _gigabytes(r, "cache_bytes"),
        )
        for r in chosen
    )
    names = ("GPU", "model, weights", "method", "budget, GB", "weights, GB", "longest context", "cache, GB")
    return Table("", names, rows, where(r.environment for r in chosen))


def metrics_table(records: Records) -> Table:
    """Return the time to compare one layer's heads, all at once against head by head."""
    chosen = sorted(
        (r for r in records if r.cell.experiment == "metrics-speed" and not r.error),
        key=lambda r: (_device(r), r.cell.settings["tokens"]),
    )
    rows = tuple(
        (
            _device(r),
            str(r.environment.cpu_threads),
            f"{r.cell.settings['tokens']:,}",
            f"{r.cell.settings['queries']:,}",
            f"{r.cell.settings['heads']} on {r.cell.settings['kv_heads']}",
            _figure(r, "vectorised_ms"),
            _figure(r, "loop_ms"),
            _figure(r, "speed_ratio"),
        )
        for r in chosen
    )
    sides = (metric(name).label for name in ("vectorised_ms", "loop_ms"))
    names = ("hardware", "threads", "tokens", "queries a head", "heads", *sides, "times as fast")
    return Table("", names, rows, where(r.environment for r in chosen))


def long_context_table(records: Iterable[ExperimentRecord]) -> Table:
    """Return `evaluate`'s time and memory by context; a model in a folder goes by the folder's name."""
    figures = ("bits_per_value", "cosine_similarity", "same_top_pct")
    chosen = sorted(
        records, key=lambda r: (r.cell.model or "", r.cell.settings["context"], (r.cell.method or "")[::-1])
    )
    rows = tuple(
        (
            Path(r.cell.model or "").name,
            code(r.cell.method),
            f"{r.cell.settings['context']:,}",
            *(metric(name).text(r.metrics.get(name)) for name in figures),
            f"{r.timing['elapsed']:.1f}",
            *_peak(r.metrics.get("peak_memory_bytes"), r.cell.settings["context"]),
        )
        for r in chosen
    )
    names = ("model", "method", "context", *(metric(name).label for name in figures), "seconds", "peak, GB")
    return Table("", (*names, "peak, KB a token"), rows, where(r.environment for r in chosen))


def _peak(peak: float | None, context: int) -> tuple[str, str]:
    """Peak memory in GB, and in KB for each token of the context."""
    return (NONE, NONE) if peak is None else (f"{peak / 1e9:.2f}", f"{peak / 1e3 / context:.1f}")
