"""Run by `test_faults.py` in a process of its own: take the memory away in one phase of a comparison.

The limit is the kernel's (RLIMIT_AS), so that allocations really fail, wherever in PyTorch, numba or Python they are.
Prints one JSON line: how the starved run ended, what its result holds, how much address space was given back by then,
and how the next run ended once there was memory again.
"""

import ctypes
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.config import AppConfig
from app.engine import backend, logs
from app.engine.engine import Engine
from app.engine.job import Job
from tests.support.asked import compare_asked
from turboquant.records.comparison import Settings

MODEL = "smollm2-135m"
WORDS = "The tide table says when the boats can leave the harbour of Arnsey. "
SPARE = 4 * 2**20


def used() -> int:
    """Address space of this process in bytes."""
    kib = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kib is not None
    return int(kib[1]) * 1024


def starve() -> int:
    """Give free heap back to the system, then allow hardly more than what is in use; returns the limit."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    limit = used() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return limit


PHASES: dict[str, Callable[[Job], bool]] = {
    "prefill": lambda job: job.view.state == "running",
    "decode": lambda job: bool(job.view.sides[0].tokens),
    "metrics": lambda job: job.view.phase.startswith("Comparing attention"),
}


def ask(engine: Engine, name: str, repeats: int, tokens: int) -> Job:
    """Submit a comparison."""
    prompt = f"{name}: " + WORDS * repeats
    return engine.submit(name, compare_asked(prompt, Settings(max_new_tokens=tokens), MODEL))


def main(phase: str) -> None:
    torch.set_num_threads(1)
    logs.set_up(AppConfig())
    engine = Engine(backend.load, backend.run, is_expected=backend.is_expected)
    assert ask(engine, "warm", 20, 4).wait(120)
    repeats, tokens = {"prefill": (250, 4), "decode": (20, 300), "metrics": (60, 24)}[phase]
    job = ask(engine, "starved", repeats, tokens)
    while job.live and not PHASES[phase](job):
        time.sleep(0.002)
    limit = starve()
    job.wait(300)
    given_back = limit - used()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = ask(engine, "starved", repeats, tokens) if phase == "metrics" else ask(engine, "next", 20, 4)
    again.wait(300)
    results = [job.results[0][0], again.results[0][0]] if phase == "metrics" else []
    said: dict[str, Any] = {"state": job.view.state, "error": job.view.error, "tokens": job.view.sides[0].tokens}
    said |= {"notes": [result.notes for result in results], "measured": [bool(result.tokens) for result in results]}
    print(json.dumps({**said, "given_back": given_back, "next": again.view.state, "next_error": again.view.error}))
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
