"""CPU versions of `kernels.codes` (numba): a row of codes is unpacked into a small buffer and used at once.

Where one plane holds the codes (1, 2 or 4 bits) a byte is looked up in a table of all the levels it can stand for;
other widths put their planes together first. Everything compiles on first use (seconds) and is cached on disk. The
kernels run on one thread and do not hold the GIL.
"""

from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from turboquant.quant.modes import shared_table
from turboquant.quant.packing import PLANE_WIDTHS, Planes, unpack_bits

_jit: Any = numba.njit(fastmath=True, nogil=True, cache=True)
_inline: Any = numba.njit(fastmath=True, nogil=True, inline="always")
# Kernels always take three planes, so that numba compiles them once; this stands for those that a width does not have.
_NO_PLANE = np.zeros((1, 1, 1, 1), np.uint8)


@_inline
def _look_up(row: Any, table: Any, slots: int, levels: Any) -> None:
    """Write the `slots` levels of every byte, side by side."""
    # Written out for each count: a loop of known length is unrolled, one over `slots` is not.
    if slots == 2:
        for j in range(row.shape[0]):
            byte = row[j]
            levels[2 * j] = table[byte, 0]
            levels[2 * j + 1] = table[byte, 1]
    elif slots == 4:
        for j in range(row.shape[0]):
            byte = row[j]
            for s in range(4):
                levels[4 * j + s] = table[byte, s]
    else:
        for j in range(row.shape[0]):
            byte = row[j]
            for s in range(8):
                levels[8 * j + s] = table[byte, s]


@_inline
def add_plane(row: Any, width: int, shift: int, codes: Any) -> None:
    """Or a plane's codes, shifted, into `codes`; constant shifts let the compiler vectorise."""
    count = row.shape[0]
    if width == 4:
        for slot in range(2):
            for j in range(count):
                codes[slot * count + j] |= ((row[j] >> (4 * slot)) & 15) << shift
    elif width == 2:
        for slot in range(4):
            for j in range(count):
                codes[slot * count + j] |= ((row[j] >> (2 * slot)) & 3) << shift
    elif width == 1:
        for slot in range(8):
            for j in range(count):
                codes[slot * count + j] |= ((row[j] >> slot) & 1) << shift
    else:
        for j in range(count):
            codes[j] = row[j]


@_inline
def _put_together(
    planes: Any, starts: Any, widths: Any, b: int, h: int, n: int, codes: Any, table: Any, levels: Any
) -> None:
    """Write the levels of one row whose codes lie in up to three planes."""
    codes[:] = 0
    add_plane(planes[0][b, h, starts[0] + n], widths[0], 0, codes)
    if widths[1]:
        add_plane(planes[1][b, h, starts[1] + n], widths[1], widths[0], codes)
    if widths[2]:
        add_plane(planes[2][b, h, starts[2] + n], widths[2], widths[0] + widths[1], codes)
    for i in range(levels.shape[0]):
        levels[i] = table[codes[i], 0]


@_jit
def _scores(query: Any, planes: Any, starts: Any, widths: Any, slots: int, table: Any, scales: Any, out: Any) -> None:
    batch, heads, rows, dim = query.shape
    levels, codes = np.zeros(dim, np.float32), np.zeros(dim + 8, np.uint8)  # codes come in whole bytes
    for b in range(batch):
        for h in range(heads):
            for n in range(scales.shape[2]):
                if slots:
                    _look_up(planes[0][b, h, starts[0] + n], table, slots, levels)
                else:
                    _put_together(planes, starts, widths, b, h, n, codes, table, levels)
                # All query rows of a KV head share one unpacking, and the scale is applied once a score.
                for r in range(rows):
                    total = np.float32(0)
                    for i in range(dim):
                        total += query[b, h, r, i] * levels[i]
                    out[b, h, r, n] = total * scales[b, h, n]


