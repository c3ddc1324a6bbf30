"""The compressed cache: a Hugging Face `Cache` whose full-attention layers hold packed codes, and what it holds."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from turboquant.cache.count import CompressedLayer, Count, count_layer
from turboquant.cache.kinds import DenseLayer, keeps_all
from turboquant.cache.layer import CachedStates, QuantizedLayer
from turboquant.cache.roomy import Replayable
from turboquant.records.comparison import CacheReport

if TYPE_CHECKING:
    from turboquant.methods import Method

__all__ = [
    "CachedStates",
    "CompressedCache",
    "NothingCompressedError",
    "QuantizedLayer",
    "build_cache",
    "cache_bytes",
    "cache_report",
    "fill_cache",
    "layer_states",
    "tokens_held",
]


class NothingCompressedError(RuntimeError):
    """A quality or memory figure was asked of a run in which no token was packed."""


class CompressedCache(Replayable, Cache):
    """A cache in which every full-attention layer is a `CompressedLayer`; other layers are Hugging Face's own."""

    def __init__(self, method: "Method", layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.method = method

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take one layer's keys and values of a forward call.

        Raises:
            ValueError: If the layers hold different numbers of tokens, since an earlier call failed midway.
        """
        self._check_step(layer_idx, key_states.shape[2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(keys, CachedStates):
            keys.on_unread = self._forget_call
        return keys, values

    def _check_step(self, layer_idx: int, added: int) -> None:
        """Refuse a call whose layers do not hold the same tokens.

        The first compressed layer is held against all others, whose turn in this call has been or is to come; every
        other compressed layer against the first. A layer without tokens is asked when its own turn comes.
        """
        layers: list[Any] = self.layers
        own = layers[layer_idx]
        if not isinstance(own, CompressedLayer) or getattr(own, "lengths", None) is not None:  # there `steps` counts
            return
        first = next(i for i, layer in enumerate(layers) if isinstance(layer, CompressedLayer))
        before = own.get_seq_length()
        for other in range(len(layers)) if layer_idx == first else [first]:
            if other == layer_idx or not isinstance(layers[other], (CompressedLayer, DynamicSlidingWindowLayer)):
                continue
            held = layers[other].get_seq_length()
            if held and held != (due := before + (added if other < layer_idx else 0)):
                raise ValueError(
                    f"layer {other} of the cache holds {held} tokens, and {due} by what layer {layer_idx} holds: an "
                    "earlier call failed midway; call reset() on the cache or build a new one"
                )

    def _forget_call(self) -> None:
        """Forget the present call in Hugging Face's layers too, if it was the first one."""
        if not any(layer.get_seq_length() for layer in self.layers if isinstance(layer, QuantizedLayer)):
            self.reset()

    def reset(self) -> None:
        """Forget all tokens in every layer; transformers before 5.23 only fills its own layers with zeros."""
        self.release()
        self.given_up = self.graph_bytes = 0
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and not isinstance(layer, CompressedLayer):
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()


def build_cache(config: PreTrainedConfig, method: "Method") -> Cache:
    """Return an empty cache for `model.generate(..., past_key_values=cache)` or plain forward calls.

    Args:
        config: The model's config.
        method: From `parse_method`. `full` gives Hugging Face's own DynamicCache (in which a window that no context
            can fill is none).

    Raises:
        NoSuchLayerError: If the method gives bits to a layer that the model does not have, or does not compress.

    Example:
        >>> from turboquant import build_cache, parse_method, tiny_model
        >>> model = tiny_model("llama")
        >>> type(build_cache(model.config, parse_method("turboquant:bits=4"))).__name__
        'CompressedCache'
    """
    plain = _plain_cache(config)
    compressed = compressed_layers(config)
    method.check_layers(len(plain.layers), compressed)
    readers = last_readers(config)
    layers = list(plain.layers)
    for i in compressed:
        layers[i] = method.layer(layers[i], i, readers.get(i), config)
    return CompressedCache(method, layers) if method.compresses else plain


def _plain_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return Hugging Face's cache, in which layers whose window is none keep all tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if _window_is_none(layer, config) else layer for layer in cache.layers]
    return cache


def _window_is_none(layer: Any, config: PreTrainedConfig) -> bool:
    """Does a layer with a window keep all tokens that the model has positions for? Then its window is none.

    Phi-4-mini, Phi-3.5 and Ministral 8B are published so.
    """
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
    return window is not None and positions is not None and window >= positions


def compressed_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers that a compressed cache packs: those that keep keys and values of all tokens.

    Layers that look at an image, once for all tokens, are none of them (Llama 3.2 Vision).
    """
    crossing = getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ()
    layers = _plain_cache(config).layers
    return [i for i, layer in enumerate(layers) if keeps_all(layer) and i not in crossing]


def last_readers(config: PreTrainedConfig) -> dict[int, int]:
    """Return which layer is the last to read the keys and values of another one, by the latter's index.

    Models such as Gemma 3n let their last layers use the states of the last earlier layer of the same type.
    """
    config = config.get_text_config(decoder=True)
    shared = int(getattr(config, "num_kv_shared_layers", None) or 0)
    types = list(getattr(config, "layer_types", None) or [])
    if not 0 < shared < len(types):
        return {}
    own = len(types) - shared
    last = {kind: i for i, kind in enumerate(types)}
    makers = {kind: i for i, kind in enumerate(types[:own])}
    return {maker: last[kind] for kind, maker in makers.items() if last[kind] != maker}


@torch.no_grad()
def fill_cache(
    cache: Cache,
    layer_idx: int,
    key_states: Float[Tensor, "batch kv_heads tokens dim"],
    value_states: Float[Tensor, "batch kv_heads tokens value_dim"],
) -> None:
    """Store captured states in one layer, as one forward call over rows without padding would have stored them.

    Args:
        cache: From `build_cache`.
        layer_idx: The layer.
        key_states: Keys after rotary embedding, behind those held already.
        value_states: Values.

    Example:
        >>> import torch
        >>> from turboquant import build_cache, parse_method, tiny_model
        >>> cache = build_cache(tiny_model("llama").config, parse_method("turboquant:bits=4"))
        >>> fill_cache(cache, 0, torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64))
        >>> layer_states(cache, 0)[0].shape
        torch.Size([1, 2, 300, 64])
    """
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, QuantizedLayer):
        layer.update(key_states, value_states)
        if not isinstance(layer, DenseLayer):
            layer.compress(None)
    else:
        cache.update(key_states, value_states, layer_idx)


def layer_states(cache: Cache, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values one layer holds, as attention will read them: packed ones are dequantized.

    Both are (batch, kv_heads, tokens, dim), in the order of the attention mask and in the dtype of the model.

    Raises:
        ValueError: If the layer holds nothing.
    """
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if layer is None or not layer.get_seq_length():
        raise ValueError(f"layer {layer_idx} of the cache holds no tokens")
    return layer.dense() if isinstance(layer, CompressedLayer) else (layer.keys, layer.values)


