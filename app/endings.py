"""How jobs end: what a visitor is told of an exception, and whether the model's memory is asked back."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

NO_MEMORY = "Not enough memory for this run; try a shorter prompt, fewer new tokens or a smaller model."
NO_DISK = "The disk of the server is full, so this run could not be made; the server log has the details."
NO_WORKER = "The worker that ran this has ended unexpectedly; a new one is at work. Start the run again."
SHUTDOWN = "the shutdown of the server"
_MEMORY_WORDS = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "can't start new thread")


@dataclass(frozen=True)
class Ending:
    """How a job ended; `unload` asks for the model's memory back, `log` says that the operator should see why."""

    state: Literal["done", "stopped", "failed"]
    error: str | None = None
    unload: bool = False
    log: bool = False


def out_of_memory(error: BaseException) -> bool:
    """Did the machine or the accelerator run out of memory? Several libraries say so on the CPU only in words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def ending_of(error: BaseException, job: int, is_expected: Callable[[BaseException], bool]) -> Ending:
    """How a job ends by an exception.

    Args:
        error: The exception.
        job: The job's number, by which the log names it.
        is_expected: Tells whether an exception's message is written for people.
    """
    if out_of_memory(error):
        return Ending("failed", NO_MEMORY, unload=True)
    if isinstance(error, SystemExit):
        return Ending("failed", NO_WORKER, unload=True)
    if is_expected(error):
        return Ending("failed", str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Ending("failed", NO_DISK, log=True)
    name = type(error).__name__
    return Ending("failed", f"The run failed ({name}); the server log has the details under job {job}.", log=True)


def let_go(error: BaseException | None) -> None:
    """Drop the frames that an exception and those behind it hold, and with them the model and half-made tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
