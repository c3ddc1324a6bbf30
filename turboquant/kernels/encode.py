"""Quantizing keys and values into a cache's storage: by the quantizers, or on a GPU by one kernel for both."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from turboquant.kernels.backend import guarded, usable
from turboquant.quant.quantizer import PackedTensor, Quantizer


@runtime_checkable
class Room(Protocol):
    """Where packed tokens are held."""

    storage: Any
    length: int

    def append(self, new: PackedTensor) -> None:
        """Write tokens behind those held."""

    def extend(self, like: PackedTensor) -> PackedTensor:
        """Make room for as many tokens as `like` has, and return it."""


Side = tuple[Quantizer[Any], Tensor, Room]


def encode(keys: Side, values: Side, valid: Tensor | None) -> tuple[bool, bool]:
    """Quantize vectors behind those held.

    Args:
        keys: Quantizer, vectors (batch, kv_heads, tokens, dim) and where they go.
        values: The same for values.
        valid: (batch, tokens), False for pads; None where every token is real.

    Returns:
        Whether keys, and values, may be read back as something else: see `Quantizer.may_misread`.
    """
    # The kernel takes every token for real, so blocks with pads go to the quantizers.
    fused = _fused((keys, values)) if valid is None else None
    if fused is not None:
        return fused
    # Asked before, since packing overwrites what the question compares with.
    suspect = tuple(quantizer.may_misread(states, room.storage) for quantizer, states, room in (keys, values))
    for quantizer, states, room in (keys, values):
        room.append(quantizer.quantize(states, _held(room), valid))
    return suspect[0], suspect[1]


def _held(room: Room) -> Any:
    """What is packed already; its shared fields are used again."""
    return room.storage if room.length else None


def _fused(sides: tuple[Side, Side]) -> tuple[bool, bool] | None:
    """Quantize by a GPU kernel, as `encode` does; None where it cannot serve the call, and then nothing has changed."""
    kernels = usable(sides[0][1], "encode")
    if kernels is None:
        return None
    blanks: list[Any] = [quantizer.blank(states, _held(room)) for quantizer, states, room in sides]
    if None in blanks or kernels.unsupported(sides[0][1], *_views(sides, blanks)) is not None:
        return None
    before = [(room.storage, room.length) for *_, room in sides]

    def run() -> tuple[bool, bool]:
        targets = [room.extend(blank) for (*_, room), blank in zip(sides, blanks, strict=True)]
        found: tuple[bool, bool] = kernels.encode(sides[0][1], sides[1][1], *_views(sides, targets))
        return found

    held, far = guarded("encode", run) or (False, False)
    # What the kernel's format cannot hold (outliers) shows only afterwards; then the quantizers do it again.
    if held:
        return far and before[0][0] is not None, False
    for (*_, room), (storage, length) in zip(sides, before, strict=True):
        room.storage, room.length = storage, length
    return None


def _views(sides: tuple[Side, Side], packed: list[Any]) -> list[Any]:
    return [quantizer.view(one) for (quantizer, *_), one in zip(sides, packed, strict=True)]
