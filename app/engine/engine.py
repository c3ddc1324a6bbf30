"""One model, one worker thread, one queue.

All work of every visitor goes through the one `Engine` of the process. Its worker thread is the only thread that loads
or runs a model, so two models are never resident at once and no global state races.
"""

import contextlib
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from app.engine.cache import ResultCache
from app.engine.contract import EngineStatus, Loader, ModelKey, Runner
from app.engine.endings import MODEL_CHANGED, NO_MEMORY, NO_WORKER, SHUTDOWN, Ending, ending_of, let_go
from app.engine.job import Job, Request
from app.engine.journal import Journal, Refusal
from app.engine.logs import event
from app.engine.queue import JobQueue
from turboquant.models.fingerprint import is_current
from turboquant.records.faults import out_of_memory

JOIN_S = 2.0
"""How long the closing engine waits for its worker to notice, in seconds."""


class EngineBusyError(RuntimeError):
    """The engine does not take the request now; the message says why and what to do."""


class _CancelledLoadError(RuntimeError):
    """The only visitor who wanted this model has stopped waiting for it."""


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

    Attributes:
        journal: Where jobs and models are logged and counted.
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
        self._refusing = self._closed = False
        self.journal = Journal()
        self.journal.watch(self.status)
        self._start()

    # --- called by pages, from any thread

    def submit(self, session: str, request: Request) -> Job:
        """Queue a request; a job whose results are all known already ends at once.

        Raises:
            EngineBusyError: The session has a live job, the queue is full, or the server is being stopped.
        """
        job = Job(session, request)
        self._cache.fill(job)
        with self._wake:
            self._check_room(session, job)
            self._jobs[session] = job
            if job.pending:
                self._queue.append(job)
            self.journal.queued(job, len(self._queue))
            if not self._thread.is_alive() and not self._closed:
                self._start()
            self._wake.notify_all()
        if not job.pending:
            self._end(job, Ending("done"))
        return job

    def _check_room(self, session: str, job: Job) -> None:
        held, waiting = self._jobs.get(session), len(self._queue)
        if held is not None and held.live:
            words = f"A run is already at work in this tab ({held.request.title}); stop it or wait for it to end."
            raise self._refusal(job, "busy", words)
        if self._refusing and job.pending:
            raise self._refusal(job, "stopping", "The server is being stopped and takes no new runs; try again later.")
        if job.pending and waiting >= self._max_queue:
            wait = self._estimate(waiting)
            when = f"in about {wait:.0f} s" if wait else "in a moment"
            raise self._refusal(job, "full", f"{waiting} runs are waiting already; try again {when}.")

    def _refusal(self, job: Job, reason: Refusal, words: str) -> EngineBusyError:
        self.journal.refused(job.request.page, reason, len(self._queue))
        return EngineBusyError(words)

    def cancel(self, job: Job, reason: str | None = None) -> None:
        """Stop a job: at once while it waits or its model loads, else at the next token, keeping what it has."""
        job.request_cancel(reason)
        with self._wake:
            waits = job in self._queue
            if waits:
                self._queue.remove(job)
        if waits or job.view.state == "loading":
            self._end(job, Ending("stopped"))

    def _end(self, job: Job, ending: Ending, error: BaseException | None = None) -> None:
        if job.finish(ending.state, ending.error):
            self.journal.ended(job, error, log_error=ending.log)

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
            self.cancel(job, "the closing of its tab")
        self._cache.forget(session)

    def drain(self, seconds: float) -> bool:
        """Take no new job, stop those that wait, and stop the one at work unless it ends within `seconds`.

        Returns when no job is live, or when the one at work does not react; True if there was one to stop or wait for.
        """
        with self._wake:
            self._refusing, self._warm = True, None
            waiting, current = [*self._queue], self._current
        for job in waiting:
            self.cancel(job, SHUTDOWN)
        if current is not None and not current.wait(seconds):
            self.cancel(current, SHUTDOWN)
            current.wait(JOIN_S)
        return current is not None or bool(waiting)

    def close(self) -> None:
        """Stop the worker and every job."""
        with self._wake:
            self._refusing = self._closed = True
            jobs = [*self._queue, *([self._current] if self._current else [])]
            timers = list(self._timers.values())
            self._wake.notify_all()
        for timer in timers:
            timer.cancel()
        for job in jobs:
            self.cancel(job, SHUTDOWN)
        self._thread.join(timeout=JOIN_S)
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
                with contextlib.suppress(MemoryError):
                    event("worker_failed", level=logging.ERROR, error=error)
                let_go(error)
                self._recover(error)

    def _recover(self, error: BaseException) -> None:
        with self._wake:
            job, self._current = self._current, None
        self._unload()
        if job is not None:
            job.end_turn()
            self._end(job, Ending("failed", NO_MEMORY if out_of_memory(error) else NO_WORKER), error)
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
        ending, error = self._attempt(job, begun)
        job.end_turn()
        self._seconds.append(time.monotonic() - begun)
        if ending is None:
            with self._wake:
                if not job.cancelled:
                    job.advance("queued")
                    self._queue.append(job)
                    return
            ending = Ending("stopped")
        if ending.unload:
            self._unload()
        self._end(job, ending, error)

    def _attempt(self, job: Job, begun: float) -> tuple[Ending | None, BaseException | None]:
        """How the job ended, or None if it has let others go first, and the exception that ended it, if one did.

        No exception leaves; one of a job that asks for memory back has lost its frames, which hold model and tensors.
        """
        try:
            loaded = self._ensure((job.request.model, job.request.weights), job)
            if job.cancelled:
                return Ending("stopped"), None
            fingerprint = getattr(loaded, "fingerprint", None)
            if job.results and job.fingerprint != fingerprint:
                return Ending("failed", MODEL_CHANGED), None
            job.fingerprint = fingerprint
            job.advance("running", "Reading the prompt" if job.request.sides else "Starting")
            self._set_status("running")
            self.journal.started(job, self.status().waiting)
            return self._work_on(loaded, job, begun), None
        except BaseException as error:
            self._cache.keep(job)
            if isinstance(error, _CancelledLoadError) or job.cancelled:
                return Ending("stopped"), None
            ending = ending_of(error, job.id, self._is_expected)
            if ending.unload:
                let_go(error)
            return ending, error

    def _work_on(self, loaded: Any, job: Job, begun: float) -> Ending | None:
        """Run a job until it has ended or others must have their turn."""
        while True:
            known = len(job.results)
            self._runner(loaded, job, lambda: self._stopped(job), lambda: self._must_yield(begun))
            self._cache.keep(job)
            if job.cancelled:
                return Ending("stopped")
            if not job.pending:
                return Ending("done")
            if self._must_yield(begun):
                return None
            if len(job.results) == known:
                return Ending("failed", "The run gave no result and no reason; the server log may say more.")

    def _stopped(self, job: Job) -> bool:
        """Shall the job stop? It also does after the longest time this deployment gives a run."""
        if job.running_s > self._max_run_s and not job.cancelled:
            job.request_cancel(f"the time limit of {self._max_run_s:.0f} s for one run")
        return job.cancelled

    def _preload(self, key: ModelKey) -> None:
        try:
            self._ensure(key, None)
        except Exception as error:
            let_go(error)

    def _ensure(self, key: ModelKey, job: Job | None) -> Any:
        """The model of `key`, loaded now if another one, none or an older one is resident; that goes first."""
        if self._key == key and is_current(key[0], getattr(self._loaded, "fingerprint", None)):
            return self._loaded
        self._unload()

        def progress(fraction: float, text: str) -> None:
            self._set_status("loading", key[0], text, fraction)
            if job is not None:
                job.advance("loading", text, fraction)
                if job.cancelled:
                    raise _CancelledLoadError(key[0])

        progress(0.0, f"Loading {key[0]}")
        begun = time.monotonic()
        try:
            self._loaded = self._loader(key[0], weights=key[1], progress=progress)
        except _CancelledLoadError:
            raise
        except BaseException as error:
            self.journal.load_failed(key[0], error)
            raise
        self._key = key
        now = self._resting()
        self.journal.loaded(key[0], now.weights or key[1], now.device or "", time.monotonic() - begun)
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
