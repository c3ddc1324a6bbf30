"""What the CPU kernel of `cpu.attention` is told: one structure with the addresses, shapes and strides of a call."""

import ctypes
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from turboquant.quant.modes import shared_table
from turboquant.quant.packing import plane_widths
from turboquant.quant.quantizer import KernelView, PackedTensor, Quantizer

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3, torch.int8: 4}
_i64, _f64 = ctypes.c_int64, ctypes.c_double


class Codes(ctypes.Structure):
    """Codes of one vector a token: up to three planes (address, width and strides in bytes), and what they stand for.

    `table` has the level of each code; `magnitudes` is set where the code is sign and magnitude and has 4 bits or
    fewer, and then holds the magnitudes, eight of them (repeated where there are fewer).
    """

    _fields_ = [
        ("planes", _i64 * 3),
        ("widths", _i64 * 3),
        ("strides", (_i64 * 3) * 3),
        ("bits", _i64),
        ("table", _i64),
        ("magnitudes", _i64),
    ]


class Numbers(ctypes.Structure):
    """A tensor of floats or small integers: address (0 for none), kind and the strides of its first three axes.

    Kinds: 0 float32, 1 float16, 2 bfloat16, 3 uint8, 4 int8. Strides are in elements; the last axis is contiguous.
    """

    _fields_ = [("address", _i64), ("kind", _i64), ("strides", _i64 * 3)]


class Side(ctypes.Structure):
    """Packed keys or values, and exact ones."""

    _fields_ = [
        ("dim", _i64),
        ("group", _i64),
        ("codes", Codes),
        ("scales", Numbers),
        ("tops", Numbers),
        ("means", Numbers),
        ("mean_tops", Numbers),
        ("center", Numbers),
        ("signs", Codes),
        ("error_norms", Numbers),
        ("gain", _f64),
        ("rotation", _i64),
        ("flips", _i64),
        ("projection", _i64),
        ("exact", Numbers),
    ]


class Job(ctypes.Structure):
    """One call. `work` is room for what `prepare` and `split` hand on; see `_Room` for its parts."""

    _fields_ = [
        ("keys", Side),
        ("values", Side),
        ("query", _i64),
        ("output", _i64),
        ("work", _i64),
        ("sinks", _i64),
        ("starts", _i64),
        ("batch", _i64),
        ("heads", _i64),
        ("rows", _i64),
        ("queries", _i64),
        ("exact", _i64),
        ("packed", _i64),
        ("tile", _i64),
        ("parts", _i64),
        ("taken", _i64),
        ("counter", _i64),
        ("scaling", _f64),
        ("cap", _f64),
    ]


@dataclass(frozen=True)
class Prepared:
    """One side of a job as it is until more tokens are packed, and the tensors whose addresses it has."""

    side: Side
    kept: tuple[Any, ...]


_prepared: dict[int, Prepared] = {}


def readable(tensor: Tensor | None) -> bool:
    """Does a kernel know the dtype, and do vectors lie in one piece?"""
    return tensor is None or (tensor.dtype in _KINDS and (tensor.dim() < 4 or tensor.stride(3) == 1))


def numbers(tensor: Tensor | None) -> Numbers:
    """Return where a readable tensor of three or four axes lies."""
    if tensor is None:
        return Numbers()
    return Numbers(tensor.data_ptr(), _KINDS[tensor.dtype], tensor.stride()[:3])


@shared_table(maxsize=64)
def _eight_magnitudes(codebook: Tensor, bits: int) -> Tensor | None:
    """Return the magnitudes of sign-and-magnitude codes, repeated to eight; None where codes are something else."""
    half = codebook[: codebook.shape[0] // 2]
    if bits > 4 or not torch.equal(codebook[half.shape[0] :], -half):
        return None
    return half.repeat(8 // half.shape[0]).contiguous()


def _codes(planes: tuple[Tensor, ...], bits: int, codebook: Tensor) -> tuple[Codes, tuple[Any, ...]]:
    magnitudes = _eight_magnitudes(codebook, bits) if bits else None
    held = Codes(bits=bits, table=codebook.data_ptr(), magnitudes=0 if magnitudes is None else magnitudes.data_ptr())
    for p, (plane, width) in enumerate(zip(planes, plane_widths(bits), strict=True)):
        held.planes[p], held.widths[p], held.strides[p] = plane.data_ptr(), width, plane.stride()[:3]
    return held, (planes, codebook, magnitudes)


def _side(view: KernelView) -> Prepared:
    codes, kept = _codes(view.planes, view.bits, view.codebook)
    matrix, flips = view.rotation.matrix, view.rotation.signs
    side = Side(
        dim=matrix.shape[0],
        group=view.group_size,
        codes=codes,
        scales=numbers(view.scales),
        tops=numbers(view.tops),
        means=numbers(view.means),
        mean_tops=numbers(view.mean_tops),
        center=numbers(view.center),
        rotation=matrix.data_ptr(),
        flips=0 if flips is None else flips.data_ptr(),
        gain=view.gain,
    )
    if view.signs is not None and view.sign_levels is not None and view.projection is not None:
        side.signs, more = _codes((view.signs,), 1, view.sign_levels)
        side.error_norms, side.projection = numbers(view.error_norms), view.projection.data_ptr()
        kept = (kept, more)
    return Prepared(side, (view, kept))


def prepare(quantizer: Quantizer[Any], packed: PackedTensor) -> Prepared | None:
    """Return what `packed` is to a kernel; kept while it lives, which is many steps. None where no kernel reads it."""
    found = _prepared.get(id(packed))
    if found is None:
        view = quantizer.view(packed)
        if not isinstance(view, KernelView) or not all(map(readable, packed.tensors())):
            return None
        found = _prepared[id(packed)] = _side(view)
        finalize(packed, _prepared.pop, id(packed), None).atexit = False
    return found
