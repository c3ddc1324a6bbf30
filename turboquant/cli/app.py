"""What all commands share: their options, their errors and exit codes, progress, and records that resume.

Nothing heavy is imported before a command runs.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from turboquant.cli.errors import Program, fail, say
from turboquant.cli.flags import Commands
from turboquant.texts import reading

if TYPE_CHECKING:
    from turboquant.experiments.base import Experiment, Watch
    from turboquant.methods import Method
    from turboquant.models.load import LoadedModel, ModelError
    from turboquant.records.experiment import Cell, ExperimentRecord

    Engine = Callable[
        [Sequence[Cell], Mapping[str, Experiment[Any]], Watch, Callable[[], bool]], Iterator[ExperimentRecord]
    ]
    Store = tuple[Sequence[ExperimentRecord], Callable[[ExperimentRecord], None]]

app = Commands(cls=Program, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench = Commands(no_args_is_help=True)
app.add_typer(bench, name="bench", help="Time caches and kernels on this machine.")

ModelOption = Annotated[
    str, typer.Option("--model", help="Name from `turboquant models`, hub id, local folder or .gguf file.")
]
MethodOption = Annotated[str, typer.Option("--method", help="How the cache is compressed, such as turboquant:bits=4.")]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option("--method", help="Such as turboquant:bits=4; one or several. `turboquant methods --list` shows all."),
]
BitsOption = Annotated[
    list[int] | None,
    typer.Option(
        "--bits", help="Bits a value, 1 to 8, for each --method that names none; one or several. Alone: of turboquant."
    ),
]
WeightsOption = Annotated[
    str, typer.Option("--weights", help="Precision of the model: auto (fp32, 4bit on a GPU), fp32, bf16, 8bit or 4bit.")
]
NoTemplateOption = Annotated[
    bool, typer.Option("--no-chat-template", help="Put prompts to the model as plain text, without its chat template.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the JSON at a terminal too; a pipe or a file always gets it.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output instead of going on with it.")]


def _version(asked: bool) -> None:
    if not asked:
        return
    import torch

    from turboquant import __version__
    from turboquant.records.environment import environment

    here = environment("cuda" if torch.cuda.is_available() else "cpu")
    parts = [f"turboquant {__version__}", f"commit {here.commit or 'unknown'}", f"Python {here.python}"]
    parts += [f"torch {here.torch}", f"transformers {here.transformers}", f"{here.device}, {here.cpu_threads} threads"]
    typer.echo("; ".join(parts))
    raise typer.Exit


@app.callback()
def _callback(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print versions, commit and device, and leave."
        ),
    ] = False,
) -> None:
    """What happens to a model's answers, memory and speed when its KV cache is compressed."""


def read_method(spec: str) -> "Method":
    """Return a method, or leave with code 2."""
    from turboquant.methods import parse_method

    try:
        return parse_method(spec)
    except ValueError as error:
        fail(error, 2)


def read_methods(
    specs: Sequence[str] | None, default: Sequence[str], bits: Sequence[int] | None = None
) -> "list[Method]":
    """Return the methods named, each once, or leave with code 2.

    With `bits` a method that names none stands for one method each, and the default is `turboquant`. Methods that
    have no bits to choose are taken as they are.
    """
    named = specs or (["turboquant"] if bits else default)
    found = [method for spec in named for method in (_with_bits(spec, bits) if bits else [read_method(spec)])]
    return list({str(method): method for method in found}.values())


def _with_bits(spec: str, bits: Sequence[int]) -> "list[Method]":
    method = read_method(spec)
    if not hasattr(method, "bits"):
        return [method]
    if "bits=" in spec:
        fail(f"bits are given twice, by --method {spec} and by --bits {' '.join(map(str, bits))}", 2)
    return [read_method(f"{spec}{',' if ':' in spec else ':'}bits={one}") for one in bits]


def load(name: str, weights: str) -> "LoadedModel":
    """Return a model, or leave."""
    from turboquant.models.load import ModelError, load_model

    try:
        return load_model(name, weights=weights, progress=lambda _, text: say(text))
    except ModelError as error:
        fail_model(error)


