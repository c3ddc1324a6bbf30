"""What the engine is given, and what it shows of itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from app.engine.job import Job

Progress = Callable[[float, str], None]
ModelKey = tuple[str, str]


class Loader(Protocol):
    """Loads a model by name; raises with one clear sentence when it cannot."""

    def __call__(self, name: str, *, weights: str, progress: Progress) -> Any:  # noqa: D102
        ...


class Runner(Protocol):
    """Works on a job's pending items, adding a result for each, on the caller's thread.

    It returns when none is left, when `cancelled()` has turned true, or between two items when `yielding()` has.
    """

    def __call__(  # noqa: D102
        self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]
    ) -> None: ...


@dataclass(frozen=True)
class EngineStatus:
    """The engine as the sidebar shows it. `fraction` is the load progress, 0 to 1."""

    state: Literal["empty", "loading", "ready", "running"]
    model: str | None = None
    weights: str | None = None
    device: str | None = None
    text: str = ""
    fraction: float | None = None
    waiting: int = 0
