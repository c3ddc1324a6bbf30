"""Which layers of a model keep keys and values of all tokens, of a window of them, or none."""

from typing import Any, Literal

from turboquant.sizing.fields import ModelConfig, ModelConfigError

Kind = Literal["full", "sliding", "linear", "none"]
_KINDS: dict[str, Kind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "linear",
    "mamba": "linear",
    "mamba2": "linear",
    "conv": "linear",
    "recurrent": "linear",
    "mlp": "none",
    "moe": "none",
}
_LETTERS: dict[str, Kind] = {"*": "full", "M": "linear", "-": "none", "E": "none"}
# One full layer after so many, counted from the first, where the file does not say.
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
_INTERVALS = {"qwen3_next": 4}
_ALL_SLIDING = {"mistral", "mixtral", "phi3", "starcoder2"}
_OPTIONAL_SLIDING = ("qwen2", "qwen3")
_RECURRENT_MARKS = ("mamba_", "ssm_", "linear_num_", "lru_width", "time_mix", "conv_L_cache")


def layer_kinds(config: ModelConfig, raw: dict[str, Any]) -> tuple[Kind, ...]:
    """Return the kind of every layer, from whichever fields the architecture uses.

    Raises:
        ModelConfigError: The file does not say it, says it twice over, or uses a word that is not known here.
    """
    kinds = _named(config) or _recurrent(config, raw) or _sliding(config)
    count = config.num_hidden_layers
    if len(kinds) != count:
        raise ModelConfigError(
            f"The list of layer types must have num_hidden_layers entries ({count}), got {len(kinds)}."
        )
    if shared := config.num_kv_shared_layers:
        if shared >= count:
            raise ModelConfigError(f"num_kv_shared_layers must be less than num_hidden_layers ({count}), got {shared}.")
        reusing: Kind = "none"
        kinds = (*kinds[:-shared], *[reusing] * shared)
    size, positions = window(config, kinds), config.max_position_embeddings
    if size is not None and positions is not None and size >= positions:  # a window that is none, as Phi-4-mini's
        kinds = tuple("full" if kind == "sliding" else kind for kind in kinds)
    if not {"full", "sliding"} & set(kinds):
        raise ModelConfigError("None of its layers has attention, so there is no KV cache to count.")
    return kinds


def window(config: ModelConfig, kinds: tuple[Kind, ...]) -> int | None:
    """Return how many tokens a sliding layer sees, None where there is none.

    Raises:
        ModelConfigError: There are sliding layers and no window.
    """
    if "sliding" not in kinds:
        return None
    chunked = "chunked_attention" in (config.layer_types or ()) or config.sliding_window is None
    size = config.attention_chunk_size if chunked else config.sliding_window
    if size is None:
        raise ModelConfigError("sliding_window is missing, and some layers are sliding ones.")
    return size


def _named(config: ModelConfig) -> tuple[Kind, ...]:
    words = config.layer_types or config.layers_block_type
    if words:
        for word in words:
            if word not in _KINDS:
                raise ModelConfigError(
                    f"layer_types must be of {', '.join(_KINDS)}, got {word[:40]!r}: its cache is not known here."
                )
        return tuple(_KINDS[word] for word in words)
    if pattern := config.hybrid_override_pattern:
        for letter in pattern:
            if letter not in _LETTERS:
                raise ModelConfigError(f"hybrid_override_pattern must be made of M, *, - and E, got {letter!r}.")
        return tuple(_LETTERS[letter] for letter in pattern)
    return ()


def _recurrent(config: ModelConfig, raw: dict[str, Any]) -> tuple[Kind, ...]:
    """Layers of hybrids, in which some attend and the others carry a state of fixed size."""
    places = range(config.num_hidden_layers)
    interval = config.full_attention_interval or _INTERVALS.get(config.model_type)
    if interval:
        return tuple("linear" if (i + 1) % interval else "full" for i in places)
    if period := config.attn_layer_period:
        return tuple("full" if i % period == config.attn_layer_offset else "linear" for i in places)
    if config.full_attn_idxs:
        return tuple("full" if i in config.full_attn_idxs else "linear" for i in places)
    if config.attn_type_list:
        return tuple("full" if kind == 1 else "linear" for kind in config.attn_type_list)
    if mark := next((key for key in raw if str(key).startswith(_RECURRENT_MARKS)), None):
        raise ModelConfigError(
            f"It has recurrent layers ({str(mark)[:40]}) and nothing says which layers attend; add layer_types."
        )
    return ()


def _sliding(config: ModelConfig) -> tuple[Kind, ...]:
    places = range(config.num_hidden_layers)
    optional = config.model_type.startswith(_OPTIONAL_SLIDING)
    on = config.use_sliding_window if config.use_sliding_window is not None else not optional
    if not on or (config.sliding_window is None and config.attention_chunk_size is None):
        return tuple("full" for _ in places)
    if optional and config.max_window_layers is not None:
        return tuple("sliding" if i >= config.max_window_layers else "full" for i in places)
    period = config.sliding_window_pattern or _PATTERNS.get(config.model_type)
    if period:
        return tuple("sliding" if (i + 1) % period else "full" for i in places)
    if config.model_type in _ALL_SLIDING:
        return tuple("sliding" for _ in places)
    name = "sliding_window" if config.sliding_window is not None else "attention_chunk_size"
    raise ModelConfigError(
        f"{name} is {getattr(config, name):,} and nothing says which layers of {config.model_type} slide; "
        "add layer_types, or set it to null if none does."
    )
