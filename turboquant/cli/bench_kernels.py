"""`bench attention`, `scores` and `encode`: one layer's kernels. `bench model` and `memory`: random weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant.cli.app import (
    MOST_RUNS,
    MOST_TOKENS,
    BitsOption,
    MethodsOption,
    bench,
    check_writable,
    fail,
    read_methods,
)

if TYPE_CHECKING:
    from turboquant.results import Record

ShapeOption = Annotated[
    list[str] | None, typer.Option("--shape", help="Heads of llama-3.1-8b, qwen2.5-3b, phi-2 or smollm2-135m; several.")
]
BatchOption = Annotated[list[int] | None, typer.Option("--batch", min=1, max=MOST_RUNS, help="Rows; one or several.")]
ContextOption = Annotated[
    list[int] | None, typer.Option("--context", min=1, max=MOST_TOKENS, help="Tokens a row; one or several.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Timed rounds; sides take turns.")]


def _write(records: "Iterable[Record]", output: Path) -> None:
    from turboquant.results import append_record

    try:
        for record in records:
            append_record(record, output)
            typer.echo(record.model_dump_json())
    except ValueError as error:
        fail(error, 2)
    except RuntimeError as error:  # the GPU's; finished records are written
        from turboquant.faults import out_of_memory

        if out_of_memory(error):
            raise
        fail(error, 1)


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
    from turboquant.kernel_bench import bench_attention

    chosen = read_methods(method, ["turboquant"], bits or (None if method else [4, 3, 2]))
    check_writable(output)
    for name in dict.fromkeys(shape or ["llama-3.1-8b"]):
        for rows in dict.fromkeys(batch or [1]):
            for tokens in dict.fromkeys(context or [8192]):
                options = {"batch": rows, "context": tokens, "query_tokens": query_tokens, "repeats": repeats}
                _write(bench_attention(name, chosen, **options), output)


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
    from turboquant.kernel_bench import bench_scores

    chosen = read_methods(method, ["turboquant"], bits or (None if method else [4, 3, 2]))
    check_writable(output)
    for name in dict.fromkeys(shape or ["llama-3.1-8b"]):
        for rows in dict.fromkeys(batch or [1]):
            for tokens in dict.fromkeys(context or [8192]):
                _write(bench_scores(name, chosen, batch=rows, context=tokens, repeats=repeats), output)


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
    from turboquant.kernel_bench import bench_encode

    chosen = read_methods(method, ["turboquant"], bits or (None if method else [4, 3, 2]))
    check_writable(output)
    for name in dict.fromkeys(shape or ["llama-3.1-8b"]):
        for rows in dict.fromkeys(batch or [1]):
            for count in dict.fromkeys(tokens or [12_800]):
                _write(bench_encode(name, chosen, batch=rows, tokens=count, repeats=repeats), output)


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
    from turboquant.model_bench import bench_model

    _write(bench_model(model, weights, chosen, batch=batch, context=context, steps=steps), output)


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
    from turboquant.model_bench import bench_memory

    _write(bench_memory(model, weights, chosen, budget_bytes=int(budget_gb * 1e9)), output)
