"""Long calls on top of packed tokens: the prefix is dequantized, a bounded part at a time, for torch's own attention.

The prefix is everything before the call's own tokens. It is read in the rotated space, where the queries go once: parts
of packed keys and values are dequantized there, and the exact tokens before the call (sinks, window) are rotated. No
mask is needed for it. The call's own tokens are a square with a causal mask. All are joined by their log-sum-exps, and
the sum of values is rotated back in the same step. The workspace does not grow with the context: `WORKSPACE` bytes of
keys and as many of values, on top of what attention takes.

`attend` launches, in this order: torch's attention of the call to itself (causal); `rotate_rows` for the queries; for
each part of the prefix `dequantize_tile` for keys and for values, at the first also `rotate_rows` for the exact tokens,
then torch's attention; `join_rows`. `dequantize_tile` has the grid (tile of tokens, KV head times batch), reads what a
`KernelView` shows and writes OUT (batch, kv_heads, room, D). The last axes of all tensors are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from turboquant.kernels.scoring import Scoring
from turboquant.kernels.triton import levels
from turboquant.kernels.triton.attention import INTERPRETED, _two
from turboquant.kernels.triton.levels import halves, load_table, quarters
from turboquant.kernels.triton.rotate import join, rotate
from turboquant.quant.quantizer import KernelView

WORKSPACE = 2**27
"""Bytes of dequantized keys (and of values) held at once."""
TILE = 64


@triton.jit
def _offset(M, MT, CENTER, group, d, inside, D: tl.constexpr, CENTERED: tl.constexpr, GROUP_MEANS: tl.constexpr):
    """Mean of each token's group plus center, at dims `d`; `group` has one entry where a tile is within one group."""
    x = tl.zeros([1, 1], tl.float32)
    if GROUP_MEANS:
        mean = tl.load(M + group[:, None] * D + d[None, :], mask=inside, other=0).to(tl.float32)
        x = x + mean * (tl.load(MT + group).to(tl.float32) / 127)[:, None]
    if CENTERED:
        x = x + tl.load(CENTER + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["first", "count", "t_b", "t_h", "mt_b", "mt_h"])
