"""An uncompressed cache with room for tokens to come: growing copies nothing, and decode steps can be replayed."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

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


class Replayable:
    """A cache whose decode steps `turboquant.hf_attention.steps` can capture; a mixin in front of Hugging Face's."""

    layers: list[Any]
    replay: Any = None
    given_up = 0
    """How many captured steps were given up soon after; where rows are chosen anew all the time (beams), none lasts."""

    def release(self) -> None:
        """Give the layers back to calls that are not replayed."""
        if self.replay is None:
            return
        self.given_up += self.replay.runs < FEW
        self.replay = None
        for layer in self.layers:
            if hasattr(layer, "lengths"):
                layer.lengths = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no captured step."""
        self.release()
        return vars(self)


class RoomyCache(Replayable, DynamicCache):
    """Hugging Face's cache of a model whose every layer keeps all tokens, with room in its layers."""

    def shrink(self) -> None:
        """Give all room back: what is held then is what Hugging Face's own cache would hold."""
        self.release()
        for layer in self.layers:
            if isinstance(layer, RoomyLayer):
                layer.shrink()


def roomy(plain: Cache, config: PreTrainedConfig) -> Cache:
    """Return an empty cache like an empty plain one, with room where every layer keeps all tokens."""
    if type(plain) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in plain.layers):
        return plain
    cache = RoomyCache(config=config)
    cache.layers = [RoomyLayer() for _ in plain.layers]
    return cache
