"""`bench attention`, `scores` and `encode`: one layer's kernels. `bench model` and `memory`: random weights."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from turboquant.cli.app import (
    MOST_RUNS,
    MOST_TOKENS,
    BitsOption,
    MethodsOption,
    at_terminal,
    bench,
    check_writable,
    fail,
    read_methods,
    say,
)
from turboquant.cli.tables import show

if TYPE_CHECKING:
    from turboquant.records.base import Record
    from turboquant.report import Table

B = TypeVar("B", bound="Record")

ShapeOption = Annotated[
    list[str] | None, typer.Option("--shape", help="Heads of llama-3.1-8b, qwen2.5-3b, phi-2 or smollm2-135m; several.")
]
BatchOption = Annotated[list[int] | None, typer.Option("--batch", min=1, max=MOST_RUNS, help="Rows; one or several.")]
ContextOption = Annotated[
    list[int] | None, typer.Option("--context", min=1, max=MOST_TOKENS, help="Tokens a row; one or several.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Timed rounds; sides take turns.")]


def _cases(
    shape: Sequence[str] | None, batch: Sequence[int] | None, tokens: Sequence[int]
) -> Iterable[tuple[str, int, int]]:
    """Return every shape with every number of rows and of tokens, each once."""
    return product(dict.fromkeys(shape or ["llama-3.1-8b"]), dict.fromkeys(batch or [1]), dict.fromkeys(tokens))


def write_benches(running: "Iterable[B]", output: Path, table: "Callable[[Sequence[B]], Table]") -> None:
    """Keep each record and print it: as JSON, or at a terminal all of them as a table."""
    from turboquant.records.files import append_record

    done = []
    try:
        for record in running:
            append_record(record, output)
            done.append(record)
            if at_terminal():
                say(f"{len(done)} measured")
            else:
                typer.echo(record.model_dump_json())
    except ValueError as error:
        fail(error, 2)
    except RuntimeError as error:  # nothing was packed, or the GPU's; finished records are written
        from turboquant.records.faults import out_of_memory

        if out_of_memory(error):
            raise
        fail(error, 1)
    finally:
        if done and at_terminal():
            show(table(done))


@bench.command("attention")
def bench_attention_command(
    shape: ShapeOption = None,
    method: MethodsOption = None,
    bits: BitsOption = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    query_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Query tokens a row.")] = 1,
    repeats: RepeatsOption = 20,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-attention.jsonl"),
) -> None:
    """Time one layer's attention from the last tokens, the fastest full one of torch against compressed ones."""
    from turboquant.experiments.kernel_speed import bench_attention
    from turboquant.report.gpu import attention_table, prefill_table

    chosen = read_methods(method, ["turboquant"], bits or (None if method else [4, 3, 2]))
    check_writable(output)
    running = (
        record
        for name, rows, tokens in _cases(shape, batch, context or [8192])
        for record in bench_attention(
            name, chosen, batch=rows, context=tokens, query_tokens=query_tokens, repeats=repeats
        )
    )
    write_benches(running, output, attention_table if query_tokens == 1 else prefill_table)


@bench.command("scores")
def bench_scores_command(
    shape: ShapeOption = None,
    method: MethodsOption = None,
    bits: BitsOption = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    repeats: RepeatsOption = 20,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-scores.jsonl"),
) -> None:
    """Time attention scores alone, float32 keys against packed ones."""
    from turboquant.experiments.kernel_speed import bench_scores
    from turboquant.report.gpu import scores_table

    chosen = read_methods(method, ["turboquant"], bits or (None if method else [4, 3, 2]))
    check_writable(output)
    running = (
        record
        for name, rows, tokens in _cases(shape, batch, context or [8192])
        for record in bench_scores(name, chosen, batch=rows, context=tokens, repeats=repeats)
    )
    write_benches(running, output, scores_table)


@bench.command("encode")
def bench_encode_command(
    shape: ShapeOption = None,
    method: MethodsOption = None,
    bits: BitsOption = None,
    batch: BatchOption = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, max=MOST_TOKENS, help="Tokens a row; one or several.")
    ] = None,
    repeats: RepeatsOption = 20,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-encode.jsonl"),
) -> None:
    """Time quantizing the keys and values of one layer."""
    from turboquant.experiments.kernel_speed import bench_encode
    from turboquant.report.gpu import encode_table

    chosen = read_methods(method, ["turboquant"], bits or (None if method else [4, 3, 2]))
    check_writable(output)
    running = (
        record
        for name, rows, count in _cases(shape, batch, tokens or [12_800])
        for record in bench_encode(name, chosen, batch=rows, tokens=count, repeats=repeats)
    )
    write_benches(running, output, encode_table)


ShapedOption = Annotated[str, typer.Option("--model", help="Shape of mistral-7b or smollm2-135m; weights are random.")]
PrecisionOption = Annotated[str, typer.Option("--weights", help="bf16 or 4bit.")]


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        fail("this benchmark needs a CUDA device; `bench decode` and `bench attention` run without one", 1)


@bench.command("model")
def bench_model_command(
    model: ShapedOption = "mistral-7b",
    weights: PrecisionOption = "4bit",
    method: MethodsOption = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Rows.")] = 1,
    context: Annotated[int, typer.Option(min=256, max=MOST_TOKENS, help="Tokens a row.")] = 32_768,
    steps: Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Timed decode steps.")] = 64,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-model.jsonl"),
) -> None:
    """Time decode steps of a whole model of a known shape on a GPU, called step by step and as a CUDA graph."""
    chosen = read_methods(method, ["full", "turboquant:bits=4"])
    check_writable(output)
    _check_cuda()
    from turboquant.experiments.model_speed import bench_model
    from turboquant.report.gpu import model_table

    running = bench_model(model, weights, chosen, batch=batch, context=context, steps=steps)
    write_benches(running, output, model_table)


@bench.command("memory")
def bench_memory_command(
    model: ShapedOption = "mistral-7b",
    weights: PrecisionOption = "4bit",
    method: MethodsOption = None,
    budget_gb: Annotated[float, typer.Option(min=1, max=10_000, help="GPU memory to stay within, GB.")] = 16,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-memory.jsonl"),
) -> None:
    """Find the longest context that fits a budget of GPU memory, by filling the cache and decoding."""
    chosen = read_methods(method, ["full", "turboquant:bits=4"])
    check_writable(output)
    _check_cuda()
    from turboquant.experiments.model_speed import bench_memory
    from turboquant.report.gpu import context_table

    write_benches(bench_memory(model, weights, chosen, budget_bytes=int(budget_gb * 1e9)), output, context_table)
