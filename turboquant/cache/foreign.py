"""Hugging Face's quantized cache layers, made safe to use beside ours and possible to measure.

They are used as they are: dense states come back from `update`, and the group-wise ones (quanto, HQQ) quantize the
whole history again whenever their window of exact tokens is full, so a token is quantized many times. What is changed
is what would otherwise fail or be silently wrong in some supported version of transformers:

- `crop`, beam reordering, selecting and repeating rows, and `reset` reach the codes, not only the exact window. Where a
  crop goes behind the window of a group-wise layer, what is left is quantized once more, as any full window would.
- HQQ packs several codes a byte along its rows and fails where they do not fill it: the last token is repeated until
  they do.
- The fp8 scale is that of the first call; larger values later are clamped to its range (torch on some devices and
  versions makes them NaN).
- Groups that do not divide head_dim are refused at the first call instead of in the middle of an answer.

`offload` moves the exact window only; codes stay where they are.
"""

import copy
from abc import abstractmethod
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import cache_utils

from turboquant.cache.count import CompressedLayer, Count
from turboquant.quant.grouping import misread, uneven
from turboquant.quant.modes import gradients_wanted, plain, without_gradients

BACKENDS = ("quanto", "hqq", "fp8")


def _inner(tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that make up a tensor of a wrapper class (quanto), by name; itself for a plain one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {"_data": tensor}
    names = tensor.__tensor_flatten__()[0]
    return {name: part for name in names for part in _inner(getattr(tensor, name)).values()}


def _parts(stored: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return codes and scales of what a backend's `_quantize` gave."""
    if isinstance(stored, tuple):  # HQQ: codes and a dict; fp8: codes and a scale
        codes, meta = stored
        return [codes], [t for t in (meta.values() if isinstance(meta, dict) else [meta]) if isinstance(t, Tensor)]
    parts = _inner(stored)
    return [parts["_data"]], [tensor for name, tensor in parts.items() if name != "_data"]


class ForeignLayer(CompressedLayer, cache_utils.DynamicLayer):
    """What the classes below share; a mixin in front of a quantized layer of Hugging Face."""

    cumulative_length: int
    _quantized_keys: Any
    _quantized_values: Any
    _dequantize: Any
    _misread: tuple[int, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note the shape, of which the codes keep no record."""
        self.batch, self.heads = key_states.shape[:2]
        self.dims = key_states.shape[-1] + value_states.shape[-1]
        super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the states of a call, and return all of them; the first call's are exact and keep their gradients."""
        first = not self.is_initialized
        with plain():
            keys, values = super().update(key_states.detach(), value_states.detach(), *args, **kwargs)
        if first and gradients_wanted(key_states, value_states):
            return key_states, value_states
        return without_gradients(keys, key_states), without_gradients(values, value_states)

    @property
    def misread_vectors(self) -> int:
        """Vectors that are read back as something else; see `turboquant.quant.grouping.misread`."""
        return sum(self._misread)

    @property
    def window(self) -> int:
        """Tokens held exactly."""
        return self.keys.shape[-2] if self.keys is not None and self.keys.dim() == 4 else 0

    @property
    def packed_length(self) -> int:
        """Tokens held as codes."""
        return self.cumulative_length - self.window

    @property
    def held_values(self) -> int:
        """Key and value numbers held, of rows in use."""
        return self.batch * self.heads * self.dims * self.cumulative_length if self.is_initialized else 0

    def count_bytes(self, count: Count) -> None:
        """Add the bytes of codes, scales and the exact window."""
        if self.is_initialized:
            (keys, key_scales), (values, value_scales) = _parts(self._quantized_keys), _parts(self._quantized_values)
            count.add("key", keys)
            count.add("value", values)
            count.add("scale", key_scales + value_scales)
            count.add("exact", (t for t in (self.keys, self.values) if t is not None))

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, dequantized."""
        keys, values = self._dequantize(self._quantized_keys), self._dequantize(self._quantized_values)
        if not self.window:
            return keys, values
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([keys, self.keys], dim=-2), torch.cat([values, self.values], dim=-2)

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = self._quantized_keys = self._quantized_values = None
        self.is_initialized = False
        self.cumulative_length = 0
        self._misread = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForeignLayer":
        """Share the tensors with the copy: they are replaced, never written to."""
        return copy.copy(self)

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        """Select the rows that beam search goes on with."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.is_initialized:
            self._select(torch.arange(self.batch, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self._select(torch.arange(self.batch, device="cpu")[indices.cpu()] if self.is_initialized else indices)

    def _select(self, rows: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        self.batch = len(rows)
        if self.window:
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self._select_codes(rows)

    @abstractmethod
    def _select_codes(self, rows: Tensor) -> None:
        """Select the codes of some rows."""

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last tokens; the number is given as a negative integer."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 hands a tensor over
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative integer, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        kept = self.cumulative_length + tokens_to_remove
        if kept <= 0:
            self.reset()
        elif -tokens_to_remove <= self.window:
            assert self.keys is not None
            assert self.values is not None
            left = self.window + tokens_to_remove
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
            self.cumulative_length = kept
        else:
            self._crop_codes(kept)
            self.cumulative_length = kept

    @abstractmethod
    def _crop_codes(self, kept: int) -> None:
        """Keep the codes of the first `kept` tokens, fewer than there are."""


class GroupWiseLayer(ForeignLayer):
    """What quanto and HQQ share. Selected rows are noted and applied at the next reading, as in transformers 5.23."""

    nbits: int
    axis_key: int
    axis_value: int
    q_group_size: int
    contiguous_axis: int
    """The axis along which a group is successive values of one vector."""
    _rows: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Check the groups against the dims.

        Raises:
            ValueError: If the group size does not divide a head dim.
        """
        for states in (key_states, value_states):
            if states.shape[-1] % self.q_group_size:
                raise ValueError(f"group_size {self.q_group_size} must divide head_dim, got {states.shape[-1]}")
        super().lazy_initialization(key_states, value_states)

    def count_bytes(self, count: Count) -> None:
        """Add the order of the rows too; it counts as scales do."""
        super().count_bytes(count)
        if self._rows is not None:
            count.add("scale", [self._rows])

    def _quantize(self, tensor: Tensor, axis: int) -> Any:
        self._rows = None  # by now both keys and values have been read, in the order of the rows
        try:
            stored = super()._quantize(tensor, axis)  # type: ignore[misc]
        except (ValueError, AssertionError) as error:
            shape = "x".join(map(str, tensor.shape))
            raise ValueError(
                f"states of shape {shape} cannot be split into groups of {self.q_group_size} along axis {axis}"
            ) from error
        count = misread(tensor, super()._dequantize(stored)) if uneven(tensor) else 0
        self._misread = (*self._misread, count)[-2:]  # all keys and all values are quantized at once
        return stored

    def _dequantize(self, stored: Any) -> Tensor:
        states = super()._dequantize(stored)
        return states if self._rows is None else states.index_select(0, self._rows)

    def _select_codes(self, rows: Tensor) -> None:
        self._rows = rows.clone() if self._rows is None else self._rows.index_select(0, rows)

    def _crop_codes(self, kept: int) -> None:
        keys, values = (states[:, :, :kept].contiguous() for states in self.dense())
        stored = self._quantize(keys, axis=self.axis_key), self._quantize(values, axis=self.axis_value)
        self._quantized_keys, self._quantized_values = stored
        self.keys = torch.tensor([], dtype=self.dtype, device=self.device)
        self.values = self.keys.clone()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._rows = None


class QuantoLayer(GroupWiseLayer, cache_utils.QuantoQuantizedLayer):  # type: ignore[misc]
    """Hugging Face's layer on optimum-quanto."""

    def _dequantize(self, stored: Any) -> Tensor:
        try:
            return super()._dequantize(stored)
        except (OSError, RuntimeError, ImportError) as error:
            if "quanto" not in str(error) and "ninja" not in str(error).lower():
                raise
            raise RuntimeError(
                "optimum-quanto could not build its extension at first use (it needs ninja and a C++ compiler, on a "
                f"GPU also nvcc): {str(error).splitlines()[0]}"
            ) from error


class HQQLayer(GroupWiseLayer, cache_utils.HQQQuantizedLayer):
    """Hugging Face's layer on HQQ."""

    def _quantize(self, tensor: Tensor, axis: int) -> Any:  # type: ignore[override]
        missing = -tensor.shape[2] % 8
        filled = torch.cat([tensor, tensor[:, :, -1:].expand(-1, -1, missing, -1)], dim=2) if missing else tensor
        codes, meta = super()._quantize(filled, axis)
        return codes, {**meta, "tokens": tensor.shape[2]}

    def _dequantize(self, stored: Any) -> Tensor:
        return super()._dequantize(stored)[:, :, : stored[1]["tokens"]]


def _fp8_base() -> Any:
    return getattr(cache_utils, "Fp8QuantizedLayer", None)


class Fp8Layer(ForeignLayer, _fp8_base() or object):  # type: ignore[misc]
    """Hugging Face's fp8 layer: one scale a tensor, no window."""

    def _quantize(self, tensor: Tensor, scale: Tensor | None = None) -> Any:
        limit = None if scale is None else scale * self.fp8_max
        inside = tensor if limit is None else tensor.float().clamp(-limit, limit)
        stored = super()._quantize(inside, scale)
        count = misread(tensor, self._dequantize(stored)) if scale is not None or uneven(tensor) else 0
        self._misread = (*self._misread, count)
        return stored

    def _map(self, fn: Any) -> None:
        (keys, key_scale), (values, value_scale) = self._quantized_keys, self._quantized_values
        self._quantized_keys, self._quantized_values = (fn(keys), key_scale), (fn(values), value_scale)

    def _select_codes(self, rows: Tensor) -> None:
        self._map(lambda codes: codes.index_select(0, rows))

    def _crop_codes(self, kept: int) -> None:
        self._map(lambda codes: codes[:, :, :kept].clone())


def _require(available: bool, package: str, backend: str) -> None:
    if not available:
        raise ImportError(f"hf-{backend} needs the package {package}: pip install {package}")


def foreign_layer(backend: str, **options: int) -> ForeignLayer:
    """Return a new layer.

    Args:
        backend: "quanto", "hqq" or "fp8".
        options: nbits, axis_key, axis_value, q_group_size and residual_length, as Hugging Face's layers take them;
            none for fp8.

    Raises:
        ImportError: If the backend's package is not installed, or transformers has no such layer.
    """
    if backend == "quanto":
        _require(transformers.utils.is_optimum_quanto_available(), "optimum-quanto", backend)
        return QuantoLayer(**options)
    if backend == "hqq":
        _require(transformers.utils.is_hqq_available(), "hqq", backend)
        return HQQLayer(**options)
    if _fp8_base() is None:
        raise ImportError(
            f"hf-fp8 needs a transformers with Fp8QuantizedLayer (5.23 has it), got {transformers.__version__}"
        )
    return Fp8Layer()
