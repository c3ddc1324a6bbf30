"""Rotate, centre, scale, round and pack keys and values on the GPU: one launch for both, into the cache's own storage.

A program takes one group of tokens of one KV head. The rotation is a dot with the matrix (in two 16-bit parts where one
does not hold it exactly), levels are found by comparing with the positive boundaries, and a plane's bytes are sums of
shifted codes, so that nothing is looked up.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernel_view import KernelView
from turboquant.rotation import Rotation

SCALES = {"norm": 0, "matched": 1, "unbiased": 2}
UNGROUPED_TOKENS = 64


@triton.jit
def _half(x):
    """To float16 and back, the greatest finite one where it would overflow."""
    return tl.minimum(x, 65504.0).to(tl.float16)


@triton.jit
def _encode(
    X, x_t, MATRIX, MATRIX_LOW, SIGNS, CENTER, BOUNDS, LEVELS, tokens, first, head, batch, kv_head,
    P0, p0_b, p0_h, P1, p1_b, p1_h, S, s_b, s_h, TOPS, t_b, t_h, MEANS, m_b, m_h, MEAN_TOPS, mt_b, mt_h,
    factor,
    D: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    SIGNED: tl.constexpr, EXACT: tl.constexpr, CENTERED: tl.constexpr, GROUP_MEANS: tl.constexpr,
):  # fmt: skip
    n, d = first + tl.arange(0, T), tl.arange(0, D)
    there = n < tokens
    x = tl.load(X + n[:, None] * x_t + d[None, :], mask=there[:, None], other=0.0)
    if SIGNED:
        x = x * tl.load(SIGNS + d)[None, :].to(x.dtype)
    y = tl.dot(x, tl.load(MATRIX + d[None, :] * D + d[:, None]))
    if not EXACT:
        y += tl.dot(x, tl.load(MATRIX_LOW + d[None, :] * D + d[:, None]))
    y *= factor
    if CENTERED:
        y -= tl.load(CENTER + head * D + d)[None, :].to(tl.float32)
    if GROUP_MEANS:
        mean = tl.sum(y, 0) / T
        top = _half(tl.max(tl.abs(mean), 0))
        wide = top.to(tl.float32)
        steps = tl.floor(tl.where(wide > 0, mean / tl.maximum(wide, 1e-30) * 127, 0.0) + 0.5)
        steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
        group = first // GROUP
        tl.store(MEANS + batch * m_b + kv_head * m_h + group * D + d, steps.to(tl.int8))
        tl.store(MEAN_TOPS + batch * mt_b + kv_head * mt_h + group, top)
        y -= (steps * (wide / 127))[None, :]
    norm = tl.sqrt(tl.sum(y * y, 1))
    unit = y / tl.maximum(norm, 1.1754943508222875e-38)[:, None]

    HALF: tl.constexpr = 2 ** (BITS - 1)
    size = tl.abs(unit)
    index = tl.zeros([T, D], tl.int32)
    level = tl.zeros([T, D], tl.float32) + tl.load(LEVELS + HALF)
    for step in tl.static_range(HALF - 1):
        above = size > tl.load(BOUNDS + HALF + step)
        index += above.to(tl.int32)
        level = tl.where(above, tl.load(LEVELS + HALF + step + 1), level)
    code = tl.where(unit > 0, HALF + index, HALF - 1 - index)
    if SCALE == 1:
        norm = norm / tl.sqrt(tl.sum(level * level, 1))
    elif SCALE == 2:
        norm = norm / tl.maximum(tl.sum(size * level, 1), 1e-6)
    scales = S + batch * s_b + kv_head * s_h + n
    if GROUP:
        top = _half(tl.max(norm, 0))
        wide = top.to(tl.float32)
        steps = tl.floor(tl.where(wide > 0, norm / tl.maximum(wide, 1e-30) * 255, 0.0) + 0.5)
        tl.store(scales, tl.minimum(steps, 255.0).to(tl.uint8), mask=there)
        tl.store(TOPS + batch * t_b + kv_head * t_h + first // GROUP, top)
    else:
        tl.store(scales, _half(norm), mask=there)

    WIDTH: tl.constexpr = BITS if BITS != 3 else 2
    SLICES: tl.constexpr = 8 // WIDTH
    ROW: tl.constexpr = D // SLICES
    low = tl.reshape(code & (2**WIDTH - 1), [T, SLICES, ROW]) << (tl.arange(0, SLICES) * WIDTH)[None, :, None]
    row = tl.arange(0, ROW)
    at = P0 + batch * p0_b + kv_head * p0_h + n[:, None] * ROW + row[None, :]
    tl.store(at, tl.sum(low, 1).to(tl.uint8), mask=there[:, None])
    if BITS == 3:
        high = tl.reshape(code >> 2, [T, 8, D // 8]) << tl.arange(0, 8)[None, :, None]
        column = tl.arange(0, D // 8)
        at = P1 + batch * p1_b + kv_head * p1_h + n[:, None] * (D // 8) + column[None, :]
        tl.store(at, tl.sum(high, 1).to(tl.uint8), mask=there[:, None])


@triton.jit(do_not_specialize=["tokens", "kt_b", "kt_h", "kmt_b", "kmt_h", "vt_b", "vt_h"])
def encode_pair(
    K, V, k_b, k_h, k_t, v_b, v_h, v_t, KEY_MATRIX, KEY_LOW, KEY_SIGNS, VALUE_MATRIX, VALUE_LOW, VALUE_SIGNS, CENTER,
    KEY_BOUNDS, KEY_LEVELS, VALUE_BOUNDS, VALUE_LEVELS, tokens, key_factor, value_factor,
    K0, k0_b, k0_h, K1, k1_b, k1_h, KS, ks_b, ks_h, KT, kt_b, kt_h, KM, km_b, km_h, KMT, kmt_b, kmt_h,
    V0, v0_b, v0_h, V1, v1_b, v1_h, VS, vs_b, vs_h, VT, vt_b, vt_h,
    KV_HEADS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_SCALE: tl.constexpr, VALUE_SCALE: tl.constexpr,
    KEY_SIGNED: tl.constexpr, VALUE_SIGNED: tl.constexpr, KEY_EXACT: tl.constexpr, VALUE_EXACT: tl.constexpr,
    CENTERED: tl.constexpr, GROUP_MEANS: tl.constexpr,
):  # fmt: skip
    """Program (group, head, 0 or 1): keys or values of one group of tokens."""
    first, head = tl.program_id(0) * T, tl.program_id(1)
    batch, kv_head = (head // KV_HEADS).to(tl.int64), head % KV_HEADS
    if tl.program_id(2) == 0:
        _encode(
            K + batch * k_b + kv_head * k_h, k_t, KEY_MATRIX, KEY_LOW, KEY_SIGNS, CENTER, KEY_BOUNDS, KEY_LEVELS,
            tokens, first, head, batch, kv_head,
            K0, k0_b, k0_h, K1, k1_b, k1_h, KS, ks_b, ks_h, KT, kt_b, kt_h, KM, km_b, km_h, KMT, kmt_b, kmt_h,
            key_factor, D, T, KEY_BITS, GROUP, KEY_SCALE, KEY_SIGNED, KEY_EXACT, CENTERED, GROUP_MEANS,
        )  # fmt: skip
    else:
        _encode(
            V + batch * v_b + kv_head * v_h, v_t, VALUE_MATRIX, VALUE_LOW, VALUE_SIGNS, CENTER, VALUE_BOUNDS,
            VALUE_LEVELS, tokens, first, head, batch, kv_head,
            V0, v0_b, v0_h, V1, v1_b, v1_h, VS, vs_b, vs_h, VT, vt_b, vt_h, KM, km_b, km_h, KMT, kmt_b, kmt_h,
            value_factor, D, T, VALUE_BITS, GROUP, VALUE_SCALE, VALUE_SIGNED, VALUE_EXACT, False, False,
        )  # fmt: skip


@lru_cache(maxsize=256)
def _matrix(rotation: Rotation, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, bool]:
    """The matrix in one 16-bit part where its entries allow (+1, -1 times a factor), otherwise in two."""
    matrix = rotation.matrix
    whole = matrix * matrix.shape[0] ** 0.5
    if bool((whole.abs() - 1).abs().max() < 1e-5):
        signs = whole.round().to(dtype)
        return signs, signs, matrix.shape[0] ** -0.5, True
    high = matrix.to(dtype)
    return high, (matrix - high.float()).to(dtype), 1.0, False


def unsupported(states: Tensor, keys: KernelView | None, values: KernelView | None) -> str | None:
    """Return why these kernels cannot encode, or None where they can."""
    if keys is None or values is None:
        return "the method has no kernel"
    dim = states.shape[-1]
    if states.dtype not in (torch.float16, torch.bfloat16) or dim not in (64, 128, 256):
        return f"{states.dtype} vectors of {dim}"
    if keys.signs is not None or values.center is not None or keys.group_size != values.group_size:
        return "a QJL stage or centred values"
    if not (1 <= keys.bits <= 4 and 1 <= values.bits <= 4) or values.rotation.matrix.shape[0] != dim:
        return f"{keys.bits} and {values.bits} bits"
    return None


def encode(
    key_states: Tensor,
    value_states: Tensor,
    keys: KernelView,
    values: KernelView,
) -> None:
    """Quantize vectors (batch, kv_heads, tokens, dim) into the storage that `keys` and `values` show.

    The center is read, not computed. Tokens are whole groups, all of them real.
    """
    batch, heads, tokens, dim = key_states.shape
    group = keys.group_size
    each = group or UNGROUPED_TOKENS
    key_states, value_states = (x if x.stride(3) == 1 else x.contiguous() for x in (key_states, value_states))
    arguments: list[Tensor | int | float] = []
    key_matrix = _matrix(keys.rotation, key_states.dtype)
    value_matrix = _matrix(values.rotation, key_states.dtype)
    for matrix, view in ((key_matrix, keys), (value_matrix, values)):
        arguments += [matrix[0], matrix[1], matrix[0] if view.rotation.signs is None else view.rotation.signs]
    none = key_states  # stands where a kernel reads nothing

    def place(tensor: Tensor | None) -> list[Tensor | int | float]:
        return [none, 0, 0] if tensor is None else [tensor, tensor.stride(0), tensor.stride(1)]

    encode_pair[-(-tokens // each), batch * heads, 2](
        key_states, value_states, *key_states.stride()[:3], *value_states.stride()[:3], *arguments,
        none if keys.center is None else keys.center.contiguous(),
        keys.boundaries, keys.codebook, values.boundaries, values.codebook, tokens,
        key_matrix[2], value_matrix[2],
        *place(keys.planes[0]), *place(keys.planes[-1]), *place(keys.scales), *place(keys.tops),
        *place(keys.means), *place(keys.mean_tops),
        *place(values.planes[0]), *place(values.planes[-1]), *place(values.scales), *place(values.tops),
        KV_HEADS=heads, D=dim, T=each, GROUP=group, KEY_BITS=keys.bits, VALUE_BITS=values.bits,
        KEY_SCALE=SCALES[keys.scale], VALUE_SCALE=SCALES[values.scale],
        KEY_SIGNED=keys.rotation.signs is not None, VALUE_SIGNED=values.rotation.signs is not None,
        KEY_EXACT=key_matrix[3], VALUE_EXACT=value_matrix[3], CENTERED=keys.center is not None,
        GROUP_MEANS=keys.means is not None, num_warps=4,
    )  # fmt: skip
