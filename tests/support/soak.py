"""Many runs by many visitors against one engine: what the process's memory does.

    python -m tests.support.soak --runs 2000 --output results/soak.jsonl

Every run is a comparison by another visitor, who leaves when it has ended; two small models take turns, so that models
are loaded and let go as well.
"""

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any, Literal

import psutil

from app.engine import backend
from app.engine.contract import Progress
from app.engine.engine import Engine
from tests.support.asked import compare_asked
from tests.support.models import tiny_loaded
from turboquant.records.base import Record
from turboquant.records.comparison import Settings
from turboquant.records.environment import Environment, environment
from turboquant.records.files import append_record

METHOD = "turboquant:bits=4,residual_length=8,sink_length=0"
SETTINGS = Settings(max_new_tokens=3)
MODEL_EVERY = 50


class SoakBench(Record):
    """One soak: the resident memory of the process after a quarter of the runs, and after each further quarter.

    The first quarter is warm-up. `growth_mib_per_1000_runs` is over the other three.
    """

    kind: Literal["bench-soak"] = "bench-soak"
    environment: Environment
    load_average: float
    runs: int
    models_loaded: int
    seconds: float
    rss_mib: list[float]
    growth_mib_per_1000_runs: float


def load(name: str, *, weights: str, progress: Progress) -> Any:
    """A small model with random weights for every name."""
    del weights
    progress(0.5, name)
    return tiny_loaded("llama", chat_template=None)


def small_engine() -> Engine:
    """An engine with such models."""
    return Engine(load, backend.run, is_expected=backend.is_expected, grace_s=0.05, max_queue=20, max_cached=8)


def resident_mib() -> float:
    """Resident memory of this process."""
    gc.collect()
    return float(psutil.Process(os.getpid()).memory_info().rss) / 2**20


def measure(engine: Engine, runs: int) -> SoakBench:
    """Make the runs, one after the other.

    Raises:
        AssertionError: A run did not end well, or packed nothing.
    """
    memory, average, begun = [], os.getloadavg()[0], time.monotonic()
    for number in range(runs):
        prompt = f"Visitor {number} asks about the tide and the boats. " * 2
        model = f"model-{number // MODEL_EVERY % 2}"
        job = engine.submit(f"visitor-{number}", compare_asked(prompt, SETTINGS, model, METHOD))
        assert job.wait(120)
        assert job.view.state == "done", job.view.error
        assert job.results[0][0].compressed.report.compressed_tokens > 0
        engine.disconnect(f"visitor-{number}")
        del job
        if (number + 1) % (runs // 4) == 0:
            memory.append(round(resident_mib(), 1))
    return SoakBench(
        environment=environment(),
        load_average=round(average, 2),
        runs=runs,
        models_loaded=-(-runs // MODEL_EVERY),
        seconds=round(time.monotonic() - begun, 1),
        rss_mib=memory[:4],
        growth_mib_per_1000_runs=round((memory[3] - memory[0]) / (0.75 * runs) * 1000, 1),
    )


def sentence(record: SoakBench) -> str:
    """The record in words."""
    env = record.environment
    return (
        f"{record.runs:,} comparisons by as many visitors, who left, with {record.models_loaded} loads of two small "
        f"models in turn, took {record.seconds:.0f} s. The process held {record.rss_mib[0]:.0f} MiB after a quarter of "
        f"them and {', '.join(f'{value:.0f}' for value in record.rss_mib[1:])} MiB after each further quarter: "
        f"{record.growth_mib_per_1000_runs} MiB for 1,000 runs more. Measured on {env.device}, load average "
        f"{record.load_average} before it, {env.created[:10]}, commit {env.commit}."
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    engine = small_engine()
    record = measure(engine, given.runs)
    engine.close()
    print(record.model_dump_json(indent=1), sentence(record), sep="\n")
    if given.output is not None:
        append_record(record, given.output)


if __name__ == "__main__":
    main()
