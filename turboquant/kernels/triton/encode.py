"""Rotate, centre, scale, round and pack keys and values on the GPU: one launch for both, into the cache's own storage.

A program takes one group of tokens of one KV head. The rotation is a dot with the matrix (in two 16-bit parts where one
does not hold it exactly), levels are found by comparing with the positive boundaries, and a plane's bytes are sums of
shifted codes, so that nothing is looked up.

`encode_pair` has the grid (group of tokens, KV head times batch, keys or values) and calls `_encode`, which does what
`TurboQuantMSE._encode` does. It reads vectors (batch, kv_heads, tokens, D) of 16 bits and writes a `KernelView`: planes
(batch, kv_heads, tokens, bytes), scales (batch, kv_heads, tokens), tops, means and mean tops (batch, kv_heads, groups).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernels.triton.rotations import parts
from turboquant.quant.grouping import FP16_MAX, FP16_TINY, OUTLIER
from turboquant.quant.quantizer import KernelView

SCALES = {"norm": 0, "matched": 1, "unbiased": 2}
UNGROUPED_TOKENS = 64
WARPS = 4
INTERPRETED = bool(triton.knobs.runtime.interpret)
GREATEST, LEAST, FAR = tl.constexpr(FP16_MAX), tl.constexpr(FP16_TINY), tl.constexpr(float(OUTLIER))
LEAST_STEP = tl.constexpr(255 // OUTLIER + 1)
"""Of 255, the least scale in a group: as in `_stored_scales` of the quantizers."""


def _search_assembly(steps: int) -> str:
    """Count the boundaries below |x| and sum the level, in arithmetic: predicates would be packed into registers."""
    lines = [
        ".reg .f32 a, t, n;",
        "abs.f32 a, $2;",
        "mov.f32 n, 0f4B000000;",  # 2^23: the sum's low bits are the count
        f"mov.f32 $1, ${3 + steps};",
    ]
    for step in range(steps):
        lines += [
            f"set.gt.f32.f32 t, a, ${3 + step};",
            "add.f32 n, n, t;",
            f"fma.rn.f32 $1, t, ${4 + steps + step}, $1;",
        ]
    return "{ " + "\n".join([*lines, "mov.b32 $0, n;", "and.b32 $0, $0, 7;"]) + " }"


def _search_constraints(steps: int) -> str:
    return ",".join(["=&r", "=&f", "f"] + ["f"] * (2 * steps + 1))


_SEARCH = {steps: (_search_assembly(steps), _search_constraints(steps)) for steps in (1, 3, 7)}
ASM_2, CONSTRAINTS_2 = (tl.constexpr(part) for part in _SEARCH[1])
ASM_3, CONSTRAINTS_3 = (tl.constexpr(part) for part in _SEARCH[3])
ASM_4, CONSTRAINTS_4 = (tl.constexpr(part) for part in _SEARCH[7])


@triton.jit
def _nearest(x, B, L, BITS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr):
    """Index of |x| among the positive levels L, whose boundaries are B, and the level."""
    if ASM and BITS == 2:
        return tl.inline_asm_elementwise(
            ASM_2, CONSTRAINTS_2, [x, B[0], L[0], L[1] - L[0]], (tl.int32, tl.float32), is_pure=True, pack=1
        )
    elif ASM and BITS == 3:
        return tl.inline_asm_elementwise(
            ASM_3, CONSTRAINTS_3, [x, B[0], B[1], B[2], L[0], L[1] - L[0], L[2] - L[1], L[3] - L[2]],
            (tl.int32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    elif ASM and BITS == 4:
        return tl.inline_asm_elementwise(
            ASM_4, CONSTRAINTS_4,
            [x, B[0], B[1], B[2], B[3], B[4], B[5], B[6], L[0], L[1] - L[0], L[2] - L[1], L[3] - L[2], L[4] - L[3],
             L[5] - L[4], L[6] - L[5], L[7] - L[6]],
            (tl.int32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        index = tl.zeros([T, D], tl.int32)
        level = tl.full([T, D], 0.0, tl.float32) + L[0]
        for step in tl.static_range(2 ** (BITS - 1) - 1):
            above = tl.abs(x) > B[step]
            index += above.to(tl.int32)
            level = tl.where(above, L[step + 1], level)
        return index, level


@triton.jit
def _half(x):
    """To float16 and back, the greatest finite one where it would overflow."""
    return tl.minimum(x, 65504.0).to(tl.float16)


@triton.jit
def _encode(
    # Vectors of one head and the stride of a token; rotation as `rotations.Parts`; center; positive boundaries, levels.
    X, x_t, MATRIX, MATRIX_LOW, CENTER, BOUNDS, LEVELS,
    # Tokens in all and where this group begins; the head, as a number and as row of the batch and KV head.
    tokens, first, head, batch, kv_head,
    # Written, each with its strides over batch and KV heads: planes, scales, tops, means and their tops.
    P0, p0_b, p0_h, P1, p1_b, p1_h, S, s_b, s_h, TOPS, t_b, t_h, MEANS, m_b, m_h, MEAN_TOPS, mt_b, mt_h,
    # Two flags: the format does not hold this group; the center is far longer than most of its vectors.
    FLAGS,
    # Of the rotation's parts.
    factor,
    # head_dim, tokens of this program, bits, tokens a group (0: none), a number of SCALES; then switches.
    D: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    EXACT: tl.constexpr, CENTERED: tl.constexpr, GROUP_MEANS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    n, d = first + tl.arange(0, T), tl.arange(0, D)
    there = n < tokens
    x = tl.load(X + n[:, None] * x_t + d[None, :], mask=there[:, None], other=0.0)
    # y = Pi x (Algorithm 1, Quant)
    y = tl.dot(x, tl.load(MATRIX + d[None, :] * D + d[:, None]))
    if not EXACT:
        y += tl.dot(x, tl.load(MATRIX_LOW + d[None, :] * D + d[:, None]))
    y *= factor
    unfit = first < 0
    if CENTERED:
        center = tl.load(CENTER + head * D + d).to(tl.float32)
        short = tl.sqrt(tl.sum(y * y, 1)) * FAR < tl.sqrt(tl.sum(center * center, 0))
        held = tl.sum(there.to(tl.int32), 0)
        tl.atomic_or(FLAGS + 1, 1, mask=2 * tl.sum((short & there).to(tl.int32), 0) >= held)
        y -= center[None, :]
    if GROUP_MEANS:
        mean = tl.sum(y, 0) / T  # groups are whole and without pads, as `encode` asks
        top = _half(tl.max(tl.abs(mean), 0))
        wide = top.to(tl.float32)
        steps = tl.floor(mean * tl.where(wide > 0, 127 / tl.maximum(wide, 1e-30), 0.0) + 0.5)
        steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)  # a top beyond fp16 was cut
        unfit |= wide >= GREATEST
        group = first // GROUP
        tl.store(MEANS + batch * m_b + kv_head * m_h + group * D + d, steps.to(tl.int8))
        tl.store(MEAN_TOPS + batch * mt_b + kv_head * mt_h + group, top)
        y -= (steps * (wide / 127))[None, :]  # the mean as it is stored, so that codes make up for its rounding
    norm = tl.sqrt(tl.sum(y * y, 1))
    unit = y * (1 / tl.maximum(norm, 1e-30))[:, None]

    # idx_j = argmin |y_j - c| (Algorithm 1, Quant), of the magnitude: levels are symmetric about 0
    HALF: tl.constexpr = 2 ** (BITS - 1)
    index, level = _nearest(unit, BOUNDS, LEVELS, BITS, T, D, ASM)
    code = tl.where(unit >= 0, index, HALF + index).to(tl.uint8)  # sign and magnitude
    # Beyond the paper, which stores the norm (section 3.1): see `TurboQuantMSE`.
    if SCALE == 1:
        norm = norm / tl.sqrt(tl.sum(level * level, 1))
    elif SCALE == 2:
        norm = norm / tl.maximum(tl.sum(tl.abs(unit) * level, 1), 1e-6)
    scales = S + batch * s_b + kv_head * s_h + n
    if GROUP:
        longest = tl.max(norm, 0)
        top = _half(longest)
        wide = top.to(tl.float32)
        steps = tl.floor(tl.where(wide > 0, norm / tl.maximum(wide, 1e-30) * 255, 0.0) + 0.5)
        tl.store(scales, tl.minimum(steps, 255.0).to(tl.uint8), mask=there)
        tl.store(TOPS + batch * t_b + kv_head * t_h + first // GROUP, top)
        least = tl.min(tl.where(norm > 0, steps, 255.0), 0)
        unfit |= (wide >= GREATEST) | ((longest > 0) & ((longest < LEAST) | (least < LEAST_STEP)))
    else:
        scale = _half(norm)
        tl.store(scales, scale, mask=there)
        outside = (scale.to(tl.float32) >= GREATEST) | ((norm > 0) & (norm < LEAST))
        unfit |= tl.sum((outside & there).to(tl.int32), 0) > 0
    tl.atomic_or(FLAGS, 1, mask=unfit)

    # Layout of `quant.packing`: slice s of a row is shifted by s widths. The slices do not overlap, so a sum is an or.
    WIDTH: tl.constexpr = BITS if BITS != 3 else 2
    SLICES: tl.constexpr = 8 // WIDTH
    ROW: tl.constexpr = D // SLICES
    low = (
        tl.reshape(code & (2**WIDTH - 1), [T, SLICES, ROW])
        << (tl.arange(0, SLICES) * WIDTH).to(tl.uint8)[None, :, None]
    )
    row = tl.arange(0, ROW)
    at = P0 + batch * p0_b + kv_head * p0_h + n[:, None] * ROW + row[None, :]
    tl.store(at, tl.sum(low, 1).to(tl.uint8), mask=there[:, None])
    if BITS == 3:
        high = tl.reshape(code >> 2, [T, 8, D // 8]) << tl.arange(0, 8).to(tl.uint8)[None, :, None]
        column = tl.arange(0, D // 8)
        at = P1 + batch * p1_b + kv_head * p1_h + n[:, None] * (D // 8) + column[None, :]
        tl.store(at, tl.sum(high, 1).to(tl.uint8), mask=there[:, None])


@triton.jit(do_not_specialize=["tokens", "kt_b", "kt_h", "kmt_b", "kmt_h", "vt_b", "vt_h"])
def encode_pair(
    # Vectors (batch, kv_heads, tokens, D) with their strides; rotations as `rotations.Parts`; center of the keys.
    K, V, k_b, k_h, k_t, v_b, v_h, v_t, KEY_MATRIX, KEY_LOW, VALUE_MATRIX, VALUE_LOW, CENTER,
    # Tuples of numbers: positive boundaries and levels.
    KEY_BOUNDS, KEY_LEVELS, VALUE_BOUNDS, VALUE_LEVELS,
    # Tokens in all; factors of the rotations' parts.
    tokens, key_factor, value_factor,
    # Written, each with its strides over batch and KV heads, as in `_encode`: keys, then values.
    K0, k0_b, k0_h, K1, k1_b, k1_h, KS, ks_b, ks_h, KT, kt_b, kt_h, KM, km_b, km_h, KMT, kmt_b, kmt_h,
    V0, v0_b, v0_h, V1, v1_b, v1_h, VS, vs_b, vs_h, VT, vt_b, vt_h, FLAGS,
    # As in `_encode`, for keys and values.
    KV_HEADS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_SCALE: tl.constexpr, VALUE_SCALE: tl.constexpr,
    KEY_EXACT: tl.constexpr, VALUE_EXACT: tl.constexpr,
    CENTERED: tl.constexpr, GROUP_MEANS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program (group, head, 0 or 1): keys or values of one group of tokens."""
    first, head = tl.program_id(0) * T, tl.program_id(1)
    batch, kv_head = (head // KV_HEADS).to(tl.int64), head % KV_HEADS
    if tl.program_id(2) == 0:
        _encode(
            K + batch * k_b + kv_head * k_h, k_t, KEY_MATRIX, KEY_LOW, CENTER, KEY_BOUNDS, KEY_LEVELS,
            tokens, first, head, batch, kv_head,
            K0, k0_b, k0_h, K1, k1_b, k1_h, KS, ks_b, ks_h, KT, kt_b, kt_h, KM, km_b, km_h, KMT, kmt_b, kmt_h,
            FLAGS, key_factor, D, T, KEY_BITS, GROUP, KEY_SCALE, KEY_EXACT, CENTERED, GROUP_MEANS, ASM,
        )  # fmt: skip
    else:
        _encode(
            V + batch * v_b + kv_head * v_h, v_t, VALUE_MATRIX, VALUE_LOW, CENTER, VALUE_BOUNDS,
            VALUE_LEVELS, tokens, first, head, batch, kv_head,
            V0, v0_b, v0_h, V1, v1_b, v1_h, VS, vs_b, vs_h, VT, vt_b, vt_h, KM, km_b, km_h, KMT, kmt_b, kmt_h,
            FLAGS, value_factor, D, T, VALUE_BITS, GROUP, VALUE_SCALE, VALUE_EXACT, False, False, ASM,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _positive(codebook: Tensor, boundaries: Tensor | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The boundaries between positive levels, and those levels, as numbers: the kernel's arguments need no load."""
    half = codebook.numel() // 2
    assert boundaries is not None
    return tuple(boundaries.tolist()[half:]) or (0.0,), tuple(codebook.tolist()[:half])


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
) -> tuple[bool, bool]:
    """Quantize vectors (batch, kv_heads, tokens, dim) into the storage that `keys` and `values` show.

    The center is read, not computed. Tokens are whole groups, all of them real.

    Returns:
        Whether the format holds all of them, as it does but for outliers; whether the center is far longer than most
        keys of some group, which may then be misread. The device is waited for.
    """
    batch, heads, tokens, dim = key_states.shape
    group = keys.group_size
    each = group or UNGROUPED_TOKENS
    key_states, value_states = (x if x.stride(3) == 1 else x.contiguous() for x in (key_states, value_states))
    arguments: list[Tensor | int | float] = []
    key_matrix, value_matrix = (parts(view.rotation, key_states.dtype) for view in (keys, values))
    for matrix in (key_matrix, value_matrix):
        arguments += [matrix.high, matrix.low]
    none = key_states  # stands where a kernel reads nothing

    flags = torch.zeros(2, dtype=torch.int32, device=key_states.device)

    def place(tensor: Tensor | None) -> list[Tensor | int | float]:
        return [none, 0, 0] if tensor is None else [tensor, tensor.stride(0), tensor.stride(1)]

    encode_pair[-(-tokens // each), batch * heads, 2](
        key_states, value_states, *key_states.stride()[:3], *value_states.stride()[:3], *arguments,
        none if keys.center is None else keys.center.contiguous(),
        *_positive(keys.codebook, keys.boundaries), *_positive(values.codebook, values.boundaries), tokens,
        key_matrix.factor, value_matrix.factor,
        *place(keys.planes[0]), *place(keys.planes[-1]), *place(keys.scales), *place(keys.tops),
        *place(keys.means), *place(keys.mean_tops),
        *place(values.planes[0]), *place(values.planes[-1]), *place(values.scales), *place(values.tops), flags,
        KV_HEADS=heads, D=dim, T=each, GROUP=group, KEY_BITS=keys.bits, VALUE_BITS=values.bits,
        KEY_SCALE=SCALES[keys.scale], VALUE_SCALE=SCALES[values.scale],
        KEY_EXACT=key_matrix.exact, VALUE_EXACT=value_matrix.exact, CENTERED=keys.center is not None,
        GROUP_MEANS=keys.means is not None, ASM=not INTERPRETED, num_warps=WARPS,
    )  # fmt: skip
    unfit, far = flags.tolist()
    return not unfit, bool(far)
