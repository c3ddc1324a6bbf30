"""Shared fixtures. One thread a process: tests run side by side with servers and browsers on two cores.

PyTorch is imported by those tests and fixtures that need it: one file of others is collected in a moment.
"""

import contextlib
import ctypes
import gc
import os
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the GPU kernels are tested on CPUs too, interpreted

settings.register_profile(
    "ci", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Where tests go first: what takes a minute or more in one file, so that two processes end at about the same time, and
# one browser at a time.
FIRST = (
    *("tests/e2e/test_actions.py", "tests/unit/experiments/test_sweep.py", "tests/reference/test_docs.py"),
    *("tests/e2e/test_pages.py", "tests/unit/kernels/", "tests/app/engine/", "tests/unit/models/"),
    *("tests/e2e/test_browser.py", "tests/reference/", "tests/unit/", "tests/property/"),
)


# Unit tests that take seconds, by file: they load models, start commands, compile kernels. Not in `make check`.
SLOW = {
    "cache": "cache failed_calls foreign graph hf_generate",
    "cli": "app compare errors heads identity perplexity theory",
    "experiments": "heads kernel_speed needle perplexity recommend seeds sweep",
    "hf_attention": "options",
    "kernels": "sass triton",
    "models": "gguf hub load placement stored",
    "quant": "modes",
    "records": "metrics settings",
    "report": "report",
    "run": "chat compare compare_methods feed generate heads threads",
    "sizing": "sizing",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow files, and put long ones first; within a file tests keep their order."""
    for item in items:
        slow = SLOW.get(item.path.parent.name, "").split() if "unit" in item.path.parts else []
        if item.path.stem.removeprefix("test_") in slow:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: next((i for i, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST)))


def pytest_collection_finish() -> None:
    """Keep the imported libraries from the garbage collector, which Streamlit calls after every run of a page."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def llama():
    """A tiny Llama with grouped queries; its attention is "turboquant", which runs plain caches as SDPA does."""
    from turboquant.models.load import tiny_model

    return tiny_model("llama")


@pytest.fixture
def generator() -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread_without_gradients():
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    with torch.no_grad() if torch is not None else contextlib.nullcontext():
        yield
