"""What a cache holds, counted layer by layer: bytes by purpose, and values."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

Purpose = Literal["key", "value", "scale", "exact", "spare", "shared", "state"]


@dataclass
class Count:
    """Bytes by purpose, each storage counted once; the numbers that layers hold, and what of them is packed.

    `packed_tokens` are those of the layer that has packed most.
    """

    key: int = 0
    value: int = 0
    scale: int = 0
    exact: int = 0
    spare: int = 0
    shared: int = 0
    state: int = 0
    values: int = 0
    packed_values: int = 0
    packed_tokens: int = 0
    compressed_layers: int = 0
    misread_vectors: int = 0
    seen: set[int] = field(default_factory=set)

    @property
    def total(self) -> int:
        """All bytes."""
        return self.key + self.value + self.scale + self.exact + self.spare + self.shared + self.state

    def add(self, purpose: Purpose, tensors: Iterable[Tensor], holders: Iterable[Tensor] | None = None) -> None:
        """Count tensors under one purpose, and what their storages, or those of `holders`, hold beyond as spare."""
        tensors = list(tensors)
        held = sum(tensor.nbytes for tensor in tensors)
        setattr(self, purpose, getattr(self, purpose) + held)
        self.add_storages("spare", tensors if holders is None else holders)
        self.spare -= held

    def add_storages(self, purpose: Purpose, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors, where they have not been counted before, under one purpose."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                setattr(self, purpose, getattr(self, purpose) + storage.nbytes())


class CompressedLayer(CacheLayerMixin):
    """What a cache asks of a layer that packs, beside what Hugging Face asks of every layer.

    `misread_vectors` are those that are read back as something else (`turboquant.quant.grouping.misread`).
    """

    misread_vectors: Any

    @property
    @abstractmethod
    def packed_length(self) -> int:
        """Tokens held as codes."""

    @property
    @abstractmethod
    def held_values(self) -> int:
        """Key and value numbers held, packed or exact."""

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, dequantized."""

    @abstractmethod
    def count_bytes(self, count: Count) -> None:
        """Add the bytes of every storage reachable from the layer."""


def state_tensors(layer: Any) -> list[Tensor]:
    """Return the recurrent states of a layer: of a fixed size, by kind, instead of keys and values or beside them."""
    kinds = [kept for kept in vars(layer).values() if isinstance(kept, dict)]
    return [tensor for kept in kinds for tensor in kept.values() if isinstance(tensor, Tensor)]


def count_layer(layer: Any, count: Count) -> None:
    """Add what a layer holds; the plain tensors of Hugging Face's own layers are exact."""
    if not isinstance(layer, CompressedLayer):
        states = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        count.add("exact", states, getattr(layer, "buffers", None) or states)
        count.add_storages("spare", (t for t in vars(layer).values() if isinstance(t, Tensor)))
        count.add_storages("state", state_tensors(layer))
        count.values += sum(t.numel() for t in states)
        return
    layer.count_bytes(count)
    count.values += layer.held_values
    count.compressed_layers += 1
    count.misread_vectors += layer.misread_vectors
    count.packed_tokens = max(count.packed_tokens, layer.packed_length)
    if layer.packed_length:
        count.packed_values += layer.held_values * layer.packed_length // layer.get_seq_length()
