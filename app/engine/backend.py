"""The real work behind the engine: loading a model and doing what was asked, by the `turboquant` library.

The model library takes seconds to import, so it is imported on the worker thread, where it is first needed; no page
waits for it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from app.config import AppConfig
from app.engine.contract import Progress
from app.engine.engine import Engine
from app.engine.job import Job
from app.engine.library import import_library

if TYPE_CHECKING:
    from turboquant.models.load import LoadedModel


def load(name: str, *, weights: str, progress: Progress) -> "LoadedModel":
    """Load a model of the registry, the hub, a local folder or a GGUF file."""
    import_library()
    from turboquant.models.load import load_model

    return load_model(name, weights=weights, progress=progress)


def run(loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
    """Work on a job's pending items, in the way of what was asked."""
    job.request.run(loaded, job, cancelled, yielding)


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