def dequantize_tile(
    # Each with its strides over batch and KV heads: planes, scales, tops, means and their tops. Then the center.
    P0, p0_b, p0_h, P1, p1_b, p1_h, S, s_b, s_h, T, t_b, t_h, M, m_b, m_h, MT, mt_b, mt_h, CENTER,
    # `levels.tables` and `levels.late_bytes`; the output.
    LUT, TABLE, LATE, OUT, o_b, o_h,
    # The first token to read, how many, and the factor on stored scales.
    first, count, factor,
    # SHARED: tokens that share a top (0: none); BN: tokens a tile; KW: bytes of a slice up to a power of two.
    KV_HEADS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    CENTERED: tl.constexpr, GROUP_MEANS: tl.constexpr, BN: tl.constexpr, KW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (tile, head): `BN` vectors from `first` on, in the rotated space, as 16-bit numbers."""
    head = tl.program_id(1)
    batch, kv_head = (head // KV_HEADS).to(tl.int64), head % KV_HEADS
    SLICE: tl.constexpr = D // 2 if BITS == 4 else D // 4
    ROW: tl.constexpr = D // 2 if BITS == 4 else D // 8 if BITS == 1 else D // 4
    begin = tl.program_id(0) * BN
    place, j = begin + tl.arange(0, BN), tl.arange(0, KW)
    n, there = first + place, place < count
    inside = there[:, None] & (j[None, :] < SLICE)
    codes = tl.load(P0 + batch * p0_b + kv_head * p0_h + n[:, None] * ROW + (j % ROW)[None, :], mask=inside, other=0)
    scale = tl.load(S + batch * s_b + kv_head * s_h + n, mask=there, other=0).to(tl.float32) * factor
    if SHARED:
        scale *= tl.load(T + batch * t_b + kv_head * t_h + n // SHARED, mask=there, other=0.0).to(tl.float32)
    column = tl.zeros([BN], tl.int32)  # loaded a token, as in `decode.split`, though all read the same column
    ta, tb, tc, td = load_table(TABLE, column)
    table = (ta[:, None], tb[:, None], tc[:, None], td[:, None])
    M += batch * m_b + kv_head * m_h
    MT += batch * mt_b + kv_head * mt_h
    CENTER += head * D
    OUT += batch * o_b + kv_head * o_h
    ONE: tl.constexpr = GROUP > 0 and GROUP % BN == 0  # a tile lies within one group
    if ONE:
        group = (first + begin) // GROUP + tl.arange(0, 1)
        known = (j < SLICE)[None, :]
    else:
        group = tl.where(there, n // (GROUP if GROUP else 1), 0)
        known = inside
    if BITS == 4:
        k0, k1 = halves(codes, LUT, table, ASM)
    else:
        high = codes
        if BITS == 3:
            at = P1 + batch * p1_b + kv_head * p1_h + n[:, None] * (D // 8) + (j % (D // 8))[None, :]
            high = tl.load(at, mask=inside, other=0)
        k0, k1, k2, k3 = quarters(codes, high, tl.load(LATE + j)[None, :], LUT, table, BITS, ASM)
    # x~ = scale * level + what was subtracted, slice by slice of the dims; still rotated.
    x = k0.to(tl.float32) * scale[:, None] + _offset(M, MT, CENTER, group, j, known, D, CENTERED, GROUP_MEANS)
    target = OUT + place[:, None].to(tl.int64) * D + j[None, :]
    dtype = OUT.dtype.element_ty
    tl.store(target, x.to(dtype), mask=inside)
    x = k1.to(tl.float32) * scale[:, None] + _offset(M, MT, CENTER, group, SLICE + j, known, D, CENTERED, GROUP_MEANS)
    tl.store(target + SLICE, x.to(dtype), mask=inside)
    if BITS != 4:
        d = 2 * SLICE + j
        x = k2.to(tl.float32) * scale[:, None] + _offset(M, MT, CENTER, group, d, known, D, CENTERED, GROUP_MEANS)
        tl.store(target + 2 * SLICE, x.to(dtype), mask=inside)
        d = 3 * SLICE + j
        x = k3.to(tl.float32) * scale[:, None] + _offset(M, MT, CENTER, group, d, known, D, CENTERED, GROUP_MEANS)
        tl.store(target + 3 * SLICE, x.to(dtype), mask=inside)


def dequantize(view: KernelView, first: int, count: int, out: Tensor) -> Tensor:
    """Write vectors first..first+count in the rotated space into the front of `out` (batch, kv_heads, room, dim).

    `first` is a whole number of groups.
    """
    batch, heads = view.scales.shape[:2]
    dim = view.rotation.matrix.shape[0]
    lut, table = levels.tables(view.codebook, dim)

    def place(tensor: Tensor | None) -> tuple[Tensor, int, int]:
        return (lut if tensor is None else tensor, *_two(tensor))

    dequantize_tile[-(-count // TILE), batch * heads](
        *place(view.planes[0]), *place(view.planes[-1]), *place(view.scales), *place(view.tops), *place(view.means),
        *place(view.mean_tops), lut if view.center is None else view.center.contiguous(), lut, table,
        levels.late_bytes(dim, out.device), out, *_two(out), first, count, dim**-0.5 / (255 if view.shared else 1),
        KV_HEADS=heads, D=dim, BITS=view.bits, GROUP=view.group_size, SHARED=view.shared,
        CENTERED=view.center is not None, GROUP_MEANS=view.means is not None, BN=TILE,
        KW=triton.next_power_of_2(dim // 2 if view.bits == 4 else dim // 4),
        ASM=not INTERPRETED, num_warps=4,
    )  # fmt: skip
    return out


def _attention(query: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Torch's fastest attention that tells its log-sum-exp (batch, heads, queries): cuDNN's, else flash."""
    if can_use_cudnn_attention(SDPAParams(query, keys, values, None, 0.0, causal, True)):
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, keys, values, None, True, 0.0, causal, False, scale=scaling
        )
        return output, lse.reshape(query.shape[:3])
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
    scoring: Scoring,
    starts: Tensor | None = None,
) -> Tensor:
    """Attend from a chunk of tokens to exact and packed ones; see `kernels.attention.attend`.

    Rows that are padded are served one after the other. A learned sink takes its share at the end.

    Returns:
        (batch, heads, queries, dim) in the dtype of the query, a view of a (batch, queries, heads, dim) tensor.
    """
    query = query if query.stride(3) == 1 else query.contiguous()
    if starts is None:
        return _attend(query, exact_keys, exact_values, keys, values, scoring, 0)
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for row, start in enumerate(starts.tolist()):
        part = slice(row, row + 1)
        states = (query[part], exact_keys[part], exact_values[part], keys.row(row), values.row(row))
        out[part] = _attend(*states, scoring, start).transpose(1, 2)
    return out.transpose(1, 2)


