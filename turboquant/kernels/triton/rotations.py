"""Rotation matrices as tensor cores take them: in 16 bits, in two parts where one does not hold them exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant.quant.modes import shared_table
from turboquant.quant.rotation import Rotation


@dataclass(frozen=True)
class Parts:
    """A matrix as `factor * (high + low)`; where it is `exact`, `low` is not needed."""

    high: Tensor
    low: Tensor
    factor: float
    exact: bool


def _split(matrix: Tensor, signs: Tensor | None, dtype: torch.dtype) -> Parts:
    """Return the parts of a matrix whose columns have these signs.

    A Hadamard matrix is +1 and -1 times a factor, which 16 bits hold exactly.
    """
    matrix = matrix if signs is None else matrix * signs  # signs act on x first: they belong to columns
    whole = matrix * matrix.shape[0] ** 0.5
    if bool((whole.abs() - 1).abs().max() < 1e-5):
        signs = whole.round().to(dtype)
        return Parts(signs, signs, matrix.shape[0] ** -0.5, True)
    # What 16 bits leave of a Haar matrix, in 16 bits: together 16 (bfloat16) or 22 bits of its digits.
    high = matrix.to(dtype)
    return Parts(high, (matrix - high.float()).to(dtype), 1.0, False)


@shared_table(maxsize=256)
def parts(rotation: Rotation, dtype: torch.dtype) -> Parts:
    """Return the parts of the matrix W with which a rotation maps x to W x."""
    return _split(rotation.matrix, rotation.signs, dtype)


@shared_table(maxsize=256)
def sketch(projection: Tensor, rotation: Rotation, dtype: torch.dtype) -> Parts:
    """Return the parts of QJL's projection after the rotation, as one matrix."""
    return _split((projection @ rotation.matrix).contiguous(), rotation.signs, dtype)
