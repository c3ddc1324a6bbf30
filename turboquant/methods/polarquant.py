"""PolarQuant (arXiv:2502.02617, Han et al.): a rotated vector is stored as radii and quantized angles.

Coordinates are paired and each pair is written as radius and angle; the radii are paired again, four levels deep, so
that 16 coordinates become one radius and 8 + 4 + 2 + 1 angles. After a random rotation the densities of the angles are
known: uniform on a circle at level 1, proportional to sin(2 psi)^(2^(l-1) - 1) on [0, pi/2] at level l. Their optimal
levels are computed from those densities once and need no data (the paper's "offline" codebook, made exact).

The paper spends 4 bits on an angle of level 1 and 2 bits on the others: 3.875 bits a coordinate. Level 1 has a range
four times as wide, so other widths keep that difference of two bits; `effective_bits` gives what they cost. A head_dim
that 16 does not divide has as many levels as it can be halved (head_dim 40: 3).
(Another method of the same name, Wu et al., NeurIPS 2025, is not meant.)
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from turboquant.methods import BitsMethod, check_choice
from turboquant.quant.codebook import boundaries, check_bits
from turboquant.quant.grouping import stored
from turboquant.quant.modes import shared_table
from turboquant.quant.packing import Planes, pack_bits, unpack_bits
from turboquant.quant.quantizer import PackedTensor, Quantizer
from turboquant.quant.rotation import ROTATIONS, Rotation, RotationKind, random_rotation

MAX_LEVELS = 4
_GRID = 2**16


def levels_of(dim: int) -> int:
    """Return how often `dim` can be halved, at most 4.

    Raises:
        ValueError: If `dim` is odd.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"polarquant needs an even head_dim, got {dim}")
    return min(MAX_LEVELS, (dim & -dim).bit_length() - 1)


def angle_bits(bits: int, level: int) -> int:
    """Return the bits of an angle: `bits` at level 1, two fewer (at least 1) at the others."""
    return bits if level == 1 else max(1, bits - 2)


def effective_bits(bits: int, dim: int) -> float:
    """Return the bits a coordinate with its share of the fp16 radius, where the codes fill whole bytes."""
    depth = levels_of(dim)
    return 16 / 2**depth + sum(angle_bits(bits, level) / 2**level for level in range(1, depth + 1))


@cache
def _solve(bits: int, level: int) -> np.ndarray:
    """Lloyd's iteration on the density of an angle of level 2 or deeper, on a grid of [0, pi/2]."""
    edges = np.linspace(0, np.pi / 2, _GRID + 1)
    angles = (edges[1:] + edges[:-1]) / 2
    # The density of level l is proportional to sin(2 psi)^(2^(l-1) - 1).
    weights = np.sin(2 * angles) ** (2 ** (level - 1) - 1)
    mass, moment = (np.concatenate([[0.0], np.cumsum(w)]) for w in (weights, weights * angles))
    spread = np.cumsum(weights ** (1 / 3))  # where a fine quantizer puts its levels (Panter and Dite)
    levels = np.interp((np.arange(2**bits) + 0.5) / 2**bits * spread[-1], spread, angles)
    for _ in range(10_000):
        cuts = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [np.pi / 2]])
        centroids = np.diff(np.interp(cuts, edges, moment)) / np.diff(np.interp(cuts, edges, mass))
        moved = np.abs(centroids - levels).max()
        levels = centroids
        if moved < 1e-9:
            break
    return levels


def angle_codebook(bits: int, level: int) -> Float[Tensor, " levels"]:
    """Return the angles that minimise mean squared error for the density of one level, ascending.

    Args:
        bits: Bits a code, 1 to 8.
        level: 1 for the angle of two coordinates (uniform on [0, 2 pi)), deeper ones lie in [0, pi/2].
    """
    if level == 1:
        return ((torch.arange(2**bits, dtype=torch.float64, device="cpu") + 0.5) * (2 * math.pi / 2**bits)).float()
    return torch.from_numpy(_solve(check_bits(bits), level)).float()


