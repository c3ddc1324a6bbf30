"""An uncompressed cache with room for tokens to come: growing copies nothing, and decode steps can be replayed."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from turboquant.cache.layer import CachedStates
from turboquant.quant.modes import in_plain_modes

FEW = 4
"""Steps that a captured one has to last to have been worth it."""


class RoomyLayer(DynamicLayer):
    """A plain layer with room behind its tokens.

    Args:
        room: For how many tokens there is room from the beginning; it grows by an eighth where that is not enough.
    """

    packed_length = 0
    due = False

    def __init__(self, room: int = 0) -> None:
        self.room, self.exact_length = room, 0
        self.buffers: list[Tensor] = []  # keys and values, (batch, kv_heads, room, dim)
        self.lengths: Tensor | None = None  # (0, exact tokens) on the device, while steps are replayed
        super().__init__()

    def _held(self, side: int) -> Tensor | None:
        return self.buffers[side][:, :, : self.exact_length] if self.buffers else None

    def _hold(self, side: int, states: Tensor | None) -> None:
        """Take other states, as Hugging Face's layer does where rows are selected or tokens removed."""
        if states is not None and states.numel() and self.buffers:
            self.buffers[side], self.exact_length = states, states.shape[2]

    keys = property(lambda self: self._held(0), lambda self, states: self._hold(0, states))
    values = property(lambda self: self._held(1), lambda self, states: self._hold(1, states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write behind the tokens held; return all of them."""
        if self.lengths is not None:
            place = self.lengths[1:].long()
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, place, new)
            self.lengths[1:] += 1  # in place: a CUDA graph replays this with the same addresses
            states: Any = CachedStates(self, 1)  # type: ignore[arg-type]
            return states, states
        self._append(key_states, value_states)
        return self.keys, self.values

    @in_plain_modes
    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        stop = self.exact_length + key_states.shape[2]
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            room = max(self.room, stop)
            self.buffers = [t.new_zeros(*t.shape[:2], room, t.shape[3]) for t in (key_states, value_states)]
        elif stop > self.buffers[0].shape[2]:
            self.reserve(stop + stop // 8)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.exact_length : stop] = new
        self.exact_length = stop

    @in_plain_modes
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all; what stands in it is zero."""
        for side, old in enumerate(self.buffers):
            if old.shape[2] < tokens:
                self.buffers[side] = old.new_zeros(*old.shape[:2], tokens, old.shape[3])
                self.buffers[side][:, :, : self.exact_length] = old[:, :, : self.exact_length]

    def shrink(self) -> None:
        """Give the room back."""
        self.buffers = [buffer[:, :, : self.exact_length].clone() for buffer in self.buffers]

    @property
    def exact_keys(self) -> Tensor | None:
        """Keys and the room behind them."""
        return self.buffers[0] if self.buffers else None

    @property
    def exact_values(self) -> Tensor | None:
        """Values and the room behind them."""
        return self.buffers[1] if self.buffers else None

    @property
    def full(self) -> bool:
        """Whether there is no room for another token."""
        return bool(self.buffers) and self.exact_length >= self.buffers[0].shape[2]

    def storages(self) -> tuple[object, ...]:
        """Return what holds the tokens; while it stays the same, captured steps can read it."""
        return tuple(self.buffers)

    @property
    def replayable(self) -> bool:
        """Whether a step over these tokens can be captured."""
        return bool(self.buffers)

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.exact_length

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last tokens, given as a negative number."""
        self.exact_length = max(0, self.exact_length + int(tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens."""
        self.exact_length, self.buffers = 0, []
        self.is_initialized = False


class RollingLayer(DynamicSlidingWindowLayer):
    """A layer with a sliding window while its steps are replayed: the token at place p of a text is in slot p % room.

    Attention does not ask in which order keys lie, so a new token takes the place of the one that leaves the window.

    Args:
        plain: Hugging Face's own layer, whose tokens are copied.
        room: For how many tokens there is room, or for the window, if that is less.
    """

    packed_length = 0
    due = False

    def __init__(self, plain: DynamicSlidingWindowLayer, room: int) -> None:
        super().__init__(plain.sliding_window)
        assert plain.keys is not None
        assert plain.values is not None
        self.dtype, self.device, self.is_initialized = plain.dtype, plain.device, True
        self.cumulative_length = plain.cumulative_length
        self.lengths: Tensor | None = None  # (0, all tokens so far) on the device
        self.padding: Tensor | None = None  # (batch,) pad tokens in front of each row; None without padding
        self._place([plain.keys, plain.values], room)

    @staticmethod
    def can_take(plain: Any) -> bool:
        """Is it a layer of Hugging Face's with a window, as its own `update` leaves it?"""
        if type(plain) is not DynamicSlidingWindowLayer or plain.keys is None or getattr(plain, "record_past", False):
            return False
        return plain.keys.shape[-2] == min(plain.cumulative_length, plain.sliding_window - 1) > 0

    def plain(self) -> DynamicSlidingWindowLayer:
        """Return Hugging Face's own layer with the tokens that it would hold."""
        layer = DynamicSlidingWindowLayer(self.sliding_window)
        layer.lazy_initialization(*self.buffers)
        layer.cumulative_length = self.cumulative_length
        layer.keys, layer.values = self.keys, self.values
        return layer

    def _slots(self) -> Tensor:
        """Return where the tokens lie that a plain layer holds, in their order."""
        first = max(0, self.cumulative_length - self.sliding_window + 1)
        return torch.arange(first, self.cumulative_length, device=self.device) % self.buffers[0].shape[2]

    @in_plain_modes
    def _ordered(self, side: int) -> Tensor:
        return self.buffers[side][:, :, self._slots()]

    def _set(self, states: Tensor | None) -> None:
        if states is not None:
            raise RuntimeError("a layer whose steps are replayed is changed by its cache: call its crop() or the like")

    keys = property(lambda self: self._ordered(0), lambda self, states: self._set(states))
    values = property(lambda self: self._ordered(1), lambda self, states: self._set(states))

    @in_plain_modes
    def _place(self, states: list[Tensor], room: int) -> None:
        room = min(room, self.sliding_window)
        self.buffers = [old.new_zeros(*old.shape[:2], room, old.shape[3]) for old in states]
        for buffer, old in zip(self.buffers, states, strict=True):
            buffer[:, :, self._slots()] = old

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, or for the window, if that is less."""
        if self.buffers[0].shape[2] < min(tokens, self.sliding_window):
            self._place([self.keys, self.values], tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write one token a row into its slot."""
        assert self.lengths is not None
        place = self.lengths[1:].long() % self.buffers[0].shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, place, new)
        self.lengths[1:] += 1
        states: Any = CachedStates(self, 1)  # type: ignore[arg-type]
        return states, states

    def in_window(self) -> Tensor:
        """Return which slots hold tokens of the window, (1 or batch, room), from the length on the device."""
        assert self.lengths is not None
        room = self.buffers[0].shape[2]
        last = self.lengths[1] - 1
        place = last - (last - torch.arange(room, device=self.device)) % room
        return (place >= (0 if self.padding is None else self.padding[:, None])).view(-1, room)

    @property
    def exact_length(self) -> int:
        """All tokens so far."""
        return self.cumulative_length

    @exact_length.setter
    def exact_length(self, tokens: int) -> None:
        self.cumulative_length = tokens

    exact_keys = property(lambda self: self.buffers[0])
    exact_values = property(lambda self: self.buffers[1])

    @property
    def full(self) -> bool:
        """Whether there is no room for another token, and none leaves the window."""
        return self.buffers[0].shape[2] < min(self.cumulative_length + 1, self.sliding_window)

    def storages(self) -> tuple[object, ...]:
        """Return what holds the tokens; while it stays the same, captured steps can read it."""
        return tuple(self.buffers)


class Replayable:
    """A cache whose decode steps `turboquant.hf_attention.steps` can capture; a mixin in front of Hugging Face's."""

    layers: list[Any]
    replay: Any = None
    given_up = 0
    """How many captured steps were given up soon after; where rows are chosen anew all the time (beams), none lasts."""
    graph_bytes = 0
    """GPU memory that a captured step took for its own tensors, at most; it is given back with the step."""

    def release(self) -> None:
        """Give the layers back to calls that are not replayed."""
        if self.replay is None:
            return
        self.given_up += self.replay.runs < FEW
        self.replay = None
        self.layers = [layer.plain() if isinstance(layer, RollingLayer) else layer for layer in self.layers]
        for layer in self.layers:
            if hasattr(layer, "lengths"):
                layer.lengths = None

    def shrink(self) -> None:
        """Give back the room that captured steps needed, once no more are to come for now."""
        if self.replay is None:
            return
        tries = self.given_up
        self.release()
        self.given_up = tries  # a short answer is no step that failed to last
        for layer in self.layers:
            if hasattr(layer, "shrink"):
                layer.shrink()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens, as Hugging Face's caches do."""
        self.release()
        super().crop(*args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        """Select the rows that beam search goes on with."""
        self.release()
        super().reorder_cache(*args, **kwargs)  # type: ignore[misc]

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        """Repeat each row."""
        self.release()
        super().batch_repeat_interleave(*args, **kwargs)  # type: ignore[misc]

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        """Keep only the given rows."""
        self.release()
        super().batch_select_indices(*args, **kwargs)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no captured step."""
        self.release()
        return vars(self)


class RoomyCache(Replayable, DynamicCache):
    """Hugging Face's cache with room in the layers that keep all tokens."""

    @property
    def plain_bytes(self) -> int:
        """Bytes of the tokens held, as Hugging Face's own layers would hold them: without room."""
        held = 0
        for layer in self.layers:
            buffers: Any = getattr(layer, "buffers", None) or [layer.keys, layer.values]
            window = getattr(layer, "sliding_window", None)
            tokens = layer.get_seq_length() if window is None else min(layer.get_seq_length(), window - 1)
            held += sum(buffer[:, :, :tokens].nbytes for buffer in buffers if buffer is not None)
        return held

    def shrink(self) -> None:
        """Give all room back: what is held then is what Hugging Face's own cache would hold."""
        self.release()
        for layer in self.layers:
            if isinstance(layer, RoomyLayer):
                layer.shrink()


def roomy(plain: Cache, config: PreTrainedConfig) -> Cache:
    """Return an empty cache like an empty plain one, with room in layers that keep all tokens.

    One with other layers than those and layers with a window is returned as it is.
    """
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(plain) is not DynamicCache or any(type(layer) not in known for layer in plain.layers):
        return plain
    cache = RoomyCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in plain.layers]
    return cache
