"""Attention over exact and packed tokens on the GPU: `kernels.attention.attend` for few query tokens, in 3 launches.

Nothing here is a kernel: this is the caller of `decode.prepare`, `decode.split` and `decode.merge`, in that order. It
says what they can serve (`unsupported`), chooses how they are launched (`plan`), and owns what passes between them.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from turboquant.kernels.scoring import Scoring
from turboquant.kernels.triton import decode, levels
from turboquant.kernels.triton.rotations import parts, sketch
from turboquant.quant.quantizer import KernelView

MAX_QUERIES = 4
"""Query tokens a call; more go through `kernels.prefill`."""
MAX_ROWS = 64
"""Query rows that share a KV head."""
DIMS = (64, 80, 96, 128, 192, 256)
BITS = (1, 2, 3, 4)
INTERPRETED = bool(triton.knobs.runtime.interpret)
LONG = 2**18 - 2**11
"""Tokens, over all KV heads, from which parts are long enough for larger tiles."""
SHORT = 2**17
"""Tokens, over all KV heads, up to which few parts that are quickly joined are read sooner than many."""
_MULTIPROCESSORS = 132  # where no device says


def unsupported(query: Tensor, keys: KernelView | None, values: KernelView | None) -> str | None:
    """Return why kernels cannot read these packed tokens, or None where they can."""
    if keys is None or values is None:
        return "the method has no kernel"
    dim = query.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"kernels take float16 and bfloat16, got {query.dtype}"
    if keys.rotation.matrix.shape[0] != dim:
        return f"key codes in {keys.rotation.matrix.shape[0]} dimensions and queries in {dim}"
    for name, view in (("key", keys), ("value", values)):
        if view.rotation.matrix.shape[0] not in DIMS:
            return f"head_dim must be one of {', '.join(map(str, DIMS))}, got {view.rotation.matrix.shape[0]}"
        if view.bits not in BITS:
            return f"{name} codes of {view.bits} bits"
        if view.scales.dtype == torch.float32:
            return f"{name} scales are out of the range of float16"
    if values.signs is not None or values.center is not None or values.means is not None:
        return "values are centred or have a QJL stage"
    return None


def few_rows(query: Tensor, kv_heads: int) -> bool:
    """Whether the queries are few enough to share one reading of the codes."""
    return query.shape[2] <= MAX_QUERIES and query.shape[1] // kv_heads * query.shape[2] <= MAX_ROWS


@dataclass(frozen=True)
class Plan:
    """How the `split` kernel is launched."""

    tile: int
    warps: int
    stages: int
    splits: int
    registers: int | None = None
    """The most a thread may have; None leaves it to the compiler."""


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _MULTIPROCESSORS


@lru_cache(maxsize=8)
def _launches_early(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def plan(keys: KernelView, heads: int, tokens: int, rows: int) -> Plan:
    """Choose tile, warps and parts for `heads` KV heads (times batch) of `tokens` packed tokens.

    Measured on an H100 and an H200 (docs/kernels.md): programs of one warp, which wait for no other, are fastest as
    long as their registers hold what they compute on; at 2 bits long parts are read faster in larger tiles, and at 4
    bits short contexts in fewer parts.
    """
    dim = keys.rotation.matrix.shape[0]
    tile, warps, stages, programs = 64 if dim <= 64 else 32, 1, 3, 8
    if rows > 16:
        tile, warps, programs = 64, 4, 3
    elif dim == 128 and keys.bits <= 2 and heads * tokens >= LONG:
        tile = 64
    elif dim == 128 and keys.bits == 4 and heads * tokens <= SHORT:
        programs = 4
    # As many parts as fill the GPU once, but none of fewer than two tiles: a part has a cost of its own in `merge`.
    wanted = _multiprocessors(keys.scales.device) * programs // heads
    return Plan(tile, warps, stages, max(1, min(wanted, -(-tokens // (2 * tile)))))


def _two(tensor: Tensor | None) -> tuple[int, int]:
    """Strides over rows and KV heads; 0 where there is no tensor."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _width(bits: int, dim: int) -> int:
    return triton.next_power_of_2(dim // 2 if bits == 4 else dim // 4)


def attend(
    query: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    keys: KernelView,
    values: KernelView,
    scoring: Scoring,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    launch: Plan | None = None,
) -> Tensor:
    """Attend from the last 1 to 4 tokens to exact and packed tokens; see `kernels.attention.attend`.

    Args:
        query: (batch, heads, queries, dim), float16 or bfloat16.
        exact_keys: (batch, kv_heads, tokens, dim): sinks, then the window that ends with the query tokens.
        exact_values: The same for values, whose dims may be others.
        keys: Packed keys.
        values: Packed values.
        scoring: From scores to weights.
        starts: (batch,) packed tokens at the front of each row that are pads; None where no row is padded.
        lengths: (packed tokens, exact tokens) as int32 on the device, for a CUDA graph; the tensors then hold at least
            that many. None takes the lengths of the tensors.
        launch: How to launch; chosen by `plan` if not given.

    Returns:
        (batch, heads, queries, value_dim) in the dtype of the query, a view of a (batch, queries, heads, value_dim)
        tensor.
    """
    batch, heads, queries, dim = query.shape
    value_dim, scaling = exact_values.shape[3], scoring.scaling * decode.LOG2_E
    cap = 0.0 if scoring.cap is None else scoring.cap * decode.LOG2_E
    kv_heads = keys.scales.shape[1]
    groups, device = heads // kv_heads, query.device
    rows = groups * queries
    launch = launch or plan(keys, batch * kv_heads, keys.tokens, rows)
    # Query rows are the right operand of `mma`, which is 8 wide; dims are padded in registers only, never in memory.
    padded_rows = max(8, triton.next_power_of_2(rows))
    padded_dim, padded_value_dim = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    block = padded_value_dim if value_dim <= 128 else 32
    group, splits, programs = keys.group_size, launch.splits, batch * kv_heads
    biases = keys.means.shape[2] if keys.means is not None else 1
    # Rotated queries are made in blocks, so that they are there sooner.
    query_block = min(64, padded_dim)
    bases = padded_dim // query_block

    # Exact tokens are read by the first parts, a few each.
    exact_parts = 4 if splits >= 8 else 1
    slots = splits + exact_parts

    # All that passes between the launches is one allocation, in float32.
    sizes = [programs * padded_rows * count for count in (slots, slots, biases, bases, slots * value_dim)]
    space = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    maxima, sums, bias, base, output = space.split(sizes)
    sketched = keys.signs is not None
    projected = torch.empty(
        3 if sketched else 2, programs, padded_rows, dim, dtype=torch.float16, device=device
    )  # rotated queries in two parts, and sketched ones
    result = torch.empty(batch, queries, heads, value_dim, dtype=query.dtype, device=device)
    rotation, back = parts(keys.rotation, query.dtype), parts(values.rotation, query.dtype)
    projection = rotation if keys.projection is None else sketch(keys.projection, keys.rotation, query.dtype)
    lut, table = levels.tables(keys.codebook, dim)
    value_lut, value_table = levels.tables(values.codebook, value_dim)
    sign_lut, sign_table = (lut, table) if keys.sign_levels is None else levels.tables(keys.sign_levels, 1)
    none = lut  # stands where a kernel reads nothing
    sinks = none if scoring.sinks is None else scoring.sinks.detach().contiguous()
    exact_keys, exact_values = (_rows(tensor) for tensor in (exact_keys, exact_values))
    early = _launches_early(device)
    rest = projected.stride(0)
    decode.prepare[programs, bases](
        query, rotation.high, rotation.low, projection.high, projection.low,
        none if keys.center is None else keys.center.contiguous(), projected[0], projected[-1], base,
        scaling, rotation.factor, *query.stride()[:3], rest,
        KV_HEADS=kv_heads, G=groups, TQ=queries, D=dim, DP=padded_dim, BM=padded_rows, BP=max(16, padded_rows),
        BLOCK=query_block, EXACT=rotation.exact, CENTERED=keys.center is not None,
        SKETCHED=sketched, EARLY=early, num_warps=4,
    )  # fmt: skip

    # `ldmatrix` transposes 16-bit words. `mma` takes 16 dims at once, and below 4 bits 64 dims have slices of 8 words.
    words = values.bits == 4 or value_dim > 64
    key_planes, value_planes = (keys.planes[0], keys.planes[-1]), (values.planes[0], values.planes[-1])
    if words:
        value_planes = (value_planes[0].view(torch.int16), value_planes[1].view(torch.int16))
    late, value_late = levels.late_bytes(dim, device), levels.late_bytes(value_dim, device)
    # Levels in tables are times sqrt(dim), shared scales are 1/255 of their top: the factors that undo both.
    key_level = dim**-0.5 / (1 if keys.tops is None else 255)
    value_level = value_dim**-0.5 / (1 if values.tops is None else 255)
    decode.split[splits, programs](
        query, exact_keys, exact_values, projected[0], projected[-1], base, bias,
        *key_planes, keys.scales, none if keys.tops is None else keys.tops,
        none if keys.means is None else keys.means, none if keys.mean_tops is None else keys.mean_tops,
        none if keys.signs is None else keys.signs, none if keys.error_norms is None else keys.error_norms,
        *value_planes, values.scales, none if values.tops is None else values.tops,
        output, maxima, sums, none if lengths is None else lengths, none if starts is None else starts,
        lut, table, value_lut, value_table, sign_lut, sign_table, late,
        levels.late_words(value_dim, device) if words else value_late,
        exact_keys.shape[2], keys.tokens, biases, splits, rest, scaling, cap,
        key_level, keys.gain, value_level,
        *query.stride()[:3], *_two(exact_keys), *_two(exact_values),
        *_two(key_planes[0]), *_two(key_planes[1]), *_two(keys.scales), *_two(keys.tops), *_two(keys.means),
        *_two(keys.mean_tops), *_two(keys.signs), *_two(keys.error_norms),
        *_two(value_planes[0]), *_two(value_planes[1]), *_two(values.scales), *_two(values.tops),
        KV_HEADS=kv_heads, G=groups, TQ=queries, D=dim, DP=padded_dim, VD=value_dim, VDP=padded_value_dim,
        KEY_BITS=keys.bits, VALUE_BITS=values.bits, CAPPED=scoring.cap is not None,
        BM=padded_rows, BN=launch.tile, BE=16, GROUP=group, KEY_TOPS=keys.shared, VALUE_TOPS=values.shared,
        GROUP_MEANS=keys.means is not None,
        SKETCHED=sketched, ON_DEVICE=lengths is not None, PADDED=starts is not None, ASM=not INTERPRETED, WORDS=words,
        STAGES=launch.stages, KW=_width(keys.bits, dim), VW=_width(values.bits, value_dim) // (2 if words else 1),
        SW=_width(1, dim), BASES=bases, NG=16 if biases <= 16 * splits else 32, PARTS=exact_parts, EARLY=early,
        launch_pdl=early, num_warps=launch.warps, maxnreg=launch.registers,
    )  # fmt: skip

    decode.merge[batch * queries * heads,](
        output, maxima, sums, back.high, back.low, sinks, result, splits, back.factor,
        KV_HEADS=kv_heads, G=groups, TQ=queries, D=value_dim, DP=padded_value_dim, BM=padded_rows,
        SP=triton.next_power_of_2(slots), BS=min(128, triton.next_power_of_2(splits)), BLOCK=block,
        EXACT=back.exact, SINKS=scoring.sinks is not None, PARTS=exact_parts, EARLY=early, launch_pdl=early,
        num_warps=4 if splits <= 32 else 8,
    )  # fmt: skip
    return result.transpose(1, 2)


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose tokens lie one behind the other."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3] else tensor.contiguous()
