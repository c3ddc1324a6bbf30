"""One model, one worker thread, one queue.

All work of every visitor goes through the one `Engine` of the process. Its worker thread is the only thread that loads
or runs a model, so two models are never resident at once and no global state races.
"""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from app.job_queue import JobQueue
from app.jobs import Job, Request
from app.result_cache import ResultCache

log = logging.getLogger(__name__)
Progress = Callable[[float, str], None]
ModelKey = tuple[str, str]


class Loader(Protocol):
    """Loads a model by name; raises with one clear sentence when it cannot."""

    def __call__(self, name: str, *, weights: str, progress: Progress) -> Any:  # noqa: D102
        ...


class Runner(Protocol):
    """Works on a job's pending items, adding a result for each, on the caller's thread.

    It returns when none is left, when `cancelled()` has turned true, or between two items when `yielding()` has.
    """

    def __call__(  # noqa: D102
        self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]
    ) -> None: ...


_NO_MEMORY = "Not enough memory for this run; try a shorter prompt, fewer new tokens or a smaller model."
_NO_WORKER = "The worker that ran this has ended unexpectedly; a new one is at work. Start the run again."


@dataclass(frozen=True)
class _Ending:
    """How a job ended; `unload` asks for the model's memory back."""

    state: Literal["done", "stopped", "failed"]
    error: str | None = None
    unload: bool = False


class EngineBusyError(RuntimeError):
    """The engine does not take the request now; the message says why and what to do."""


class _CancelledLoadError(RuntimeError):
    """The only visitor who wanted this model has stopped waiting for it."""


@dataclass(frozen=True)
class EngineStatus:
    """The engine as the sidebar shows it. `fraction` is the load progress, 0 to 1."""

    state: Literal["empty", "loading", "ready", "running"]
    model: str | None = None
    weights: str | None = None
    device: str | None = None
    text: str = ""
    fraction: float | None = None
    waiting: int = 0


