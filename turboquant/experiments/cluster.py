"""The Ray engine: the same cells as tasks of a Ray cluster, for sweeps that outgrow one machine.

Every node needs this package and the models. Ray is imported when it is used; it comes with the extra `ray`.
"""

import functools
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turboquant.experiments.base import Experiment, Models, Watch, failed, groups, run_group
from turboquant.models.inputs import as_here
from turboquant.models.load import load_model
from turboquant.records.experiment import Cell, ExperimentRecord

RETRIES = 3
"""How often Ray runs a task again whose node or process died."""
_POLL_SECONDS = 0.5


class RayMissingError(RuntimeError):
    """Ray is not installed, or its cluster cannot be reached."""


def import_ray() -> Any:
    """Return the package, told to send no usage statistics."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RayMissingError("the ray engine needs the package ray: pip install 'turboquant-lab[ray]'") from None
    return ray


@functools.cache
def _models() -> Models:
    """One loaded model stays in each Ray process, which runs many tasks."""
    return Models(lambda name, weights: load_model(name, weights=weights))


def _run_group(experiment: Experiment[Any], cells: list[Cell], threads: int) -> Iterator[ExperimentRecord]:
    torch.set_num_threads(threads)
    yield from run_group(experiment, cells, _models(), Watch())


@dataclass
class _Task:
    """A submitted group: how many cells it had and which it still owes."""

    size: int
    owed: list[Cell]


@dataclass
class _Cluster:
    """What waits and what is in flight, by the generator of its records."""

    ray: Any
    experiments: Mapping[str, Experiment[Any]]
    waiting: deque[list[Cell]]
    cpus: float
    gpus: float

    def __post_init__(self) -> None:
        self.flying: dict[Any, _Task] = {}
        self.remote = self.ray.remote(_run_group).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES, num_returns="streaming"
        )

    def submit(self) -> None:
        """Submit as many tasks as can run, and one more to show that more is wanted (clusters may grow)."""
        have = self.ray.cluster_resources()
        asked = {"CPU": self.cpus, "GPU": self.gpus}
        places = min(int(have.get(name, 0) // count) for name, count in asked.items() if count)
        while self.waiting and len(self.flying) <= places:
            cells = self.waiting.popleft()
            records = self.remote.remote(self.experiments[cells[0].experiment], cells, max(1, round(self.cpus)))
            self.flying[records] = _Task(len(cells), list(cells))

    def gather(self) -> Iterator[ExperimentRecord]:
        """Wait a moment and yield what has come."""
        ready, _ = self.ray.wait(list(self.flying), num_returns=1, timeout=_POLL_SECONDS, fetch_local=False)
        for records in ready:
            task = self.flying[records]
            try:
                record = as_here(self.ray.get(next(records)))
            except StopIteration:
                del self.flying[records]
            except self.ray.exceptions.RayError as error:
                del self.flying[records]
                yield from self._give_up(task, error)
            else:
                task.owed.remove(record.cell)
                yield record

    def _give_up(self, task: _Task, error: Exception) -> Iterator[ExperimentRecord]:
        """Put the cells of a task that Ray has given up back, one by one: which of them is to blame is not known."""
        if task.size > 1:
            self.waiting.extend([cell] for cell in task.owed)
            return
        reason = str(error).strip().splitlines()[0]
        for cell in task.owed:
            yield failed(cell, f"Ray gave the task up after {RETRIES} retries: {type(error).__name__}: {reason}")


def run_ray(
    cells: Sequence[Cell],
    experiments: Mapping[str, Experiment[Any]],
    watch: Watch,
    stopping: Callable[[], bool],
    *,
    address: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> Iterator[ExperimentRecord]:
    """Run cells as Ray tasks and yield a record each as it comes, failed ones with their error.

    A task whose node or process dies is run again elsewhere, up to `RETRIES` times; after that its cells are tried
    one by one and then recorded as failed.

    Args:
        cells: What to measure; neighbours that differ only in the method make one task.
        experiments: By name; importable functions on every node.
        watch: Its progress is told.
        stopping: Asked often: once true, what is in flight is finished and nothing new is submitted.
        address: Of the cluster, as `ray.init` takes it; None starts one on this machine.
        cpus: CPUs that a task takes.
        gpus: GPUs that a task takes.

    Raises:
        RayMissingError: If Ray is not installed or the cluster cannot be reached.
        ValueError: If a task would take no CPU and no GPU, or a negative number of them.
    """
    if min(cpus, gpus) < 0 or not (cpus or gpus):
        raise ValueError(f"a task takes CPUs or GPUs, 0 or more of each, got {cpus} and {gpus}")
    began = connect(address)
    ray = import_ray()
    cluster = _Cluster(ray, experiments, deque(groups(cells)), cpus, gpus)
    done = 0
    try:
        while True:
            if stopping():
                cluster.waiting.clear()
            cluster.submit()
            watch.progress(done / max(1, len(cells)), f"{done} of {len(cells)} cells")
            if not cluster.flying:
                return
            for record in cluster.gather():
                done += 1
                yield record
    finally:
        for records in cluster.flying:
            ray.cancel(records)
        if began:
            ray.shutdown()


def connect(address: str | None = None) -> bool:
    """Connect this process to a cluster, and return whether this call did.

    Args:
        address: As `ray.init` takes it; None starts a cluster on this machine.

    Raises:
        RayMissingError: If Ray is not installed or the cluster cannot be reached.
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    try:
        if match := re.fullmatch(r"([^:/]+):(\d+)", address or ""):  # Ray itself tries for minutes
            socket.create_connection((match[1], int(match[2])), timeout=5).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level="error")
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise RayMissingError(f"no Ray cluster at {address}: {str(error).strip().splitlines()[0]}") from None
    return True
