"""What a search found, as tables."""

import pandas as pd

from turboquant.experiments.recommendation import Recommendation
from turboquant.records.metrics import metric

EVIDENCE = {
    "kl_mean": "kl",
    "kl_low": "kl_low",
    "kl_high": "kl_high",
    "same_top_pct": "same_top_pct",
    "bits_per_value": "bits_per_value",
    "estimated_bytes": "estimated_bytes",
}
"""Metrics of the evidence, and the fields of `Tried` that hold them."""
MEMORY = ("bytes", "full_precision_bytes", "compression_ratio")
PARTS = {"choose": "first half", "confirm": "held-out half"}


def evidence(found: Recommendation) -> pd.DataFrame:
    """One row for every method that was measured on a half of the text, the smallest first."""
    return pd.DataFrame(
        [
            {
                "method": one.method,
                "measured on": PARTS[one.part],
                "within limits": "yes" if one.failure is None else "no" if one.kl is not None else one.failure,
                **{metric(name).column: getattr(one, field) for name, field in EVIDENCE.items()},
            }
            for one in sorted(found.tried, key=lambda one: (one.estimated_bytes, one.method, one.part))
        ]
    )


def memory(found: Recommendation) -> pd.DataFrame:
    """What the setting holds at each context."""
    names = [metric(name).column for name in MEMORY]
    return pd.DataFrame(
        [
            {
                "tokens": row.tokens,
                **dict(zip(names, (row.bytes, row.full_bytes, row.times_smaller), strict=True)),
                "where from": "measured" if row.measured else "estimated",
            }
            for row in found.memory
        ]
    )
