"""Test doubles that are real: a method that packs without loss, to test the cache and not the rounding."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from turboquant.methods import Method
from turboquant.quantizer import PackedTensor, Quantizer


@dataclass(frozen=True)
class PlainVectors(PackedTensor):
    codes: Tensor


class PlainQuantizer(Quantizer[PlainVectors]):
    def quantize(self, x, like=None, valid=None):
        return PlainVectors(x.float())

    def dequantize(self, packed):
        return packed.codes


@dataclass(frozen=True)
class Lossless(Method):
    """Goes through the whole packing machinery and stores float32 vectors; not registered."""

    title: ClassVar[str] = "lossless"
    residual_length: int = 8
    sink_length: int = 2

    def quantizers(self, key_dim, value_dim, layer_idx, device):
        return PlainQuantizer(), PlainQuantizer()

    def __str__(self) -> str:
        return "lossless"


Lossless.name = "lossless"


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    """Random token ids of a tiny model's vocabulary, special tokens left out."""
    return torch.randint(3, 256, (rows, count), generator=torch.Generator().manual_seed(seed))
