"""Which of several choices are worth having: those that no other beats on both cost and loss."""

import math
from collections.abc import Mapping, Sequence

from turboquant.records.metrics import metric

Point = tuple[float | None, float | None]


def pareto_front(points: Sequence[Point]) -> list[bool]:
    """Return for each point whether no other is at least as good in both numbers and better in one; less is better.

    Args:
        points: (cost, loss), such as bits per value and KL. A point without a finite number is never on the front.

    Example:
        >>> pareto_front([(2.0, 0.5), (4.0, 0.1), (4.5, 0.2), (None, 0.0)])
        [True, True, False, False]
    """
    return [_is_known(point) and not any(_beats(other, point) for other in points) for point in points]


def front_of(
    figures: Sequence[Mapping[str, float | None]], cost: str = "bits_per_value", loss: str = "kl_mean"
) -> list[bool]:
    """Return for each row of figures whether it is on the front of two metrics; the catalogue says which way is better.

    Args:
        figures: By their names in records.
        cost: The one metric.
        loss: The other.
    """

    def side(row: Mapping[str, float | None], name: str) -> float | None:
        value = row.get(name)
        return None if value is None else metric(name).loss(value)

    return pareto_front([(side(row, cost), side(row, loss)) for row in figures])


def _is_known(point: Point) -> bool:
    return all(number is not None and math.isfinite(number) for number in point)


def _beats(other: Point, point: Point) -> bool:
    (a, b), (cost, loss) = other, point
    if a is None or b is None or cost is None or loss is None:
        return False
    return a <= cost and b <= loss and (a < cost or b < loss)
