"""What a KV cache takes in memory, computed from a model's config.json alone: no weights, no network, no GPU.

`read_config` turns a config.json into the shape of the cache, `kv_bytes` counts what a method holds for it, part by
part as `cache_report` measures it, and `longest_context` and `largest_batch` turn that around.
"""

from turboquant.sizing.config import MAX_CONFIG_BYTES, KVShape, ModelConfigError, read_config
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

__all__ = [
    "MAX_CONFIG_BYTES",
    "MOST_ROWS",
    "MOST_TOKENS",
    "RESERVE_BYTES",
    "KVBytes",
    "KVShape",
    "ModelConfigError",
    "SizingError",
    "kv_bytes",
    "largest_batch",
    "longest_context",
    "read_config",
    "weight_bytes",
]
