"""Round to nearest with one scale a group of channels, as the q4_0 and q8_0 caches of llama.cpp do.

A group's scale is its value of largest magnitude over -2^(bits-1), so that this value is met exactly and zero is a
level (llama.cpp, `quantize_row_q4_0_ref`). Below 4 bits that grid wastes one of its few levels; there we use the
symmetric one: 2 and 3 bits have the levels +-1/2, +-3/2 ... times max|x| / 2^(bits-1), and 1 bit is the sign times the
mean magnitude, the best scale for signs (XNOR-Net, arXiv:1603.05279).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from turboquant.methods import BitsMethod, check_choice
from turboquant.quant.codebook import check_bits
from turboquant.quant.grouping import channel_groups, stored, ungrouped
from turboquant.quant.packing import Planes, pack_bits, unpack_bits
from turboquant.quant.quantizer import PackedTensor, Quantizer
from turboquant.quant.rotation import Rotation, random_rotation

GROUP_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class PackedRTN(PackedTensor):
    """Codes and one fp16 scale a group.

    Shapes: planes (batch, kv_heads, tokens, bytes) uint8; scales (batch, kv_heads, tokens, groups) float16.
    """

    codes: Planes
    scales: Tensor


class RoundToNearest(Quantizer[PackedRTN]):
    """Symmetric rounding of groups of channels of one vector, after a rotation if one is given.

    Args:
        dim: Length of the vectors.
        bits: Bits a coordinate, 1 to 8.
        group_size: Channels that share a scale; the last group of a vector may be shorter.
        rotation: The layer's rotation, or None.
    """

    def __init__(self, dim: int, bits: int, group_size: int = 32, rotation: Rotation | None = None) -> None:
        self.dim, self.bits, self.group_size, self.rotation = dim, check_bits(bits), group_size, rotation

    @property
    def _offset(self) -> float:
        """What is subtracted from a code to get its level."""
        return (2**self.bits - 1) / 2 if self.bits < 4 else 2.0 ** (self.bits - 1)

    def _scales(self, groups: Tensor) -> Tensor:
        if self.bits == 1:
            missing = -self.dim % self.group_size  # the last channel stands that often too many in the last group
            total = groups.abs().sum(dim=-1)
            total[..., -1] -= missing * groups[..., -1, -1].abs()
            counts = torch.full_like(total, self.group_size)
            counts[..., -1] -= missing
            return 2 * total / counts
        # Levels +-1/2, +-3/2 ... up to (2^b - 1) / 2: the largest magnitude lies half a step outside the outermost one.
        if self.bits < 4:
            return groups.abs().amax(dim=-1) / 2 ** (self.bits - 1)
        # Signed: the value of largest magnitude gets code 0, the level -2^(b-1), which has no positive counterpart.
        largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        return largest / -(2 ** (self.bits - 1))

    def quantize(
        self,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        like: PackedRTN | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> PackedRTN:
        """Quantize vectors; see `Quantizer.quantize`. No statistics are shared between vectors."""
        y = x.float() if self.rotation is None else self.rotation.apply(x.float())
        groups = channel_groups(y, self.group_size)
        scales = stored(self._scales(groups), valid)
        steps = scales.float().unsqueeze(-1)  # as stored, since that is what codes are read with
        levels = torch.where(steps == 0, 0, groups / steps)
        codes = (levels + self._offset).round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        return PackedRTN(pack_bits(ungrouped(codes, self.dim), self.bits), scales)

    def _rotated(self, packed: PackedRTN) -> Tensor:
        """Return the vectors as they were rounded, still rotated."""
        levels = unpack_bits(packed.codes, self.bits, self.dim).float() - self._offset
        steps = packed.scales.float().repeat_interleave(self.group_size, dim=-1)[..., : self.dim]
        return levels * steps

    def dequantize(self, packed: PackedRTN) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Return the vectors in float32."""
        y = self._rotated(packed)
        return y if self.rotation is None else self.rotation.inverse(y)

    def project(self, query: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch projected"]:
        """Rotate queries, so that keys need not be rotated back."""
        return query if self.rotation is None else self.rotation.apply(query)

    def scores(
        self, projected: Float[Tensor, "batch kv_heads queries projected"], packed: PackedRTN
    ) -> Float[Tensor, "batch kv_heads queries tokens"]:
        """Return inner products of projected queries and packed keys."""
        return projected @ self._rotated(packed).mT

    def combine(
        self, weights: Float[Tensor, "batch kv_heads queries tokens"], packed: PackedRTN
    ) -> Float[Tensor, "batch kv_heads queries dim"]:
        """Return the weighted sum of packed values, still rotated."""
        return weights @ self._rotated(packed)

    def unproject(self, output: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Rotate a sum of values back."""
        return output if self.rotation is None else self.rotation.inverse(output)

    def tables(self) -> tuple[Tensor, ...]:
        """Return the rotation's tables."""
        return () if self.rotation is None else self.rotation.tensors


@dataclass(frozen=True)
class RTN(BitsMethod):
    """Round to nearest; `rotation=hadamard` rotates every vector first. bits + 16 / group_size bits a value."""

    name: ClassVar[str] = "rtn"
    title: ClassVar[str] = "Round to nearest"
    summary: ClassVar[str] = (
        "Every 32 channels of a vector share one scale and are rounded to evenly spaced levels, as in llama.cpp's "
        "q4_0 cache. A random Hadamard rotation may come first, which spreads outliers over all channels."
    )
    reference: ClassVar[str] = "llama.cpp q4_0 and q8_0; with rotation QuaRot, arXiv:2404.00456"
    color: ClassVar[str] = "#e69f00"
    sign: ClassVar[str] = "square"
    presets: ClassVar[tuple[str, ...]] = ("bits=4",)
    grid: ClassVar[tuple[str, ...]] = (
        *("bits=3", "bits=4", "bits=8"),
        *("bits=2,rotation=hadamard", "bits=3,rotation=hadamard", "bits=4,rotation=hadamard"),
    )
    group_size: int = 32
    rotation: Literal["none", "hadamard"] = "none"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("group_size", self.group_size, GROUP_SIZES)
        check_choice("rotation", self.rotation, ("none", "hadamard"))

    def quantizers(
        self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device
    ) -> tuple[Quantizer[Any], Quantizer[Any]]:
        """Return the key and the value quantizer of one layer."""
        pair = []
        for dim, bits in zip((key_dim, value_dim), self.resolved_bits, strict=True):
            rotated = self.rotation == "hadamard"
            rotation = random_rotation("hadamard", dim, self.seed, layer_idx, device) if rotated else None
            pair.append(RoundToNearest(dim, bits, self.group_size, rotation))
        return pair[0], pair[1]
