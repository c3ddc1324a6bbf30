"""The local engine: worker processes that may die without taking the sweep along.

Each worker has a pipe of its own, so that a killed worker can break nothing that others use (the shared queues of the
usual process pools do not survive that), and its records stream back one by one.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from turboquant.experiments.base import Experiment, Models, Watch, failed, groups, run_group
from turboquant.models.load import load_model
from turboquant.records.experiment import Cell, ExperimentRecord

TRIES = 2
_POLL_SECONDS = 0.2


def _processes(gpus: bool) -> Any:
    """Return how processes are started.

    On Linux one clean process imports the libraries and forks the workers, so that they start, and start again, fast.
    Where there are GPUs each worker is a new program, since what an import does with CUDA must not be forked.
    """
    if gpus or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _main_left_out() -> Iterator[None]:
    """Keep a new process from running the caller's main program again (a script without a guard, an app's page)."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@dataclass
class _Job:
    """Cells that share their work, less those that are recorded; `tries` counts the workers that died of it."""

    cells: list[Cell]
    tries: int = 0


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: _Job | None = None
    model: str | None = None
    fraction: float = 0.0
    size: int = 0

    def ahead(self) -> float:
        """How many cells' worth of work of the job in hand is done and not yet recorded."""
        return max(0.0, self.fraction * self.size - (self.size - len(self.job.cells))) if self.job else 0.0


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(i) for i in range(count)])[:count]


def _work(pipe: Connection, experiments: Mapping[str, Experiment[Any]], threads: int, gpu: str | None) -> None:
    """Run jobs until the pipe closes. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is first used
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    models = Models(lambda name, weights: load_model(name, weights=weights))
    said = [0.0]

    def progress(fraction: float, text: str) -> None:
        if time.monotonic() - said[0] >= _POLL_SECONDS:
            said[0] = time.monotonic()
            pipe.send(fraction)

    while True:
        try:
            cells: list[Cell] = pipe.recv()
            for record in run_group(experiments[cells[0].experiment], cells, models, Watch(progress)):
                pipe.send(record)
            pipe.send(None)
        except (EOFError, BrokenPipeError):
            return


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@dataclass
class _Crew:
    """The workers and what is left to do."""

    experiments: Mapping[str, Experiment[Any]]
    waiting: deque[_Job]
    size: int
    gpus: list[str]
    workers: list[_Worker | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.workers = [None] * self.size
        self.processes = _processes(bool(self.gpus))

    def busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker and worker.job]

    def hand_out(self) -> None:
        """Give every idle place a job, starting a worker where there is none."""
        for place in range(self.size):
            worker = self.workers[place]
            if self.waiting and (worker is None or worker.job is None):
                worker = self.workers[place] = worker or self._start(place)
                job = self._choose(worker)
                try:
                    worker.pipe.send(job.cells)
                except OSError:  # it died while it had nothing to do
                    self.waiting.appendleft(job)
                    self.workers[place] = None
                    continue
                worker.job, worker.model = job, job.cells[0].model
                worker.fraction, worker.size = 0.0, len(job.cells)

    def _choose(self, worker: _Worker) -> _Job:
        """Take the next job, before others one whose model this worker has loaded."""
        job = next((one for one in self.waiting if one.cells[0].model == worker.model), self.waiting[0])
        self.waiting.remove(job)
        return job

    def _start(self, place: int) -> _Worker:
        ours, theirs = self.processes.Pipe()
        gpu = self.gpus[place % len(self.gpus)] if self.gpus else None
        threads = max(1, torch.get_num_threads() // self.size)
        process = self.processes.Process(target=_work, args=(theirs, self.experiments, threads, gpu), daemon=True)
        with _main_left_out():
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def hear(self, worker: _Worker) -> Iterator[ExperimentRecord]:
        """Take what one worker has sent; a dead worker's cells are put back, or given up as failed."""
        try:
            while worker.job and worker.pipe.poll():
                message = worker.pipe.recv()
                if isinstance(message, ExperimentRecord):
                    worker.job.cells.remove(message.cell)
                    yield message
                elif message is None:
                    worker.job = None
                else:
                    worker.fraction = message
        except (EOFError, OSError):
            yield from self._bury(worker)

    def _bury(self, worker: _Worker) -> Iterator[ExperimentRecord]:
        self.workers[self.workers.index(worker)] = None
        worker.process.join()
        worker.pipe.close()
        assert worker.job is not None
        tries = worker.job.tries + 1
        for cell in worker.job.cells:
            if tries < TRIES:  # one by one: which of them the worker died of is not known
                self.waiting.append(_Job([cell], tries))
            else:
                yield failed(cell, _death(worker.process.exitcode))

    def dismiss(self, at_once: bool) -> None:
        """End all workers: idle ones leave when their pipe closes."""
        left = [worker for worker in self.workers if worker]
        for worker in left:
            worker.pipe.close()
            if at_once:
                worker.process.kill()
        for worker in left:
            worker.process.join(timeout=5)
            worker.process.kill()
            worker.process.join()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the worker process died of {signal.Signals(-code).name}, {TRIES} times (too little memory, perhaps)"
    return f"the worker process left with code {code}, {TRIES} times"


def run_workers(
    cells: Sequence[Cell],
    experiments: Mapping[str, Experiment[Any]],
    watch: Watch,
    stopping: Callable[[], bool],
    *,
    workers: int | None = None,
) -> Generator[ExperimentRecord, None, None]:
    """Run cells in worker processes and yield a record each as it comes, failed ones with their error.

    A worker that dies costs the cell in hand one try: its unfinished cells are run once more, one by one, then
    recorded as failed. If this process dies, the workers leave.

    Args:
        cells: What to measure; neighbours that differ only in the method go to one worker.
        experiments: By name; importable functions, since each worker imports them anew.
        watch: Its progress is told; cancelling is `stopping` and closing this generator.
        stopping: Asked often: once true, what is in hand is finished and nothing new is begun.
        workers: How many processes; by default one for each GPU, or one on the CPU. The CPU's threads are shared out.

    Raises:
        ValueError: If `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    jobs = deque(_Job(group) for group in groups(cells))
    gpus = visible_gpus()
    crew = _Crew(experiments, jobs, min(workers or len(gpus) or 1, max(1, len(jobs))), gpus)
    done, at_once = 0, True
    try:
        while True:
            if stopping():
                crew.waiting.clear()
            crew.hand_out()
            busy = crew.busy()
            ahead = sum(worker.ahead() for worker in busy)
            watch.progress((done + ahead) / max(1, len(cells)), f"{done} of {len(cells)} cells")
            if not busy and not crew.waiting:
                at_once = stopping()
                return
            wait([worker.pipe for worker in busy], timeout=_POLL_SECONDS)
            for worker in busy:
                before = done
                for record in crew.hear(worker):
                    done += 1
                    yield record
                if done > before and stopping():
                    worker.job = None  # the record in hand has come
    finally:
        crew.dismiss(at_once)
