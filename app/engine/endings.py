"""How jobs end: what a visitor is told of an exception, and whether the model's memory is asked back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from turboquant.records.faults import out_of_disk, out_of_memory

NO_MEMORY = "Not enough memory for this run; try a shorter prompt, fewer new tokens or a smaller model."
NO_DISK = "The disk of the server is full, so this run could not be made; the server log has the details."
NO_WORKER = "The worker that ran this has ended unexpectedly; a new one is at work. Start the run again."
MODEL_CHANGED = (
    "The files of the model have changed since this run began; what was measured stays. Start the run again."
)
SHUTDOWN = "the shutdown of the server"


@dataclass(frozen=True)
class Ending:
    """How a job ended; `unload` asks for the model's memory back, `log` says that the operator should see why."""

    state: Literal["done", "stopped", "failed"]
    error: str | None = None
    unload: bool = False
    log: bool = False


def ending_of(error: BaseException, job: int, is_expected: Callable[[BaseException], bool]) -> Ending:
    """How a job ends by an exception.

    Args:
        error: The exception.
        job: The job's number, by which the log names it.
        is_expected: Tells whether an exception's message is written for people.
    """
    if isinstance(error, SystemExit):
        return Ending("failed", NO_WORKER, unload=True)
    if is_expected(error):
        return Ending("failed", str(error), unload=out_of_memory(error))
    if out_of_memory(error):
        return Ending("failed", NO_MEMORY, unload=True)
    if out_of_disk(error):
        return Ending("failed", NO_DISK, log=True)
    name = type(error).__name__
    return Ending("failed", f"The run failed ({name}); the server log has the details under job {job}.", log=True)


def let_go(error: BaseException | None) -> None:
    """Drop the frames that an exception and those behind it hold, and with them the model and half-made tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
