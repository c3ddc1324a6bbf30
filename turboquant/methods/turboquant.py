"""TurboQuant (arXiv:2504.19874): random rotation, then an optimal scalar code for every coordinate.

Two recipes share the quantizers of `scalar`. `turboquant-paper` is the paper's: keys by TurboQuant_prod, values by
TurboQuant_mse, nothing exact. `turboquant` is the one we recommend; it drops the QJL stage, which costs more than it
gives once a softmax follows, takes the mean of every 64 keys away before they are rounded, keeps lengths (keys) or
inner products (values) right, stores scales in 8 bits, and leaves sinks and the most recent tokens exact. What each of
these is worth was measured: docs/recipe.md.
Rotation followed by scalar codes has a history: DRIVE and EDEN (arXiv:2105.08339, 2108.08842), QuaRot
(arXiv:2404.00456), HIGGS (arXiv:2411.17525), RaBitQ (arXiv:2405.12497).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from turboquant.methods import BitsMethod, NoSuchLayerError, check_choice
from turboquant.methods.layer_bits import Bits, read_layer_bits, write_layer_bits
from turboquant.methods.scalar import SCALES, Scale, TurboQuantMSE, TurboQuantProd
from turboquant.quant.rotation import ROTATIONS, RotationKind, qjl_projection, qjl_scale, random_rotation

QJL_KINDS = ("none", "gaussian", "orthogonal")
GROUP_SIZES = (0, 32, 64, 128)


@dataclass(frozen=True)
class TurboQuant(BitsMethod):
    """The recommended recipe; every field can be changed, so the paper's choices can be tried one by one.

    `layers` gives some layers other bits, such as `0+4-6:2+9:5/3` (see `turboquant.methods.layer_bits`).
    """

    name: ClassVar[str] = "turboquant"
    title: ClassVar[str] = "TurboQuant, recommended recipe"
    summary: ClassVar[str] = (
        "Each vector is rotated by a random Hadamard matrix and every coordinate is rounded to the optimal levels for "
        "the density that gives. Keys lose the mean of their group of 64 first; sinks and recent tokens stay exact."
    )
    reference: ClassVar[str] = "arXiv:2504.19874, Algorithm 1, with group means, corrected norms, sinks and a window"
    color: ClassVar[str] = "#0080d0"
    sign: ClassVar[str] = "circle"
    presets: ClassVar[tuple[str, ...]] = ("bits=4", "bits=3", "bits=2")
    grid: ClassVar[tuple[str, ...]] = (
        *("bits=2", "bits=3", "key_bits=4,value_bits=2", "key_bits=4,value_bits=3", "bits=4", "bits=8"),
    )
    residual_length: int = 64
    sink_length: int = 4
    rotation: RotationKind = "hadamard"
    qjl: str = "none"
    center: bool = True
    scale: Scale = "matched"
    value_scale: Scale = "unbiased"
    group_size: int = 64
    layers: str = ""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("rotation", self.rotation, ROTATIONS)
        check_choice("qjl", self.qjl, QJL_KINDS)
        check_choice("scale", self.scale, SCALES)
        check_choice("value_scale", self.value_scale, SCALES)
        check_choice("group_size", self.group_size, GROUP_SIZES)
        other = {layer: bits for layer, bits in read_layer_bits(self.layers).items() if bits != self.resolved_bits}
        object.__setattr__(self, "layers", write_layer_bits(other))

    def layer_kind(self, layer_idx: int) -> Bits:
        """Return the key bits and value bits of one layer."""
        return read_layer_bits(self.layers).get(layer_idx, self.resolved_bits)

    def check_layers(self, count: int, compressed: Collection[int]) -> None:
        """Refuse bits for a layer that the model does not have, or that is not compressed."""
        named = read_layer_bits(self.layers)
        last = max(named, default=0)
        if last >= count:
            raise NoSuchLayerError(f"{self.name} gives bits to layer {last}, the model has layers 0 to {count - 1}")
        if idle := {layer: named[layer] for layer in named if layer not in compressed}:
            which = write_layer_bits(dict.fromkeys(idle, (1, 1))).removesuffix(":1")
            raise NoSuchLayerError(
                f"{self.name} gives bits to layers {which}, whose cache is not compressed in this model: they keep a "
                f"window of tokens, or no keys and values ({len(compressed)} of {count} layers are compressed)"
            )

    @property
    def payload_bits(self) -> float | None:
        """Mean of key and value bits; None where layers differ, so that the codes that are held are counted instead."""
        return None if self.layers else super().payload_bits

    @property
    def block_length(self) -> int:  # type: ignore[override]
        """Tokens leave the exact window one group at a time."""
        return self.group_size or 32

    def quantizers(
        self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device
    ) -> tuple[TurboQuantMSE, TurboQuantMSE]:
        """Return the key and the value quantizer of one layer."""
        # Keys and values of equal length share a rotation, and its memory: they are never multiplied with each other.
        key_bits, value_bits = self.layer_kind(layer_idx)
        rotation = random_rotation(self.rotation, key_dim, self.seed, layer_idx, device)
        value_rotation = random_rotation(self.rotation, value_dim, self.seed, layer_idx, device)
        keys: TurboQuantMSE
        if self.qjl == "none":  # Algorithm 1 for keys too; else Algorithm 2, whose bits include the sign
            keys = TurboQuantMSE(key_dim, key_bits, rotation, self.scale, self.center, self.group_size)
        else:
            kind: Literal["gaussian", "orthogonal"] = "gaussian" if self.qjl == "gaussian" else "orthogonal"
            projection = qjl_projection(kind, key_dim, self.seed, layer_idx, device)
            constant = qjl_scale(kind, key_dim)
            options = (self.scale, self.center, self.group_size)
            keys = TurboQuantProd(key_dim, key_bits, rotation, projection, constant, *options)
        # Values are not centred: that was tried and was worse (docs/recipe.md).
        values = TurboQuantMSE(value_dim, value_bits, value_rotation, self.value_scale, group_size=self.group_size)
        return keys, values


@dataclass(frozen=True)
class TurboQuantPaper(TurboQuant):
    """The paper's and the methodology's recipe."""

    name: ClassVar[str] = "turboquant-paper"
    title: ClassVar[str] = "TurboQuant as published"
    summary: ClassVar[str] = (
        "Keys spend one of their bits on the sign of a Gaussian projection of the rounding error (QJL), which makes "
        "inner products unbiased but noisier; values are rounded plainly. Nothing stays exact."
    )
    reference: ClassVar[str] = "arXiv:2504.19874, Algorithms 1 and 2"
    color: ClassVar[str] = "#56b4e9"
    sign: ClassVar[str] = "circle-open"
    presets: ClassVar[tuple[str, ...]] = ("bits=4",)
    grid: ClassVar[tuple[str, ...]] = (
        *("bits=2", "bits=3", "bits=4"),
        *("bits=2,qjl=orthogonal", "bits=3,qjl=orthogonal", "bits=4,qjl=orthogonal"),
    )
    residual_length: int = 0
    sink_length: int = 0
    rotation: RotationKind = "qr"
    qjl: str = "gaussian"
    center: bool = False
    scale: Scale = "norm"
    value_scale: Scale = "norm"
    group_size: int = 0

    @property
    def block_length(self) -> int:  # type: ignore[override]
        """Every token is packed as soon as it has been processed."""
        return self.group_size or 1
