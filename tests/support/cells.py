"""A stand-in runner for cells: their records are made by hand, as many as the test lets it. Nothing is measured."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from app.engine.job import Job
from app.tab.measure import CellsRequest
from turboquant.records.environment import Environment
from turboquant.records.experiment import Cell, ExperimentRecord

HERE = Environment(
    created="2026-01-02T03:04:05+00:00",
    commit="abc1234",
    device="cpu: test",
    cpu_threads=2,
    python="3",
    torch="2",
    transformers="5",
)


@dataclass
class Cells:
    """Serves one cell for each permit; `make` makes its record. `served` are the cells that ran."""

    make: Callable[[Cell], ExperimentRecord]
    served: list[Cell] = field(default_factory=list)
    _allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def let(self, count: int = 1000) -> None:
        """Allow so many more cells."""
        self._allowed.release(count)

    def load(self, name: str, *, weights: str, progress: Any) -> Any:
        return object()

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        assert isinstance(job.request, CellsRequest)
        for item in job.pending:
            while not self._allowed.acquire(timeout=0.02):
                if cancelled():
                    return
            job.add(item, self.make(job.request.cells[item]))
            self.served.append(job.request.cells[item])
            if cancelled() or yielding():
                return
