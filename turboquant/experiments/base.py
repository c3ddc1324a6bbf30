"""Experiments as cells: each cell is measured once, recorded at once, and passed over when it is there already.

A cell is one method under one experiment with one model and one set of settings. Cells that differ only in the method
run together, since they share a forward pass. Whatever runs cells (a command, a page, a sweep) calls `run_cells`.
Experiments on random vectors have no model, and those on the code itself no method either.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Generic, TypeVar

import torch

from turboquant.cache.build import NothingCompressedError
from turboquant.methods import Method, parse_method
from turboquant.models.fingerprint import is_current
from turboquant.models.inputs import inputs
from turboquant.models.load import LoadedModel, ModelError, load_model
from turboquant.records.base import Record
from turboquant.records.comparison import CacheReport
from turboquant.records.environment import code, environment
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.faults import NO_MEMORY, out_of_memory
from turboquant.run.compare import model_info
from turboquant.run.generate import CancelledError, PromptError
from turboquant.texts import ReadText, reading

S = TypeVar("S", bound=Record)
Load = Callable[[str, str], LoadedModel]
SAYS_IT_ALL = (ModelError, PromptError, NothingCompressedError, ValueError, OSError)
"""Errors whose text is written for people; others are recorded with their type."""


@dataclass(frozen=True)
class Watch:
    """How running work reports and hears.

    Attributes:
        progress: Called with the fraction of the present piece that is done (0 to 1) and what is being done.
        cancelled: Asked often; once true, the work raises CancelledError.
        stopping: Asked by an experiment before it begins another method; once true, it yields what it has and returns.
    """

    progress: Callable[[float, str], None] = lambda fraction, text: None
    cancelled: Callable[[], bool] = lambda: False
    stopping: Callable[[], bool] = lambda: False

    def check(self) -> None:
        """Raise CancelledError if the caller asked to stop."""
        if self.cancelled():
            raise CancelledError

    def part(self, start: float, stop: float) -> "Watch":
        """Return a watch whose 0 to 1 is `start` to `stop` of this one."""
        return replace(self, progress=lambda fraction, text: self.progress(start + (stop - start) * fraction, text))


@dataclass(frozen=True)
class Measurement:
    """What an experiment found for one method; see `ExperimentRecord` for the names' suffixes."""

    metrics: dict[str, float | None]
    cache: CacheReport | None = None
    timing: dict[str, float] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


def _any_model(loaded: LoadedModel, settings: Any) -> None:
    """Refuse nothing."""


def _any_methods(methods: Sequence[Method], settings: Any) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """A kind of measurement. Its functions are importable by name, since other processes run them too.

    Attributes:
        name: As in records and on the command line.
        settings: The record class of its settings (`turboquant.records.settings`).
        run: Measures methods with a model, yielding each as soon as it is known, in any order. Without a model it gets
            None, without methods none, and yields one measurement, of None.
        check: Raises ValueError where a model cannot serve the settings; quick, and asked before `run`.
        check_methods: Raises ValueError where methods cannot be measured under the settings; asked before a model is
            loaded.
        model: Whether it measures a model.
        methods: Whether it measures methods.
        timed: Whether it measures the code's own speed: then a record is about the commit that made it, and is measured
            again after a change of the program.
    """

    name: str
    settings: type[S]
    run: Callable[[Any, Sequence[Method], S, Watch], Iterator[tuple[Any, Measurement]]]
    check: Callable[[LoadedModel, S], None] = _any_model
    check_methods: Callable[[Sequence[Method], S], None] = _any_methods
    model: bool = True
    methods: bool = True
    timed: bool = False


def cells_for(
    experiment: Experiment[S],
    model: str | None,
    methods: Iterable[Method],
    settings: Iterable[S],
    weights: str = "auto",
) -> list[Cell]:
    """Return the cells of one model: every method under every settings, those that share work side by side.

    An experiment without a model or methods leaves them out of its cells.
    """
    named = [str(method) for method in methods] if experiment.methods else [None]
    place: dict[str, Any] = {"model": model, "weights": weights} if experiment.model else {}
    return [
        Cell(experiment=experiment.name, **place, method=method, settings=one.model_dump(mode="json"))
        for one in settings
        for method in named
    ]