def fail_model(error: "ModelError") -> NoReturn:
    """Leave where a model cannot be had: with code 2 for a name that there is not, otherwise 1."""
    from turboquant.models.registry import UnknownNameError

    fail(error, 2 if isinstance(error, UnknownNameError) else 1)


def check_writable(path: Path, *, read_back: bool = True) -> None:
    """Leave with code 2 where a file cannot be written; asked before the work starts.

    It is tried, since permissions do not tell (of read-only disks, full ones, and to the superuser). The folder is
    tried too: a lock or a partial file will stand beside the output. A pipe that nobody reads fails at once.

    Args:
        path: The file.
        read_back: Whether it is a file of records, which are read as well: a pipe or a device cannot be one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
            usable = path.is_file() or not read_back
        else:
            path.with_name(f".{path.name}.partial").exists()  # raises where the name is too long
            tempfile.TemporaryFile(dir=path.parent).close()
            usable = not path.is_symlink()
    except FileExistsError:
        fail(f"the output {path} cannot be written: {path.parent} is not a folder", 2)
    except OSError as error:
        fail(f"the output {path} cannot be written: {error.strerror or error}", 2)
    if not usable:
        fail(f"the output {path} must be a file that can be read again, or not be there yet", 2)


def check_apart(**files: Path | None) -> None:
    """Leave with code 2 where two options name one file; the names are those of the options."""
    named: dict[Path, str] = {}
    for name, path in files.items():
        if path is not None and (other := named.setdefault(path.resolve(), name)) != name:
            fail(f"--{other} and --{name} must be two files, got {path} for both", 2)


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


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds >= 60 else f"{seconds:.0f} s"


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """Show a bar with the time left on standard error while the block runs; yields what to call with 0 to 1 and a text.

    Where standard error is not a terminal each new text becomes a line instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        said, started = [""], time.monotonic()

        def line(fraction: float, text: str) -> None:
            if text != said[0]:
                said[0] = text
                left = (time.monotonic() - started) * (1 - fraction) / fraction if fraction >= 0.02 else None
                say(f"{100 * fraction:3.0f} %  {text}" + (f"  (about {_duration(left)} left)" if left else ""))

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
    """Return the records to go on with, none with `overwrite`; leave with code 2 for a file of something else."""
    from turboquant.records.files import RecordFileError, read_records

    check_writable(path)
    if overwrite:
        return []
    try:
        records = read_records(path)
    except RecordFileError as error:
        fail(f"{error}: give another --output, or --overwrite", 2)
    others = sorted({record.cell.experiment for record in records} - experiments)
    if others:
        fail(f"{path} holds records of {', '.join(others)}: give another --output, or --overwrite", 2)
    return records


@reading()  # every text is read once: what is compared with records is what is measured
def run_recorded(
    title: str,
    cells: "Sequence[Cell]",
    experiments: "Mapping[str, Experiment[Any]]",
    output: Path,
    overwrite: bool,
    show: "Callable[[ExperimentRecord], None]" = lambda record: None,
    engine: "Engine | None" = None,
    store: "Store | None" = None,
) -> "list[ExperimentRecord]":
    """Measure what is missing in an output, record by record; return the records of all cells, old and new.

    A cell that failed before is tried again, and one whose model or text has changed since is measured again. Leaves
    with code 1 after Ctrl-C, saying how to go on, and where a text or the model changed while other processes ran.

    Args:
        title: What the progress bar says.
        cells: What is wanted; one that comes twice is measured once.
        experiments: By name; the output may hold records of these and of no others.
        output: The file of records.
        overwrite: Whether to begin anew; what the output held goes once the model is loaded and the settings checked.
        show: Called with each new record that did not fail.
        engine: What runs the cells that are missing; without it they run in this process.
        store: What the output held before, and how a record is added to it; without it the output is a file of records.
    """
    from turboquant.experiments.base import Watch
    from turboquant.models.inputs import disagreement
    from turboquant.records.files import append_record

    cells = list({cell.key: cell for cell in cells}.values())  # what is asked for twice counts once
    before, keep = store or (
        finished(output, set(experiments), overwrite),
        lambda record: append_record(record, output),
    )
    known = _known(before, cells, output)
    missing = [cell for cell in cells if cell.key not in known]
    with Stop().listening() as stop, progress_bar(title) as progress:
        watch = Watch(progress=progress)
        try:
            running = (engine or _in_this_process)(missing, experiments, watch, stop)
            if overwrite and not store:
                output.write_bytes(b"")
            for record in running:
                _keep(record, keep, output)
                known[record.cell.key] = record
                if record.error:
                    say(f"failed: {record.cell}: {record.error}")
                else:
                    show(record)
        except KeyboardInterrupt:
            stop.asked = True
    if stop.asked and len(known) < len(cells):
        again = "the same command without --overwrite" if overwrite else "the same command"
        fail(f"stopped with {len(known)} of {len(cells)} records in {output}; {again} goes on from there", 1)
    if name := disagreement(known.values()):
        why = "it changed while this ran, or differs between machines"
        again = "the same command measures again those that are about something else"
        fail(f"{name} was not the same for all {len(cells)} records ({why}): {again}", 1)
    return [known[cell.key] for cell in cells]


