"""Attention of a few query tokens over sinks, packed tokens and window on a CPU (numba), in one pass over the tokens.

The steps are those of the GPU kernels (docs/kernels.md): `prepare` scales and rotates the queries, `split` goes through
the tokens of one KV head at a time, tile by tile, with a running softmax, and `merge` joins the parts and rotates the
sum back. A tile's levels are unpacked into a buffer that stays in the L1 cache and serves all query rows of the head;
the mean of a group of keys is a bias of its scores, that of values is added once a group.

Parts are handed to PyTorch's own threads one by one (`kernels.openmp`), so a thread that has lost its processor holds
up one part and not a share of all. What is compiled takes one address, of a `Job`; numba's call of a function with
twenty arrays takes as long as the attention itself at a few hundred tokens.
"""

import ctypes
import math
from functools import partial
from typing import Any

import numba
import numpy as np
from numba.core import types
from torch import Tensor

from turboquant.kernels import openmp
from turboquant.kernels.cpu.codes import add_plane
from turboquant.kernels.cpu.intrinsics import PERMUTES, float_of, pointer, spread, take
from turboquant.kernels.cpu.job import Job, numbers, prepare, readable
from turboquant.kernels.scoring import Scoring
from turboquant.quant.quantizer import PackedTensor, Quantizer

TILE = 64
"""Tokens unpacked at once, at most; packed ones lie in one group."""
MAX_ROWS = 32
"""Query rows of a KV head (its query heads times query tokens); beyond, matrix products are faster."""
PARTS_A_THREAD = 3
GRAIN = 2**20
"""Values (tokens times dims times rows) for each thread, about 150 us of work: to wake one costs more on a busy CPU."""

