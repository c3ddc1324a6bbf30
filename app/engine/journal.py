"""What happens to jobs and models, told twice: as events of the log and as counts for Prometheus.

Nothing in either follows from what a visitor wrote, or tells one visitor from another.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.engine.contract import EngineStatus
from app.engine.job import Job
from app.engine.logs import event
from turboquant.records.faults import out_of_memory

_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)
Refusal = Literal["busy", "full", "stopping"]
disable_created_metrics()


class Journal:
    """Of one engine.

    Attributes:
        registry: The engine's metrics, and those of the process (memory, processor time, open files).
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry, "namespace": "turboquant"}
        self._ended = Counter("jobs_ended", "Jobs that ended, by page and outcome", ["page", "outcome"], **make)
        self._refused = Counter("jobs_refused", "Jobs that were not taken, by reason", ["reason"], **make)
        for reason in get_args(Refusal):
            self._refused.labels(reason)
        self._tokens = Counter("tokens_generated", "Tokens generated, over both sides", **make)
        self._waited = Histogram("job_wait_seconds", "From queued to started", ["page"], buckets=_SECONDS, **make)
        self._worked = Histogram("job_work_seconds", "Work on a job, waiting left out", buckets=_SECONDS, **make)
        self._loaded = Histogram("model_load_seconds", "Loads of a model", buckets=_SECONDS, **make)
        self._failed_loads = Counter("model_loads_failed", "Loads of a model that failed", **make)
        ProcessCollector(registry=self.registry)

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Read the engine's present state whenever the metrics are asked for."""
        self.registry.register(_Present(status))

    def queued(self, job: Job, waiting: int) -> None:
        """A job was taken; `waiting` are in the queue with it."""
        event("job_queued", **_asked(job), items=job.request.items, cached=len(job.cached), waiting=waiting)

    def refused(self, page: str, reason: Refusal, waiting: int) -> None:
        """A job was not taken."""
        self._refused.labels(reason).inc()
        event("job_refused", page=page, reason=reason, waiting=waiting)

    def started(self, job: Job, waiting: int) -> None:
        """The worker turned to a job, for the first time or again."""
        again = job.worked_s > 0
        wait = None if again or job.started is None else job.started - job.created
        if wait is not None:
            self._waited.labels(job.request.page).observe(wait)
        event("job_continued" if again else "job_started", job=job.id, wait_s=_round(wait), waiting=waiting)

    def ended(self, job: Job, error: BaseException | None = None, *, log_error: bool = False) -> None:
        """A job ended; `error` is the exception that ended it, whose traceback is logged if `log_error`."""
        outcome = job.view.state
        memory = "out of memory" if error is not None and out_of_memory(error) else None
        self._ended.labels(job.request.page, outcome).inc()
        self._tokens.inc(job.generated)
        if job.started is not None:
            self._worked.observe(job.running_s)
        event(
            f"job_{outcome}",
            level=logging.ERROR if log_error else logging.WARNING if outcome == "failed" else logging.INFO,
            error=error if log_error else None,
            **_asked(job),
            results=len(job.results),
            cached=len(job.cached),
            prompt_tokens=sum(map(job.request.prompt_tokens, job.results.values())) or None,
            generated_tokens=job.generated,
            work_s=_round(job.running_s),
            total_s=_round((job.ended or job.created) - job.created),
            reason=job.stop_reason or memory,
            error_type=type(error).__name__ if error is not None else None,
        )

    def loaded(self, model: str, weights: str, device: str, seconds: float) -> None:
        """A model was loaded."""
        self._loaded.observe(seconds)
        event("model_loaded", model=model, weights=weights, device=device, seconds=_round(seconds))

    def load_failed(self, model: str, error: BaseException) -> None:
        """A model could not be loaded; who waited for it is told why."""
        self._failed_loads.inc()
        event("model_load_failed", level=logging.WARNING, model=model, error_type=type(error).__name__)


def exposition(journal: Journal) -> tuple[bytes, str]:
    """The metrics as Prometheus reads them, and their media type."""
    return generate_latest(journal.registry), CONTENT_TYPE_LATEST


class _Present(Collector):
    """The engine as it is now."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Queue, worker, resident model."""
        now = self._status()
        yield GaugeMetricFamily("turboquant_jobs_waiting", "Jobs in the queue", now.waiting)
        yield GaugeMetricFamily("turboquant_jobs_running", "Jobs at work, 0 or 1", now.state == "running")
        loading = now.state == "loading"
        yield GaugeMetricFamily("turboquant_model_loading", "1 while a model is loaded from disk or hub", loading)
        model = GaugeMetricFamily(
            "turboquant_model_resident", "The model in memory", labels=("model", "weights", "device")
        )
        if now.model is not None and not loading:
            model.add_metric([now.model, now.weights or "", now.device or ""], 1)
        yield model


def _asked(job: Job) -> dict[str, Any]:
    request = job.request
    named = {"job": job.id, "page": request.page, "model": request.model, "weights": request.weights}
    return {**named, "methods": list(request.methods)}


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