@shared_table(maxsize=64)
def _shared_codebook(bits: int, level: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return decision points, cosines and sines, one object for all layers."""
    angles = angle_codebook(bits, level).to(device)
    return boundaries(angles), angles.cos(), angles.sin()


@dataclass(frozen=True)
class PackedPolar(PackedTensor):
    """Codes of the angles and one fp16 radius a block of 2^levels coordinates.

    Shapes: planes (batch, kv_heads, tokens, bytes) uint8, of level 1 in `codes` and of all deeper levels in
    `deep_codes`; radii (batch, kv_heads, tokens, blocks) float16.
    """

    code_fields: ClassVar[tuple[str, ...]] = ("codes", "deep_codes")
    codes: Planes
    deep_codes: Planes
    radii: Tensor


class Polar(Quantizer[PackedPolar]):
    """Recursive polar transform of the rotated vector; radii are kept, angles are quantized."""

    def __init__(self, dim: int, bits: int, rotation: Rotation) -> None:
        self.dim, self.bits, self.rotation = dim, check_bits(bits), rotation
        self.depth = levels_of(dim)
        device = rotation.matrix.device
        self.codebooks = [_shared_codebook(angle_bits(bits, lv), lv, device) for lv in range(1, self.depth + 1)]

    def quantize(
        self,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        like: PackedPolar | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> PackedPolar:
        """Quantize vectors; see `Quantizer.quantize`. No statistics are shared between vectors."""
        radii = self.rotation.apply(x.float())
        codes: list[Tensor] = []
        for cuts, _, _ in self.codebooks:
            first, second = radii.unflatten(-1, (-1, 2)).unbind(-1)
            angles = torch.atan2(second, first)
            if not codes:  # level 1 goes round the circle; deeper ones pair radii, whose angles lie in [0, pi/2]
                angles = torch.where(angles < 0, angles + 2 * math.pi, angles)
            codes.append(torch.bucketize(angles, cuts, out_int32=True).to(torch.uint8))
            radii = torch.hypot(first, second)
        deep = pack_bits(torch.cat(codes[1:], dim=-1), angle_bits(self.bits, 2)) if self.depth > 1 else ()
        return PackedPolar(pack_bits(codes[0], self.bits), deep, stored(radii, valid))

    def _rotated(self, packed: PackedPolar) -> Tensor:
        """Return the vectors as they were encoded, still rotated."""
        codes = [unpack_bits(packed.codes, self.bits, self.dim // 2)]
        if self.depth > 1:
            counts = [self.dim // 2**level for level in range(2, self.depth + 1)]
            deep = unpack_bits(packed.deep_codes, angle_bits(self.bits, 2), sum(counts))
            codes += deep.split(counts, dim=-1)
        # From the deepest level up: each radius and angle give back the pair they were made from.
        radii = packed.radii.float()
        for (_, cosines, sines), part in zip(reversed(self.codebooks), reversed(codes), strict=True):
            index = part.int()
            radii = torch.stack([radii * cosines[index], radii * sines[index]], dim=-1).flatten(-2)
        return radii

    def dequantize(self, packed: PackedPolar) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Return the vectors in float32."""
        return self.rotation.inverse(self._rotated(packed))

    def project(self, query: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch projected"]:
        """Rotate queries, so that keys need not be rotated back."""
        return self.rotation.apply(query)

    def scores(
        self, projected: Float[Tensor, "batch kv_heads queries projected"], packed: PackedPolar
    ) -> Float[Tensor, "batch kv_heads queries tokens"]:
        """Return inner products of rotated queries and packed keys."""
        return projected @ self._rotated(packed).mT

    def combine(
        self, weights: Float[Tensor, "batch kv_heads queries tokens"], packed: PackedPolar
    ) -> Float[Tensor, "batch kv_heads queries dim"]:
        """Return the weighted sum of packed values, still rotated."""
        return weights @ self._rotated(packed)

    def unproject(self, output: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Rotate a sum of values back."""
        return self.rotation.inverse(output)

    def tables(self) -> tuple[Tensor, ...]:
        """Return rotation and codebooks."""
        return (*self.rotation.tensors, *(table for tables in self.codebooks for table in tables))


@dataclass(frozen=True)
class PolarQuant(BitsMethod):
    """PolarQuant with one rotation for keys, values, all layers and heads."""

    name: ClassVar[str] = "polarquant"
    title: ClassVar[str] = "PolarQuant"
    summary: ClassVar[str] = (
        "Each vector is rotated and written in polar coordinates, 16 of its values as one radius and 15 angles; the "
        "angles are rounded to the optimal levels for their known densities. 4 bits are the paper's recipe."
    )
    reference: ClassVar[str] = "arXiv:2502.02617"
    color: ClassVar[str] = "#cc79a7"
    sign: ClassVar[str] = "triangle-up"
    presets: ClassVar[tuple[str, ...]] = ("",)
    grid: ClassVar[tuple[str, ...]] = ("",)
    rotation: RotationKind = "qr"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("rotation", self.rotation, ROTATIONS)

    @property
    def payload_bits(self) -> float:
        """Mean bits of the angles a coordinate, at four levels (without the radius)."""
        return sum(effective_bits(bits, 2**MAX_LEVELS) - 1 for bits in self.resolved_bits) / 2

    def quantizers(
        self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device
    ) -> tuple[Quantizer[Any], Quantizer[Any]]:
        """Return the key and the value quantizer, the same in every layer."""
        # Layer 0 whatever the layer: the paper has one rotation for all.
        key_bits, value_bits = self.resolved_bits
        keys, values = (random_rotation(self.rotation, dim, self.seed, 0, device) for dim in (key_dim, value_dim))
        return Polar(key_dim, key_bits, keys), Polar(value_dim, value_bits, values)
