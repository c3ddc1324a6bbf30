"""One forward pass with the full cache, kept so that any number of compressed caches can be held against it.

The context goes through the model in chunks; its last `queries` tokens are a chunk of their own. What is kept: the keys
and values of every full-attention layer, the real queries (after rotary embedding) of the last chunk, and its logits.
A compressed cache filled from these states holds what it would hold after one forward call over everything before the
last chunk, because a prefill attends exactly. So it can serve the last chunk as it would in real use.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from turboquant.cache.build import build_cache, fill_cache
from turboquant.cache.kinds import HybridLayer
from turboquant.cache.roomy import RoomyLayer
from turboquant.experiments.base import Watch
from turboquant.hf_attention import observe_queries
from turboquant.kernels.scoring import Scoring
from turboquant.methods import METHODS, Method
from turboquant.models.load import LoadedModel
from turboquant.run.feed import feed, step
from turboquant.run.generate import QueryRecorder
from turboquant.run.memory import trim


@dataclass
class Captured:
    """A forward pass that was kept.

    Attributes:
        ids: The context, (1, tokens).
        last: How many tokens the last chunk has.
        cache: The full cache; it holds the whole context.
        layer_indices: The layers that keep every token, which is those that can be compressed.
        windows: The other layers (sliding windows) as they were before the last chunk.
        queries: The last chunk's queries, (1, heads, last, dim), by layer.
        scoring: What the model makes of scores, by layer.
        logits: The last chunk's, (last, vocabulary).
    """

    ids: Int[Tensor, "1 tokens"]
    last: int
    cache: Cache
    layer_indices: list[int]
    windows: dict[int, Any]
    queries: dict[int, Tensor]
    scoring: dict[int, Scoring]
    logits: Float[Tensor, "last vocabulary"]

    @property
    def before(self) -> int:
        """Tokens before the last chunk."""
        return self.ids.shape[1] - self.last

    def states(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return the full keys and values of one layer."""
        layer: Any = self.cache.layers[layer_idx]
        return layer.keys, layer.values

    def filled(self, loaded: LoadedModel, method: Method) -> Cache:
        """Return a cache of this method that has read everything before the last chunk.

        That of `full` shares its storage with the captured cache; `replay` writes the same tokens there again.
        """
        cache = build_cache(loaded.model.config, method)
        for layer_idx in self.layer_indices:
            if not method.compresses:
                twin: Any = copy.copy(self.cache.layers[layer_idx])
                twin.crop(-self.last)
                cache.layers[layer_idx] = twin
                continue
            keys, values = self.states(layer_idx)
            fill_cache(cache, layer_idx, keys[:, :, : self.before], values[:, :, : self.before])
            trim()
        for layer_idx, layer in self.windows.items():
            own = cache.layers[layer_idx]
            if isinstance(own, HybridLayer):
                own.take_states(layer)
                fill_cache(cache, layer_idx, layer.keys, layer.values)
            else:
                cache.layers[layer_idx] = copy.deepcopy(layer)
        return cache

    @torch.no_grad()
    def replay(self, loaded: LoadedModel, cache: Cache, watch: Watch) -> Float[Tensor, "last vocabulary"]:
        """Read the last chunk with a filled cache and return its logits."""
        with observe_queries(QueryRecorder(watch.cancelled, keep=False)):
            parts = feed(loaded.model, cache, self.ids, [(self.before, self.ids.shape[1])])
            return torch.cat([logits for _, logits in parts], dim=1)[0]


@torch.no_grad()
def capture(
    loaded: LoadedModel, ids: Int[Tensor, "1 tokens"], last: int, chunk_tokens: int, watch: Watch, room: int = 0
) -> Captured:
    """Read a context with the full cache, chunk by chunk, and keep what was seen.

    Beside the full cache one chunk's activations and scores (chunk_tokens x tokens at most) are held.

    Args:
        loaded: The model.
        ids: The context.
        last: Tokens of the last chunk, fewer than the context has.
        chunk_tokens: Tokens of every other chunk, at most.
        watch: Told after each chunk, asked in each layer.
        room: Tokens behind the context that the full cache has room for, to go on from there.

    Raises:
        CancelledError: If the caller asked to stop.
    """
    model, tokens = loaded.model, ids.shape[1]
    cache = build_cache(model.config, METHODS["full"]())
    cache.layers = [RoomyLayer(tokens + room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    before = tokens - last
    with observe_queries(QueryRecorder(watch.cancelled, keep=False)):
        for start in range(0, before, chunk_tokens):
            stop = min(start + chunk_tokens, before)
            watch.progress(start / tokens, f"Reading {tokens:,} tokens")
            step(model, cache, ids[:, start:stop])
            trim()
    kept = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, RoomyLayer)}
    windows = {i: copy.deepcopy(layer) for i, layer in enumerate(cache.layers) if i not in kept}
    recorder = QueryRecorder(watch.cancelled, last=last)
    with observe_queries(recorder):
        logits = torch.cat([part for _, part in feed(model, cache, ids, [(before, tokens)])], dim=1)
    layer_indices = [i for i, layer in kept.items() if layer.is_initialized]
    return Captured(
        ids=ids,
        last=last,
        cache=cache,
        layer_indices=layer_indices,
        windows=windows,
        queries={i: torch.cat(queries, dim=2) for i, queries in recorder.queries.items() if i in layer_indices},
        scoring={i: scoring for i, scoring in recorder.scoring.items() if i in layer_indices},
        logits=logits[0],
    )
