"""Tables of the GPU benchmarks."""

from collections.abc import Iterable

from turboquant.bench_records import AttentionBench, ContextBench, GpuBench, ModelBench
from turboquant.report.tables import Table, code
from turboquant.results import Environment


def _where(environments: Iterable[Environment]) -> str:
    found = {
        f"{e.device}, torch {e.torch}, triton {e.triton}, driver {e.driver}, {e.created[:10]}, "
        f"{e.commit or 'no commit'}"
        for e in environments
    }
    return f"Measured on {'; '.join(sorted(found))}." if found else ""


def attention_table(records: Iterable[GpuBench]) -> Table:
    """Return the time of one layer's decode attention, full against compressed."""
    chosen = [r for r in records if isinstance(r, AttentionBench)]
    chosen.sort(key=lambda r: (r.shape, r.batch * r.context, r.batch, r.method[::-1]), reverse=False)
    rows = tuple(
        (
            r.shape,
            f"{r.batch} x {r.context:,}",
            code(r.method),
            f"{r.full_us.median:.1f} ({r.full})",
            f"{r.us.median:.1f}",
            f"{r.us.p20:.1f} to {r.us.p80:.1f}",
            f"{r.ratio:.2f}",
            f"{100 * r.floor_fraction:.0f} %",
        )
        for r in chosen
    )
    names = ("heads of", "batch x context", "method", "full, us", "compressed, us", "20 % to 80 %", "times as fast")
    return Table("", (*names, "byte floor"), rows, _where(r.environment for r in chosen))


def model_table(records: Iterable[GpuBench]) -> Table:
    """Return decode steps of whole models."""
    chosen = sorted((r for r in records if isinstance(r, ModelBench)), key=lambda r: (r.model, r.run, r.method))
    rows = tuple(
        (
            f"{r.model}, {r.weights}",
            code(r.method),
            {"calls": "step by step", "graph": "CUDA graph"}[r.run],
            f"{r.batch} x {r.context:,}",
            f"{r.step_ms.median:.2f}",
            f"{r.tokens_per_second:.1f}",
            f"{r.cache_bytes / 1e9:.2f}",
        )
        for r in chosen
    )
    names = ("model, weights", "method", "run", "batch x context", "ms a step", "tokens/s", "cache, GB")
    return Table("", names, rows, _where(r.environment for r in chosen))


def context_table(records: Iterable[GpuBench]) -> Table:
    """Return the longest contexts that were reached in a budget of memory."""
    chosen = sorted((r for r in records if isinstance(r, ContextBench)), key=lambda r: (r.model, r.context))
    rows = tuple(
        (
            f"{r.model}, {r.weights}",
            code(r.method),
            f"{r.budget_bytes / 1e9:.0f}",
            f"{r.weight_bytes / 1e9:.2f}",
            f"{r.context:,}",
            f"{r.cache_bytes / 1e9:.2f}",
        )
        for r in chosen
    )
    names = ("model, weights", "method", "budget, GB", "weights, GB", "longest context", "cache, GB")
    return Table("", names, rows, _where(r.environment for r in chosen))
