"""A cache of packed keys and values that stands in for Hugging Face's own."""

from turboquant.cache.build import (
    CompressedCache,
    NothingCompressedError,
    build_cache,
    cache_bytes,
    cache_report,
    fill_cache,
    layer_states,
)

__all__ = [
    "CompressedCache",
    "NothingCompressedError",
    "build_cache",
    "cache_bytes",
    "cache_report",
    "fill_cache",
    "layer_states",
]
