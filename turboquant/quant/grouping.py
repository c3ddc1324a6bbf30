"""Groups of channels that share a scale, and the float in which scales are stored."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

OUTLIER = 32
"""How many times as long as its neighbours a vector may be before it no longer shares a mean and a scale with them: in
steps of 1/255 of the greatest scale the least one is then rounded by 6 %."""
FP16_MAX = 65504.0
FP16_TINY = 2.0**-14
"""The least magnitude that float16 holds with all its digits."""


def in_float16(x: Tensor, smallest: float = FP16_TINY) -> bool:
    """Return whether float16 holds every finite number of `x` of at least this magnitude (and 0) with all digits."""
    size = x.abs()
    out = ((size > FP16_MAX) & (size < torch.inf)) | ((size < smallest) & (size > 0))
    return not bool(out.any())


def stored(
    x: Shaped[Tensor, "batch kv_heads rows *rest"],
    valid: Bool[Tensor, "batch rows"] | None = None,
    smallest: float = FP16_TINY,
) -> Shaped[Tensor, "batch kv_heads rows *rest"]:
    """Round to the float in which scales and means are kept: float16 where it holds them all, float32 otherwise.

    Infinity saturates, NaN stays NaN.

    Args:
        x: What is to be kept.
        valid: False for pad tokens, where a row stands for a token: they are not asked what holds them.
        smallest: Smaller magnitudes may lose digits: 0 for means, since what they lose is left for the codes.
    """
    asked = x if valid is None else torch.where(valid.view(-1, 1, valid.shape[1], *[1] * (x.dim() - 3)), x, 0)
    if in_float16(asked, smallest):
        return x.clamp(-FP16_MAX, FP16_MAX).half()
    return x.float().nan_to_num(nan=torch.nan)


def median(x: Float[Tensor, "*batch count"], dim: int) -> Float[Tensor, "*rest"]:
    """Return the lower median along a dim, which is kept; NaN is left out, and stands where there is nothing else.

    It is found by sorting: torch's own is not deterministic on a GPU.
    """
    ordered = x.sort(dim=dim).values  # NaN comes last
    count = (~ordered.isnan()).sum(dim=dim, keepdim=True)
    return ordered.gather(dim, ((count - 1) // 2).clamp_min(0))


def uneven(x: Float[Tensor, "batch kv_heads tokens dim"]) -> bool:
    """Return whether some vectors are much longer than others of their head or of other heads, or all far from 1."""
    lengths = x.float().norm(dim=-1)
    usual = median(lengths, dim=2)
    # A vector far from the usual length of its head, heads far from each other, or all out of float16's range.
    apart = (lengths > 4 * usual).any() | (usual.max() > OUTLIER * usual.min())
    return bool(apart | (lengths.max() > FP16_MAX) | (usual.min() < FP16_TINY))


def misread(x: Float[Tensor, "batch kv_heads tokens dim"], read: Float[Tensor, "batch kv_heads tokens dim"]) -> int:
    """Count vectors that are read back as something else, since very different ones share a range or a mean with them.

    Those are read at less than half or more than twice their length along themselves, or with an error of more than
    twice their length; vectors that are small beside most of their head are passed over.

    Args:
        x: What was packed.
        read: What is read back.
    """
    lengths = x.float().norm(dim=-1, keepdim=True)
    usual = median(lengths, dim=2)
    error = read.float() - x.float()
    along = (x.float() * error).sum(dim=-1, keepdim=True) / lengths.square()  # 0 where it is read right
    size = error.norm(dim=-1, keepdim=True)
    wrong = ((along < -0.5) | (along > 1) | (size > 2 * lengths)) & (size > usual / 2)
    return int((wrong & (lengths > 0)).sum())


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
