"""The real work behind the engine: loading a model and comparing two caches, by the `turboquant` library.

The model library takes seconds to import, so it is imported on the worker thread, where it is first needed; no page
waits for it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from app.config import AppConfig
from app.engine import Engine, Progress
from app.jobs import Request
from turboquant.methods import parse_method
from turboquant.results import Comparison

if TYPE_CHECKING:
    from turboquant.comparison import Event
    from turboquant.models import LoadedModel


def load(name: str, *, weights: str, progress: Progress) -> "LoadedModel":
    """Load a model of the registry, the hub or a local folder."""
    from turboquant.models import load_model

    return load_model(name, weights=weights, progress=progress)


def run(
    loaded: Any, request: Request, on_event: "Callable[[Event], None]", cancelled: Callable[[], bool]
) -> Comparison:
    """Compare the full cache with the request's method on the request's prompt."""
    from turboquant.comparison import compare

    method = parse_method(request.method)
    return compare(
        loaded, request.prompt, method, request.settings, chat=request.chat, on_event=on_event, cancelled=cancelled
    )


def is_expected(error: BaseException) -> bool:
    """Is the error's message one sentence for the visitor?"""
    from turboquant.cache import NothingCompressedError
    from turboquant.comparison import PromptError
    from turboquant.models import ModelError

    return isinstance(error, ModelError | PromptError | NothingCompressedError)


def build_engine(config: AppConfig) -> Engine:
    """The engine of this deployment; it warms up the default model if the settings say so."""
    engine = Engine(load, run, is_expected=is_expected, max_queue=config.max_queue, grace_s=config.disconnect_grace_s)
    if config.warm_up:
        engine.warm_up(config.default_model, config.weights)
    return engine
