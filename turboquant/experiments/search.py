"""The search behind `recommend`, without any measuring: which candidate to try next, and what need not be tried."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A method that may be chosen.

    Attributes:
        method: As `parse_method` reads it.
        family: Candidates of one family differ in bits alone.
        bits: Of keys and of values.
        size: Bytes its cache holds where sizes are compared.
    """

    method: str
    family: str
    bits: tuple[int, int]
    size: int

    def within(self, other: "Candidate") -> bool:
        """Has it nowhere more bits than the other one of its family? Then it is no better, and passed over with it."""
        return self.family == other.family and all(a <= b for a, b in zip(self.bits, other.bits, strict=True))


def smallest(
    candidates: Iterable[Candidate],
    choose: Callable[[Candidate], bool],
    confirm: Callable[[Candidate], bool] = lambda candidate: True,
) -> Candidate | None:
    """Return the smallest candidate that passes both tests, or None.

    The one in the middle is tried: where it passes, only smaller ones are still of interest; where it fails, so do
    those `within` it. What is left at the end is confirmed; where that fails, the search goes on among larger ones.
    `choose` may be asked about a candidate twice.
    """
    left = sorted(candidates, key=lambda one: (one.size, one.method))
    best: Candidate | None = None
    while True:
        below = left if best is None else [one for one in left if one.size < best.size]
        if below:
            tried = below[len(below) // 2]
            if choose(tried):
                best = tried
                continue
        elif best is None or confirm(best):
            return best
        else:
            tried, best = best, None
        left = [one for one in left if not one.within(tried)]


def most(count: int, passes: Callable[[int], bool]) -> int:
    """Return the greatest number from 1 to `count` that passes, or 0; if one passes, all below it are taken to pass."""
    low, high = 0, count + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low
