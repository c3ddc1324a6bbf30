"""A method of your own, from its packed tensors to its figures beside TurboQuant's.

    .venv/bin/python examples/own_method.py

This one keeps a sign a number and the mean magnitude of a vector. Once its class exists it has a name, and everything
that takes a method takes it: caches, comparisons, experiments, the command line. What each part may override further is
in docs/library.md, "Your own method".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from turboquant import Method, PackedTensor, Quantizer, load_model, parse_method
from turboquant.experiments.base import Watch
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.quant.packing import Planes, pack_bits, unpack_bits


@dataclass(frozen=True)
class PackedSigns(PackedTensor):
    """Signs (batch, kv_heads, tokens, bytes) uint8 and scales (batch, kv_heads, tokens) float16."""

    codes: Planes
    scales: Tensor


class Signs(Quantizer[PackedSigns]):
    """Maps vectors of `dim` numbers to their signs and back."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def quantize(self, x: Tensor, like: PackedSigns | None = None, valid: Tensor | None = None) -> PackedSigns:
        """Take signs and mean magnitudes; vectors share nothing, so pads (`valid`) do no harm."""
        return PackedSigns(pack_bits((x > 0).to(torch.uint8), 1), x.float().abs().mean(dim=-1).half())

    def dequantize(self, packed: PackedSigns) -> Tensor:
        """Return plus or minus the scale."""
        signs = unpack_bits(packed.codes, 1, self.dim).float() * 2 - 1
        return signs * packed.scales.float().unsqueeze(-1)


@dataclass(frozen=True)
class OneBit(Method):
    """Signs and a scale a vector: 1 + 16 / head_dim bits."""

    name: ClassVar[str] = "one-bit"
    title: ClassVar[str] = "Signs"
    summary: ClassVar[str] = "Each number is stored as its sign, each vector with its mean magnitude."
    reference: ClassVar[str] = "XNOR-Net, arXiv:1603.05279"
    residual_length: int = 64
    sink_length: int = 4

    def quantizers(self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device) -> tuple[Signs, Signs]:
        """Return the key and the value quantizer of one layer."""
        return Signs(key_dim), Signs(value_dim)


if __name__ == "__main__":
    loaded = load_model("smollm2-135m")
    perplexity = EXPERIMENTS["perplexity"]
    settings = perplexity.settings(texts=("persuasion",), context=200, prefill=168)
    methods = [parse_method(spec) for spec in ("one-bit", "turboquant:bits=1", "turboquant:bits=2")]
    for method, measured in perplexity.run(loaded, methods, settings, Watch()):
        print(f"{method}: KL {measured.metrics['kl_mean']:.4f}, {measured.metrics['packed_bits_per_value']:.2f} bits")
