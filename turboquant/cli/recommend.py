"""`turboquant recommend`: the smallest cache that stays within limits on a text of the user's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant.cli.app import (
    JsonOption,
    OverwriteOption,
    Stop,
    WeightsOption,
    app,
    at_terminal,
    check_writable,
    fail,
    finished,
    load,
    progress_bar,
    say,
)
from turboquant.cli.options import read_settings
from turboquant.cli.perplexity import check_texts
from turboquant.cli.tables import heads, interval, print_table
from turboquant.records.metrics import human_bytes, metric
from turboquant.texts import reading

if TYPE_CHECKING:
    from turboquant.experiments.recommend import Recommendation, Tried
    from turboquant.records.experiment import ExperimentRecord

TRIED = ("kl_mean", ("kl_low", "kl_high"), "same_top_pct", "cache_bytes", "estimated_bytes")


@app.command()
@reading()
def recommend(
    model: Annotated[str, typer.Argument(help="Name from `turboquant models`, hub id, local folder or .gguf file.")],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="A UTF-8 file of yours or a shipped text; may be repeated. Default persuasion."),
    ] = None,
    max_kl: Annotated[float, typer.Option(help="Greatest mean KL from the full cache, nats a token.")] = 0.01,
    min_same_top: Annotated[
        float, typer.Option(help="Least share of positions with the same most likely token, %.")
    ] = 90.0,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe", help="Method without bits; may be repeated. Default turboquant, kivi and rotated rtn."
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window, fewer where the text is short.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each half of each text.")] = 1,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Context at which sizes are compared. Default: the model's longest, at most 32,768."),
    ] = None,
    layers: Annotated[bool, typer.Option(help="Try fewer bits in the layers that stand it best.")] = True,
    weights: WeightsOption = "auto",
    output: Annotated[Path, typer.Option(help="One perplexity record a measurement.")] = Path(
        "results/recommend.jsonl"
    ),
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Search recipe, key and value bits and bits of layers for the smallest cache within limits on a text.

    Exit code 1 where no method stays within them.
    """
    check_writable(output)
    from turboquant.experiments.base import Watch
    from turboquant.experiments.recommend import RecommendSettings, reusable_for
    from turboquant.experiments.recommend import recommend as search
    from turboquant.records.files import append_record
    from turboquant.run.generate import CancelledError

    values = {"texts": text, "max_kl": max_kl, "min_same_top_pct": min_same_top, "recipes": recipe}
    values |= {"context": context, "windows": windows, "tokens": tokens, "layers": layers}
    flags = {"texts": "--text", "recipes": "--recipe", "min_same_top_pct": "--min-same-top"}
    settings = read_settings(RecommendSettings, values, flags)
    check_texts(settings.texts, output)
    known = finished(output, {"perplexity"}, overwrite)
    loaded = load(model, weights)
    for line in reusable_for(loaded, settings.texts, known).lines("measured again where needed"):
        say(line)
    if overwrite:
        output.write_bytes(b"")
    with Stop().listening() as stop, progress_bar("recommend") as progress:
        watch = Watch(progress=progress, stopping=stop)
        try:
            found = search(loaded, settings, watch, known=known, keep=lambda record: append_record(record, output))
        except (CancelledError, KeyboardInterrupt):
            again = "the same command without --overwrite" if overwrite else "the same command"
            fail(f"stopped; what was measured is in {output}, and {again} goes on from there", 1)
        except ValueError as error:
            fail(error, 2)
        except OSError as error:
            fail(f"{output} cannot be written: {error.strerror or error}", 1)
    say_reused(found.reused, known, output)
    show(found)
    if json_ or not at_terminal():
        typer.echo(json.dumps({**found.model_dump(mode="json"), "output": str(output)}))
    if found.method is None:
        raise typer.Exit(1)


def say_reused(count: int, known: "Sequence[ExperimentRecord]", output: Path) -> None:
    """Say how many measurements were there before, and at which commits they were made."""
    if count:
        commits = ", ".join(sorted({record.environment.commit or "no commit" for record in known}))
        say(f"{count} measurements were in {output} already (measured at {commits})")


def show(found: "Recommendation") -> None:
    """Print the evidence, the memory and the outcome."""
    from turboquant.records.verdict import against_16_bits

    typer.echo(
        f"{found.model.name} {found.model.dtype} on {found.environment.device}; "
        f"{', '.join(found.texts)}: windows of {found.context:,} tokens, the first {found.prefill:,} read in "
        f"one call; {found.measured} of {found.candidates} methods measured, the others need not be: they are larger "
        "than one that passes, or have no more bits than one that fails"
    )
    tried = sorted(found.tried, key=lambda one: (one.estimated_bytes, one.part))
    print_table(("method", "part", *heads(TRIED), "within limits"), [_row(one) for one in tried])
    held, estimated = (metric(name).column for name in ("cache_bytes", "estimated_bytes"))
    typer.echo(f"{held}: measured at {found.context:,} tokens; {estimated}: at {found.tokens:,} tokens.")
    if found.lower_bits and found.uniform:
        keys, values = found.lower_bits
        gain = "saves bytes" if found.method != found.uniform else "is not within the limits"
        typer.echo(f"{found.uniform} with {keys} bits a key and {values} a value in some layers {gain}.")
    for row in found.memory:
        typer.echo(
            f"{row.tokens:>9,} tokens: {human_bytes(row.bytes)}, {against_16_bits(row.bytes, row.full_bytes)} of "
            f"{human_bytes(row.full_bytes)} ({'measured' if row.measured else 'estimated'})"
        )
    typer.echo(found.sentence)
    if found.caution:
        typer.echo(found.caution)


def _row(one: "Tried") -> list[str]:
    return [
        one.method,
        one.part,
        metric("kl_mean").text(one.kl),
        interval("kl_mean", one.kl_low, one.kl_high),
        *(metric(name).text(getattr(one, name)) for name in ("same_top_pct", "bytes", "estimated_bytes")),
        "yes" if one.failure is None else f"no: {one.failure}",
    ]
