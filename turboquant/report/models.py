"""The table of families of models, from records of their check."""

from collections import Counter
from collections.abc import Iterable

from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import NONE, metric
from turboquant.report.gpu import where
from turboquant.report.tables import Table

FIGURES = ("lossless_logit_error", "logit_error", "lossless_same_tokens_pct", "same_tokens_pct")


def families_table(records: Iterable[ExperimentRecord]) -> Table:
    """Return what becomes of each family, those with the most users first."""
    chosen = [r for r in records if r.cell.experiment == "families" and not r.error]
    chosen.sort(key=lambda r: -r.detail["users"])  # of equal ones in the order of the records
    rows = tuple(
        (
            r.cell.settings["family"],
            r.detail["stands_for"],
            _outcome(r, ""),
            _own(r),
            _layers(r),
            *(metric(name).text(r.metrics.get(name)) for name in FIGURES),
            _bytes(r),
        )
        for r in chosen
    )
    names = ("family", "stands for", "`load_model`", "own model", metric("compressed_layers").label)
    figures = (*(metric(name).label for name in FIGURES), "estimated size, of that held")
    counted = Counter(str(r.detail["outcome"]) for r in chosen)
    said = ", ".join(f"{count} {name}" for name, count in counted.most_common())
    return Table(
        "", (*names, *figures), rows, f"{len(chosen)} families: {said}. {where(r.environment for r in chosen)}"
    )


def _outcome(record: ExperimentRecord, way: str) -> str:
    outcome, reason = record.detail.get(f"{way}outcome"), record.detail.get(f"{way}reason")
    return NONE if outcome is None else f"{outcome}: {reason}" if reason else str(outcome)


def _own(record: ExperimentRecord) -> str:
    """What becomes of an own model; the reason where it is another one."""
    detail = record.detail
    same = detail.get("own_reason") == detail["reason"]
    return str(detail["own_outcome"]) if same and "own_outcome" in detail else _outcome(record, "own_")


def _layers(record: ExperimentRecord) -> str:
    figures = record.metrics
    return f"{figures['compressed_layers']:.0f} of {figures['layers']:.0f}" if "layers" in figures else NONE


def _bytes(record: ExperimentRecord) -> str:
    held, estimated = record.metrics.get("cache_bytes"), record.metrics.get("estimated_bytes")
    if not held:
        return NONE
    return f"{estimated / held:.3f}" if estimated else f"refused: {record.detail.get('sizing')}"