class Engine:
    """Owns the resident model and runs jobs: first in, first out, short ones before long ones.

    Args:
        loader: Loads a model; called on the worker thread only.
        runner: Works on a job; called on the worker thread only.
        is_expected: Tells whether an exception's message is written for people; others are logged and summarised.
        max_queue: Jobs that may wait.
        grace_s: Seconds a job goes on after its session has disconnected.
        max_run_s: Seconds of work after which a job is stopped.
        max_cached: Results that are kept for repeated settings.
    """

    def __init__(
        self,
        loader: Loader,
        runner: Runner,
        *,
        is_expected: Callable[[BaseException], bool] = lambda error: False,
        max_queue: int = 8,
        grace_s: float = 20.0,
        max_run_s: float = 1800.0,
        max_cached: int = 64,
    ) -> None:
        self._loader, self._runner, self._is_expected = loader, runner, is_expected
        self._max_queue, self._grace_s, self._max_run_s = max_queue, grace_s, max_run_s
        self._cache = ResultCache(max_cached)
        self._wake = threading.Condition()
        self._queue = JobQueue()
        self._current: Job | None = None
        self._jobs: dict[str, Job] = {}
        self._timers: dict[str, threading.Timer] = {}
        self._seconds: deque[float] = deque(maxlen=10)
        self._warm: ModelKey | None = None
        self._loaded: Any = None
        self._key: ModelKey | None = None
        self._status = EngineStatus("empty")
        self._closed = False
        self._start()

    # --- called by pages, from any thread

    def submit(self, session: str, request: Request) -> Job:
        """Queue a request; a job whose results are all known already ends at once.

        Raises:
            EngineBusyError: The session has a live job, or the queue is full.
        """
        job = Job(session, request)
        self._cache.fill(job)
        with self._wake:
            held = self._jobs.get(session)
            if held is not None and held.live:
                raise EngineBusyError(
                    f"A run is already at work in this tab ({held.request.title}); stop it or wait for it to end."
                )
            if not job.pending:
                job.finish("done")
            elif len(self._queue) >= self._max_queue:
                wait = self._estimate(len(self._queue))
                when = f"in about {wait:.0f} s" if wait else "in a moment"
                raise EngineBusyError(f"{len(self._queue)} runs are waiting already; try again {when}.")
            else:
                self._queue.append(job)
            self._jobs[session] = job
            if not self._thread.is_alive() and not self._closed:
                self._start()
            self._wake.notify_all()
            return job

    def cancel(self, job: Job, reason: str | None = None) -> None:
        """Stop a job: at once while it waits or its model loads, else at the next token, keeping what it has."""
        job.request_cancel(reason)
        with self._wake:
            if job in self._queue:
                self._queue.remove(job)
                job.finish("stopped")
            elif job.view.state == "loading":
                job.finish("stopped")

    def job(self, session: str) -> Job | None:
        """The newest job of a session."""
        with self._wake:
            return self._jobs.get(session)

    def ahead(self, job: Job) -> int:
        """How many jobs have their turn before this one, the running one included."""
        with self._wake:
            return self._queue.before(job) + (self._current is not None) if job in self._queue else 0

    def estimate_s(self, job: Job) -> float | None:
        """Seconds until a queued job has its turn, from the recent turns; None before any has ended."""
        return self._estimate(self.ahead(job))

    def _estimate(self, ahead: int) -> float | None:
        return ahead * sum(self._seconds) / len(self._seconds) if self._seconds and ahead else None

    def status(self) -> EngineStatus:
        """What the engine is doing."""
        with self._wake:
            return replace(self._status, waiting=len(self._queue))

    def warm_up(self, name: str, weights: str) -> None:
        """Load a model in the background when no job waits; a failure is only logged."""
        with self._wake:
            self._warm = (name, weights)
            self._wake.notify_all()

    def connect(self, session: str) -> None:
        """A session is there (again): its job is not cancelled."""
        with self._wake:
            if timer := self._timers.pop(session, None):
                timer.cancel()

    def disconnect(self, session: str) -> None:
        """A session has gone: cancel its job and forget its results unless it comes back within the grace period."""
        timer = threading.Timer(self._grace_s, self._expire, [session])
        timer.daemon = True
        with self._wake:
            if old := self._timers.pop(session, None):
                old.cancel()
            self._timers[session] = timer
        timer.start()

    def _expire(self, session: str) -> None:
        with self._wake:
            if self._timers.pop(session, None) is None:
                return
            job = self._jobs.pop(session, None)
        if job is not None and job.live:
            log.info("Job %d is cancelled: its tab was closed", job.id)
            self.cancel(job)
        self._cache.forget(session)

    def close(self) -> None:
        """Stop the worker and every job."""
        with self._wake:
            self._closed = True
            jobs = [*self._queue, *([self._current] if self._current else [])]
            timers = list(self._timers.values())
            self._wake.notify_all()
        for timer in timers:
            timer.cancel()
        for job in jobs:
            self.cancel(job)
        self._thread.join(timeout=10)
        self._loaded = self._key = None

    # --- the worker thread

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._live, name="turboquant-engine", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        """Work until the engine is closed; whatever ends the work itself fails the job in hand and nothing else."""
        while not self._closed:
            try:
                self._work()
            except BaseException as error:
                log.error("The worker has ended and starts again", exc_info=error)
                error.__traceback__ = None
                self._recover()

    def _recover(self) -> None:
        with self._wake:
            job, self._current = self._current, None
        self._unload()
        if job is not None:
            job.end_turn()
            job.finish("failed", _NO_WORKER)
        with self._wake:
            self._status = self._resting()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._queue or self._warm)
                if self._closed:
                    return
                job, warm = (self._queue.take(), None) if self._queue else (None, self._warm)
                self._current, self._warm = job, None
            if job is not None:
                self._serve(job)
            elif warm is not None:
                self._preload(warm)
            with self._wake:
                self._current = None
                self._status = self._resting()

    def _must_yield(self, since: float) -> bool:
        with self._wake:
            return self._queue.wants_turn(time.monotonic() - since)

    def _serve(self, job: Job) -> None:
        """Give a job its turn; whatever happens in it, the next one finds a working engine."""
        begun = time.monotonic()
        job.begin_turn()
        ending = self._attempt(job, begun)
        job.end_turn()
        self._seconds.append(time.monotonic() - begun)
        if ending is None:
            with self._wake:
                if not job.cancelled:
                    job.advance("queued")
                    self._queue.append(job)
                    return
            ending = _Ending("stopped")
        if ending.unload:
            self._unload()
        job.finish(ending.state, ending.error)

    def _attempt(self, job: Job, begun: float) -> _Ending | None:
        """How the job ended, or None if it has let others go first.

        No exception leaves, so nothing keeps its frames, and with them the model, alive.
        """
        try:
            loaded = self._ensure((job.request.model, job.request.weights), job)
            if job.cancelled:
                return _Ending("stopped")
            job.advance("running", "Reading the prompt" if job.request.sides else "Starting")
            self._set_status("running")
            return self._work_on(loaded, job, begun)
        except BaseException as error:
            self._cache.keep(job)
            if isinstance(error, _CancelledLoadError) or job.cancelled:
                return _Ending("stopped")
            return self._failure(job, error)

    def _work_on(self, loaded: Any, job: Job, begun: float) -> _Ending | None:
        """Run a job until it has ended or others must have their turn."""
        while True:
            known = len(job.results)
            self._runner(loaded, job, lambda: self._stopped(job), lambda: self._must_yield(begun))
            self._cache.keep(job)
            if job.cancelled:
                return _Ending("stopped")
            if not job.pending:
                return _Ending("done")
            if len(job.results) == known:
                return _Ending("failed", "The run gave no result and no reason; the server log may say more.")
            if self._must_yield(begun):
                return None

    def _failure(self, job: Job, error: BaseException) -> _Ending:
        if out_of_memory(error):
            log.warning("Job %d ran out of memory: %s", job.id, error)
            error.__traceback__ = None  # its frames hold the model and the half-made tensors
            return _Ending("failed", _NO_MEMORY, unload=True)
        if isinstance(error, SystemExit):
            error.__traceback__ = None
            return _Ending("failed", _NO_WORKER, unload=True)
        if self._is_expected(error):
            return _Ending("failed", str(error))
        log.error("Job %d failed", job.id, exc_info=error)
        name = type(error).__name__
        return _Ending("failed", f"The run failed ({name}); the server log has the details under job {job.id}.")

    def _stopped(self, job: Job) -> bool:
        """Shall the job stop? It also does after the longest time this deployment gives a run."""
        if job.running_s > self._max_run_s and not job.cancelled:
            job.request_cancel(f"the time limit of {self._max_run_s:.0f} s for one run")
        return job.cancelled

    def _preload(self, key: ModelKey) -> None:
        try:
            self._ensure(key, None)
        except Exception as error:
            log.warning("Could not warm up %s: %s", key[0], error)

    def _ensure(self, key: ModelKey, job: Job | None) -> Any:
        """The model of `key`, loaded now if another one or none is resident; the other one goes first."""
        if self._key == key:
            return self._loaded
        self._unload()

        def progress(fraction: float, text: str) -> None:
            self._set_status("loading", key[0], text, fraction)
            if job is not None:
                job.advance("loading", text, fraction)
                if job.cancelled:
                    raise _CancelledLoadError(key[0])

        progress(0.0, f"Loading {key[0]}")
        self._loaded = self._loader(key[0], weights=key[1], progress=progress)
        self._key = key
        return self._loaded

    def _unload(self) -> None:
        """Forget the resident model and give its memory back."""
        self._loaded = self._key = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _set_status(
        self,
        state: Literal["loading", "running"],
        model: str | None = None,
        text: str = "",
        fraction: float | None = None,
    ) -> None:
        resting = self._resting()
        with self._wake:
            self._status = EngineStatus(state, model or resting.model, resting.weights, resting.device, text, fraction)

    def _resting(self) -> EngineStatus:
        if self._key is None:
            return EngineStatus("empty")
        weights, device = getattr(self._loaded, "weights", None), getattr(self._loaded, "device", None)
        return EngineStatus("ready", self._key[0], weights, device)


def out_of_memory(error: BaseException) -> bool:
    """Did the machine or the accelerator run out of memory? PyTorch says so on the CPU only in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
