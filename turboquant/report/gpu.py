"""Tables of the GPU benchmarks."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from turboquant.records.bench import AttentionBench, ContextBench, EncodeBench, GpuBench, ModelBench, ScoresBench
from turboquant.records.environment import Environment
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import NONE, metric
from turboquant.report.tables import Table, code

B = TypeVar("B", bound=GpuBench)
LARGE = "llama-3.1-8b", 8, 32_768, 1


def _where(environments: Iterable[Environment]) -> str:
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


def _device(record: GpuBench) -> str:
    """The GPU's name without its maker and memory; other devices as they are named."""
    name = record.environment.device
    return name.removeprefix("cuda: NVIDIA ").split(" ")[0] if name.startswith("cuda: NVIDIA ") else name


def _of(records: Iterable[GpuBench], kind: type[B]) -> list[B]:
    return [record for record in records if isinstance(record, kind)]


def _against_full(records: Iterable[AttentionBench], floor: bool) -> Table:
    chosen = sorted(records, key=lambda r: (_device(r), r.shape, r.batch * r.context, r.batch, r.method[::-1]))
    rows = tuple(
        (
            _device(r),
            r.shape,
            f"{r.batch} x {r.context:,}",
            *(() if floor else (f"{r.query_tokens:,}",)),
            code(r.method),
            f"{r.full_us.median:,.1f} ({r.full})",
            f"{r.us.median:,.1f}",
            f"{r.us.p20:,.1f} to {r.us.p80:,.1f}",
            f"{r.ratio:.2f}",
            *((f"{100 * r.floor_fraction:.0f} %",) if floor else ()),
        )
        for r in chosen
    )
    place = ("GPU", "heads of", "batch x context", *(() if floor else ("chunk",)), "method")
    names = ("full, us", "compressed, us", "20 % to 80 %", "times as fast", *(("byte floor",) if floor else ()))
    return Table("", (*place, *names), rows, _where(r.environment for r in chosen))


def attention_table(records: Iterable[GpuBench]) -> Table:
    """Return the time of one layer's decode attention, full against compressed."""
    return _against_full((r for r in _of(records, AttentionBench) if r.query_tokens == 1), floor=True)


def speed_table(records: Iterable[GpuBench]) -> Table:
    """Return the rows of `attention_table` that the README shows: one large case on every GPU."""
    chosen = (r for r in _of(records, AttentionBench) if (r.shape, r.batch, r.context, r.query_tokens) == LARGE)
    return _against_full(chosen, floor=True)


def prefill_table(records: Iterable[GpuBench]) -> Table:
    """Return the time of one layer's attention from a chunk of query tokens, full against compressed."""
    return _against_full((r for r in _of(records, AttentionBench) if r.query_tokens > 1), floor=False)


def scores_table(records: Iterable[GpuBench]) -> Table:
    """Return the time of attention scores alone, float32 keys against packed ones."""
    chosen = sorted(
        _of(records, ScoresBench),
        key=lambda r: (_device(r), r.shape, r.batch * r.context, r.batch, r.method[::-1]),
    )
    rows = tuple(
        (
            _device(r),
            r.shape,
            f"{r.batch} x {r.context:,}",
            code(r.method),
            f"{r.full_us.median:,.1f}",
            f"{r.us.median:,.1f}",
            f"{r.us.p20:,.1f} to {r.us.p80:,.1f}",
            f"{r.ratio:.2f}",
        )
        for r in chosen
    )
    names = ("GPU", "heads of", "batch x context", "method", "float32 keys, us", "packed, us", "20 % to 80 %")
    return Table("", (*names, "times as fast"), rows, _where(r.environment for r in chosen))


def encode_table(records: Iterable[GpuBench]) -> Table:
    """Return the time of packing keys and values."""
    chosen = sorted(_of(records, EncodeBench), key=lambda r: (_device(r), r.shape, r.vectors, r.method[::-1]))
    rows = tuple(
        (
            _device(r),
            r.shape,
            f"{r.vectors:,}",
            code(r.method),
            f"{r.us.median:,.1f}",
            f"{r.us.p20:,.1f} to {r.us.p80:,.1f}",
            f"{r.gb_per_second:,.0f}",
            f"{100 * r.copy_fraction:.0f} %",
        )
        for r in chosen
    )
    names = ("GPU", "heads of", "vectors", "method", "us", "20 % to 80 %", "GB/s", "of a copy")
    return Table("", names, rows, _where(r.environment for r in chosen))


def model_table(records: Iterable[GpuBench]) -> Table:
    """Return decode steps of whole models."""
    chosen = sorted(
        _of(records, ModelBench),
        key=lambda r: (_device(r), r.model, r.weights, r.context, r.batch, r.run, r.method),
    )
    rows = tuple(
        (
            _device(r),
            f"{r.model}, {r.weights}",
            f"{r.batch} x {r.context:,}",
            {"calls": "step by step", "graph": "CUDA graph"}[r.run],
            code(r.method),
            f"{r.step_ms.median:.2f}",
            metric("tokens_per_second").text(r.tokens_per_second),
            f"{r.cache_bytes / 1e9:.2f}",
            f"{r.peak_bytes / 1e9:.2f}",
        )
        for r in chosen
    )
    names = (
        "GPU",
        "model, weights",
        "batch x context",
        "run",
        "method",
        "ms a step",
        metric("tokens_per_second").label,
        "cache, GB",
        "peak, GB",
    )
    return Table("", names, rows, _where(r.environment for r in chosen))


def context_table(records: Iterable[GpuBench]) -> Table:
    """Return the longest contexts that were reached in a budget of memory."""
    chosen = sorted(_of(records, ContextBench), key=lambda r: (_device(r), r.model, r.context))
    rows = tuple(
        (
            _device(r),
            f"{r.model}, {r.weights}",
            code(r.method),
            f"{r.budget_bytes / 1e9:.0f}",
            f"{r.weight_bytes / 1e9:.2f}",
            f"{r.context:,}",
            f"{r.cache_bytes / 1e9:.2f}",
        )
        for r in chosen
    )
    names = ("GPU", "model, weights", "method", "budget, GB", "weights, GB", "longest context", "cache, GB")
    return Table("", names, rows, _where(r.environment for r in chosen))


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
    return Table("", (*names, "peak, KB a token"), rows, _where(r.environment for r in chosen))


def _peak(peak: float | None, context: int) -> tuple[str, str]:
    """Peak memory in GB, and in KB for each token of the context."""
    return (NONE, NONE) if peak is None else (f"{peak / 1e9:.2f}", f"{peak / 1e3 / context:.1f}")
