"""Results of repeated settings: what was measured once is not measured again.

Results that follow from shipped examples and numbers alone are given to everybody; those that follow from what a
visitor wrote are kept for that visitor alone, and go when the visitor does. A result is of the model as it was then:
once its folder has changed it is measured again.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from typing import Any

from app.engine.job import Job
from turboquant.models.fingerprint import is_current
from turboquant.records.faults import UNMEASURED


@dataclass(frozen=True)
class _Kept:
    result: Any
    fingerprint: str | None


class ResultCache:
    """The newest results by key; safe to use from several threads.

    Args:
        limit: Results that are kept; the one longest unused goes first. 0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._results: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    def fill(self, job: Job) -> None:
        """Give a new job the results that are known, and mark them as cached."""
        is_so = cache(is_current)
        for item in range(job.request.items):
            key = _key(job, item)
            with self._lock:
                if key is None or key not in self._results:
                    continue
                self._results.move_to_end(key)
                known = self._results[key]
            if is_so(job.request.model, known.fingerprint):
                job.fingerprint = known.fingerprint
                job.add(item, known.result)
        job.cached = frozenset(job.results)

    def keep(self, job: Job) -> None:
        """Keep a job's whole results; what a stopped job was at work on may be half a result."""
        done = [item for item in job.results if item not in job.cached]
        for item in done[:-1] if job.cancelled else done:
            key = _key(job, item)
            if key is not None and _whole(job.results[item]):
                self._put(key, _Kept(job.results[item], job.fingerprint))

    def _put(self, key: tuple[str, str], kept: _Kept) -> None:
        with self._lock:
            self._results[key] = kept
            self._results.move_to_end(key)
            while len(self._results) > self._limit:
                self._results.popitem(last=False)

    def forget(self, session: str) -> None:
        """Drop what was kept for one visitor."""
        with self._lock:
            for key in [key for key in self._results if key[0] == session]:
                del self._results[key]


def _whole(result: Any) -> bool:
    """Is there nothing in it that another run might still measure?"""
    parts = result if isinstance(result, tuple) else (result,)
    return not any(getattr(part, "error", None) or UNMEASURED in getattr(part, "notes", ()) for part in parts)


def _key(job: Job, item: int) -> tuple[str, str] | None:
    """Whose result it is ("" for everybody's) and which."""
    key = job.request.key(item)
    return None if key is None else (job.session if item in job.request.private else "", key)
