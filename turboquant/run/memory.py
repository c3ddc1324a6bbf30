"""How long a context this machine has the memory for, and giving back what is free."""

import contextlib
import ctypes
from typing import Any

from turboquant.methods import METHODS
from turboquant.run.generate import PromptError
from turboquant.sizing import kv_bytes, longest_context, read_config

WORKSPACE_BYTES = 256 * 2**20
"""What a measurement takes beside model and caches: activations of a chunk, logits, tiles of scores."""
CACHES = 1.25
"""A full cache and a compressed one, measured against the full one."""


def full_bytes(config: Any, weights: str, tokens: int) -> int:
    """Return the bytes of a full cache of `tokens` tokens.

    Args:
        config: As in transformers.
        weights: fp32 caches 4 bytes a value, everything else 2.
        tokens: Length of the context.

    Raises:
        ModelConfigError: What the model caches is not known.
    """
    return kv_bytes(read_config(config.to_dict()), METHODS["full"](), tokens, value_bytes=_value_bytes(weights)).bytes


def tokens_that_fit(config: Any, weights: str, free: int) -> int:
    """Return how many tokens can be measured in `free` bytes: a full cache, a compressed one and the workspace.

    Where every layer keeps a window only, a longer context takes no more: `turboquant.sizing.MOST_TOKENS`.

    Raises:
        ModelConfigError: What the model caches is not known.
    """
    shape, room = read_config(config.to_dict()), int((free - WORKSPACE_BYTES) / CACHES)
    return longest_context(shape, METHODS["full"](), room, 0, reserve_bytes=0, value_bytes=_value_bytes(weights))


def _value_bytes(weights: str) -> int:
    return 4 if weights == "fp32" else 2


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
        ModelConfigError: What the model caches is not known.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise PromptError(f"{name} has a context of {limit:,} tokens, got {tokens:,}")
    if tokens > (fit := tokens_that_fit(config, weights, free)):
        needed = CACHES * full_bytes(config, weights, tokens) + WORKSPACE_BYTES
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
