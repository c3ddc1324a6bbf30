"""A worker that measures no model: each cell gets the figures of a record of its kind, when the test lets it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from app.engine import Engine
from app.jobs import Job
from turboquant.results import Cell, ExperimentRecord

RESULTS = Path(__file__).resolve().parents[2] / "results"


class Cells:
    """A runner of CellsRequests. `let` allows so many more cells; `measured` are the keys of those that ran."""

    def __init__(self, make: Callable[[Cell], ExperimentRecord]) -> None:
        self.make = make
        self.measured: list[str] = []
        self._allowed = threading.Semaphore(0)

    def let(self, count: int) -> None:
        self._allowed.release(count)

    def load(self, name: str, **options: Any) -> Any:
        return SimpleNamespace(name=name, weights="fp32", device="cpu")

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        request: Any = job.request
        for item in job.pending:
            while not self._allowed.acquire(timeout=0.02):
                if cancelled():
                    return
            self.measured.append(request.cells[item].key)
            job.add(item, self.make(request.cells[item]))
            if cancelled() or yielding():
                return


@contextmanager
def engine_of(cells: Cells) -> Iterator[Engine]:
    engine = Engine(cells.load, cells.run, max_queue=3, grace_s=0.1, max_cached=0)
    yield engine
    engine.close()