def _attend(
    query: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    keys: KernelView,
    values: KernelView,
    scoring: Scoring,
    start: int,
) -> Tensor:
    """Attend to the packed tokens from `start` on, and to the exact ones."""
    batch, _, count, dim = query.shape
    scaling = scoring.scaling
    kv_heads, before = exact_keys.shape[1], exact_keys.shape[2] - count
    # The call's own tokens are the last of the exact ones, and the only ones for which causality says anything.
    own, own_lse = _attention(query, exact_keys[:, :, before:], exact_values[:, :, before:], True, scaling)
    rotated = rotate(query, keys.rotation, torch.empty_like(query, memory_format=torch.contiguous_format))
    unit = keys.group_size or 1
    # Parts are whole tiles and whole groups; 2 bytes a number.
    part = max(1024, WORKSPACE // (2 * batch * kv_heads * dim)) // TILE * TILE // unit * unit
    spaces = query.new_empty(2, batch, kv_heads, min(part, keys.tokens) + before, dim)
    joined: Tensor | None = None
    joined_lse = own_lse
    start = min(start, keys.tokens)  # a row that is all pads reads its exact tokens alone
    for first in range(min(start, keys.tokens - unit) // unit * unit, keys.tokens, part):
        tokens, skipped = min(part, keys.tokens - first), max(0, start - first)
        for space, view in zip(spaces, (keys, values), strict=True):
            dequantize(view, first, tokens, space)
        if joined is None and before:
            rotate(exact_keys[:, :, :before], keys.rotation, spaces[0][:, :, tokens : tokens + before])
            rotate(exact_values[:, :, :before], values.rotation, spaces[1][:, :, tokens : tokens + before])
            tokens += before
        if skipped == tokens:  # nothing but pads, and no exact token before the call
            return _with_sinks(own, own_lse, scoring)
        read = spaces[:, :, :, skipped:tokens]
        output, lse = _attention(rotated, read[0], read[1], False, scaling)
        if joined is None:
            joined, joined_lse = output, lse
        else:
            # Each part's weight is its share of the sum of exponentials of all scores so far.
            both = torch.logaddexp(joined_lse, lse)
            joined = joined.float() * (joined_lse - both).exp().unsqueeze(-1)
            joined += output * (lse - both).exp().unsqueeze(-1)
            joined_lse = both
    assert joined is not None
    output = join(joined, joined_lse, own, own_lse, values.rotation)
    return output if scoring.sinks is None else _with_sinks(output, torch.logaddexp(joined_lse, own_lse), scoring)


def attend_exact(query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor | None:
    """Attend to plain tensors from all of their tokens, causally, or from the last one; None where that is not so."""
    rows, tokens = query.shape[2], keys.shape[2]
    same = query.dtype == keys.dtype and query.dtype in (torch.float16, torch.bfloat16)
    if scoring.cap is not None or rows not in (1, tokens) or not same or values.shape[3] != query.shape[3]:
        return None
    return _with_sinks(*_attention(query, keys, values, rows > 1, scoring.scaling), scoring)


def _with_sinks(output: Tensor, lse: Tensor, scoring: Scoring) -> Tensor:
    """Take from each head's output the share of its learned sink, from the log-sum-exp (batch, heads, queries)."""
    if scoring.sinks is None:
        return output
    return output * (lse - scoring.sinks[:, None]).sigmoid().unsqueeze(-1).to(output.dtype)


def unsupported(query: Tensor, keys: KernelView | None, values: KernelView | None, scoring: Scoring) -> str | None:
    """Return why a call that `attention.unsupported` lets pass has no kernels here, or None where it has."""
    assert keys is not None
    assert values is not None
    if keys.signs is not None:
        return "keys have a QJL stage"
    if scoring.cap is not None:
        return "torch's attention does not cap scores"
    if values.rotation.matrix.shape[0] != query.shape[-1]:
        return "torch's attention takes values of the keys' dims"
    return None
