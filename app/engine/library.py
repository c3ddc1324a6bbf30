"""The model library takes seconds to import, and threads that import it at the same time find it half made."""

import gc
import importlib
from functools import cache
from threading import Lock

_importing = Lock()


def import_library() -> None:
    """Import what loads and measures models, or wait until another thread has."""
    with _importing:
        _import_once()


@cache
def _import_once() -> None:
    """Import it and keep its half a million objects, which live as long as the process, from the garbage collector.

    Streamlit collects after every run of a page, which would look at them all for a quarter of a second each time.
    """
    for module in ("experiments.base", "models.load", "experiments.registry"):
        importlib.import_module(f"turboquant.{module}")
    gc.collect()
    gc.freeze()
