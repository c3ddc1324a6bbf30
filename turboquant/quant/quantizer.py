"""What every method builds on: packed vectors, the map to and from them, and what a fused kernel reads of them.

Shapes follow Hugging Face: (batch, kv_heads, tokens, head_dim).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from turboquant.quant.packing import Planes
from turboquant.quant.rotation import Rotation

Self = TypeVar("Self", bound="PackedTensor")


@dataclass(frozen=True)
class PackedTensor:
    """Compressed vectors. Every field is a tensor or a tuple of tensors with batch on axis 0.

    Axis 2 of every field counts tokens, or groups of a fixed number of successive tokens (such as the scale that 32
    tokens share), except for the fields named in `shared`, which hold one value for all tokens (such as the mean that
    was subtracted). Where there are groups, lengths are whole groups. `code_fields` names the fields that hold codes;
    the rest is overhead.
    """

    shared: ClassVar[frozenset[str]] = frozenset()
    code_fields: ClassVar[tuple[str, ...]] = ("codes",)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], names: Sequence[str]) -> Self:
        # A field is a tensor, a tuple of planes, or None where there is nothing of it.
        changes: dict[str, Any] = {}
        for name in names:
            value = getattr(self, name)
            changes[name] = tuple(map(fn, value)) if isinstance(value, tuple) else None if value is None else fn(value)
        return replace(self, **changes)

    @classmethod
    @cache  # asked several times a layer and step
    def _fields(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    @cache
    def _token_fields(cls) -> tuple[str, ...]:
        return tuple(name for name in cls._fields() if name not in cls.shared)

    def map(self: Self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Apply `fn` to every tensor: batch reordering, repeats and moves between devices."""
        return self._apply(fn, self._fields())

    def map_tokens(self: Self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Apply `fn` to the tensors that have a token axis, and keep the shared ones."""
        return self._apply(fn, self._token_fields())

    def narrow(self: Self, start: int, length: int) -> Self:
        """Return a view of `length` tokens from `start`.

        Raises:
            ValueError: If that cuts a group of tokens.
        """
        group = self.token_group
        if start % group or length % group:
            raise ValueError(f"packed tokens are cut in whole groups of {group}, got {length} tokens from {start}")
        return self._map_rows(lambda tensor, size: tensor.narrow(2, start // size, length // size))

    def empty(self: Self, tokens: int) -> Self:
        """Return storage like this one for `tokens` tokens, not filled; shared fields are kept."""
        return self._map_rows(lambda x, size: x.new_empty(*x.shape[:2], tokens // size, *x.shape[3:]))

    def _map_rows(self: Self, fn: Callable[[Tensor, int], Tensor]) -> Self:
        """`map_tokens` where `fn` takes the number of tokens that share a row too."""
        tokens = self.tokens
        return self.map_tokens(lambda tensor: fn(tensor, _tokens_a_row(tokens, tensor)))

    def tensors(self, *names: str) -> list[Tensor]:
        """Return the tensors of the named fields (of all fields when none is named)."""
        values = [getattr(self, name) for name in names or self._fields()]
        flat: list[Tensor] = []
        for value in values:
            flat += value if isinstance(value, tuple) else [] if value is None else [value]
        return flat

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        # Some field has a row a token; those of groups have fewer.
        return max(tensor.shape[2] for tensor in self.tensors(*self._token_fields()))

    @property
    def token_group(self) -> int:
        """Number of tokens that share the row of some field; 1 where every token has its own."""
        tokens = self.tokens
        return max(_tokens_a_row(tokens, tensor) for tensor in self.tensors(*self._token_fields()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def copy_into(self: Self, target: Self, start: int) -> None:
        """Write these tokens into `target` at token `start`, in place."""
        names, tokens = self._token_fields(), self.tokens
        for source, destination in zip(self.tensors(*names), target.tensors(*names), strict=True):
            row = start // _tokens_a_row(tokens, source)
            destination.narrow(2, row, source.shape[2]).copy_(source)

    def alike(self: Self, other: Self) -> tuple[Self, Self]:
        """Return both in one format, where one of them needed a wider float than the other; else both as they are."""
        pairs = list(zip(self.tensors(), other.tensors(), strict=True))
        if all(own.dtype == its.dtype for own, its in pairs):
            return self, other
        # Field by field: codes stay uint8 while scales become float32.
        types = [torch.promote_types(own.dtype, its.dtype) for own, its in pairs]

        def widened(packed: Self) -> Self:
            left = iter(types)
            return packed.map(lambda tensor: tensor.to(next(left)))

        return widened(self), widened(other)

    @staticmethod
    def cat(parts: "Sequence[Self]") -> "Self":
        """Concatenate along the token axis; shared fields are taken from the first part."""
        first = parts[0]
        names = first._token_fields()
        joined = iter([torch.cat(group, dim=2) for group in zip(*(p.tensors(*names) for p in parts), strict=True)])
        return first.map_tokens(lambda _: next(joined))


P = TypeVar("P", bound=PackedTensor)


def _tokens_a_row(tokens: int, tensor: Tensor) -> int:
    """Return how many tokens share a row of a field, where the fields hold `tokens` tokens."""
    return tokens // tensor.shape[2] if tokens else 1


def token_groups(
    x: Float[Tensor, "batch kv_heads tokens dim"], valid: Bool[Tensor, "batch tokens"] | None, size: int
) -> tuple[
    Float[Tensor, "batch kv_heads groups size dim"],
    Bool[Tensor, "batch 1 groups size 1"] | None,
]:
    """Split vectors into groups of `size` successive tokens, and say which of them count in a group's statistics.

    Those are the real ones; all of them in a group that has none, so that even what is hidden now reads back right.

    Raises:
        ValueError: If the number of tokens is no multiple of `size`.
    """
    if x.shape[2] % size:
        raise ValueError(f"tokens are quantized in whole groups of {size}, got {x.shape[2]}")
    if valid is None:
        return x.unflatten(2, (-1, size)), None
    real = valid.unflatten(1, (-1, size))[:, None, :, :, None]
    return x.unflatten(2, (-1, size)), real | ~real.any(dim=3, keepdim=True)


class Quantizer(ABC, Generic[P]):
    """Maps key or value vectors of one layer to packed ones and back.

    Attention runs in the quantizer's own space, so that nothing is rotated back vector by vector: a query is
    `project`-ed once, `scores` reads it against packed keys, `combine` sums packed values, and `unproject` maps that
    sum back once. The defaults dequantize; a method overrides what it can do better.
    """

    token_group: int = 1
    """Tokens quantized together; `quantize` takes whole groups and a packed length is always a multiple of it."""

    @abstractmethod
    def quantize(
        self,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        like: P | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> P:
        """Quantize vectors.

        Args:
            x: The vectors, any float dtype.
            like: What was packed before for the same rows; its shared fields (means) are used again. None for the
                first block, from which they are computed.
            valid: False for pad tokens, which must not enter statistics. None where every token is real.
        """

    @abstractmethod
    def dequantize(self, packed: P) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Return the vectors in float32."""

    def project(self, query: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch projected"]:
        """Map queries to the space in which `scores` reads keys; once a call, not once a tile."""
        return query

    def scores(
        self, projected: Float[Tensor, "batch kv_heads queries projected"], packed: P
    ) -> Float[Tensor, "batch kv_heads queries tokens"]:
        """Return inner products of projected queries and packed keys."""
        return projected @ self.dequantize(packed).mT

    def combine(
        self, weights: Float[Tensor, "batch kv_heads queries tokens"], packed: P
    ) -> Float[Tensor, "batch kv_heads queries dim"]:
        """Return the weighted sum of packed values in the quantizer's own space."""
        return weights @ self.dequantize(packed)

    def unproject(self, output: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Map a sum from `combine` back to the space of values."""
        return output

    def tile_tokens(self, rows: Float[Tensor, "batch kv_heads queries _"]) -> int:
        """Return how many packed tokens attention should read at once for these query rows.

        What `scores` and `combine` unpack is at most one such tile; 512 tokens bound it for the defaults above.
        """
        return 512

    def may_misread(self, x: Float[Tensor, "batch kv_heads tokens dim"], like: P | None) -> bool:
        """Return whether these vectors may be read back as something else, and must be looked at once they are packed.

        That is where vectors of very different lengths share a range or a mean. The arguments are those of `quantize`.
        """
        return False

    def blank(self, x: Float[Tensor, "batch kv_heads tokens dim"], like: P | None) -> P | None:
        """Return room for these vectors that a fused kernel can fill, or None where the method has no kernel."""
        return None

    def view(self, packed: P) -> Any:
        """Return the `KernelView` of packed vectors that fused kernels read, or None where the method has no kernel."""
        return None

    def tables(self) -> tuple[Tensor, ...]:
        """The constant tensors this quantizer holds (codebooks, rotations), for byte counts."""
        return ()


@dataclass(frozen=True)
class KernelView:
    """Packed vectors as `center + mean of the group + scale * codebook[codes]` in the rotated space.

    Shapes: planes (batch, kv_heads, tokens, bytes) uint8; scales (batch, kv_heads, tokens) float16, or uint8 in units
    of tops / 255 where `group_size` tokens share one of tops (batch, kv_heads, groups); center (batch, kv_heads, 1,
    dim) float16; means (batch, kv_heads, groups, dim) int8 in units of mean_tops / 127; signs (one plane) and
    error_norms (batch, kv_heads, tokens) of a QJL stage whose estimate is `gain * error_norm * <projection y, sign>`.
    `boundaries` and `scale` (as in `TurboQuantMSE`) say how new vectors are rounded.
    """

    planes: Planes
    bits: int
    codebook: Tensor
    rotation: Rotation
    scales: Tensor
    group_size: int
    tops: Tensor | None = None
    center: Tensor | None = None
    means: Tensor | None = None
    mean_tops: Tensor | None = None
    signs: Tensor | None = None
    sign_levels: Tensor | None = None
    error_norms: Tensor | None = None
    projection: Tensor | None = None
    gain: float = 0.0
    boundaries: Tensor | None = None
    scale: str = "norm"

    @property
    def shared(self) -> int:
        """Tokens that share one of `tops`; 0 where every scale stands for itself."""
        return 0 if self.tops is None else self.group_size

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.scales.shape[2]

    def row(self, index: int) -> "KernelView":
        """Return the view of one row of the batch."""
        changes: dict[str, Any] = {"planes": tuple(plane[index : index + 1] for plane in self.planes)}
        for name in BATCHED:
            tensor = getattr(self, name)
            changes[name] = None if tensor is None else tensor[index : index + 1]
        return replace(self, **changes)


# Tensors with the batch on axis 0, planes apart; codebooks, rotations and projections serve all rows.
BATCHED = ("scales", "tops", "center", "means", "mean_tops", "signs", "error_norms")
