"""Figures with their uncertainty: means over seeds, spreads, and whether the difference of two settings is real."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from turboquant.records.base import Record
from turboquant.records.experiment import Spread

CONFIDENCE = 0.95
RESAMPLES = 9999
"""Bootstrap and permutation resamples; with fewer than 14 pairs every permutation is gone through."""


def timing_spread(values: Sequence[float]) -> Spread:
    """Return the median of repeated timings and their 20th and 80th percentile."""
    p20, median, p80 = (float(value) for value in np.percentile(values, [20, 50, 80]))
    return Spread(median=median, p20=p20, p80=p80)


class Estimate(Record):
    """A mean over seeds and its standard error."""

    mean: float
    standard_error: float
    seeds: int

    def z(self, expected: float, rounding: float = 0.0) -> float:
        """Return how far off the mean is, as the normal deviate that is as improbable as its t statistic (0 to 99).

        `rounding` is what the storage format alone may add, absolute.
        """
        excess = max(0.0, abs(self.mean - expected) - rounding)
        if excess == 0:
            return 0.0
        t = excess / self.standard_error if self.standard_error else math.inf
        return float(min(99.0, stats.norm.isf(stats.t.sf(t, self.seeds - 1))))


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value a seed, of at least two seeds."""
    x = np.asarray(values, dtype=np.float64)
    return Estimate(mean=float(x.mean()), standard_error=float(x.std(ddof=1) / math.sqrt(len(x))), seeds=len(x))


class Spread95(Record):
    """How values of different seeds spread. `low` and `high` are the 95 % interval of their mean (Student's t).

    `sd`, `low` and `high` are None for a single value.
    """

    count: int
    mean: float
    sd: float | None
    minimum: float
    maximum: float
    low: float | None
    high: float | None


def spread(values: Sequence[float], bounds: tuple[float, float] | None = None) -> Spread95:
    """Describe at least one value; `bounds` are those that the quantity, and so its interval, cannot leave."""
    x = np.asarray(values, dtype=np.float64)
    sd = low = high = None
    if len(x) > 1:
        sd = float(x.std(ddof=1))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1)) * sd / math.sqrt(len(x))
        low, high = np.clip([x.mean() - half, x.mean() + half], *(bounds or (-math.inf, math.inf))).tolist()
    return Spread95(
        count=len(x),
        mean=float(x.mean()),
        sd=sd,
        minimum=float(x.min()),
        maximum=float(x.max()),
        low=low,
        high=high,
    )


class Difference(Record):
    """The mean of paired differences, first less second.

    `low` and `high` are the 95 % bootstrap interval (percentiles) over pairs, `p_value` is that of a paired permutation
    test (signs flipped, two-sided). All three are None where there are fewer than `LEAST_PAIRS` pairs.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    pairs: int

    @property
    def real(self) -> bool | None:
        """Whether both the interval and the test exclude no difference; None where there are too few pairs."""
        if self.low is None or self.high is None or self.p_value is None:
            return None
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - CONFIDENCE


LEAST_PAIRS = 6
"""With fewer pairs no permutation test can reach 5 %."""


def paired_difference(
    first: Float[np.ndarray, " pairs"] | Sequence[float], second: Float[np.ndarray, " pairs"] | Sequence[float]
) -> Difference:
    """Compare two settings measured on the same things (the same blocks of text, the same seeds).

    Args:
        first: One value a pair.
        second: The other setting's, in the same order.

    Raises:
        ValueError: If they are not equally many, or none.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"pairs must be equally many and at least one, got {a.size} and {b.size}")
    gaps = a - b
    mean = float(gaps.mean())
    if len(gaps) < LEAST_PAIRS:
        return Difference(difference=mean, low=None, high=None, p_value=None, pairs=len(gaps))
    if np.ptp(gaps) == 0:  # nothing to resample: every pair says the same
        p_value = 1.0 if mean == 0 else 2.0 ** (1 - len(gaps))
        return Difference(difference=mean, low=mean, high=mean, p_value=p_value, pairs=len(gaps))
    interval = stats.bootstrap(
        (gaps,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    test = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return Difference(
        difference=mean,
        low=float(interval.low),
        high=float(interval.high),
        p_value=float(test.pvalue),
        pairs=len(gaps),
    )


def block_interval(
    values: Float[np.ndarray, "series positions"], block: int
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % bootstrap interval (percentiles) of the mean of series whose neighbours resemble each other.

    Args:
        values: Series of equal length.
        block: Neighbours that are drawn together; the last block of a series may be shorter.

    Returns:
        Both ends, or None twice where there are fewer than 3 blocks.
    """
    blocks = [piece for series in values for piece in np.split(series, range(block, len(series), block))]
    if len(blocks) < 3:
        return None, None
    found = stats.bootstrap(
        ([piece.sum() for piece in blocks], [len(piece) for piece in blocks]),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
