"""Commands about the models and methods there are, and decode speed."""

from pathlib import Path
from typing import Annotated

import typer

from turboquant.cli.app import (
    MOST_ANSWER,
    MOST_RUNS,
    MOST_TOKENS,
    MethodsOption,
    ModelOption,
    WeightsOption,
    app,
    bench,
    check_writable,
    load,
    read_methods,
    say,
)
from turboquant.cli.bench_kernels import write_benches


@app.command()
def models() -> None:
    """List the models that have a name, and which of them are on this machine."""
    from turboquant.models.hub import available_models
    from turboquant.models.registry import MODELS

    here = set(available_models())
    for name, spec in MODELS.items():
        typer.echo(f"{name:24} {'here' if name in here else '':5} {spec.hub_id:40} {spec.note}")


@bench.command("decode")
def bench_decode_command(
    model: ModelOption = "smollm2-135m",
    method: MethodsOption = None,
    weights: WeightsOption = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, max=MOST_ANSWER, help="Tokens generated in a run.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Runs of each cache.")] = 5,
    busy: Annotated[int, typer.Option(min=0, max=MOST_RUNS, help="Other processes that compute meanwhile.")] = 0,
    output: Annotated[Path, typer.Option(help="Records are appended here.")] = Path("results/bench-decode.jsonl"),
) -> None:
    """Time decoding with the full and with compressed caches, alternated in one process."""
    from turboquant.experiments.decode_speed import bench_decode
    from turboquant.report.tables import busy_table, decode_table

    chosen = read_methods(method, ["turboquant:bits=4"])
    check_writable(output)
    loaded = load(model, weights)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, "busy": busy}
    running = (bench_decode(loaded, one, **sizes, progress=say) for one in chosen)
    write_benches(running, output, busy_table if busy else decode_table)
