"""One layer of a compressed cache.

How a layer behaves:

1. The tokens of the current forward call attend to themselves exactly; older ones are read from packed codes, but for
   the first `sink_length` real tokens of each row and the most recent ones.
2. After each call all but the sinks and the last `residual_length` tokens are packed, in blocks of the method's
   `block_length`. No full-precision copy of a packed token is kept, and nothing is quantized twice.
3. Codes are written into preallocated storage that grows by a sixteenth at a time.

A layer stores the tokens of a row as: sinks, packed, exact window. In a left-padded row the sinks are the first real
tokens, which stand behind the pads; `slots` gives that order, so that masks can follow it.
"""

from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from turboquant.methods import Method
from turboquant.ops.encode import encode
from turboquant.quantizer import Quantizer
from turboquant.token_buffer import TokenBuffer, round_up


class CachedStates:
    """What `QuantizedLayer.update` returns in place of key and value tensors; only our attention function reads it."""

    def __init__(self, layer: "QuantizedLayer") -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> NoReturn:
        """Tell the caller what is missing: another attention function was handed packed states."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            "a compressed cache needs the attention function 'turboquant': call turboquant.hf_attention.register() "
            "and model.set_attn_implementation('turboquant'), or load the model with turboquant.load_model()"
        )


class QuantizedLayer(CacheLayerMixin):
    """One layer of a compressed cache (see the module's notes).

    Args:
        method: How to quantize.
        layer_idx: Index of the layer in the model; selects its rotation.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, method: Method, layer_idx: int) -> None:
        super().__init__()
        self.method, self.layer_idx = method, layer_idx
        self.reset()

    # -- state ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.packed_keys, self.packed_values = TokenBuffer(), TokenBuffer()
        self.exact_keys: Tensor | None = None  # (batch, kv_heads, room, dim): sinks first, then the exact window
        self.exact_values: Tensor | None = None
        self.exact_length = 0
        self.sink_length = 0  # sinks set apart at the front of the exact tensors; 0 until something is packed
        self.padding: Tensor | None = None  # (batch,) pad tokens in front of each row; None without padding
        self.lengths: Tensor | None = None  # packed and exact tokens, on the device, while `graphs` replays steps

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Build the quantizers once dims and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        quantizers = self.method.quantizers(
            key_states.shape[-1], value_states.shape[-1], self.layer_idx, key_states.device
        )
        if quantizers is None:
            raise ValueError(f"method {self.method} stores plain tensors and has no quantized layer")
        self.key_quantizer: Quantizer[Any]
        self.value_quantizer: Quantizer[Any]
        self.key_quantizer, self.value_quantizer = quantizers
        self.is_initialized = True

    @property
    def packed_length(self) -> int:
        """Tokens held as codes."""
        return self.packed_keys.length

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.packed_length + self.exact_length

    def get_max_length(self) -> int:
        """Return -1: the layer grows without limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the key length that a mask for `query_length` new tokens covers, and its offset."""
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return 0 if self.exact_keys is None else self.exact_keys.shape[0]

    @property
    def held_values(self) -> int:
        """Key and value numbers held, packed or exact."""
        if self.exact_keys is None or self.exact_values is None:
            return 0
        rows, heads, _, dim = self.exact_keys.shape
        return rows * heads * self.get_seq_length() * (dim + self.exact_values.shape[3])

    # -- growing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[CachedStates, CachedStates]:
        """Take the keys and values of a forward call; `compress` packs them once attention has read them.

        Raises:
            ValueError: If the call has another number of rows than the cache holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif key_states.shape[0] != self.batch_size:
            raise ValueError(f"the cache holds {self.batch_size} rows, the call has {key_states.shape[0]}")
        states = CachedStates(self)
        added = key_states.shape[2]
        if self.lengths is not None:
            self._append_at_length(key_states, value_states)
            return states, states
        self.exact_keys = _appended(self.exact_keys, key_states.detach(), self.exact_length, self._room(added))
        self.exact_values = _appended(self.exact_values, value_states.detach(), self.exact_length, self._room(added))
        self.exact_length += added
        return states, states

    def _append_at_length(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write one token where the length on the device says; the lengths here follow by `graphs`."""
        assert self.lengths is not None
        assert self.exact_keys is not None
        assert self.exact_values is not None
        place = self.lengths[1:].long()
        self.exact_keys.index_copy_(2, place, key_states)
        self.exact_values.index_copy_(2, place, value_states)
        self.lengths[1:] += 1

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, so that no later step or packing moves the storage."""
        room = max(self._steady_room, self.exact_length)
        self.exact_keys = _grown(self._exact(self.exact_keys), room)
        self.exact_values = _grown(self._exact(self.exact_values), room)
        for buffer in (self.packed_keys, self.packed_values):
            buffer.reserve(round_up(tokens, self._token_group))

    def follow(self) -> None:
        """Count the token that a replayed step wrote, and pack what has left the window."""
        self.exact_length += 1
        before = self.packed_length
        self.compress()
        if self.lengths is not None and self.packed_length != before:
            self.lengths[0], self.lengths[1] = self.packed_length, self.exact_length

    @property
    def _steady_room(self) -> int:
        """Exact tokens held between two packings, at most."""
        return self.method.sink_length + self.method.residual_length + self.method.block_length

    def _room(self, added: int) -> int:
        """Exact tokens to make room for: single steps should rarely need new storage, a long call shrinks anyway."""
        end = self.exact_length + added
        if added > self.method.block_length:
            return end
        grown = end + max(self.method.block_length, end // 8)
        return min(grown, self._steady_room) if end <= self._steady_room else grown

    @torch.no_grad()
    def compress(self, visible: Bool[Tensor, "batch tokens"] | None = None) -> None:
        """Pack what has left the exact window.

        Args:
            visible: False for pad tokens, in the order of the model's attention mask; None where no row is padded.
        """
        first = not self.packed_length
        visible = None if visible is None else visible.expand(self.batch_size, -1)  # one mask may serve all rows
        if first and visible is not None and self.exact_length == visible.shape[1]:
            self._set_padding(visible)
        front = self._padded_front if first else 0
        sinks = self.method.sink_length
        window = self.exact_length - (sinks if first else self.sink_length)
        ready = window - self.method.residual_length - front
        count = ready // self.method.block_length * self.method.block_length
        if count <= 0:
            return
        if first:
            self._set_sinks(sinks)
            count += front
        self._pack(count, self._valid(visible, count) if first else None)

    @property
    def _token_group(self) -> int:
        """Tokens that are quantized together."""
        return max(self.key_quantizer.token_group, self.value_quantizer.token_group)

    @property
    def _padded_front(self) -> int:
        """Places behind the sinks that hold pads in some row, up to whole groups; all are packed at the first time."""
        return 0 if self.padding is None else round_up(int(self.padding.max()), self._token_group)

    def _set_padding(self, visible: Tensor) -> None:
        leading = visible.int().argmax(dim=1)
        padding = torch.where(visible.any(dim=1), leading, visible.shape[1])
        self.padding = padding if bool(padding.any()) else None

    def _set_sinks(self, sinks: int) -> None:
        """Bring each row's sinks to the front, before its pads."""
        self.sink_length = sinks
        if self.padding is not None:
            slots = self.slots(self.exact_length)
            self.exact_keys = _gathered(self._exact(self.exact_keys), slots)
            self.exact_values = _gathered(self._exact(self.exact_values), slots)

    def _valid(self, visible: Tensor | None, count: int) -> Tensor | None:
        """Which of the first `count` tokens behind the sinks are real."""
        if visible is None:
            return None
        stored = visible if self.padding is None else visible.gather(1, self.slots(visible.shape[1]))
        return stored[:, self.sink_length : self.sink_length + count]

    def _pack(self, count: int, valid: Tensor | None) -> None:
        start, stop = self.sink_length, self.sink_length + count
        encode(
            (self.key_quantizer, self._exact(self.exact_keys)[:, :, start:stop], self.packed_keys),
            (self.value_quantizer, self._exact(self.exact_values)[:, :, start:stop], self.packed_values),
            valid,
        )
        self.exact_keys = self._without(self.exact_keys, start, stop)
        self.exact_values = self._without(self.exact_values, start, stop)
        self.exact_length -= count

    def _exact(self, exact: Tensor | None) -> Tensor:
        assert exact is not None
        return exact[:, :, : self.exact_length]

    def _without(self, exact: Tensor | None, start: int, stop: int) -> Tensor:
        """Drop tokens start..stop; the storage shrinks back to its steady size once a long call is packed."""
        held = self._exact(exact)
        assert exact is not None
        tail = held[:, :, stop:].clone()
        room = max(self._steady_room, start + tail.shape[2])
        if exact.shape[2] <= room:
            target = exact
        else:
            target = exact.new_empty(*exact.shape[:2], room, exact.shape[3])
            target[:, :, :start] = held[:, :, :start]
        target[:, :, start : start + tail.shape[2]] = tail
        return target

    def slots(self, tokens: int) -> Int[Tensor, "batch tokens"]:
        """Return the position (in the order of the attention mask) of the token in each stored place."""
        assert self.padding is not None
        place = torch.arange(tokens, device=self.padding.device)
        padding = self.padding[:, None]
        behind = torch.where(place < padding + self.sink_length, place - self.sink_length, place)
        return torch.where(place < self.sink_length, padding + place, behind)

    # -- reading -------------------------------------------------------------------------------------------------

    def exact(self) -> tuple[Float[Tensor, "rows kv_heads tokens dim"], Float[Tensor, "rows kv_heads tokens vdim"]]:
        """Return keys and values held exactly: sinks, then window."""
        return self._exact(self.exact_keys), self._exact(self.exact_values)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values in the order of the attention mask, dequantized. For measuring, not for decode."""
        keys, values = self.exact()
        if not self.packed_length:
            return keys, values
        pair = []
        for quantizer, exact, packed in (
            (self.key_quantizer, keys, self.packed_keys),
            (self.value_quantizer, values, self.packed_values),
        ):
            codes = quantizer.dequantize(packed.view()).to(exact.dtype)
            stored = torch.cat([exact[:, :, : self.sink_length], codes, exact[:, :, self.sink_length :]], dim=2)
            pair.append(stored if self.padding is None else _scattered(stored, self.slots(stored.shape[2])))
        return pair[0], pair[1]

    # -- what generate() asks of a cache -----------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last tokens; as in Hugging Face the number is given as a negative integer.

        Where that cuts a group of tokens that were quantized together, those of the group that are left go back to the
        exact window as they had been dequantized, and are packed again later: the one case in which a token is
        quantized twice. So a group never holds tokens of two kinds, and its statistics are always its own.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 hands a tensor over
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative integer, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        kept = self.get_seq_length() + tokens_to_remove
        if kept <= 0:
            self.reset()
            return
        group = self._token_group
        if self.packed_length and (kept - self.sink_length) // group * group <= self._padded_front:
            # No whole group is left behind sinks and pads: give up the packed order.
            keys, values = (states[:, :, :kept].clone() for states in self.dense())
            self.reset()
            self.is_initialized = True
            self.exact_keys, self.exact_values, self.exact_length = keys, values, kept
            return
        from_window = min(-tokens_to_remove, self.exact_length - self.sink_length)
        self.exact_length -= from_window
        left = self.packed_length - min(-tokens_to_remove - from_window, self.packed_length)
        if left == self.packed_length:
            return
        loose = left % group
        if loose:
            self._unpack(left - loose, loose)
        self.packed_keys.length = self.packed_values.length = left - loose

    def _unpack(self, start: int, count: int) -> None:
        """Take `count` tokens of the group at `start` back to the (empty) exact window, dequantized."""
        pair = []
        for quantizer, packed, exact in (
            (self.key_quantizer, self.packed_keys, self.exact_keys),
            (self.value_quantizer, self.packed_values, self.exact_values),
        ):
            group = quantizer.dequantize(packed.view().narrow(start, self._token_group))[:, :, :count]
            pair.append(_appended(exact, group.to(self.dtype), self.exact_length, self._room(count)))
        self.exact_keys, self.exact_values = pair
        self.exact_length += count

    def _map(self, fn: Any) -> None:
        """Apply `fn` to every tensor of a row's state (batch on axis 0)."""
        for buffer in (self.packed_keys, self.packed_values):
            if buffer.storage is not None:
                buffer.storage = buffer.storage.map(fn)
        if self.exact_keys is not None and self.exact_values is not None:
            self.exact_keys, self.exact_values = fn(self.exact_keys), fn(self.exact_values)
        if self.padding is not None:
            self.padding = fn(self.padding)

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        """Select the rows that beam search goes on with."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move the layer to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Bring the layer back to its device."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))


def _appended(buffer: Tensor | None, new: Tensor, length: int, room: int) -> Tensor:
    """Write `new` behind `length` tokens of `buffer`, in place where there is room."""
    end = length + new.shape[2]
    if buffer is None or buffer.shape[2] < end:
        larger = new.new_empty(*new.shape[:2], room, new.shape[3])
        if buffer is not None:
            larger[:, :, :length] = buffer[:, :, :length]
        buffer = larger
    buffer[:, :, length:end] = new
    return buffer


def _grown(states: Tensor, room: int) -> Tensor:
    """Return storage for `room` tokens that begins with these."""
    larger = states.new_empty(*states.shape[:2], room, states.shape[3])
    larger[:, :, : states.shape[2]] = states
    return larger


def _index(slots: Tensor, states: Tensor) -> Tensor:
    return slots[:, None, :, None].expand(states.shape)


def _gathered(states: Tensor, slots: Tensor) -> Tensor:
    return states.gather(2, _index(slots, states))


def _scattered(states: Tensor, slots: Tensor) -> Tensor:
    return torch.empty_like(states).scatter_(2, _index(slots, states), states)
