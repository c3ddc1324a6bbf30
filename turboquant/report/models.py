"""The table of families of models, from records of their check."""

from collections import Counter
from collections.abc import Iterable

from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import NONE
from turboquant.report.gpu import where
from turboquant.report.tables import Table

ANSWERED = 48
"""Tokens of all greedy answers."""


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
            _error(r, "error_lossless"),
            _error(r, "error_8_bits"),
            *(_count(r, f"greedy_{name}") for name in ("lossless", "8_bits")),
            _bytes(r),
        )
        for r in chosen
    )
    names = ("family", "stands for", "`load_model`", "own model", "layers compressed")
    figures = ("logits, lossless", "logits, 8 bits", "tokens, lossless", "tokens, 8 bits", "bytes predicted / held")
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


def _error(record: ExperimentRecord, name: str) -> str:
    value = record.metrics.get(name)
    return NONE if value is None else f"{value:.1g}" if value < 0.001 else f"{value:.3f}"


def _count(record: ExperimentRecord, name: str) -> str:
    value = record.metrics.get(name)
    return NONE if value is None else f"{value:.0f} of {ANSWERED}"


def _bytes(record: ExperimentRecord) -> str:
    held, predicted = record.metrics.get("held_bytes"), record.metrics.get("predicted_bytes")
    if not held:
        return NONE
    return f"{predicted / held:.3f}" if predicted else f"refused: {record.detail.get('sizing')}"
