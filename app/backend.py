"""The real work behind the engine: loading a model and comparing two caches, by the `turboquant` library."""

from collections.abc import Callable
from typing import Any

from app.config import AppConfig
from app.engine import Engine, Progress
from app.jobs import Request
from turboquant.cache import NothingCompressedError
from turboquant.comparison import Event, PromptError, compare
from turboquant.methods import parse_method
from turboquant.models import LoadedModel, ModelError, load_model
from turboquant.ops.codes import compile_kernels
from turboquant.results import Comparison


def load(name: str, *, weights: str, progress: Progress) -> LoadedModel:
    """Load a model of the registry, the hub or a local folder; the first answer should not wait for a compiler."""
    compile_kernels()
    return load_model(name, weights=weights, progress=progress)


def run(loaded: Any, request: Request, on_event: Callable[[Event], None], cancelled: Callable[[], bool]) -> Comparison:
    """Compare the full cache with the request's method on the request's prompt."""
    method = parse_method(request.method)
    return compare(
        loaded, request.prompt, method, request.settings, chat=request.chat, on_event=on_event, cancelled=cancelled
    )


def build_engine(config: AppConfig) -> Engine:
    """The engine of this deployment; it warms up the default model if the settings say so."""
    expected = (ModelError, PromptError, NothingCompressedError)
    engine = Engine(load, run, expected=expected, max_queue=config.max_queue, grace_s=config.disconnect_grace_s)
    if config.warm_up:
        engine.warm_up(config.default_model, config.weights)
    return engine
