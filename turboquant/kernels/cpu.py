"""CPU versions of `ops.codes` (numba): a row of codes is unpacked into registers' reach and used at once.

Each function compiles on first use (about a second) and is cached on disk. They run on one thread without the GIL.
"""

from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from turboquant.packing import Planes, plane_widths

_jit = numba.njit(fastmath=True, nogil=True, cache=True)


@_jit
def _unpack_row(planes: Any, starts: Any, widths: Any, row_bytes: Any, codebook: Any, codes: Any, levels: Any) -> None:
    """Write the levels of one row; `codes` and `levels` have room for whole bytes."""
    shift = 0
    for p in range(len(planes)):
        plane, start, width, count = planes[p], starts[p], widths[p], row_bytes[p]
        mask = np.uint8((1 << width) - 1)
        for slot in range(8 // width):
            for j in range(count):
                part = ((plane[start + j] >> np.uint8(slot * width)) & mask) << np.uint8(shift)
                if p == 0:
                    codes[slot * count + j] = part
                else:
                    codes[slot * count + j] |= part
        shift += width
    for i in range(levels.shape[0]):
        levels[i] = codebook[codes[i]]


@_jit
def _scores(
    query: Any, planes: Any, strides: Any, widths: Any, row_bytes: Any, codebook: Any, scales: Any, out: Any
) -> None:
    batch, heads, rows, dim = query.shape
    codes, levels = np.zeros(dim + 8, np.uint8), np.zeros(dim, np.float32)
    starts = np.zeros(len(planes), np.int64)
    for b in range(batch):
        for h in range(heads):
            for n in range(scales.shape[2]):
                for p in range(len(planes)):
                    starts[p] = strides[p, 0] + b * strides[p, 1] + h * strides[p, 2] + n * strides[p, 3]
                _unpack_row(planes, starts, widths, row_bytes, codebook, codes, levels)
                for r in range(rows):
                    total = np.float32(0)
                    for i in range(dim):
                        total += query[b, h, r, i] * levels[i]
                    out[b, h, r, n] = total * scales[b, h, n]


@_jit
def _combine(
    weights: Any, planes: Any, strides: Any, widths: Any, row_bytes: Any, codebook: Any, scales: Any, out: Any
) -> None:
    batch, heads, rows, dim = out.shape
    codes, levels = np.zeros(dim + 8, np.uint8), np.zeros(dim, np.float32)
    starts = np.zeros(len(planes), np.int64)
    for b in range(batch):
        for h in range(heads):
            for n in range(scales.shape[2]):
                for p in range(len(planes)):
                    starts[p] = strides[p, 0] + b * strides[p, 1] + h * strides[p, 2] + n * strides[p, 3]
                _unpack_row(planes, starts, widths, row_bytes, codebook, codes, levels)
                for r in range(rows):
                    weight = weights[b, h, r, n] * scales[b, h, n]
                    for i in range(dim):
                        out[b, h, r, i] += weight * levels[i]


def _arguments(planes: Planes, bits: int) -> tuple[Any, ...]:
    """Return the planes as flat arrays with offsets and strides, so that views need no copy."""
    flat = tuple(np.frombuffer(_storage(plane), np.uint8) for plane in planes)
    strides = np.array([[plane.storage_offset(), *plane.stride()[:3]] for plane in planes], np.int64)
    widths = np.array(plane_widths(bits), np.int64)
    return flat, strides, widths, np.array([plane.shape[-1] for plane in planes], np.int64)


def _storage(plane: Tensor) -> Any:
    storage = plane.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]


def code_scores(
    query: Float[Tensor, "batch heads rows dim"],
    planes: Planes,
    bits: int,
    codebook: Float[Tensor, " levels"],
    scales: Float[Tensor, "batch heads tokens"],
) -> Float[Tensor, "batch heads rows tokens"]:
    """See `ops.codes.code_scores`."""
    query, scales = query.contiguous(), scales.float().contiguous()
    out = query.new_empty(*query.shape[:3], scales.shape[2])
    _scores(query.numpy(), *_arguments(planes, bits), codebook.numpy(), scales.numpy(), out.numpy())
    return out


def code_combine(
    weights: Float[Tensor, "batch heads rows tokens"],
    planes: Planes,
    bits: int,
    codebook: Float[Tensor, " levels"],
    scales: Float[Tensor, "batch heads tokens"],
    dim: int,
) -> Float[Tensor, "batch heads rows dim"]:
    """See `ops.codes.code_combine`."""
    weights, scales = weights.contiguous(), scales.float().contiguous()
    out = weights.new_zeros(*weights.shape[:3], dim)
    _combine(weights.numpy(), *_arguments(planes, bits), codebook.numpy(), scales.numpy(), out.numpy())
    return out
