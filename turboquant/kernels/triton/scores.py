"""Attention scores alone, straight from packed keys: what a metric or a sparse attention asks, without the values.

Behind `rotate_rows`, one launch: each program reads `SPAN` tokens of one KV head for all its query rows. The means of
the span's groups are scored first, by one small dot, and stay in registers.

`score_keys` has the grid (span, KV head times batch), reads rotated queries (KV heads times batch, ROWS, D) in float32
and what a `KernelView` shows of the keys, and writes OUT (KV heads times batch, ROWS, tokens).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernels.triton import attention, levels
from turboquant.kernels.triton.decode import _scale
from turboquant.kernels.triton.levels import halves, load_table, quarters
from turboquant.kernels.triton.rotate import rotate
from turboquant.quant.quantizer import KernelView

MAX_GROUPS = 16
"""The most groups that a program reads: the rows of one dot."""
REGISTERS, PROGRAMS = 128, 16
"""Registers a thread where they suffice, and the programs of a warp that a multiprocessor then holds."""


@triton.jit(do_not_specialize=["tokens", "t_b", "t_h", "mt_b", "mt_h"])
def score_keys(
    # Rotated queries; planes, scales, tops, means and their tops, each with its strides; center; the output.
    Q, K, k_b, k_h, K1, k1_b, k1_h, S, s_b, s_h, T, t_b, t_h, M, m_b, m_h, MT, mt_b, mt_h, CENTER, OUT,
    # `levels.tables` and `levels.late_bytes`; tokens; factors on stored scales (scaling included) and on the rest.
    LUT, TABLE, LATE, tokens, factor, scaling,
    # BM: query rows padded, BN: tokens a tile, SHARED: tokens that share a top, GROUPS: means scored at once.
    KV_HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    GROUP_MEANS: tl.constexpr, CENTERED: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr, KW: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (span, head): scores of the query rows, (rows, tokens) of each head."""
    head = tl.program_id(1)
    batch, kv_head = (head // KV_HEADS).to(tl.int64), head % KV_HEADS
    SLICE: tl.constexpr = D // 2 if BITS == 4 else D // 4
    ROW: tl.constexpr = D // 2 if BITS == 4 else D // 8 if BITS == 1 else D // 4
    rows, token, j = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, KW)
    real = rows < ROWS
    ta, tb, tc, td = load_table(TABLE, token)
    table = (ta[:, None], tb[:, None], tc[:, None], td[:, None])
    late = tl.load(LATE + j)[None, :]
    if EARLY:  # tables are no work of the rotation in front; the queries are
        tl.extra.cuda.gdc_wait()
    Q += head * ROWS * D + rows[None, :] * D
    within = (j[:, None] < SLICE) & real[None, :]
    q0 = tl.load(Q + j[:, None], mask=within, other=0.0).to(tl.float16)
    q1 = tl.load(Q + SLICE + j[:, None], mask=within, other=0.0).to(tl.float16)
    if BITS != 4:
        q2 = tl.load(Q + 2 * SLICE + j[:, None], mask=within, other=0.0).to(tl.float16)
        q3 = tl.load(Q + 3 * SLICE + j[:, None], mask=within, other=0.0).to(tl.float16)
    dims = tl.arange(0, DP)
    if CENTERED or GROUP_MEANS:
        q = tl.load(Q + dims[:, None], mask=(dims[:, None] < D) & real[None, :], other=0.0) * scaling
    if CENTERED:
        center = tl.load(CENTER + head * D + dims, mask=dims < D, other=0.0).to(tl.float32)
        bias = tl.sum(q * center[:, None], 0)
    first = tl.program_id(0) * SPAN
    K += batch * k_b + kv_head * k_h
    K1 += batch * k1_b + kv_head * k1_h
    S += batch * s_b + kv_head * s_h
    T += batch * t_b + kv_head * t_h
    if GROUP_MEANS:
        M += batch * m_b + kv_head * m_h
        MT += batch * mt_b + kv_head * mt_h
        group = first // GROUP + tl.arange(0, GROUPS)
        there = group * GROUP < tl.minimum(tokens, first + SPAN)
        means = tl.load(M + group[:, None] * D + dims[None, :], mask=there[:, None] & (dims[None, :] < D), other=0).to(
            tl.float16
        )
        q_high = q.to(tl.float16)
        # Means are large beside what is left of a key, so queries go in as fp16 and what that leaves out.
        offsets = tl.dot(means, q_high) + tl.dot(means, (q - q_high.to(tl.float32)).to(tl.float16))
        offsets *= (tl.load(MT + group, mask=there, other=0.0).to(tl.float32) / 127)[:, None]
    OUT += head.to(tl.int64) * ROWS * tokens
    for start in tl.range(first, tl.minimum(first + SPAN, tokens), BN):
        n = start + token
        inside = n < tokens
        if GROUP and SLICE == KW:  # codes are packed in whole groups
            codes = tl.load(K + n[:, None] * ROW + (j % ROW)[None, :])
        else:
            codes = tl.load(
                K + n[:, None] * ROW + (j % ROW)[None, :], mask=inside[:, None] & (j[None, :] < SLICE), other=0
            )
        if BITS == 4:
            k0, k1 = halves(codes, LUT, table, ASM)
            s = tl.dot(k0, q0) + tl.dot(k1, q1)
        else:
            high = codes
            if BITS == 3:
                at = K1 + n[:, None] * (D // 8) + (j % (D // 8))[None, :]
                if GROUP and SLICE == KW:
                    high = tl.load(at)
                else:
                    high = tl.load(at, mask=inside[:, None] & (j[None, :] < SLICE), other=0)
            k0, k1, k2, k3 = quarters(codes, high, late, LUT, table, BITS, ASM)
            s = tl.dot(k1, q1, tl.dot(k0, q0)) + tl.dot(k3, q3, tl.dot(k2, q2))
        s *= _scale(S, T, n, tokens, factor, SHARED)[:, None]
        if CENTERED:
            s += bias[None, :]
        if GROUP_MEANS:
            # Registers cannot be indexed: the group's row is picked by a sum over all with the others at 0.
            which = tl.arange(0, GROUPS) == (start - first) // GROUP
            s += tl.sum(tl.where(which[:, None], offsets, 0.0), 0)[None, :]
        place = OUT + rows[None, :].to(tl.int64) * tokens + n[:, None]
        tl.store(place, s.to(OUT.dtype.element_ty), mask=inside[:, None] & real[None, :])


def unsupported(query: Tensor, keys: KernelView | None) -> str | None:
    """Return why the kernel cannot read these keys, or None where it can."""
    if keys is not None and (keys.signs is not None or (keys.group_size and keys.group_size % 32)):
        return "keys have a QJL stage, or groups that a tile of 32 tokens does not divide"
    return attention.unsupported(query, keys, keys and _as_values(keys)) or (
        None if attention.few_rows(query, keys.scales.shape[1]) else "too many query rows"  # type: ignore[union-attr]
    )


def _as_values(keys: KernelView) -> KernelView:
    """Keys without what values never have, so that one function says what can be read."""
    return KernelView(keys.planes, keys.bits, keys.codebook, keys.rotation, keys.scales, keys.group_size)


def scores(query: Tensor, keys: KernelView, scaling: float) -> Tensor:
    """Score packed keys; see `kernels.scores.scores`."""
    batch, heads, queries, dim = query.shape
    kv_heads, count = keys.scales.shape[1], keys.tokens
    rows = heads // kv_heads * queries
    early = attention._launches_early(query.device)
    rotated = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    rotate(query if query.stride(3) == 1 else query.contiguous(), keys.rotation, rotated, early)
    out = torch.empty(batch, kv_heads, rows, count, dtype=query.dtype, device=query.device)
    lut, table = levels.tables(keys.codebook, dim)

    def place(tensor: Tensor | None) -> tuple[Tensor, int, int]:
        return (lut, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))

    tile, group = 32, keys.group_size
    size = group or 64
    # Spans are as long as they can be while programs fill the GPU.
    share = batch * kv_heads * count // (size * PROGRAMS * attention._multiprocessors(query.device))
    span = size * min(MAX_GROUPS, max(1, share))
    score_keys[-(-count // span), batch * kv_heads](
        rotated, *place(keys.planes[0]), *place(keys.planes[-1]), *place(keys.scales), *place(keys.tops),
        *place(keys.means), *place(keys.mean_tops),
        lut if keys.center is None else keys.center.contiguous(), out, lut, table, levels.late_bytes(dim, query.device),
        count, scaling * dim**-0.5 / (255 if keys.shared else 1), scaling,
        KV_HEADS=kv_heads, ROWS=rows, D=dim, DP=triton.next_power_of_2(dim), BITS=keys.bits,
        BM=max(8, triton.next_power_of_2(rows)), BN=tile, SPAN=span, GROUP=group, SHARED=keys.shared,
        GROUP_MEANS=keys.means is not None,
        CENTERED=keys.center is not None, GROUPS=MAX_GROUPS,
        ASM=not attention.INTERPRETED,
        KW=triton.next_power_of_2(dim // 2 if keys.bits == 4 else dim // 4), EARLY=early,
        launch_pdl=early, num_warps=1, num_stages=3, 
        maxnreg=REGISTERS if rows <= 8 and dim in (64, 128) else None,
    )  # fmt: skip
    return out.view(batch, heads, queries, count)