def groups(cells: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Yield neighbours that differ only in the method: they share their forward passes."""
    for _, group in groupby(cells, key=lambda cell: cell.model_copy(update={"method": None}).key):
        yield list(group)


class Models:
    """Loads models, one at a time in memory."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.held: tuple[str, str] | None = None
        self.loaded: LoadedModel | None = None

    def get(self, name: str, weights: str) -> LoadedModel:
        """Return a model, loading it where the one in memory is another or the name stands for something else now."""
        same = self.loaded is not None and self.held == (name, weights)
        if self.loaded is None or not (same and is_current(name, self.loaded.fingerprint)):
            self.loaded = None  # let go of the old one first
            self.held = None  # a failed load leaves nothing behind
            self.loaded, self.held = self.load(name, weights), (name, weights)
        return self.loaded


def _finite(value: float | None) -> float | None:
    """Return a figure, or None where there is none; on disk NaN and infinity are null as well."""
    return value if value is not None and math.isfinite(value) else None


def _sentence(error: BaseException) -> str:
    if out_of_memory(error):
        return NO_MEMORY
    text = str(error).strip().splitlines()
    return text[0] if text and isinstance(error, SAYS_IT_ALL) else f"{type(error).__name__}: {error}".strip()


def failed(cell: Cell, error: BaseException | str, device: torch.device | str = "cpu") -> ExperimentRecord:
    """Return the record of a cell that could not be measured."""
    text = error if isinstance(error, str) else _sentence(error)
    return ExperimentRecord(cell=cell, environment=environment(device), error=text)


def _device(loaded: LoadedModel | None, settings: Any) -> torch.device:
    """Return where it is measured: where the model is, or what the settings say (a record's or a cell's)."""
    if loaded is not None:
        return loaded.model.device
    named = settings.get("device", "cpu") if isinstance(settings, dict) else getattr(settings, "device", "cpu")
    return torch.device(str(named).partition(":")[0])


def _allocated(device: torch.device) -> int | None:
    """Bytes allocated on a GPU, whose peak is counted anew from here; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _within_reading(
    running: Iterator[tuple[Method, Measurement]], texts: dict[str, ReadText]
) -> Iterator[tuple[Method, Measurement]]:
    """Let an experiment go on within its block of texts, and leave the block while it waits."""
    while True:
        with reading(texts):
            found = next(running, None)
        if found is None:
            return
        yield found


def _measure(
    experiment: Experiment[Any], cells: Sequence[Cell], loaded: LoadedModel | None, watch: Watch
) -> Iterator[ExperimentRecord]:
    by_method = {cell.method: cell for cell in cells}
    settings = experiment.settings.model_validate(cells[0].settings)
    methods = [parse_method(cell.method) for cell in cells if cell.method is not None]
    device, started = _device(loaded, settings), time.perf_counter()
    held = _allocated(device)
    experiment.check_methods(methods, settings)
    with reading() as texts:
        running = experiment.run(loaded, methods, settings, watch)
    for method, found in _within_reading(running, texts):
        elapsed, started = time.perf_counter() - started, time.perf_counter()
        peak = {} if held is None else {"peak_memory_bytes": float(torch.cuda.max_memory_allocated(device) - held)}
        yield ExperimentRecord(
            cell=by_method.pop(None if method is None else str(method)),
            model=None if loaded is None else model_info(loaded),
            metrics={name: _finite(value) for name, value in {**peak, **found.metrics}.items()},
            cache=found.cache,
            timing={"elapsed": elapsed, **found.timing},
            detail=found.detail,
            inputs=inputs(None if loaded is None else loaded.fingerprint, texts, code() if experiment.timed else None),
            environment=environment(device),
        )
        _allocated(device)
    if watch.stopping():
        return
    for cell in by_method.values():
        yield failed(cell, f"the experiment {experiment.name} gave no result for it", device)


def run_group(
    experiment: Experiment[Any], cells: Sequence[Cell], models: Models, watch: Watch
) -> Iterator[ExperimentRecord]:
    """Run cells that differ only in the method; those that fail become records with an error.

    An error does not say which method it belongs to, so the methods that had not finished are then run one by one.
    """
    model, loaded = cells[0].model, None
    try:
        if model is not None:
            loaded = models.get(model, cells[0].weights)
    except Exception as error:
        yield from [failed(cell, error) for cell in cells]
        return
    waiting = {cell.method: cell for cell in cells}
    try:
        for record in _measure(experiment, cells, loaded, watch):
            del waiting[record.cell.method]
            yield record
        return
    except CancelledError:
        raise
    except Exception as error:  # its text alone is kept: the traceback would keep the tensors of the failed run
        text = _sentence(error)
    if len(cells) == 1:
        yield failed(cells[0], text, _device(loaded, cells[0].settings))
        return
    for cell in waiting.values():
        yield from run_group(experiment, [cell], models, watch)


def run_cells(
    cells: Sequence[Cell],
    experiments: Mapping[str, Experiment[Any]],
    load: Load = lambda name, weights: load_model(name, weights=weights),
    watch: Watch = Watch(),
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[ExperimentRecord]:
    """Run cells in order and yield a record each, failed ones with their error.

    Args:
        cells: What to measure; neighbours that differ only in the method share their forward passes.
        experiments: By name.
        load: Loads a model by name and weights; a model is kept for as long as the next cell uses it.
        watch: Progress over all cells, and cancelling in the middle of one.
        stopping: Asked between methods: once true, what is in hand has been finished and nothing new is begun.

    Raises:
        CancelledError: If `watch.cancelled` said so.
    """
    models, done = Models(load), 0
    watch = replace(watch, stopping=stopping)
    for part in groups(cells):
        span = watch.part(done / len(cells), (done + len(part)) / len(cells))
        if stopping():
            return
        yield from run_group(experiments[part[0].experiment], part, models, span)
        done += len(part)
