"""One layer of a compressed cache.

How a layer behaves:

1. The tokens of the current forward call are not packed before attention has read them; older ones are read from packed
   codes, but for the first `sink_length` real tokens of each row and the most recent ones.
2. After each call all but the sinks and the last `residual_length` tokens are packed, in blocks of the method's
   `block_length`. No full-precision copy of a packed token is kept, and nothing is quantized twice.
3. Exact tokens of float32 models are kept in 16 bits (`cache.exact`), and codes are made from what is kept. A call that
   finds the layer empty is read as the model made it. While steps are replayed they are kept in float32.
4. Codes are written into preallocated storage that grows by a sixteenth at a time. Exact tokens have no spare room but
   while steps are replayed.

A layer stores the tokens of a row as: sinks, packed, exact window. In a left-padded row the sinks are the first real
tokens, which stand behind the pads; `slots` gives that order, so that masks can follow it. Pads have no say in the
statistics of codes. A pad is what the 2D attention mask calls one. Where there is no 2D mask, tokens that no query has
seen yet may be shown to a later one: in front of a row they stand behind the sinks as pads do, but they count.

What a layer keeps outlives the call that brought it, so it is made in `modes.plain`, whatever the caller has switched
on.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

from turboquant.cache.buffer import TokenBuffer, round_up
from turboquant.cache.count import CompressedLayer, Count, Purpose
from turboquant.cache.exact import appended
from turboquant.kernels.encode import encode
from turboquant.quant.grouping import misread
from turboquant.quant.modes import in_plain_modes
from turboquant.quant.quantizer import Quantizer

ATTENTION_NAME = "turboquant"
"""Under which name our attention function is registered with Hugging Face."""


@runtime_checkable
class Packing(Protocol):
    """What a layer asks of its method (`turboquant.methods.Method`)."""

    @property
    def sink_length(self) -> int: ...  # noqa: D102
    @property
    def residual_length(self) -> int: ...  # noqa: D102
    @property
    def block_length(self) -> int: ...  # noqa: D102
    @property
    def rounds_exact(self) -> bool: ...  # noqa: D102

    def packed_length(self, tokens: int) -> int:
        """Return how many of `tokens` tokens are packed once they have been processed."""

    def quantizers(
        self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device
    ) -> tuple[Quantizer[Any], Quantizer[Any]] | None:
        """Return the key and the value quantizer of one layer."""


class CachedStates:
    """What `QuantizedLayer.update` returns in place of key and value tensors; only our attention function reads it.

    Attributes:
        layer: Holds the states of all tokens, those of the call too.
        added: Tokens of the call.
        own: Keys and values of the call as the model made them, until the layer has packed.
        spent: Has the layer packed since? Then the states of the call are not exact any more.
        on_unread: Called once where something else than our attention function wants to read.
    """

    def __init__(self, layer: "QuantizedLayer", added: int, own: tuple[Tensor, Tensor] | None = None) -> None:
        self.layer, self.added, self.own = layer, added, own
        self.spent = False
        self.on_unread: Callable[[], None] = lambda: None

    def to(self, *args: Any, **kwargs: Any) -> "CachedStates":
        """Return the states as they are: a layer that reads another one's brings its queries to them."""
        return self

    def undo(self) -> None:
        """Let the layer give the call's tokens back, where the call cannot go on."""
        self.layer.take_back(self.added)
        self.added = 0

    def __getattr__(self, name: str) -> NoReturn:
        """Tell the caller what is missing; the cache can be used again once that is mended."""
        if name.startswith("__"):
            raise AttributeError(name)
        self.undo()
        self.on_unread()
        raise RuntimeError(_why_unread(self.layer.config, name))


def _why_unread(config: PreTrainedConfig | None, name: str) -> str:
    """Say why something else than our attention function was handed packed states, of which it wanted `name`."""
    set_to = None if config is None else config.get_text_config(decoder=True)._attn_implementation
    if set_to == ATTENTION_NAME:
        return (
            f"this model cannot use a compressed cache: its layers work on keys and values themselves ({name!r}) "
            "before, or in place of, the attention function that transformers' AttentionInterface gives them"
        )
    if ATTENTION_NAME in AttentionInterface._global_mapping:
        now = f", which is {set_to!r} now" if set_to else ""
        return (
            "a compressed cache needs the attention function 'turboquant': it is registered, and the model must be set "
            f"to it{now}: call model.set_attn_implementation('turboquant')"
        )
    return (
        "a compressed cache needs the attention function 'turboquant': call turboquant.attach(model), or load the "
        "model with turboquant.load_model()"
    )


