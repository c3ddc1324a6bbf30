"""Make a run that ships with the app: `python -m app.compare.record NAME --example summary --method turboquant:bits=3`.

The run is a real one, made here and now, and is written to `assets/runs/NAME.json` with its date, hardware and commit.
"""

from typing import Annotated

import typer

from app.tab.examples import BY_NAME
from app.tab.runs import RECORDED_FOLDER, Run
from app.tab.verdict import facts, verdict
from turboquant.methods import parse_method
from turboquant.models.load import load_model
from turboquant.records.comparison import Settings
from turboquant.run.compare import compare


def record(
    name: Annotated[str, typer.Argument(help="File name without .json; also the run's id.")],
    example: Annotated[str, typer.Option(help="Name of an example prompt.")] = "summary",
    method: Annotated[str, typer.Option(help="Compression method.")] = "turboquant:bits=4",
    model: Annotated[str, typer.Option(help="Model name, hub id or folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128,
    detail: Annotated[bool, typer.Option(help="Keep what the Heads page explains heads with; the file grows.")] = True,
) -> None:
    """Run one comparison and keep it as a recorded run."""
    if example not in BY_NAME:
        raise typer.BadParameter(f"choose from {', '.join(BY_NAME)}", param_hint="--example")
    loaded = load_model(model, progress=lambda fraction, text: typer.echo(text, err=True))
    settings = Settings(max_new_tokens=tokens, temperature=0.0, top_p=1.0, top_k=0, seed=0)
    result = compare(loaded, BY_NAME[example].prompt, parse_method(method), settings, detail=detail)
    run = Run(id=name, origin="recorded", comparison=result)
    if not run.packed:
        raise typer.BadParameter("this run packs no token, so it shows nothing", param_hint="--method")
    RECORDED_FOLDER.mkdir(parents=True, exist_ok=True)
    (RECORDED_FOLDER / f"{name}.json").write_text(run.model_dump_json() + "\n", encoding="utf-8")
    typer.echo(verdict(result))
    for label, value in facts(result):
        typer.echo(f"{label}: {value}")


if __name__ == "__main__":
    typer.run(record)
