"""`bench metrics`: head metrics for all heads at once against the obvious loop."""

from pathlib import Path
from typing import Annotated

import typer

from turboquant.cli.app import MOST_RUNS, MOST_TOKENS, at_terminal, bench, check_writable, fail


@bench.command("metrics")
def bench_metrics_command(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a context; default 512 2048 8192.")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Queries a head.")] = 64,
    heads: Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="KV heads.")] = 3,
    head_dim: Annotated[int, typer.Option(min=2, max=4096, help="Values of a key.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Timed runs of each.")] = 5,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-metrics.jsonl"),
) -> None:
    """Time comparing one layer's attention heads, all at once against head by head (default: SmolLM2's heads)."""
    from turboquant.experiments.decode_speed import bench_metrics
    from turboquant.records.files import append_record

    check_writable(output)
    for count in dict.fromkeys(tokens or [512, 2048, 8192]):
        try:
            record = bench_metrics(
                count, queries=queries, heads=heads, kv_heads=kv_heads, head_dim=head_dim, repeats=repeats
            )
        except ValueError as error:
            fail(error, 2)
        append_record(record, output)
        sides = f"{record.vectorised_ms.median:.1f} ms at once, {record.loop_ms.median:.1f} ms in a loop"
        typer.echo(f"{count:>8,} tokens: {sides}, {record.ratio:.1f} times", err=True)
        if not at_terminal():
            typer.echo(record.model_dump_json())
