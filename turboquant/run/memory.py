"""How long a context this machine has the memory for, and giving back what is free."""

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

from turboquant.cache.build import compressed_layers
from turboquant.models.sizes import layer_heads
from turboquant.run.generate import PromptError

WORKSPACE_BYTES = 256 * 2**20
"""What a measurement takes beside model and caches: activations of a chunk, logits, tiles of scores."""
CACHES = 1.25
"""A full cache and a compressed one, measured against the full one."""


@dataclass(frozen=True)
class CacheShape:
    """What the cache of a model takes in memory.

    Attributes:
        token_bytes: Bytes each token adds, in the layers that keep all of them.
        window_bytes: Bytes of the layers that keep a window, once it is full.
    """

    token_bytes: int
    window_bytes: int

    def full_bytes(self, tokens: int) -> int:
        """Return the bytes of a full cache of `tokens` tokens."""
        return self.token_bytes * tokens + self.window_bytes


def cache_shape(config: Any, weights: str) -> CacheShape:
    """Return what the cache takes, from a model's configuration.

    Args:
        config: As in transformers.
        weights: fp32 caches 4 bytes a value, everything else 2.
    """
    number = 4 if weights == "fp32" else 2
    layer_bytes = [2 * one.kv_heads * one.head_dim * number for one in layer_heads(config)]
    full = set(compressed_layers(config))
    window = getattr(config.get_text_config(decoder=True), "sliding_window", None) or 0
    return CacheShape(
        sum(size for i, size in enumerate(layer_bytes) if i in full),
        sum(size * window for i, size in enumerate(layer_bytes) if i not in full),
    )


def tokens_that_fit(shape: CacheShape, free: int) -> int:
    """Return how many tokens can be measured in `free` bytes: a full cache, a compressed one and the workspace."""
    room = free - WORKSPACE_BYTES - CACHES * shape.window_bytes
    if not shape.token_bytes:  # windows alone: a longer context takes no more
        return 2**40 if room > 0 else 0
    return max(0, int(room / (CACHES * shape.token_bytes)))


def check_context(name: str, config: Any, tokens: int, weights: str, free: int) -> None:
    """Refuse a context that the model has no positions for, or this machine no memory.

    Args:
        name: The model's, for the message.
        config: The model's configuration.
        tokens: Length of the context.
        weights: fp32, bf16, 8bit or 4bit.
        free: Bytes that are free beside the weights.

    Raises:
        PromptError: With how many tokens the model has positions for, or how many fit.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise PromptError(f"{name} has a context of {limit:,} tokens, got {tokens:,}")
    shape = cache_shape(config, weights)
    if tokens > (fit := tokens_that_fit(shape, free)):
        needed = CACHES * shape.full_bytes(tokens) + WORKSPACE_BYTES
        raise PromptError(
            f"a context of {tokens:,} tokens needs {needed / 2**30:.1f} GiB beside the weights of {name} and "
            f"{max(0, free) / 2**30:.1f} GiB are free: {fit:,} tokens fit"
        )


def trim() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    Tensors of growing sizes, taken and freed layer after layer, leave holes in the heap that glibc keeps; on a long
    context they come to as much as half the cache. Costs milliseconds.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
