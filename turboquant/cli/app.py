"""What all commands share: their options, their errors and exit codes, progress, and records that resume.

Nothing heavy is imported before a command runs.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from turboquant.experiments import Experiment
    from turboquant.methods import Method
    from turboquant.models import LoadedModel
    from turboquant.results import Cell, ExperimentRecord

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench", help="Time caches on this machine and append the record to results/.")

ModelOption = Annotated[str, typer.Option("--model", help="Name from `turboquant models`, hub id or local folder.")]
MethodOption = Annotated[str, typer.Option("--method", help="Method string, such as turboquant:bits=4.")]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option("--method", help="Method string, such as turboquant:bits=4; may be given several times."),
]
WeightsOption = Annotated[str, typer.Option("--weights", help="auto, fp32, bf16, 8bit or 4bit.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output instead of going on with it.")]


@app.callback()
def _callback() -> None:
    """What happens to a model's answers, memory and speed when its KV cache is compressed."""


def say(text: str) -> None:
    """Print a line for people, on standard error."""
    typer.echo(text, err=True)


def fail(error: Exception | str, code: int) -> NoReturn:
    """Say what is wrong in one line and leave with this exit code: 1 the run failed, 2 wrong use."""
    say(f"turboquant: {error}")
    raise typer.Exit(code)


def read_method(spec: str) -> "Method":
    """Return a method, or leave with code 2."""
    from turboquant.methods import parse_method

    try:
        return parse_method(spec)
    except ValueError as error:
        fail(error, 2)


def read_methods(specs: Sequence[str] | None, default: Sequence[str]) -> "list[Method]":
    """Return the methods named, each once, or leave with code 2."""
    return list({str(method): method for method in map(read_method, specs or default)}.values())


def load(name: str, weights: str) -> "LoadedModel":
    """Return a model, or leave with code 1."""
    from turboquant.models import ModelError, load_model

    try:
        return load_model(name, weights=weights, progress=lambda _, text: say(text))
    except ModelError as error:
        fail(error, 1)


def check_writable(path: Path) -> None:
    """Leave with code 2 where a file cannot be written; asked before the work starts."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"the output folder {folder} cannot be made: {error.strerror or error}", 2)
    target = path if path.exists() else folder
    if path.is_dir() or not os.access(target, os.W_OK):
        fail(f"the output {path} cannot be written: {'it is a folder' if path.is_dir() else 'permission denied'}", 2)


class Stop:
    """Ctrl-C in two steps: the first asks to finish the record in hand, the second leaves at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """Return whether the user asked to stop."""
        return self.asked

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("stopping: the record in hand is finished first (press Ctrl-C again to leave at once)")

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Handle Ctrl-C this way while the block runs."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """Show a bar with the time left on standard error while the block runs; yields what to call with 0 to 1 and a text.

    Where standard error is not a terminal each new text becomes a line instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        said = [""]

        def line(fraction: float, text: str) -> None:
            if text != said[0]:
                said[0] = text
                say(f"{100 * fraction:3.0f} %  {text}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=text or title)


def finished(path: Path, experiments: set[str], overwrite: bool) -> "list[ExperimentRecord]":
    """Return the records an output already holds, or leave: with code 2 for a file of something else.

    With `overwrite` the file is emptied instead.
    """
    from turboquant.results import RecordFileError, read_records

    check_writable(path)
    if overwrite:
        path.write_bytes(b"")
        return []
    try:
        records = read_records(path)
    except RecordFileError as error:
        fail(f"{error}: give another --output, or --overwrite", 2)
    others = sorted({record.cell.experiment for record in records} - experiments)
    if others:
        fail(f"{path} holds records of {', '.join(others)}: give another --output, or --overwrite", 2)
    return records


def run_recorded(
    title: str,
    cells: "Sequence[Cell]",
    experiments: "dict[str, Experiment[Any]]",
    output: Path,
    overwrite: bool,
    show: "Callable[[ExperimentRecord], None]" = lambda record: None,
) -> "list[ExperimentRecord]":
    """Measure what is missing in an output, record by record; return the records of all cells, old and new.

    A cell that failed before is tried again. Leaves with code 1 after Ctrl-C, saying how to go on.
    """
    from turboquant.experiments import Watch, run_cells
    from turboquant.results import append_record

    wanted = {cell.key for cell in cells}
    before = finished(output, {cell.experiment for cell in cells}, overwrite)
    known = {record.cell.key: record for record in before if record.error is None and record.cell.key in wanted}
    missing = [cell for cell in cells if cell.key not in known]
    if known:
        commits = {record.environment.commit or "no commit" for record in known.values()}
        say(f"{len(known)} of {len(cells)} records are in {output} already (measured at {', '.join(sorted(commits))})")
    with Stop().listening() as stop, progress_bar(title) as progress:
        watch = Watch(progress=progress)
        try:
            for record in run_cells(missing, experiments, load=_load_quietly(progress), watch=watch, stopping=stop):
                append_record(record, output)
                known[record.cell.key] = record
                if record.error:
                    say(f"failed: {record.cell}: {record.error}")
                else:
                    show(record)
        except KeyboardInterrupt:
            stop.asked = True
    if stop.asked and len(known) < len(cells):
        fail(f"stopped with {len(known)} of {len(cells)} records in {output}; the same command goes on from there", 1)
    return [known[cell.key] for cell in cells]


def _load_quietly(progress: Callable[[float, str], None]) -> "Callable[[str, str], LoadedModel]":
    from turboquant.models import load_model

    return lambda name, weights: load_model(name, weights=weights, progress=lambda _, text: progress(0.0, text))


def finish(records: "Sequence[ExperimentRecord]", output: Path, started: float, **more: Any) -> None:
    """Print the JSON line that ends a command; leave with code 1 where a cell failed."""
    failed = [record for record in records if record.error]
    summary = {
        "experiment": records[0].cell.experiment if records else None,
        "records": len(records),
        "failed": len(failed),
        "output": str(output),
        "seconds": round(time.perf_counter() - started, 1),
        **more,
    }
    sys.stdout.flush()
    typer.echo(json.dumps(summary))
    if failed:
        raise typer.Exit(1)
