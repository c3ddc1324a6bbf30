"""No compression: the model's own cache."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from turboquant.methods import Method


@dataclass(frozen=True)
class Full(Method):
    """Plain tensors in the model's dtype (Hugging Face's DynamicCache)."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full precision"
    summary: ClassVar[str] = "Keys and values are stored as the model computed them. This is the reference."
    reference: ClassVar[str] = "transformers DynamicCache"
    color: ClassVar[str] = "#808080"
    sign: ClassVar[str] = "x"
    grid: ClassVar[tuple[str, ...]] = ("",)
    compresses: ClassVar[bool] = False

    def quantizers(self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device) -> None:
        """Return None: nothing is quantized."""
        return None

    def layer(self, plain: Any, layer_idx: int, last_reader: int | None = None, config: Any = None) -> Any:
        """Return the plain layer."""
        return plain

    def packed_length(self, tokens: int) -> int:
        """Return 0."""
        return 0
