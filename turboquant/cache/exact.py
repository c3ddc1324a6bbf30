"""In which number format the exact tokens of a float32 model are kept: float16, or bfloat16 where they do not fit.

A key or value fits a format where its greatest magnitude is zero, or at most the format's greatest number and at least
`SMALLEST` times its smallest normal one (2^-12 in float16). Below the smallest normal number the steps between numbers
get no finer: float16 is off by 2^-25 there at most. So a vector of d dims that fits float16 is off by no more than
2^-11 + 2^-13 sqrt(d) of its length, and up to 784 dims by no more than the 2^-8 of bfloat16. What fits neither (beyond
3.39e38, below 4.7e-38, infinite or no number) stays in float32. So nothing becomes infinite, and no vector zero.

Vectors are judged one by one, so it does not matter in which calls they come. Where one does not fit, the storage that
it is written to takes the next format for all its tokens; what is in bfloat16 does not go back to float16.
"""

import torch
from torch import Tensor

SMALLEST = 4
RANGES = {
    dtype: (SMALLEST * torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in (torch.float16, torch.bfloat16)
}
"""The 16-bit formats, the finest first, and what a vector's greatest magnitude must lie between to fit one."""
MANY = 64
"""Vectors whose magnitudes are compared where they lie; to read fewer one by one takes less time."""


def appended(held: Tensor | None, new: Tensor, rounds: bool = True) -> Tensor:
    """Return a new storage of just the size that is needed, with new tokens behind those held.

    Args:
        held: (batch, heads, tokens, dim) as they are kept; None for nothing.
        new: As the model made them. Float32 is rounded; where other formats differ, the wider one holds both.
        rounds: May float32 be rounded?
    """
    parts = [new] if held is None or not held.shape[2] else [held, new]
    if rounds and new.dtype == torch.float32 and parts[0].dtype in (*RANGES, torch.float32):
        dtype = _kept_dtype(parts)
    else:
        dtype = torch.promote_types(parts[0].dtype, new.dtype)
    if len(parts) == 1:
        return new.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return torch.cat([part if part.dtype == dtype else part.to(dtype) for part in parts], dim=2)


def rounded(states: Tensor, held: Tensor, rounds: bool = True) -> Tensor:
    """Return states as they would be read once they are kept behind `held`, in their own dtype."""
    return appended(held, states, rounds)[:, :, -states.shape[2] :].to(states.dtype)


def _kept_dtype(parts: list[Tensor]) -> torch.dtype:
    """Return the first format that all parts fit; what is kept in 16 bits fits that and wider ones."""
    tops = [top for part in parts if part.dtype == torch.float32 for top in _magnitudes(part)]
    for dtype, (least, greatest) in RANGES.items():
        widens = dtype == torch.bfloat16 or parts[0].dtype != torch.bfloat16
        if widens and all(least <= top <= greatest or top == 0 for top in tops):
            return dtype
    return torch.float32


def _magnitudes(states: Tensor) -> list[float]:
    """Return the greatest magnitude of each vector; of many, the least of those above zero, and the greatest."""
    tops = torch.linalg.vector_norm(states, torch.inf, dim=-1).flatten()
    if tops.shape[0] > MANY:
        greatest = tops.max()
        tops = torch.stack([torch.where(tops > 0, tops, greatest).min(), greatest])
    magnitudes: list[float] = tops.tolist()
    return magnitudes
