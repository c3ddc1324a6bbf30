"""`turboquant bench`: the program's own speed. Kernels of one layer, whole models of a known shape, decoding, metrics.

Records are those of experiments: a stopped run goes on, and after a change of the program everything is measured again.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turboquant.cli.app import (
    BitsOption,
    MethodsOption,
    ModelOption,
    OverwriteOption,
    WeightsOption,
    bench,
    check_writable,
    finish,
    read_methods,
    run_recorded,
)
from turboquant.cli.options import Asked, takes
from turboquant.cli.tables import show
from turboquant.records.settings import (
    DecodeSettings,
    KernelAttentionSettings,
    KernelEncodeSettings,
    KernelScoresSettings,
    LongestContextSettings,
    MetricsSpeedSettings,
    ModelSpeedSettings,
)

if TYPE_CHECKING:
    from turboquant.methods import Method
    from turboquant.records.experiment import ExperimentRecord
    from turboquant.report.tables import Table

    Tabled = Callable[[Sequence[ExperimentRecord]], Table]

CASES: dict[str, tuple[Any, ...]] = {"shape": ("llama-3.1-8b",), "batch": (1,)}
"""What kernels are timed with where nothing is given."""
BITS = (4, 3, 2)


def _kernel_methods(specs: Sequence[str] | None, bits: Sequence[int] | None) -> "list[Method]":
    return read_methods(specs, ["turboquant"], bits or (None if specs else BITS))


def _bench(
    name: str,
    methods: "Sequence[Method]",
    asked: Asked,
    output: Path,
    overwrite: bool,
    table: "Tabled",
    model: tuple[str | None, str] = (None, "auto"),
) -> None:
    """Measure what is missing, show all of it as a table, end with the JSON line."""
    started = time.perf_counter()
    check_writable(output)
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.registry import EXPERIMENTS

    experiment = EXPERIMENTS[name]
    cells = cells_for(experiment, model[0], methods, asked.grid(), model[1])
    records = run_recorded(name, cells, {name: experiment}, output, overwrite)
    measured = [record for record in records if not record.error]
    if measured:
        show(table(measured))
    figures = [{"method": r.cell.method, "settings": r.cell.settings, "metrics": r.metrics} for r in measured]
    finish(records, output, started, details={"results": figures})


@bench.command("attention")
@takes(KernelAttentionSettings, several={**CASES, "context": (8192,)})
def bench_attention(
    *,
    method: MethodsOption = None,
    bits: BitsOption = None,
    asked: Asked,
    output: Annotated[Path, typer.Option(help="One record a case.")] = Path("results/bench-attention.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Time one layer's attention from the last tokens, the fastest full one of torch against compressed ones."""
    from turboquant.report.gpu import attention_table, prefill_table

    table = attention_table if asked.values["query_tokens"] == 1 else prefill_table
    _bench("kernel-attention", _kernel_methods(method, bits), asked, output, overwrite, table)


@bench.command("scores")
@takes(KernelScoresSettings, several={**CASES, "context": (8192,)})
def bench_scores(
    *,
    method: MethodsOption = None,
    bits: BitsOption = None,
    asked: Asked,
    output: Annotated[Path, typer.Option(help="One record a case.")] = Path("results/bench-scores.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Time attention scores alone, float32 keys against packed ones."""
    from turboquant.report.gpu import scores_table

    _bench("kernel-scores", _kernel_methods(method, bits), asked, output, overwrite, scores_table)


@bench.command("encode")
@takes(KernelEncodeSettings, several={**CASES, "tokens": (12_800,)})
def bench_encode(
    *,
    method: MethodsOption = None,
    bits: BitsOption = None,
    asked: Asked,
    output: Annotated[Path, typer.Option(help="One record a case.")] = Path("results/bench-encode.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Time quantizing the keys and values of one layer."""
    from turboquant.report.gpu import encode_table

    _bench("kernel-encode", _kernel_methods(method, bits), asked, output, overwrite, encode_table)


@bench.command("model")
@takes(
    ModelSpeedSettings,
    several={"run": ("generate", "graph")},
    flags={"shape": "--model", "repeats": "--steps"},
)
def bench_model(
    *,
    method: MethodsOption = None,
    asked: Asked,
    output: Annotated[Path, typer.Option(help="One record a case.")] = Path("results/bench-model.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Time decode steps of a whole model of a known shape on a GPU, by `generate()` and as a CUDA graph."""
    from turboquant.report.gpu import model_table

    chosen = read_methods(method, ["full", "turboquant:bits=4"])
    _bench("model-speed", chosen, asked, output, overwrite, model_table)


@bench.command("memory")
@takes(LongestContextSettings, flags={"shape": "--model"}, without=("repeats",))
def bench_memory(
    *,
    method: MethodsOption = None,
    asked: Asked,
    output: Annotated[Path, typer.Option(help="One record a case.")] = Path("results/bench-memory.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Find the longest context that fits a budget of GPU memory, by filling the cache and decoding."""
    from turboquant.report.gpu import context_table

    chosen = read_methods(method, ["full", "turboquant:bits=4"])
    _bench("longest-context", chosen, asked, output, overwrite, context_table)


@bench.command("decode")
@takes(DecodeSettings)
def bench_decode(
    *,
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    weights: WeightsOption = "auto",
    asked: Asked,
    output: Annotated[Path, typer.Option(help="One record a method.")] = Path("results/bench-decode.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Time decoding with the full and with compressed caches, alternated in one process."""
    from turboquant.report.tables import busy_table, decode_table

    chosen, table = read_methods(method, ["turboquant:bits=4"]), busy_table if asked.values["busy"] else decode_table
    _bench("decode", chosen, asked, output, overwrite, table, (model, weights))


@bench.command("metrics")
@takes(MetricsSpeedSettings, several={"tokens": (512, 2048, 8192)})
def bench_metrics(
    *,
    asked: Asked,
    output: Annotated[Path, typer.Option(help="One record a length.")] = Path("results/bench-metrics.jsonl"),
    overwrite: OverwriteOption = False,
) -> None:
    """Time comparing one layer's attention heads, all at once against head by head (default: SmolLM2's heads)."""
    from turboquant.report.gpu import metrics_table

    _bench("metrics-speed", [], asked, output, overwrite, metrics_table)
