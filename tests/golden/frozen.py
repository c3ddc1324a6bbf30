"""What is written down, and how it is made from the program."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from typer import rich_utils
from typer.testing import CliRunner

import turboquant
from app.navigation import ENTRIES
from turboquant import cli
from turboquant.experiments.base import cells_for
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.methods import METHODS, parse_method
from turboquant.records.experiment import ExperimentRecord
from turboquant.report.summary import read_results

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parents[1] / "results"


def names() -> str:
    """Public names, methods with what they print as, addresses of pages."""
    found = {
        "public": sorted(turboquant.__all__),
        "methods": {name: str(method()) for name, method in sorted(METHODS.items())},
        "pages": [entry.name for entry in ENTRIES],
    }
    return json.dumps(found, indent=1) + "\n"


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, one in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(one, (*path, name))


def help_texts() -> str:
    """The help of every command."""
    runner = CliRunner(env={"COLUMNS": "120", "TERMINAL_WIDTH": "120", "NO_COLOR": "1", "TERM": "dumb"})
    commands = list(_commands(typer.main.get_command(cli.app)))
    with mock.patch.object(rich_utils, "MAX_WIDTH", 120):  # typer reads the variable when it is first imported
        found = [runner.invoke(cli.app, [*path, "--help"]).output for path in commands]
    return "".join(line.rstrip() + "\n" for text in found for line in text.splitlines())


def keys() -> str:
    """Keys of cells: of every experiment with its own defaults, and a sum over the keys of the recorded ones."""
    found: dict[str, Any] = {}
    for name, one in sorted(EXPERIMENTS.items()):
        made_here = {name: None for name, field in one.settings.model_fields.items() if field.default_factory}
        cells = cells_for(one, "smollm2-135m", [parse_method("turboquant")], [one.settings()])
        settings = [{**cell.settings, **made_here} for cell in cells]
        found[name] = [cell.model_copy(update={"settings": s}).key for cell, s in zip(cells, settings, strict=True)]
    recorded: dict[str, list[str]] = {}
    for record, path in read_results([RESULTS]).records:
        assert isinstance(record, ExperimentRecord)
        recorded.setdefault(path.name, []).append(record.cell.key)
    sums = {name: hashlib.sha256("\n".join(sorted(some)).encode()).hexdigest() for name, some in recorded.items()}
    return json.dumps({"defaults": found, "recorded": dict(sorted(sums.items()))}, indent=1) + "\n"


FROZEN: dict[str, Callable[[], str]] = {"names.json": names, "help.txt": help_texts, "keys.json": keys}
