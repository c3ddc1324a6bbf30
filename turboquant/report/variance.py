"""The table of `variance`: how far every figure spreads over seeds."""

from collections.abc import Sequence

from turboquant.records.results import ExperimentRecord
from turboquant.records.spread import spread
from turboquant.report.summary import measured_on, summarize
from turboquant.report.tables import NONE, Table, code, label, number

GREEDY = ("kl_mean", "same_top_pct", "delta_ppl_pct", "agreed_tokens")
SAMPLED = "agreed_tokens"


def variance_table(records: Sequence[ExperimentRecord]) -> Table:
    """Return mean and standard deviation over rotation seeds, and over all seeds for sampled answers.

    Args:
        records: Of the experiment `variance`; a sampling seed of None stands for perplexity and greedy answers.
    """
    kept = [record for record in records if record.error is None]
    rows = []
    for summary in summarize(kept):
        own = [r for r in kept if summarize([r])[0].group == summary.group]
        greedy = [r for r in own if r.cell.settings.get("seed") is None]
        sampled = [r for r in own if r.cell.settings.get("seed") is not None]
        figures = (*(_spread(greedy, name) for name in GREEDY), _spread(sampled, SAMPLED))
        rows.append((summary.model or NONE, code(summary.method), *figures, f"{len(greedy)} + {len(sampled)}"))
    names = (*(f"{label(name)} ± sd" for name in GREEDY), "agreed tokens, sampled ± sd", "greedy + sampled runs")
    note = measured_on(record.environment for record in kept)
    return Table("", ("model", "method", *names), tuple(rows), note)


def _spread(records: Sequence[ExperimentRecord], name: str) -> str:
    values = [value for record in records if (value := record.metrics.get(name)) is not None]
    if not values:
        return NONE
    found = spread(values)
    return number(name, found.mean) + ("" if found.sd is None else f" ± {number(name, found.sd)}")
