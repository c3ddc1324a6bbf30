"""`turboquant models`: the models that have a name."""

import typer

from turboquant.cli.app import app


@app.command()
def models() -> None:
    """List the models that have a name, and which of them are on this machine."""
    from turboquant.models.hub import available_models
    from turboquant.models.registry import MODELS

    here = set(available_models())
    for name, spec in MODELS.items():
        typer.echo(f"{name:24} {'here' if name in here else '':5} {spec.hub_id:40} {spec.note}")
