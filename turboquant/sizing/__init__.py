"""What a KV cache takes in memory, found from a model's config.json alone: no weights, no network, no GPU.

`read_config` makes the model without weights and asks the layers of its cache what they keep, `kv_bytes` counts what a
method holds for it, part by part as `cache_report` measures it, and `longest_context` and `largest_batch` turn that
around.
"""

from turboquant.sizing.config import MAX_CONFIG_BYTES, ModelConfigError, read_config
from turboquant.sizing.held import (
    MOST_ROWS,
    MOST_TOKENS,
    RESERVE_BYTES,
    KVBytes,
    SizingError,
    kv_bytes,
    largest_batch,
    longest_context,
    weight_bytes,
)
from turboquant.sizing.shape import KVShape, LayerShape

__all__ = [
    "MAX_CONFIG_BYTES",
    "MOST_ROWS",
    "MOST_TOKENS",
    "RESERVE_BYTES",
    "KVBytes",
    "KVShape",
    "LayerShape",
    "ModelConfigError",
    "SizingError",
    "kv_bytes",
    "largest_batch",
    "longest_context",
    "read_config",
    "weight_bytes",
]
