"""Bit-packing of integer codes: 1 to 8 bits a code really take 1 to 8 bits.

Widths that do not divide 8 are split into planes that do: 3 bits are a 2-bit plane and a 1-bit plane, 5 are 4+1,
6 are 4+2 and 7 are 4+2+1. Within a plane of width w, a row of d codes becomes n = ceil(d * w / 8) bytes; byte j holds
the codes j, j + n, j + 2n, ... from its low bits up, so that unpacking is a concatenation of shifted rows and never an
interleave.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

PLANE_WIDTHS: dict[int, tuple[int, ...]] = {
    0: (),
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
Planes = tuple[Tensor, ...]


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    slots = 8 // width
    if slots == 1:
        return codes.clone()
    dim = codes.shape[-1]
    row_bytes = -(-dim // slots)
    if row_bytes * slots != dim:
        codes = torch.nn.functional.pad(codes, (0, row_bytes * slots - dim))
    pieces = codes.unflatten(-1, (slots, row_bytes)).unbind(-2)
    packed = pieces[0].clone()
    for slot, piece in enumerate(pieces[1:], start=1):
        packed |= piece << (slot * width)
    return packed


def _unpack_plane(packed: Tensor, width: int, dim: int) -> Tensor:
    slots = 8 // width
    if slots == 1:
        return packed
    mask = (1 << width) - 1
    pieces = [packed & mask]
    pieces += [(packed >> (slot * width)) & mask for slot in range(1, slots - 1)]
    pieces.append(packed >> (8 - width))  # uint8 shifts in zeros: the highest slot needs no mask
    return torch.cat(pieces, dim=-1)[..., :dim]


def pack_bits(codes: UInt8[Tensor, "*batch dim"], bits: int) -> Planes:
    """Pack codes of `bits` bits along the last axis.

    Args:
        codes: Integers from 0 to ``2**bits - 1``.
        bits: Width of a code, 0 to 8 (0 gives no planes).

    Returns:
        One uint8 tensor a plane, low bits first; a plane of width w has shape (*batch, ceil(dim * w / 8)).

    Raises:
        ValueError: If `bits` is out of range.
    """
    planes = []  # the low bits first: a plane holds what is left once those of the planes before it are shifted out
    for width in plane_widths(bits):
        planes.append(_pack_plane(codes & ((1 << width) - 1), width))
        codes = codes >> width
    return tuple(planes)


def unpack_bits(planes: Planes, bits: int, dim: int) -> UInt8[Tensor, "*batch dim"]:
    """Invert `pack_bits` for rows of `dim` codes."""
    codes, shift = None, 0
    for plane, width in zip(planes, plane_widths(bits), strict=True):
        part = _unpack_plane(plane, width, dim)
        codes = part if codes is None else codes | (part << shift)
        shift += width
    if codes is None:
        raise ValueError("0 bits hold no codes to unpack")
    return codes


def plane_widths(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes that hold codes of `bits` bits, low bits first."""
    if bits not in PLANE_WIDTHS:
        raise ValueError(f"bits must be 0 to 8, got {bits}")
    return PLANE_WIDTHS[bits]
