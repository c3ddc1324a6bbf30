"""What a search found, as tables."""

import pandas as pd

from turboquant.experiments.recommendation import Recommendation

PARTS = {"choose": "first half", "confirm": "held-out half"}


def evidence(found: Recommendation) -> pd.DataFrame:
    """One row for every method that was measured on a half of the text, the smallest first."""
    return pd.DataFrame(
        [
            {
                "method": one.method,
                "measured on": PARTS[one.part],
                "within limits": "yes" if one.failure is None else "no" if one.kl is not None else one.failure,
                "KL": one.kl,
                "KL from": one.kl_low,
                "KL to": one.kl_high,
                "same top": one.same_top_pct,
                "bits held": one.bits_per_value,
                "MB estimated": one.estimated_bytes / 1e6,
            }
            for one in sorted(found.tried, key=lambda one: (one.estimated_bytes, one.method, one.part))
        ]
    )


def memory(found: Recommendation) -> pd.DataFrame:
    """What the setting holds at each context."""
    return pd.DataFrame(
        [
            {
                "tokens": row.tokens,
                "MB": row.bytes / 1e6,
                "full in 16 bits, MB": row.full_bytes / 1e6,
                "times smaller": row.times_smaller,
                "where from": "measured" if row.measured else "estimated",
            }
            for row in found.memory
        ]
    )
