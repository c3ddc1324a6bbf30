"""Rotations of many vectors, and the last step of a prefill: rotate back, weigh, add.

Both kernels take vectors (batch, heads, tokens, D), BR a program, and a rotation as `rotations.Parts`. `rotate_rows`
writes OUT in the same shape. `join_rows` reads attention over rotated values (Y) and over exact ones (EXACT_OUT) with
the log-sum-exps of their scores (batch, heads, tokens), and writes what attention over both gives.

`prefill` launches `rotate_rows` in front of attention and `join_rows` behind it; `scores` launches the first alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernels.triton.rotations import parts
from turboquant.quant.rotation import Rotation

ROWS = 32
"""Vectors a program."""


@triton.jit
def rotate_rows(
    # Vectors, the rotation, where they go; vectors in all, heads and tokens of a row; factor of the parts; strides.
    X, HIGH, LOW, OUT, count, heads, tokens, factor, x_b, x_h, x_t, o_b, o_h,
    # head_dim, the same up to a power of two, vectors a program, dims rotated at once; no low part, overlap.
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (rows): vectors in the order batch, head, token."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row, dims = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DP)
    real = row < count
    token, head, batch = row % tokens, row // tokens % heads, (row // tokens // heads).to(tl.int64)
    place = batch * x_b + head.to(tl.int64) * x_h + token.to(tl.int64) * x_t
    x = tl.load(X + place[:, None] + dims[None, :], mask=real[:, None] & (dims[None, :] < D), other=0.0)
    target = batch * o_b + head.to(tl.int64) * o_h + token.to(tl.int64) * D
    for first in tl.static_range(0, DP, BLOCK):
        outer = first + tl.arange(0, BLOCK)
        at = outer[None, :] * D + dims[:, None]
        inside = (dims[:, None] < D) & (outer[None, :] < D)
        y = tl.dot(x, tl.load(HIGH + at, mask=inside, other=0.0))
        if not EXACT:
            y += tl.dot(x, tl.load(LOW + at, mask=inside, other=0.0))
        tl.store(
            OUT + target[:, None] + outer[None, :],
            (y * factor).to(OUT.dtype.element_ty),
            mask=real[:, None] & (outer[None, :] < D),
        )


@triton.jit
def join_rows(
    # Attention over rotated values and over exact ones, their log-sum-exps, the values' rotation, the output.
    Y, EXACT_OUT, Y_LSE, EXACT_LSE, HIGH, LOW, OUT,
    # As in `rotate_rows`.
    count, heads, tokens, factor,
    y_b, y_h, y_t, e_b, e_h, e_t, o_b, o_h, o_t,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Program (rows): share * (y rotated back) + (1 - share) * exact, the share from the two log-sum-exps."""
    row, dims = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DP)
    real = row < count
    token, head, batch = (row % tokens).to(tl.int64), (row // tokens % heads).to(tl.int64), row // tokens // heads
    batch = batch.to(tl.int64)
    at = (batch * y_b + head * y_h + token * y_t)[:, None] + dims[None, :]
    y = tl.load(Y + at, mask=real[:, None] & (dims[None, :] < D), other=0.0)
    dtype = OUT.dtype.element_ty
    # A dot takes 16 bits; where several parts were joined, y is float32 and goes in as two of them.
    high = y.to(dtype)
    low = (y.to(tl.float32) - high.to(tl.float32)).to(dtype)
    ahead = tl.load(EXACT_LSE + row, mask=real, other=0.0) - tl.load(Y_LSE + row, mask=real, other=0.0)
    share = 1 / (1 + tl.exp(tl.minimum(ahead, 80.0)))  # e^89 is infinite in float32
    exact_at = batch * e_b + head * e_h + token * e_t
    target = batch * o_b + head * o_h + token * o_t
    for first in tl.static_range(0, DP, BLOCK):
        outer = first + tl.arange(0, BLOCK)
        matrix_at = dims[:, None] * D + outer[None, :]
        inside = (dims[:, None] < D) & (outer[None, :] < D)
        matrix = tl.load(HIGH + matrix_at, mask=inside, other=0.0)
        back = tl.dot(high, matrix)
        if Y.dtype.element_ty == tl.float32:
            back += tl.dot(low, matrix)
        if not EXACT:
            back += tl.dot(high, tl.load(LOW + matrix_at, mask=inside, other=0.0))
        back *= factor
        kept = real[:, None] & (outer[None, :] < D)
        exact = tl.load(EXACT_OUT + exact_at[:, None] + outer[None, :], mask=kept, other=0.0).to(tl.float32)
        joined = exact + share[:, None] * (back - exact)
        tl.store(OUT + target[:, None] + outer[None, :], joined.to(dtype), mask=kept)


def _block(dim: int) -> int:
    return triton.next_power_of_2(dim) if dim <= 128 else 64


def rotate(x: Tensor, rotation: Rotation, out: Tensor, early: bool = False) -> Tensor:
    """Rotate vectors (batch, heads, tokens, dim) of 16 bits into `out`, a tensor of that shape and any dtype.

    The last axis of both is contiguous, and `out` has its tokens one behind the other. With `early`, a kernel launched
    behind this one may begin before it has ended.
    """
    batch, heads, tokens, dim = x.shape
    matrix = parts(rotation, x.dtype)
    count, rows = batch * heads * tokens, ROWS if batch * heads * tokens > 4096 else 16
    rotate_rows[-(-count // rows),](
        x, matrix.high, matrix.low, out,
        count, heads, tokens, matrix.factor, *x.stride()[:3], *out.stride()[:2],
        D=dim, DP=triton.next_power_of_2(dim), BR=rows, BLOCK=_block(dim), EXACT=matrix.exact, EARLY=early, num_warps=4,
    )  # fmt: skip
    return out


def join(y: Tensor, y_lse: Tensor, exact: Tensor, exact_lse: Tensor, rotation: Rotation) -> Tensor:
    """Join attention over rotated values with attention over exact ones.

    Args:
        y: (batch, heads, tokens, dim) in the rotated space, float32 or 16 bits.
        y_lse: (batch, heads, tokens) log-sum-exp of its scores.
        exact: As `y`, not rotated, 16 bits.
        exact_lse: Of its scores.
        rotation: Of the values.

    Returns:
        (batch, heads, tokens, dim) in the dtype of `exact`, a view of a (batch, tokens, heads, dim) tensor.
    """
    batch, heads, tokens, dim = exact.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=exact.dtype, device=exact.device).transpose(1, 2)
    matrix = parts(rotation, exact.dtype)
    count = batch * heads * tokens
    join_rows[-(-count // ROWS),](
        y, exact, y_lse.contiguous(), exact_lse.contiguous(), matrix.high, matrix.low, out, count, heads, tokens,
        matrix.factor,
        *y.stride()[:3], *exact.stride()[:3], *out.stride()[:3],
        D=dim, DP=triton.next_power_of_2(dim), BR=ROWS, BLOCK=_block(dim), EXACT=matrix.exact, num_warps=4,
    )  # fmt: skip
    return out
