"""The real work behind the engine: loading a model and doing what was asked, by the `turboquant` library.

The model library takes seconds to import, so it is imported on the worker thread, where it is first needed; no page
waits for it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from app.config import AppConfig
from app.engine.contract import Progress
from app.engine.engine import Engine
from app.engine.job import CellsRequest, CompareRequest, Job, PromptsRequest, TurnRequest
from app.engine.library import import_library
from app.recommend.request import RecommendRequest
from turboquant.methods import parse_method

if TYPE_CHECKING:
    from turboquant.experiments.base import Watch
    from turboquant.models.load import LoadedModel
    from turboquant.records.results import ExperimentRecord


def load(name: str, *, weights: str, progress: Progress) -> "LoadedModel":
    """Load a model of the registry, the hub or a local folder."""
    import_library()
    from turboquant.models.load import load_model

    return load_model(name, weights=weights, progress=progress)


def run(loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
    """Work on a job's pending items."""
    request = job.request
    if isinstance(request, CompareRequest):
        _compare(loaded, job, request, cancelled)
    elif isinstance(request, PromptsRequest):
        _prompts(loaded, job, request, cancelled, yielding)
    elif isinstance(request, TurnRequest):
        turn = request.conversation.ask(loaded, request.prompt, request.settings, job.publish, cancelled)
        job.add(0, turn)
    elif isinstance(request, CellsRequest):
        _cells(loaded, job, request, cancelled, yielding)
    elif isinstance(request, RecommendRequest):
        _recommend(loaded, job, request, cancelled, yielding)
    else:
        raise TypeError(f"no runner for {type(request).__name__}")


def _compare(loaded: Any, job: Job, request: CompareRequest, cancelled: Callable[[], bool]) -> None:
    from turboquant.run.compare import compare_methods

    methods = [parse_method(method) for method in request.methods]
    found = compare_methods(
        loaded,
        request.prompt,
        methods,
        request.settings,
        chat=request.chat,
        detail=True,
        on_event=job.publish,
        cancelled=cancelled,
    )
    job.add(0, tuple(found))


def _prompts(
    loaded: Any, job: Job, request: PromptsRequest, cancelled: Callable[[], bool], yielding: Callable[[], bool]
) -> None:
    from turboquant.run.compare import compare

    method = parse_method(request.method)
    for item in job.pending:
        job.begin_item(item)
        found = compare(
            loaded,
            request.prompts[item],
            method,
            request.settings,
            chat=request.chat,
            on_event=job.publish,
            cancelled=cancelled,
        )
        job.add(item, found)
        if cancelled() or yielding():
            return


def _cells(
    loaded: Any, job: Job, request: CellsRequest, cancelled: Callable[[], bool], yielding: Callable[[], bool]
) -> None:
    """Measure the cells that are left, one group that shares its forward passes after the other."""
    from turboquant.experiments.base import Models, Watch, groups, run_group
    from turboquant.experiments.registry import EXPERIMENTS
    from turboquant.run.generate import CancelledError

    models = Models(lambda name, weights: loaded)
    item_of = {request.cells[item].key: item for item in job.pending}
    for group in groups([request.cells[item] for item in job.pending]):
        watch = _watch(Watch, job, len(group), cancelled, yielding)
        try:
            for record in run_group(EXPERIMENTS[group[0].experiment], group, models, watch):
                job.add(item_of[record.cell.key], record)
        except CancelledError:
            return
        if yielding():
            return


def _watch(
    make: "type[Watch]", job: Job, size: int, cancelled: Callable[[], bool], yielding: Callable[[], bool]
) -> "Watch":
    """Report the progress of `size` cells; stop between methods for others, but not before one is measured."""
    known = len(job.results)
    return make(
        progress=lambda fraction, text: job.progress(known + size * fraction, text),
        cancelled=cancelled,
        stopping=lambda: len(job.results) > known and yielding(),
    )


def _recommend(
    loaded: Any, job: Job, request: RecommendRequest, cancelled: Callable[[], bool], yielding: Callable[[], bool]
) -> None:
    """Search, or go on with a search; others may go first between two measurements, but not before one is made."""
    from turboquant.experiments.base import Watch
    from turboquant.experiments.recommend import recommend
    from turboquant.run.generate import CancelledError

    known, made = request.known, set[str]()
    watch = Watch(job.progress, cancelled, stopping=lambda: bool(made) and yielding())

    def keep(record: "ExperimentRecord") -> None:
        known[record.cell.key] = record
        made.add(record.cell.key)

    try:
        job.add(0, recommend(loaded, request.settings, watch, text=request.text, known=known.values(), keep=keep))
    except CancelledError:
        return


def is_expected(error: BaseException) -> bool:
    """Is the error's message one sentence for the visitor?"""
    from turboquant.cache.build import NothingCompressedError
    from turboquant.methods import NoSuchLayerError
    from turboquant.models.load import ModelError
    from turboquant.run.compare import PromptError
    from turboquant.sizing import ModelConfigError, SizingError

    expected = ModelError | PromptError | NothingCompressedError | NoSuchLayerError | ModelConfigError | SizingError
    return isinstance(error, expected)


def build_engine(config: AppConfig) -> Engine:
    """The engine of this deployment; it warms up the default model if the settings say so."""
    engine = Engine(
        load,
        run,
        is_expected=is_expected,
        max_queue=config.max_queue,
        grace_s=config.disconnect_grace_s,
        max_run_s=config.max_run_s,
        max_cached=config.max_cached,
    )
    if config.warm_up:
        engine.warm_up(config.default_model, config.weights)
    return engine
