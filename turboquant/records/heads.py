"""Why a head is at risk: margins and errors of all heads, and the scores of the worst ones at a few positions."""

import math
from array import array
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import NonNegativeInt, PlainSerializer, PlainValidator, PositiveInt, TypeAdapter

from turboquant.records.base import Matrix, Record

_NUMBERS = TypeAdapter(list[float | None])


def row(values: Any) -> "array[float]":
    """Return numbers, None or NaN where there is none, as an array."""
    if isinstance(values, array):
        return values
    return array("d", (math.nan if value is None else value for value in _NUMBERS.validate_python(values)))


def _numbers(row: Iterable[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in row]


Row = Annotated[array, PlainValidator(row), PlainSerializer(_numbers, return_type=list[float | None])]
"""Numbers that are many: an array, a quarter of a list's memory; null in JSON is NaN."""


class HeadDetail(Record):
    """One query head's scaled scores, [position][token], over all tokens that the query sees: full and compressed."""

    layer: int
    head: int
    full: list[Row]
    compressed: list[Row]


class AttentionDetail(Record):
    """What explains the heads at risk of one comparison.

    `tokens` are the texts of the context, prompt and answer, decoded one by one. `positions` are the query positions
    at which `heads`, the worst heads over packed positions, are kept, worst first; `packed` says how many tokens were
    packed at each of them, behind the first `sinks` exact ones. Scores are scaled as the model scales them.

    `margins` and `errors` are [row][query head] with the rows of `HeadMetrics.layer_indices`, over packed positions and
    all measured steps: the mean distance of the best from the second best score under full keys, and the root mean
    square error of the scores under compressed keys.
    """

    tokens: list[str]
    positions: list[NonNegativeInt]
    packed: list[PositiveInt]
    sinks: NonNegativeInt
    scaling: float
    heads: list[HeadDetail]
    margins: Matrix
    errors: Matrix