# Sums may be taken in any order; infinities and NaN stay what they are.
_MATHS = {"reassoc", "contract", "nsz", "arcp"}
_inner: Any = partial(numba.njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # only kernels call them
_jit: Any = _inner(fastmath=_MATHS, error_model="numpy")
_entry: Any = numba.cfunc(types.void(types.voidptr), fastmath=_MATHS, error_model="numpy", cache=True)
_JOB = np.dtype(Job)
_LOWEST = np.float32(-1e30)
"""In place of minus infinity: differences of it stay finite."""


@_jit
def _floats(address: Any, count: int) -> Any:
    return numba.carray(pointer(address), count, np.float32)


@_jit
def _from_half(bits: Any) -> Any:
    """The float16 that has these bits; exact for all but infinities and NaN, which are never stored."""
    value = float_of(np.int32((np.int32(bits) & 0x7FFF) << 13)) * np.float32(2.0**112)
    return -value if bits & 0x8000 else value


@_jit
def _number(numbers: Any, i: int) -> Any:
    """The number at place i of a tensor."""
    address, kind = numbers.address, numbers.kind
    if kind == 0:
        return numba.carray(pointer(address + 4 * i), 1, np.float32)[0]
    if kind == 1:
        return _from_half(numba.carray(pointer(address + 2 * i), 1, np.uint16)[0])
    if kind == 2:
        return float_of(np.int32(numba.carray(pointer(address + 2 * i), 1, np.uint16)[0]) << 16)
    if kind == 3:
        return np.float32(numba.carray(pointer(address + i), 1, np.uint8)[0])
    return np.float32(numba.carray(pointer(address + i), 1, np.int8)[0])


@_jit
def _place(numbers: Any, b: int, h: int, n: int) -> int:
    return b * numbers.strides[0] + h * numbers.strides[1] + n * numbers.strides[2]


@_jit
def _exp(x: Any) -> Any:
    """e**x for x <= 0, to about 2 units in the last place (Cephes' expf, without branches)."""
    x = max(x, np.float32(-87))
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    x -= n * np.float32(0.693359375)
    x -= n * np.float32(-2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * x + np.float32(1.3981999507e-3)
    y = y * x + np.float32(8.3334519073e-3)
    y = y * x + np.float32(4.1665795894e-2)
    y = y * x + np.float32(1.6666665459e-1)
    y = y * x + np.float32(5.0000001201e-1)
    return (y * x * x + x + np.float32(1)) * float_of((np.int32(n) + np.int32(127)) << np.int32(23))


# -- from codes and exact tokens to a tile of levels -------------------------------------------------------------------


@_jit
def _spread_row(low: int, high: int, size: int, magnitudes: int, levels: int, bits: int) -> None:
    """Write the levels of one token, eight bytes at a time; the last eight may overlap those before."""
    for j in range(0, size, 8):
        place = min(j, size - 8)
        if bits == 4:
            spread(low + place, high + place, size, magnitudes, levels + 4 * place, 4)
        elif bits == 3:
            spread(low + place, high + place, size, magnitudes, levels + 4 * place, 3)
        elif bits == 2:
            spread(low + place, high + place, size, magnitudes, levels + 4 * place, 2)
        else:
            spread(low + place, high + place, size, magnitudes, levels + 4 * place, 1)


@_jit
def _unpack(held: Any, b: int, h: int, start: int, count: int, dim: int, codes: Any, levels: Any) -> None:
    """Write the levels of `count` tokens, (tokens, dim), without their scales."""
    high = 1 if held.widths[1] else 0  # the plane of the signs
    size = dim * held.widths[high] >> 3
    if PERMUTES and held.magnitudes and size >= 8 and size << 3 == dim * held.widths[high]:
        low_step, step = held.strides[0][2], held.strides[high][2]
        first = held.planes[0] + b * held.strides[0][0] + h * held.strides[0][1] + start * low_step
        signs = held.planes[high] + b * held.strides[high][0] + h * held.strides[high][1] + start * step
        target = np.int64(levels.ctypes.data)
        for t in range(count):
            out = target + 4 * t * levels.shape[1]
            _spread_row(first + t * low_step, signs + t * step, size, held.magnitudes, out, held.bits)
        return
    table = _floats(held.table, 256)
    for t in range(count):
        codes[:] = 0
        shift = 0
        for p in range(3):
            width = held.widths[p]
            if width:
                place = b * held.strides[p][0] + h * held.strides[p][1] + (start + t) * held.strides[p][2]
                row = numba.carray(pointer(held.planes[p] + place), (dim * width + 7) >> 3, np.uint8)
                add_plane(row, width, shift, codes)
                shift += width
        for i in range(dim):
            levels[t, i] = table[codes[i]]


@_jit
def _exact_levels(exact: Any, b: int, h: int, start: int, count: int, dim: int, levels: Any) -> None:
    """Write exact vectors as float32, (tokens, dim)."""
    for t in range(count):
        place = _place(exact, b, h, start + t)
        out = levels[t]
        if exact.kind == 0:
            out[:dim] = _floats(exact.address + 4 * place, dim)
            continue
        bits = numba.carray(pointer(exact.address + 2 * place), dim, np.uint16)
        if exact.kind == 1:
            for i in range(dim):
                out[i] = _from_half(bits[i])
        else:
            for i in range(dim):
                out[i] = float_of(np.int32(bits[i]) << 16)


@_jit
def _vector_scales(side: Any, b: int, h: int, start: int, count: int, scales: Any) -> None:
    place = _place(side.scales, b, h, start)
    unit = np.float32(1)
    if side.tops.address:
        unit = _number(side.tops, _place(side.tops, b, h, start // side.group)) / np.float32(255)
    for t in range(count):
        scales[t] = _number(side.scales, place + t * side.scales.strides[2]) * unit


@_jit
def _mean(side: Any, b: int, h: int, group: int, mean: Any) -> None:
    """Write the mean of a group, in float32."""
    unit = _number(side.mean_tops, _place(side.mean_tops, b, h, group)) / np.float32(127)
    steps = numba.carray(pointer(side.means.address + _place(side.means, b, h, group)), mean.shape[0], np.int8)
    for i in range(mean.shape[0]):
        mean[i] = steps[i] * unit


@_jit
def _center(side: Any, b: int, h: int, center: Any) -> None:
    place = _place(side.center, b, h, 0)
    for i in range(center.shape[0]):
        center[i] = _number(side.center, place + i)


@_jit
def _dot(one: Any, two: Any) -> Any:
    total = np.float32(0)
    for i in range(one.shape[0]):
        total += one[i] * two[i]
    return total


@_jit
def _products(query: Any, levels: Any, count: int, scores: Any) -> None:
    """Write <query, level> for each row and token, four tokens at a time; up to three more tokens are written too."""
    rows, dim = query.shape
    for r in range(rows):
        q = query[r]
        for t in range(0, count, 4):
            l0, l1, l2, l3 = levels[t], levels[t + 1], levels[t + 2], levels[t + 3]
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(dim):
                s0 += q[i] * l0[i]
                s1 += q[i] * l1[i]
                s2 += q[i] * l2[i]
                s3 += q[i] * l3[i]
            scores[r, t], scores[r, t + 1], scores[r, t + 2], scores[r, t + 3] = s0, s1, s2, s3


@_jit
def _add_weighted(weights: Any, levels: Any, count: int, sums: Any) -> None:
    """Add the weighted levels to each row's sum, four tokens at a time; weights up to a multiple of four count."""
    rows, dim = sums.shape
    for r in range(rows):
        out = sums[r]
        for t in range(0, count, 4):
            l0, l1, l2, l3 = levels[t], levels[t + 1], levels[t + 2], levels[t + 3]
            w0, w1, w2, w3 = weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
            for i in range(dim):
                out[i] += w0 * l0[i] + w1 * l1[i] + w2 * l2[i] + w3 * l3[i]


@_inner(fastmath=True)
def _greatest(row: Any, count: int) -> Any:
    """The greatest of some scores, of which those that are no number may be passed over; so it is vectorised."""
    found = row[0]
    for t in range(1, count):
        found = max(found, row[t])
    return found


@_jit
def _soften(scores: Any, count: int, top: Any, total: Any, sums: Any) -> None:
    """Turn a tile's scores into weights against the running greatest score, to which what is summed is brought."""
    for r in range(scores.shape[0]):
        row = scores[r]
        greatest = max(top[r], _greatest(row, count))
        if greatest > top[r]:
            less = _exp(top[r] - greatest)
            total[r] *= less
            for i in range(sums.shape[1]):
                sums[r, i] *= less
            top[r] = greatest
        added = np.float32(0)
        for t in range(count):
            row[t] = _exp(row[t] - greatest)
            added += row[t]
        total[r] += added
        for t in range(count, count + 3 & ~3):
            row[t] = np.float32(0)


# -- the three steps ---------------------------------------------------------------------------------------------------


@_entry
def _prepare(data: Any) -> None:
    """Write each scaled query; behind them all rotated ones; behind those, for QJL, the projected ones."""
    job = numba.carray(data, 1, _JOB)[0]
    rows, dim = job.batch * job.heads * job.rows, job.keys.dim
    query = numba.carray(pointer(job.query), (rows, dim), np.float32)
    ready = numba.carray(pointer(job.work), (3, rows, dim), np.float32)
    rotation = numba.carray(pointer(job.keys.rotation), (dim, dim), np.float32)
    projection = numba.carray(pointer(job.keys.projection), (dim, dim), np.float32)
    flips = _floats(job.keys.flips, dim)
    flipped, scaling = np.empty(dim, np.float32), np.float32(job.scaling)
    for r in range(rows):
        for i in range(dim):
            ready[0, r, i] = query[r, i] * scaling
            flipped[i] = ready[0, r, i] * flips[i] if job.keys.flips else ready[0, r, i]
        for i in range(dim):
            ready[1, r, i] = _dot(rotation[i], flipped)
        if job.keys.projection:
            for i in range(dim):
                ready[2, r, i] = _dot(projection[i], ready[1, r])


@_jit
def _score_packed(
    job: Any, b: int, h: int, start: int, count: int, offset: Any, rotated: Any, sketched: Any, room: Any
) -> None:
    levels, codes, mean, scales, scores, more = room
    keys = job.keys
    rows, dim = rotated.shape
    if keys.codes.bits:
        _unpack(keys.codes, b, h, start, count, dim, codes, levels)
        _products(rotated, levels, count, scores)
        _vector_scales(keys, b, h, start, count, scales)
    else:
        scores[:] = 0
        scales[:] = 0
    if keys.means.address:
        _mean(keys, b, h, start // keys.group, mean[:dim])
    for r in range(rows):
        bias = offset[r]
        if keys.means.address:
            bias += _dot(rotated[r], mean[:dim])
        for t in range(count):
            scores[r, t] = scores[r, t] * scales[t] + bias
    if keys.projection:
        _unpack(keys.signs, b, h, start, count, dim, codes, levels)
        _products(sketched, levels, count, more)
        place, gain = _place(keys.error_norms, b, h, start), np.float32(keys.gain)
        for t in range(count):
            scales[t] = _number(keys.error_norms, place + t * keys.error_norms.strides[2]) * gain
        for r in range(rows):
            for t in range(count):
                scores[r, t] += more[r, t] * scales[t]


@_jit
def _cap(job: Any, count: int, scores: Any) -> None:
    if job.cap > 0:
        cap = np.float32(job.cap)
        for r in range(scores.shape[0]):
            for t in range(count):
                scores[r, t] = np.float32(math.tanh(scores[r, t] / cap)) * cap


@_jit
def _split_exact(job: Any, b: int, h: int, query: Any, top: Any, total: Any, sums: Any, room: Any) -> None:
    """Sinks and window: a query token does not see the tokens of the call behind it."""
    levels, _, _, _, scores, _ = room
    for start in range(0, job.exact, TILE):
        count = min(TILE, job.exact - start)
        _exact_levels(job.keys.exact, b, h, start, count, job.keys.dim, levels)
        _products(query, levels, count, scores)
        _cap(job, count, scores)
        for r in range(query.shape[0]):
            seen = job.exact - job.queries + 1 + r % job.queries
            for t in range(max(0, seen - start), count):
                scores[r, t] = _LOWEST
        _soften(scores, count, top, total, sums)
        _exact_levels(job.values.exact, b, h, start, count, job.values.dim, levels)
        _add_weighted(scores, levels, count, sums)


@_jit
def _split_packed(
    job: Any, b: int, h: int, part: int, rotated: Any, sketched: Any, top: Any, total: Any, sums: Any, room: Any
) -> None:
    levels, codes, mean, scales, scores, _ = room
    rows, dim, value_dim = rotated.shape[0], job.keys.dim, job.values.dim
    keys, values = job.keys, job.values
    tile = job.tile
    offset = np.zeros(rows, np.float32)
    if keys.center.address:
        _center(keys, b, h, mean[:dim])
        for r in range(rows):
            offset[r] = _dot(rotated[r], mean[:dim])
    tiles = -(-job.packed // tile)
    hidden = 0
    if job.starts:
        hidden = numba.carray(pointer(job.starts), job.batch, np.int64)[b]
    for n in range(tiles * part // job.parts, tiles * (part + 1) // job.parts):
        start, stop = max(n * tile, hidden), min((n + 1) * tile, job.packed)
        count = stop - start
        if count <= 0:
            continue
        _score_packed(job, b, h, start, count, offset, rotated, sketched, room)
        _cap(job, count, scores)
        _soften(scores, count, top, total, sums)
        if values.means.address:
            _mean(values, b, h, start // values.group, mean[:value_dim])
            for r in range(rows):
                weight = np.float32(0)
                for t in range(count):
                    weight += scores[r, t]
                for i in range(value_dim):
                    sums[r, i] += weight * mean[i]
        if values.codes.bits:
            _unpack(values.codes, b, h, start, count, value_dim, codes, levels)
            _vector_scales(values, b, h, start, count, scales)
            for r in range(rows):
                for t in range(count):
                    scores[r, t] *= scales[t]
            _add_weighted(scores, levels, count, sums)


@_entry
def _split(data: Any) -> None:
    """Take parts until none is left: of each row and KV head the exact tokens, and `parts` parts of the packed ones."""
    job = numba.carray(data, 1, _JOB)[0]
    rows, dim, value_dim = job.rows, job.keys.dim, job.values.dim
    heads, parts = job.batch * job.heads, job.parts + 1
    ready = numba.carray(pointer(job.work), (3, heads, rows, dim), np.float32)
    held = job.work + 4 * ready.size
    tops = numba.carray(pointer(held), (2, heads, parts, rows), np.float32)
    partial = numba.carray(pointer(held + 4 * tops.size), (heads, parts, rows, value_dim), np.float32)
    widest = max(dim, value_dim)
    codes, mean, scales = np.empty(widest + 8, np.uint8), np.empty(widest, np.float32), np.empty(TILE, np.float32)
    scores, more = np.empty((rows, TILE), np.float32), np.empty((rows, TILE), np.float32)
    levels = np.zeros((TILE, widest), np.float32)
    room = (levels, codes, mean, scales, scores, more)
    while True:
        # Of all parts those of exact tokens come first: they are the longest.
        taken = take(job.counter)
        if taken >= heads * parts:
            break
        part, head = taken // heads, taken % heads
        b, h = head // job.heads, head % job.heads
        top, total, sums = tops[0, head, part], tops[1, head, part], partial[head, part]
        top[:] = _LOWEST
        total[:] = 0
        sums[:] = 0
        if part == 0:
            _split_exact(job, b, h, ready[0, head], top, total, sums, room)
        else:
            _split_packed(job, b, h, part - 1, ready[1, head], ready[2, head], top, total, sums, room)


@_entry
def _merge(data: Any) -> None:
    """Join the parts of each head, rotate the sum over packed tokens back and write (batch, queries, heads, dim)."""
    job = numba.carray(data, 1, _JOB)[0]
    rows, dim, queries = job.rows, job.values.dim, job.queries
    heads, parts, groups = job.batch * job.heads, job.parts + 1, rows // queries
    held = job.work + 4 * 3 * heads * rows * job.keys.dim
    tops = numba.carray(pointer(held), (2, heads, parts, rows), np.float32)
    partial = numba.carray(pointer(held + 4 * tops.size), (heads, parts, rows, dim), np.float32)
    output = numba.carray(pointer(job.output), (job.batch, queries, job.heads, groups, dim), np.float32)
    rotation = numba.carray(pointer(job.values.rotation), (dim, dim), np.float32)
    flips, sinks = _floats(job.values.flips, dim), _floats(job.sinks, job.heads * groups)
    rotated, center = np.empty(dim, np.float32), np.zeros(dim, np.float32)
    for head in range(heads):
        b, h = head // job.heads, head % job.heads
        if job.values.center.address:
            _center(job.values, b, h, center)
        for r in range(rows):
            group = r // queries
            top = tops[0, head, 0, r]
            for part in range(1, parts):
                top = max(top, tops[0, head, part, r])
            if job.sinks:
                top = max(top, sinks[h * groups + group])
            total = np.float32(0)
            rotated[:] = 0
            for part in range(1, parts):
                share = _exp(tops[0, head, part, r] - top)
                weight = tops[1, head, part, r] * share
                total += weight
                for i in range(dim):
                    rotated[i] += partial[head, part, r, i] * share + weight * center[i]
            share = _exp(tops[0, head, 0, r] - top)
            total += tops[1, head, 0, r] * share
            if job.sinks:
                total += _exp(sinks[h * groups + group] - top)
            out = output[b, r % queries, h, group]
            out[:] = 0
            for i in range(dim):
                for j in range(dim):
                    out[j] += rotated[i] * rotation[i, j]
            for i in range(dim):
                back = out[i] * flips[i] if job.values.flips else out[i]
                out[i] = (back + partial[head, 0, r, i] * share) / total


def attend(
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    packed: tuple[tuple[Quantizer[Any], PackedTensor], tuple[Quantizer[Any], PackedTensor]],
    scoring: Scoring,
    starts: Tensor | None = None,
) -> Tensor | None:
    """Attend as `kernels.attention.attend` does; None where the reference must.

    Args:
        query: (batch, heads, queries, dim) on the CPU.
        exact: Keys and values (batch, kv_heads, exact, dim or value_dim): sinks, then window.
        packed: Quantizer and packed tokens of keys and of values.
        scoring: From scores to weights.
        starts: (batch,) packed tokens at the front of each row that are pads.

    Returns:
        (batch, heads, queries, value_dim) in float32, laid out as (batch, queries, heads, value_dim).
    """
    batch, heads, queries, dim = query.shape
    kv_heads, exact_length = exact[0].shape[1:3]
    rows = heads // kv_heads * queries
    if rows > MAX_ROWS or not exact_length or not all(map(readable, exact)):
        return None
    keys, values = (prepare(*side) for side in packed)
    if keys is None or values is None or values.side.projection:
        return None
    packed_length, value_dim = packed[0][1].tokens, exact[1].shape[3]
    query = query.detach().float().contiguous()
    tokens = exact_length + packed_length
    threads = min(openmp.threads(), 1 + batch * kv_heads * rows * tokens * (dim + value_dim) // GRAIN)
    parts = 1 if threads == 1 else -(-PARTS_A_THREAD * threads // (batch * kv_heads))
    held = batch * kv_heads * rows * (3 * dim + (parts + 1) * (value_dim + 2))
    work, output = query.new_empty(held), query.new_empty(batch, queries, heads, value_dim)
    sinks = None if scoring.sinks is None else scoring.sinks.detach().float().contiguous()
    starts = None if starts is None else starts.long().contiguous()
    job = Job(
        keys=keys.side,
        values=values.side,
        query=query.data_ptr(),
        output=output.data_ptr(),
        work=work.data_ptr(),
        sinks=0 if sinks is None else sinks.data_ptr(),
        starts=0 if starts is None else starts.data_ptr(),
        batch=batch,
        heads=kv_heads,
        rows=rows,
        queries=queries,
        exact=exact_length,
        packed=packed_length,
        tile=math.gcd(TILE, keys.side.group, values.side.group),
        parts=parts,
        scaling=scoring.scaling,
        cap=scoring.cap or 0.0,
    )
    job.keys.exact, job.values.exact = numbers(exact[0]), numbers(exact[1])
    address = ctypes.addressof(job)
    job.counter = address + Job.taken.offset
    openmp.run(_prepare.address, address, 1)
    openmp.run(_split.address, address, threads)
    openmp.run(_merge.address, address, 1)
    return output.transpose(1, 2)