def _payload_bits(method: "Method | None", count: Count) -> float | None:
    """Return the bits of a code by the method's formula, or as held where its layers differ."""
    if method is None or not count.packed_values:
        return None
    return method.payload_bits or 8 * (count.key + count.value) / count.packed_values


def tokens_held(cache: Cache) -> int:
    """Return how many tokens a cache has taken; layers with a recurrent state alone do not know it."""
    return max((int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length")), default=0)


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of every storage reachable from a cache; the total of `cache_report`."""
    return cache_report(cache).bytes


def cache_report(cache: Cache) -> CacheReport:
    """Measure what a cache holds: tokens, and the bytes of every storage reachable from it.

    The 16-bit baseline counts 2 bytes for every value cached, whatever dtype the run uses; tables shared by layers
    are counted once. What captured decode steps take on a GPU stands beside that, as `graph_bytes`. `payload_ratio` is
    the methodology's formula (16 bits against the bits of codes and signs, without norms, windows or tables) and stands
    beside the measured ratio, never in its place.
    """
    count = Count()
    for layer in cache.layers:
        count_layer(layer, count)
    payload = _payload_bits(getattr(cache, "method", None), count)
    full = 2 * count.values + count.state  # recurrent states are the same on both sides
    tokens = tokens_held(cache)
    return CacheReport(
        cache_class=type(cache).__name__,
        tokens=tokens,
        compressed_tokens=count.packed_tokens,
        exact_tokens=tokens - count.packed_tokens,
        layers=len(cache.layers),
        compressed_layers=count.compressed_layers,
        bytes=count.total,
        key_bytes=count.key,
        value_bytes=count.value,
        scale_bytes=count.scale,
        exact_bytes=count.exact,
        spare_bytes=count.spare,
        shared_bytes=count.shared,
        state_bytes=count.state,
        full_precision_bytes=full,
        bits_per_value=8 * (count.total - count.state) / count.values if count.values else 0.0,
        compression_ratio=full / count.total if count.total else 1.0,
        payload_ratio=16 / payload if payload else None,
        misread_vectors=count.misread_vectors,
        graph_bytes=getattr(cache, "graph_bytes", 0),
    )
