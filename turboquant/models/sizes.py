"""How many heads of which width every layer has, by a model's configuration."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Heads:
    """The attention of one layer."""

    query_heads: int
    kv_heads: int
    head_dim: int


def layer_heads(config: Any) -> list[Heads]:
    """Return the heads of every layer; models such as Gemma 4 have layers of different widths.

    Args:
        config: As in transformers; of an image-text model its text part counts.
    """
    config = config.get_text_config(decoder=True)
    count = int(getattr(config, "num_hidden_layers", None) or 0)
    each = getattr(config, "per_layer_config", None)  # transformers before 5.20 has one configuration for all layers
    return [_heads(each[i] if each is not None else config) for i in range(count)]


def _heads(config: Any) -> Heads:
    query_heads = int(getattr(config, "num_attention_heads", None) or 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 2 * query_heads) // query_heads
    return Heads(query_heads, int(kv_heads), int(width))
