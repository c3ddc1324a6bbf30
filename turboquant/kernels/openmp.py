"""Running compiled functions on PyTorch's own threads.

PyTorch's threads are those of an OpenMP library, whose entry points every OpenMP program calls. A function that is run
through them shares the threads that have just multiplied matrices: none are started, none of a second pool wait awake
beside them, and as many run as `torch.get_num_threads` says. Several callers at once each have threads of their own, as
with PyTorch's operations.
"""

import ctypes
from functools import cache
from typing import Any

import torch

_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _parallel() -> Any:
    """`GOMP_parallel`, which calls a function once on each of some threads; None where PyTorch has another library."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        # PyTorch loads its OpenMP for all to see, so that everything in a process shares it.
        call: Any = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    call.restype = None
    return call


def threads() -> int:
    """Return on how many threads `run` runs at most."""
    return 1 if _parallel() is None else torch.get_num_threads()


def run(function: int, data: int, count: int) -> None:
    """Call the compiled `function` with the address `data` on `count` threads at once, and wait for all of them."""
    call = _parallel() if count > 1 else None
    if call is None:
        _Task(function)(data)
    else:
        call(function, data, count, 0)