def _known(
    before: "Sequence[ExperimentRecord]", cells: "Sequence[Cell]", output: Path
) -> "dict[str, ExperimentRecord]":
    """Return the records that are about what the cells name now, by key; say how many, and what has changed."""
    from turboquant.models.inputs import reusable

    found = reusable(before, cells)
    for line in found.lines():
        say(line)
    if found.records:
        commits = {record.environment.commit or "no commit" for record in found.records.values()}
        there = f"{len(found.records)} of {len(cells)} records are in {output} already"
        say(f"{there} (measured at {', '.join(sorted(commits))})")
    return found.records


def _keep(record: "ExperimentRecord", keep: "Callable[[ExperimentRecord], None]", output: Path) -> None:
    try:
        keep(record)
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror or error}", 1)


def _in_this_process(
    cells: "Sequence[Cell]",
    experiments: "Mapping[str, Experiment[Any]]",
    watch: "Watch",
    stopping: Callable[[], bool],
) -> "Iterator[ExperimentRecord]":
    """Run cells here; what cannot be measured at all is refused with code 2 before anything is."""
    from turboquant.experiments.base import groups, run_cells
    from turboquant.methods import parse_method
    from turboquant.models.load import ModelError, load_model

    def load(name: str, weights: str) -> "LoadedModel":
        return load_model(name, weights=weights, progress=lambda _, text: watch.progress(0.0, text))

    for first, *others in groups(cells):
        experiment = experiments[first.experiment]
        methods = [parse_method(cell.method) for cell in (first, *others) if cell.method is not None]
        try:
            experiment.check_methods(methods, experiment.settings.model_validate(first.settings))
        except ValueError as error:
            fail(error, 2)
    wanted = {(cell.model, cell.weights) for cell in cells}
    if len(wanted) != 1 or cells[0].model is None:
        return run_cells(cells, experiments, load=load, watch=watch, stopping=stopping)
    try:
        loaded = load(str(cells[0].model), cells[0].weights)
    except ModelError as error:
        fail_model(error)
    for first, *_ in groups(cells):
        experiment = experiments[first.experiment]
        try:
            experiment.check(loaded, experiment.settings.model_validate(first.settings))
        except ValueError as error:
            fail(error, 2)
    return run_cells(cells, experiments, load=lambda name, weights: loaded, watch=watch, stopping=stopping)


def at_terminal() -> bool:
    """Does a person read standard output? Then JSON of any length is not for it."""
    return sys.stdout.isatty()


def finish(
    records: "Sequence[ExperimentRecord]",
    output: Path,
    started: float,
    details: Mapping[str, Any] = {},
    **more: Any,
) -> None:
    """Print the JSON line that ends a command; leave with code 1 where a cell failed.

    Args:
        records: Of all cells.
        output: Where they are.
        started: When the command began.
        details: What the line has as well, but for a terminal.
        more: Whatever else the line has.
    """
    failed = [record for record in records if record.error]
    summary = {
        "experiment": records[0].cell.experiment if records else None,
        "records": len(records),
        "failed": len(failed),
        "output": str(output),
        "seconds": round(time.perf_counter() - started, 1),
        **more,
        **({} if at_terminal() else details),
    }
    typer.echo(json.dumps(summary))
    if failed:
        raise typer.Exit(1)