class QuantizedLayer(CompressedLayer):
    """One layer of a compressed cache (see the module's notes).

    Args:
        method: How to quantize.
        layer_idx: Index of the layer in the model; selects its rotation.
        last_reader: The last layer to read this one's states in a call, where layers share keys and values: until it
            has, nothing is packed. None where this layer alone reads them.
        config: The model's, to explain why its attention cannot read packed states. Not needed for anything else.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        method: Packing,
        layer_idx: int,
        last_reader: int | None = None,
        config: PreTrainedConfig | None = None,
    ) -> None:
        super().__init__()
        self.method, self.layer_idx, self.last_reader, self.config = method, layer_idx, last_reader, config
        self.reset()

    # -- state ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.packed_keys, self.packed_values = TokenBuffer(), TokenBuffer()
        self.exact_keys: Tensor | None = None  # (batch, kv_heads, tokens, dim): sinks first, then the exact window
        self.exact_values: Tensor | None = None
        self.exact_length = 0
        self.added = 0  # tokens of the call at work, which its attention has not finished reading
        self.all_count = False  # may tokens that nothing has seen yet be shown later?
        self.marked = False  # has a reader of that call said what it sees?
        self.misread_vectors = 0  # packed since the layer was emptied; see `grouping.misread`
        self.sink_length = 0  # sinks set apart at the front of the exact tensors; 0 until something is packed
        self.padding: Tensor | None = None  # (batch,) pad tokens in front of each row; None without padding
        self.seen: Tensor | None = None  # (batch, tokens) of the exact tokens behind set-apart sinks; None: all seen
        self.lengths: Tensor | None = None  # packed and exact tokens, on the device, while steps are replayed

    @in_plain_modes
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Build the quantizers once dims and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.read_as = key_states.dtype, value_states.dtype  # of the model; a hybrid's states have a say in `dtype`
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

    @property
    def keys(self) -> Tensor | None:
        """The exact keys: transformers' own code asks whether a layer has any (Llama 3.2 Vision)."""
        return None if self.exact_keys is None else self.exact()[0]

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        """Pass over None, to which Hugging Face's base class sets it."""

    values = property(lambda self: None if self.exact_values is None else self.exact()[1], lambda self, states: None)

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

    def count_bytes(self, count: Count) -> None:
        """Add the bytes of codes, scales, exact tokens and tables, which an emptied layer keeps."""
        sides: tuple[tuple[Purpose, TokenBuffer], ...] = ("key", self.packed_keys), ("value", self.packed_values)
        for purpose, buffer in sides:
            if buffer.storage is not None:
                used = buffer.view()
                codes = used.tensors(*used.code_fields)
                count.add(purpose, codes)
                count.add("scale", (tensor for tensor in used.tensors() if not any(tensor is code for code in codes)))
        if self.exact_keys is not None:
            count.add("exact", self.kept())
        count.add_storages("scale", (notes for notes in (self.padding, self.seen) if notes is not None))
        if hasattr(self, "key_quantizer"):
            count.add_storages("shared", (*self.key_quantizer.tables(), *self.value_quantizer.tables()))

    # -- growing -------------------------------------------------------------------------------------------------

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[CachedStates, CachedStates]:
        """Take the keys and values of a forward call; `compress` packs them once attention has read them.

        Raises:
            ValueError: If the call has another number of rows than the cache holds.
        """
        # The call's own tokens stay in the graph for `backward`; what is kept beyond the call is cut off from it.
        states = CachedStates(self, key_states.shape[2], (key_states, value_states))
        self._append(key_states.detach(), value_states.detach())
        return states, states

    @in_plain_modes
    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.exact_keys is not None and key_states.shape[0] != self.batch_size:
            raise ValueError(f"the cache holds {self.batch_size} rows, the call has {key_states.shape[0]}")
        if self.lengths is not None:
            self._append_at_length(key_states, value_states)
            return
        self._widen(key_states.dtype, value_states.dtype)
        self._keep(key_states, value_states)
        self.added, self.marked = self.added + key_states.shape[2], False

    def _widen(self, key_dtype: torch.dtype, value_dtype: torch.dtype) -> None:
        """Where a call comes in another dtype than those before, read all in the wider one."""
        before = self.read_as
        self.read_as = torch.promote_types(before[0], key_dtype), torch.promote_types(before[1], value_dtype)
        self.dtype = self.read_as[0]
        if self.read_as != before and self.exact_keys is not None:
            self.exact_keys, self.exact_values = self.exact()

    def _keep(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write states behind the exact ones."""
        keys, values = (None, None) if self.exact_keys is None else self.kept()
        self.exact_keys = appended(keys, key_states, self.method.rounds_exact)
        self.exact_values = appended(values, value_states, self.method.rounds_exact)
        self.exact_length += key_states.shape[2]

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens, which `update` has taken and nothing has packed."""
        self.exact_length -= count
        self.added -= count
        if not self.get_seq_length():
            self.reset()

    def _append_at_length(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write one token where the length on the device says; whoever replays the step counts it."""
        assert self.lengths is not None
        assert self.exact_keys is not None
        assert self.exact_values is not None
        place = self.lengths[1:].long()
        self.exact_keys.index_copy_(2, place, key_states)
        self.exact_values.index_copy_(2, place, value_states)
        self.lengths[1:] += 1  # in place: a CUDA graph replays this with the same addresses

    @in_plain_modes
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, so that no later step or packing moves the storage."""
        steady = self.method.sink_length + self.method.residual_length + self.method.block_length
        keys, values = self.exact()  # in the model's dtype: to ask whether a token fits 16 bits is to wait for it
        self.exact_keys = _grown(keys, max(steady, self.exact_length))
        self.exact_values = _grown(values, max(steady, self.exact_length))
        for buffer in (self.packed_keys, self.packed_values):
            if buffer.storage is not None:
                buffer.reserve(round_up(tokens, self._token_group))

    @property
    def has_room(self) -> bool:
        """Whether the next block can be packed without moving what is packed; there is nothing to move at first."""
        storage = self.packed_keys.storage
        return storage is None or storage.tokens - self.packed_length >= self.method.block_length

    def storages(self) -> tuple[object, ...]:
        """Return what holds the tokens; while it stays the same, captured steps can read it."""
        packed = self.packed_keys.storage, self.packed_values.storage
        return (*packed, self.exact_keys, self.exact_values, self.padding)

    @property
    def replayable(self) -> bool:
        """Whether a step over these tokens can be captured: it reads no pads but those in front of packed tokens."""
        return self.exact_keys is not None and self.seen is None and self.last_reader is None

    @property
    def due(self) -> bool:
        """Whether a block of tokens has left the window (rows without padding)."""
        window = self.exact_length - (self.sink_length if self.packed_length else self.method.sink_length)
        return window >= self.method.residual_length + self.method.block_length

    @in_plain_modes
    def compress(self, visible: Bool[Tensor, "batch tokens"] | None = None, pads: bool = True) -> None:
        """Pack what has left the exact window.

        Args:
            visible: Which tokens count as seen by this call, in the order of the model's attention mask: those that
                the 2D mask calls real, or that one of the queries sees. None where that is every token.
            pads: Whether the others are pads, as a 2D mask says; otherwise a later call may see them.
        """
        self.mark(visible, pads)
        self.added = 0
        first = not self.packed_length
        if first:
            self.padding = _leading_pads(self.seen)
        # In a padded row the sinks stand behind the pads, so the places of all pads leave the window at the first time.
        front = self._padded_front if first else 0
        sinks = self.method.sink_length
        window = self.exact_length - (sinks if first else self.sink_length)
        ready = window - self.method.residual_length - front
        count = ready // self.method.block_length * self.method.block_length  # whole groups only
        if count <= 0:
            return
        if first:
            self._set_sinks(sinks)
            count += front
        self._pack(count)

    @in_plain_modes
    def mark(self, visible: Bool[Tensor, "batch tokens"] | None, pads: bool = True) -> None:
        """Note which of the tokens that are still exact this call or an earlier one has seen; see `compress`.

        Where layers share keys and values, each reader marks what it sees before the last one packs.
        """
        self.all_count = self.all_count or not pads
        if visible is None or (self.marked and self.seen is None):
            self.seen = None
        elif self.marked and self.seen is not None:
            self.seen = self.seen | self._of_window(visible)
        elif self.added == 1 and self.packed_length:  # a decode step: the token sees itself, and need not be asked
            if self.seen is not None:
                self.seen = torch.cat([self.seen, self.seen.new_ones(self.batch_size, 1)], dim=1)
        else:
            seen, before = self._of_window(visible).clone(), self.exact_length - self.sink_length - self.added
            seen[:, :before] |= True if self.seen is None else self.seen
            self.seen = None if bool(seen.all()) else seen
        self.marked = True

    def _of_window(self, visible: Tensor) -> Tensor:
        """Return the part of a mask's row that belongs to the exact tokens behind the sinks; one may serve all rows."""
        window = self.exact_length - self.sink_length
        return visible[:, visible.shape[1] - window :].expand(self.batch_size, -1)

    @property
    def _token_group(self) -> int:
        """Tokens that are quantized together."""
        return max(self.key_quantizer.token_group, self.value_quantizer.token_group)

    @property
    def _padded_front(self) -> int:
        """Places behind the sinks that hold pads in some row, up to whole groups; all are packed at the first time."""
        return 0 if self.padding is None else round_up(int(self.padding.max()), self._token_group)

    def _set_sinks(self, sinks: int) -> None:
        """Bring each row's sinks to the front, before its pads."""
        if self.padding is not None:
            slots = self.slots(self.exact_length, sinks)
            self.exact_keys = _gathered(self._exact(self.exact_keys), slots)
            self.exact_values = _gathered(self._exact(self.exact_values), slots)
            self.seen = None if self.seen is None else self.seen.gather(1, slots)
        self.sink_length = sinks
        self.seen = None if self.seen is None else self.seen[:, sinks:]

    def _pack(self, count: int) -> None:
        start, stop = self.sink_length, self.sink_length + count
        real = None if self.seen is None or self.all_count else self.seen[:, :count]
        sides = (
            (self.key_quantizer, self._exact(self.exact_keys)[:, :, start:stop], self.packed_keys),
            (self.value_quantizer, self._exact(self.exact_values)[:, :, start:stop], self.packed_values),
        )
        for (quantizer, states, packed), suspect in zip(sides, encode(*sides, real), strict=True):
            if suspect:
                self.misread_vectors += misread(states, _last(quantizer, packed, count))
        self.exact_keys = self._without(self.exact_keys, start, stop)
        self.exact_values = self._without(self.exact_values, start, stop)
        self.exact_length -= count
        if self.seen is not None:
            left = self.seen[:, count:]
            self.seen = None if bool(left.all()) else left.clone()

    def _exact(self, exact: Tensor | None) -> Tensor:
        assert exact is not None
        return exact if exact.shape[2] == self.exact_length else exact[:, :, : self.exact_length]

    def _without(self, exact: Tensor | None, start: int, stop: int) -> Tensor:
        """Drop tokens start..stop: in storage of just the size that is left, or in place while steps are replayed."""
        held = self._exact(exact)
        assert exact is not None
        if self.lengths is None:
            return torch.cat([held[:, :, :start], held[:, :, stop:]], dim=2)
        tail = held[:, :, stop:].clone()  # source and target may overlap
        exact[:, :, start : start + tail.shape[2]] = tail
        return exact

    def slots(self, tokens: int, sinks: int | None = None) -> Int[Tensor, "batch tokens"]:
        """Return the position (in the order of the attention mask) of the token in each stored place.

        Args:
            tokens: How many places.
            sinks: How many tokens stand in front of the pads; None for those that are set apart.
        """
        assert self.padding is not None
        sinks = self.sink_length if sinks is None else sinks
        place = torch.arange(tokens, device=self.padding.device)
        padding = self.padding[:, None]
        # Stored: sinks, pads, the rest. In the mask's order: pads, sinks, the rest.
        behind = torch.where(place < padding + sinks, place - sinks, place)
        return torch.where(place < sinks, padding + place, behind)

    @in_plain_modes
    def shrink(self) -> None:
        """Give back the room that replayed steps needed, and keep exact tokens of float32 models in 16 bits again."""
        if self.exact_keys is not None and self.exact_values is not None:
            keys, values = self.kept()
            self.exact_keys, self.exact_values, self.exact_length = None, None, 0
            self._keep(keys, values)
        self.packed_keys.shrink()
        self.packed_values.shrink()

    # -- reading -------------------------------------------------------------------------------------------------

    def exact(self) -> tuple[Float[Tensor, "rows kv_heads tokens dim"], Float[Tensor, "rows kv_heads tokens vdim"]]:
        """Return keys and values held exactly, in the model's dtype: sinks, then window."""
        keys, values = self.kept()
        return keys.to(self.read_as[0]), values.to(self.read_as[1])

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return the same in the dtype in which they are kept."""
        return self._exact(self.exact_keys), self._exact(self.exact_values)

    @in_plain_modes
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

    @in_plain_modes
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
        self.added = max(0, self.added + tokens_to_remove)  # those of a call that was stopped midway go first
        group = self._token_group
        if self.packed_length and (kept - self.sink_length) // group * group <= self._padded_front:
            # No whole group is left behind sinks and pads: give up the packed order.
            keys, values = (states[:, :, :kept] for states in self.dense())
            padding = self.padding
            self.reset()
            self.is_initialized = True
            self._keep(keys, values)
            if padding is not None:
                self.seen = torch.arange(kept, device=padding.device) >= padding[:, None]
            return
        from_window = min(-tokens_to_remove, self.exact_length - self.sink_length)
        self.exact_length -= from_window
        self.seen = None if self.seen is None else self.seen[:, : self.exact_length - self.sink_length]
        left = self.packed_length - min(-tokens_to_remove - from_window, self.packed_length)
        if left == self.packed_length:
            return
        loose = left % group
        if loose:
            self._unpack(left - loose, loose)
        self.packed_keys.length = self.packed_values.length = left - loose

    def _unpack(self, start: int, count: int) -> None:
        """Take `count` tokens of the group at `start` back to the (empty) exact window, dequantized."""
        group = self._token_group
        keys = self.key_quantizer.dequantize(self.packed_keys.view().narrow(start, group))
        values = self.value_quantizer.dequantize(self.packed_values.view().narrow(start, group))
        self._keep(keys[:, :, :count].to(self.read_as[0]), values[:, :, :count].to(self.read_as[1]))

    @in_plain_modes
    def _map(self, fn: Any) -> None:
        """Apply `fn` to every tensor of a row's state (batch on axis 0)."""
        for buffer in (self.packed_keys, self.packed_values):
            if buffer.storage is not None:
                buffer.storage = buffer.storage.map(fn)
        if self.exact_keys is not None and self.exact_values is not None:
            self.exact_keys, self.exact_values = fn(self.exact_keys), fn(self.exact_values)
        self.padding = None if self.padding is None else fn(self.padding)
        self.seen = None if self.seen is None else fn(self.seen)

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


def _last(quantizer: Quantizer[Any], packed: TokenBuffer, count: int) -> Tensor:
    """Return the last packed vectors, dequantized."""
    return quantizer.dequantize(packed.view().narrow(packed.length - count, count))


def _grown(states: Tensor, room: int) -> Tensor:
    """Return storage for `room` tokens that begins with these."""
    larger = states.new_zeros(*states.shape[:2], room, states.shape[3])  # what is masked must still be a number
    larger[:, :, : states.shape[2]] = states
    return larger


def _leading_pads(seen: Tensor | None) -> Int[Tensor, " batch"] | None:
    """Return how many tokens nothing has seen stand in front of each row; None where no row has any."""
    if seen is None:
        return None
    leading = torch.where(seen.any(dim=1), seen.int().argmax(dim=1), seen.shape[1])
    return leading if bool(leading.any()) else None


def _index(slots: Tensor, states: Tensor) -> Tensor:
    return slots[:, None, :, None].expand(states.shape)


def _gathered(states: Tensor, slots: Tensor) -> Tensor:
    return states.gather(2, _index(slots, states))


def _scattered(states: Tensor, slots: Tensor) -> Tensor:
    return torch.empty_like(states).scatter_(2, _index(slots, states), states)
