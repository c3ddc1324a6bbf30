"""`bench attention` and `bench encode`: one layer's kernels, without a model."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant.cli.app import BitsOption, MethodsOption, bench, check_writable, fail, read_methods

if TYPE_CHECKING:
    from turboquant.results import Record

ShapeOption = Annotated[
    list[str] | None, typer.Option("--shape", help="Heads of llama-3.1-8b, qwen2.5-3b, phi-2 or smollm2-135m; several.")
]
BatchOption = Annotated[list[int] | None, typer.Option("--batch", help="Rows; one or several.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Timed rounds; sides take turns.")]


def _write(records: "Iterable[Record]", output: Path) -> None:
    from turboquant.results import append_record

    try:
        for record in records:
            append_record(record, output)
            typer.echo(record.model_dump_json())
    except ValueError as error:
        fail(error, 2)
    except OSError as error:
        fail(error, 1)


@bench.command("attention")
def bench_attention_command(
    shape: ShapeOption = None,
    method: MethodsOption = None,
    bits: BitsOption = None,
    batch: BatchOption = None,
    context: Annotated[list[int] | None, typer.Option("--context", help="Tokens a row; one or several.")] = None,
    query_tokens: Annotated[int, typer.Option(min=1, help="Query tokens a row.")] = 1,
    repeats: RepeatsOption = 20,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-attention.jsonl"),
) -> None:
    """Time one layer's decode attention, the fastest full one of torch against compressed ones."""
    from turboquant.kernel_bench import bench_attention

    chosen = read_methods(method, ["turboquant"], bits or (None if method else [4, 3, 2]))
    check_writable(output)
    for name in shape or ["llama-3.1-8b"]:
        for rows in batch or [1]:
            for tokens in context or [8192]:
                options = {"batch": rows, "context": tokens, "query_tokens": query_tokens, "repeats": repeats}
                _write(bench_attention(name, chosen, **options), output)


@bench.command("encode")
def bench_encode_command(
    shape: ShapeOption = None,
    method: MethodsOption = None,
    bits: BitsOption = None,
    batch: BatchOption = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", help="Tokens a row; one or several.")] = None,
    repeats: RepeatsOption = 20,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-encode.jsonl"),
) -> None:
    """Time quantizing the keys and values of one layer."""
    from turboquant.kernel_bench import bench_encode

    chosen = read_methods(method, ["turboquant"], bits or (None if method else [4, 3, 2]))
    check_writable(output)
    for name in shape or ["llama-3.1-8b"]:
        for rows in batch or [1]:
            for count in tokens or [12_800]:
                _write(bench_encode(name, chosen, batch=rows, tokens=count, repeats=repeats), output)