@_jit
def _combine(
    weights: Any, planes: Any, starts: Any, widths: Any, slots: int, table: Any, scales: Any, out: Any
) -> None:
    batch, heads, rows, dim = out.shape
    levels, codes = np.zeros(dim, np.float32), np.zeros(dim + 8, np.uint8)  # codes come in whole bytes
    for b in range(batch):
        for h in range(heads):
            for n in range(scales.shape[2]):
                if slots:
                    _look_up(planes[0][b, h, starts[0] + n], table, slots, levels)
                else:
                    _put_together(planes, starts, widths, b, h, n, codes, table, levels)
                for r in range(rows):
                    weight = weights[b, h, r, n] * scales[b, h, n]
                    for i in range(dim):
                        out[b, h, r, i] += weight * levels[i]


def _slots(bits: int, dim: int) -> int:
    """Codes in a byte where one plane of whole bytes holds them; 0 where planes must be put together."""
    slots = 8 // bits if bits in (1, 2, 4) else 0
    return slots if slots and dim % slots == 0 else 0


@shared_table(maxsize=64)
def _order(slots: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return the dimension that each looked-up level belongs to, and the inverse."""
    # A byte's levels are written side by side but belong to dims that lie dim / slots apart (see `packing`): queries
    # and sums are brought into that order once a call, so that no level is moved.
    order = torch.arange(dim, device="cpu").reshape(slots, dim // slots).T.flatten()
    return order, order.argsort()


@shared_table(maxsize=64)
def _table(codebook: Tensor, bits: int, slots: int) -> Any:
    """Return all levels of each byte, (256, slots), or one level a code."""
    if not slots:
        return codebook.unsqueeze(-1).numpy()
    every_byte = torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(-1)
    return codebook[unpack_bits((every_byte,), bits, slots).int()].contiguous().numpy()


def _arguments(planes: Planes, bits: int, slots: int, codebook: Tensor) -> tuple[Any, ...]:
    """Return the planes' storages with the first token of each, so that views of a cache need no copy."""
    # A strided array would be another signature for numba, and slower to index.
    whole = [_whole(plane) for plane in planes]
    arrays = (*(array for array, _ in whole), *[_NO_PLANE] * (3 - len(planes)))
    starts = (*(start for _, start in whole), *[0] * (3 - len(planes)))
    widths = (*PLANE_WIDTHS[bits], *[0] * (3 - len(planes)))
    return arrays, starts, widths, slots, _table(codebook, bits, slots)


def _whole(plane: Tensor) -> tuple[Any, int]:
    """Return the contiguous tensor that `plane` is a view of, over its tokens, and the token where the view starts."""
    batch, heads, tokens, row = plane.shape
    room, offset = plane.stride(1) // row, int(plane.storage_offset())
    strides = (heads * room * row, room * row, row, 1)
    start, inside = divmod(offset, row)
    if plane.stride() != strides or inside or start + tokens > room:
        return plane.contiguous().numpy(), 0
    return plane.as_strided((batch, heads, room, row), strides, 0).numpy(), start


def code_scores(
    query: Float[Tensor, "batch heads rows dim"],
    planes: Planes,
    bits: int,
    codebook: Float[Tensor, " levels"],
    scales: Float[Tensor, "batch heads tokens"],
) -> Float[Tensor, "batch heads rows tokens"]:
    """See `kernels.codes.code_scores`."""
    dim = query.shape[-1]
    slots = _slots(bits, dim)
    query = query[..., _order(slots, dim)[0]] if slots else query.contiguous()
    scales = scales.float().contiguous()
    out = query.new_empty(*query.shape[:3], scales.shape[2])
    _scores(query.numpy(), *_arguments(planes, bits, slots, codebook), scales.numpy(), out.numpy())
    return out


def code_combine(
    weights: Float[Tensor, "batch heads rows tokens"],
    planes: Planes,
    bits: int,
    codebook: Float[Tensor, " levels"],
    scales: Float[Tensor, "batch heads tokens"],
    dim: int,
) -> Float[Tensor, "batch heads rows dim"]:
    """See `kernels.codes.code_combine`."""
    slots = _slots(bits, dim)
    weights, scales = weights.contiguous(), scales.float().contiguous()
    out = weights.new_zeros(*weights.shape[:3], dim)
    _combine(weights.numpy(), *_arguments(planes, bits, slots, codebook), scales.numpy(), out.numpy())
    return out[..., _order(slots, dim)[1]] if slots else out
