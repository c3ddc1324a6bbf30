"""What one tab has of the results of its jobs."""

from dataclasses import dataclass

from app.tab.runs import RunStore
from turboquant.experiments.recommendation import Recommendation
from turboquant.records.experiment import ExperimentRecord


@dataclass(frozen=True)
class Results:
    """Where requests put their results (`Request.keep`).

    Attributes:
        runs: Comparisons.
        records: Measured cells by their keys, the oldest first.
        recommendations: The newest search, and whether its result was known from before.
    """

    runs: RunStore
    records: dict[str, ExperimentRecord]
    recommendations: list[tuple[Recommendation, bool]]
