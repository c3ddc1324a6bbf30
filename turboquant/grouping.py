"""Groups of channels that share a scale, and the float16 in which scales are stored."""

import torch
from jaxtyping import Shaped
from torch import Tensor

FP16_MAX = 65504.0


def half(x: Tensor) -> Tensor:
    """Round to float16, saturating instead of overflowing to infinity (NaN stays NaN)."""
    return x.clamp(-FP16_MAX, FP16_MAX).half()


def channel_groups(x: Shaped[Tensor, "*batch dim"], size: int) -> Shaped[Tensor, "*batch groups size"]:
    """Split vectors into groups of `size` channels; the last channel is repeated where the last group is short.

    A repeated channel changes neither the least nor the greatest value of its group.
    """
    missing = -x.shape[-1] % size
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
    return x.unflatten(-1, (-1, size))


def ungrouped(groups: Shaped[Tensor, "*batch groups size"], dim: int) -> Shaped[Tensor, "*batch dim"]:
    """Invert `channel_groups` for vectors of `dim` channels."""
    return groups.flatten(-2)[..., :dim]
