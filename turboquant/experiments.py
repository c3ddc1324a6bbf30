"""Experiments as cells: each cell is measured once, recorded at once, and passed over when it is there already.

A cell is one method under one experiment with one model and one set of settings. Cells that differ only in the method
run together, since they share a forward pass. Whatever runs cells (a command, a page, a sweep) calls `run_cells`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Generic, TypeVar

from turboquant.cache import NothingCompressedError
from turboquant.comparison import model_info
from turboquant.generate import CancelledError, PromptError
from turboquant.methods import Method, parse_method
from turboquant.models import LoadedModel, ModelError, load_model
from turboquant.results import CacheReport, Cell, ExperimentRecord, Record, environment

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
    """

    progress: Callable[[float, str], None] = lambda fraction, text: None
    cancelled: Callable[[], bool] = lambda: False

    def check(self) -> None:
        """Raise CancelledError if the caller asked to stop."""
        if self.cancelled():
            raise CancelledError

    def part(self, start: float, stop: float) -> "Watch":
        """Return a watch whose 0 to 1 is `start` to `stop` of this one."""
        return Watch(lambda fraction, text: self.progress(start + (stop - start) * fraction, text), self.cancelled)


@dataclass(frozen=True)
class Measurement:
    """What an experiment found for one method; see `ExperimentRecord` for the names' suffixes."""

    metrics: dict[str, float | None]
    cache: CacheReport | None = None
    timing: dict[str, float] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """A kind of measurement.

    Attributes:
        name: As in records and on the command line.
        settings: The record class of its settings.
        run: Measures methods with a model, yielding each as soon as it is known, in any order.
    """

    name: str
    settings: type[S]
    run: Callable[[LoadedModel, Sequence[Method], S, Watch], Iterator[tuple[Method, Measurement]]]


def cells_for(
    experiment: Experiment[S], model: str, methods: Iterable[Method], settings: Iterable[S], weights: str = "auto"
) -> list[Cell]:
    """Return the cells of one model: every method under every settings, those that share work side by side."""
    return [
        Cell(
            experiment=experiment.name,
            model=model,
            weights=weights,
            method=str(method),
            settings=one.model_dump(mode="json"),
        )
        for one in settings
        for method in methods
    ]


def _shared(cell: Cell) -> str:
    return cell.model_copy(update={"method": None}).key


class _Models:
    """Loads models, one at a time in memory."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.held: tuple[str, str] | None = None
        self.loaded: LoadedModel | None = None

    def get(self, name: str, weights: str) -> LoadedModel:
        if self.loaded is None or self.held != (name, weights):
            self.loaded = None  # let go of the old one first
            self.loaded, self.held = self.load(name, weights), (name, weights)
        return self.loaded


def _sentence(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text and isinstance(error, SAYS_IT_ALL) else f"{type(error).__name__}: {error}".strip()


def run_group(
    experiment: Experiment[Any], cells: Sequence[Cell], models: _Models, watch: Watch
) -> Iterator[ExperimentRecord]:
    """Run cells that differ only in the method; those that fail become records with an error."""
    waiting = {cell.method: cell for cell in cells}
    loaded, started = None, time.perf_counter()
    try:
        assert cells[0].model is not None
        loaded = models.get(cells[0].model, cells[0].weights)
        settings = experiment.settings.model_validate(cells[0].settings)
        methods = [parse_method(cell.method or "") for cell in cells]
        for method, found in experiment.run(loaded, methods, settings, watch):
            elapsed, started = time.perf_counter() - started, time.perf_counter()
            yield ExperimentRecord(
                cell=waiting.pop(str(method)),
                model=model_info(loaded),
                metrics=found.metrics,
                cache=found.cache,
                timing={"elapsed": elapsed, **found.timing},
                detail=found.detail,
                environment=environment(loaded.model.device),
            )
    except CancelledError:
        raise
    except Exception as error:
        device = "cpu" if loaded is None else loaded.model.device
        for cell in waiting.values():
            yield ExperimentRecord(cell=cell, environment=environment(device), error=_sentence(error))


def run_cells(
    cells: Sequence[Cell],
    experiments: dict[str, Experiment[Any]],
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
        stopping: Asked between groups: once true, what is in hand has been finished and nothing new is begun.

    Raises:
        CancelledError: If `watch.cancelled` said so.
    """
    models, done = _Models(load), 0
    for _, group in groupby(cells, key=_shared):
        if stopping():
            return
        part = list(group)
        span = watch.part(done / len(cells), (done + len(part)) / len(cells))
        yield from run_group(experiments[part[0].experiment], part, models, span)
        done += len(part)
