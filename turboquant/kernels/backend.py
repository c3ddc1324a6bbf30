"""Which implementation runs: Triton kernels on a CUDA device, compiled CPU kernels, or the plain-torch reference."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_failed: set[str] = set()


@cache
def gpu_kernels(name: str) -> ModuleType | None:
    """The module `turboquant.kernels.triton.<name>`, or None where Triton is not installed."""
    try:
        return import_module(f"turboquant.kernels.triton.{name}")
    except ImportError:
        return None


@cache
def cpu_kernels(name: str) -> ModuleType | None:
    """The module `turboquant.kernels.cpu.<name>`, or None where numba is not installed."""
    try:
        return import_module(f"turboquant.kernels.cpu.{name}")
    except ImportError:
        return None


def usable(tensor: Tensor, name: str) -> ModuleType | None:
    """The kernels for a tensor, or None where the reference must serve it."""
    return gpu_kernels(name) if tensor.is_cuda and name not in _failed else None


def usable_on_cpu(tensor: Tensor, name: str) -> ModuleType | None:
    """The same for a tensor on the CPU; those that fail are known to `guarded` as "CPU <name>"."""
    return cpu_kernels(name) if tensor.device.type == "cpu" and f"CPU {name}" not in _failed else None


def guarded(name: str, run: Callable[[], T]) -> T | None:
    """Run kernels; where they cannot be compiled or launched, warn once, never use them again, and return None."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises its own errors, and RuntimeError, OSError or ValueError around them
        _failed.add(name)
        warnings.warn(
            f"the {name} kernels do not run here and the plain-torch reference takes their place: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def attention_backend(device: torch.device | str) -> str:
    """Name what attends over packed tokens on a device: "triton <version>", "numba <version>" or "torch"."""
    if torch.device(device).type == "cuda" and gpu_kernels("attention") and "attention" not in _failed:
        return f"triton {version('triton')}"
    return f"numba {version('numba')}" if find_spec("numba") else "torch"
