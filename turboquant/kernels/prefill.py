"""Long calls on top of packed tokens: the prefix is dequantized, a bounded part at a time, for flash attention.

Parts are dequantized in the rotated space, where the queries go once; the sum of values comes back once. Each part's
output is joined to the others by its log-sum-exp, so the workspace does not grow with the context: `WORKSPACE` bytes
of keys and as many of values, on top of what flash attention takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernel_view import KernelView
from turboquant.kernels import levels
from turboquant.kernels.attention import _rows, _two

WORKSPACE = 2**27
"""Bytes of dequantized keys (and of values) held at once."""


@triton.jit(do_not_specialize=["first", "count", "t_b", "t_h", "mt_b", "mt_h"])
def dequantize_tile(
    P0, p0_b, p0_h, P1, p1_b, p1_h, S, s_b, s_h, T, t_b, t_h, M, m_b, m_h, MT, mt_b, mt_h, CENTER, LUT, OUT,
    first, count, factor,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    CENTERED: tl.constexpr, GROUP_MEANS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (tile, head): `BN` vectors from `first` on, in the rotated space, as 16-bit numbers."""
    head = tl.program_id(1)
    batch, kv_head = (head // KV_HEADS).to(tl.int64), head % KV_HEADS
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    n, d = first + place, tl.arange(0, DP)
    inside = (place[:, None] < count) & (d[None, :] < D)
    WIDTH: tl.constexpr = BITS if BITS != 3 else 2
    ROW: tl.constexpr = D * WIDTH // 8
    codes = tl.load(P0 + batch * p0_b + kv_head * p0_h + n[:, None] * ROW + (d % ROW)[None, :], mask=inside, other=0)
    code = (codes >> (d // ROW * WIDTH)[None, :].to(tl.uint8)) & (2**WIDTH - 1)
    if BITS == 3:
        column = P1 + batch * p1_b + kv_head * p1_h + n[:, None] * (D // 8) + (d % (D // 8))[None, :]
        high = tl.load(column, mask=inside, other=0)
        code |= ((high >> (d // (D // 8))[None, :].to(tl.uint8)) & 1) << 2
    x = tl.load(LUT + code).to(tl.float32)
    scale = tl.load(S + batch * s_b + kv_head * s_h + n, mask=place < count, other=0).to(tl.float32) * factor
    if GROUP:
        scale *= tl.load(T + batch * t_b + kv_head * t_h + n // GROUP, mask=place < count, other=0.0).to(tl.float32)
    x *= scale[:, None]
    if GROUP_MEANS:
        group = n // GROUP
        mean = tl.load(M + batch * m_b + kv_head * m_h + group[:, None] * D + d[None, :], mask=inside, other=0)
        top = tl.load(MT + batch * mt_b + kv_head * mt_h + group, mask=place < count, other=0.0).to(tl.float32)
        x += mean.to(tl.float32) * (top / 127)[:, None]
    if CENTERED:
        x += tl.load(CENTER + head * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    at = OUT + (head.to(tl.int64) * count + place)[:, None] * D + d[None, :]
    tl.store(at, x.to(OUT.dtype.element_ty), mask=inside)


def dequantize(view: KernelView, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return vectors first..first+count in the rotated space, (batch, kv_heads, count, dim)."""
    batch, heads = view.scales.shape[:2]
    dim = view.rotation.matrix.shape[0]
    out = torch.empty(batch, heads, count, dim, dtype=dtype, device=view.scales.device)
    lut, _ = levels.tables(view.codebook, dim)
    none = lut

    def place(tensor: Tensor | None) -> tuple[Tensor, int, int]:
        return (none if tensor is None else tensor, *_two(tensor))

    tile = 32
    dequantize_tile[-(-count // tile), batch * heads](
        *place(view.planes[0]), *place(view.planes[-1]), *place(view.scales), *place(view.tops), *place(view.means),
        *place(view.mean_tops), none if view.center is None else view.center.contiguous(), lut, out,
        first, count, dim**-0.5 / (255 if view.group_size else 1),
        KV_HEADS=heads, D=dim, DP=triton.next_power_of_2(dim), BITS=view.bits, GROUP=view.group_size,
        CENTERED=view.center is not None, GROUP_MEANS=view.means is not None, BN=tile, num_warps=4,
    )  # fmt: skip
    return out


def _flash(query: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Flash attention, causal from the lower right corner, with its log-sum-exp (batch, heads, queries)."""
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, causal, False, scale=scaling
    )
    return output, lse[:, :, : query.shape[2]]


def attend(
    query: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    keys: KernelView,
    values: KernelView,
    scaling: float,
) -> Tensor:
    """Attend from a chunk of tokens to exact and packed ones; see `kernels.attention.attend`.

    Returns:
        (batch, heads, queries, dim) in the dtype of the query.
    """
    batch, _, _, dim = query.shape
    exact, lse = _flash(query, _rows(exact_keys), _rows(exact_values), True, scaling)
    rotated = keys.rotation.apply(query.float()).to(query.dtype)
    part = max(1024, WORKSPACE // (2 * batch * keys.scales.shape[1] * dim) // 64 * 64)
    joined: Tensor | None = None
    for first in range(0, keys.tokens, part):
        count = min(part, keys.tokens - first)
        part_keys, part_values = (dequantize(view, first, count, query.dtype) for view in (keys, values))
        output, own = _flash(rotated, part_keys, part_values, False, scaling)
        if joined is None:
            joined, packed_lse = output.float(), own
        else:
            both = torch.logaddexp(packed_lse, own)
            joined = joined * (packed_lse - both).exp().unsqueeze(-1) + output * (own - both).exp().unsqueeze(-1)
            packed_lse = both
    assert joined is not None
    share = torch.sigmoid(packed_lse - lse).unsqueeze(-1)
    return (values.rotation.inverse(joined) * share + exact * (1 - share)).to(query.dtype)
