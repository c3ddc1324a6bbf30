"""The fields of a config.json that decide the size of a cache, and what is refused before they are believed."""

import json
import reprlib
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_CONFIG_BYTES = 1_000_000
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
# Older architectures have names of their own for the same things.
_ALIASES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "multi_query_group_num"),
    "hidden_size": ("n_embd", "d_model"),
    "head_dim": ("kv_channels",),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
}
_REQUIRED = ("num_hidden_layers", "num_attention_heads")
_FILLED = (*_REQUIRED, "hidden_size", "vocab_size", "intermediate_size", "sliding_window", "max_position_embeddings")
# Their classes in transformers have no head_dim of their own, so that it need not be imported to ask.
_DERIVE_HEAD_DIM = {
    "gpt2", "gpt_neox", "jamba", "llama", "mistral", "mixtral", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "starcoder2"
}  # fmt: skip

Count = Annotated[int, Field(strict=True, ge=1, le=100_000_000)]
Offset = Annotated[int, Field(strict=True, ge=0, le=100_000_000)]
Layers = Annotated[int, Field(strict=True, ge=1, le=1024)]
Heads = Annotated[int, Field(strict=True, ge=1, le=4096)]
HeadDim = Annotated[int, Field(strict=True, ge=2, le=512)]
Flag = Annotated[bool, Field(strict=True)]
Word = Annotated[str, Field(strict=True, max_length=1024)]
Words = Annotated[list[Word], Field(max_length=1024)]
Places = Annotated[list[Offset], Field(max_length=1024)]


class ModelConfigError(ValueError):
    """A config.json cannot be counted; the message is one sentence that names the field, the rule and the value."""


class ModelConfig(BaseModel):
    """What is read of a config.json; names are Hugging Face's, everything else in the file is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Annotated[str, Field(strict=True, max_length=64)] = "unknown"
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    hidden_size: Count | None = None
    head_dim: HeadDim | None = None
    v_head_dim: HeadDim | None = None
    max_position_embeddings: Count | None = None
    # kinds of layers
    layer_types: Words | None = None
    layers_block_type: Words | None = None
    hybrid_override_pattern: Word | None = None
    full_attention_interval: Layers | None = None
    attn_layer_period: Layers | None = None
    attn_layer_offset: Offset = 0
    full_attn_idxs: Places | None = None
    attn_type_list: Places | None = None
    sliding_window: Count | None = None
    sliding_window_pattern: Layers | None = None
    attention_chunk_size: Count | None = None
    use_sliding_window: Flag | None = None
    max_window_layers: Offset | None = None
    num_kv_shared_layers: Offset | None = None
    # multi-head latent attention
    kv_lora_rank: Count | None = None
    q_lora_rank: Count | None = None
    qk_rope_head_dim: HeadDim | None = None
    qk_nope_head_dim: HeadDim | None = None
    # weights
    vocab_size: Count | None = None
    intermediate_size: Count | None = None
    tie_word_embeddings: Flag = True
    num_local_experts: Count | None = None
    num_experts: Offset | None = None
    n_routed_experts: Count | None = None
    n_shared_experts: Offset | None = None
    moe_intermediate_size: Count | None = None
    shared_expert_intermediate_size: Offset | None = None
    first_k_dense_replace: Offset = 0
    decoder_sparse_step: Layers = 1
    mlp_only_layers: Places | None = None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON knows")


def _parsed(data: str | bytes | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return dict(data)
    size = len(data) if isinstance(data, bytes) else len(data.encode(errors="replace"))
    if size > MAX_CONFIG_BYTES:
        raise ModelConfigError(f"A config.json has at most {MAX_CONFIG_BYTES:,} bytes, got {size:,}.")
    if not data.strip():
        raise ModelConfigError("The config.json is empty; paste the whole file, from { to }.")
    try:
        parsed = json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise ModelConfigError("The config.json is nested too deeply to be one of a model.") from None
    except ValueError as error:
        raise ModelConfigError(f"The config.json is no JSON: {str(error)[:120]}.") from None
    if not isinstance(parsed, dict):
        raise ModelConfigError(f"A config.json is an object with named fields, got {reprlib.repr(parsed)}.")
    return parsed


def _text_part(config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the part that describes the language model, and whether it was nested."""
    for name in _TEXT_PARTS:
        part = config.get(name)
        if isinstance(part, dict):
            outer = {key: config[key] for key in ("model_type", "tie_word_embeddings") if config.get(key) is not None}
            return outer | part, True
    return config, False


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """Give fields that have another name in older architectures the usual one; null counts as absent."""
    known = {key: value for key, value in config.items() if value is not None}
    for name, others in _ALIASES.items():
        for other in others:
            if name not in known and other in known:
                known[name] = known[other]
    # Multi-query attention is a flag in Falcon and GPT-BigCode; Falcon's newer layout has a number instead.
    if known.get("multi_query") is True and known.get("new_decoder_architecture") is not True:
        known["num_key_value_heads"] = 1
    return known


def _class_default(model_type: str, name: str) -> int | None:
    """Return what transformers takes for a field that a config.json leaves out, if it knows the model type."""
    from transformers import CONFIG_MAPPING

    value = getattr(CONFIG_MAPPING[model_type], name, None) if model_type in CONFIG_MAPPING else None
    return value if type(value) is int else None


def _filled(config: dict[str, Any], given: Collection[str]) -> list[str]:
    """Fill what the file leaves to transformers' defaults, in place; return the names. `given` counts nulls too."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return []
    names = ["num_key_value_heads"] if "num_key_value_heads" not in config else []
    if any(name not in config for name in _REQUIRED):
        names += [name for name in _FILLED if name not in config]
    if not {"head_dim", "kv_lora_rank"} & set(config) and model_type not in _DERIVE_HEAD_DIM:
        names.append("head_dim")
    found = {name: _class_default(model_type, name) for name in names if name not in given}
    # A default that means "as many KV heads as query heads" has to follow the number that the file gives.
    same = found.get("num_key_value_heads") == _class_default(model_type, "num_attention_heads") if found else False
    if same and "num_attention_heads" not in found:
        found["num_key_value_heads"] = None
    known = {name: value for name, value in found.items() if value is not None}
    config |= known
    return list(known)


def _sentence(error: ValidationError) -> str:
    """Say the first problem in one sentence."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"] if not isinstance(part, int)) or "config.json"
    if first["type"] == "missing":
        return f"{name} is missing; without it the cache cannot be counted."
    rule = {
        "int_type": "a whole number",
        "bool_type": "true or false",
        "string_type": "text",
        "list_type": "a list",
        "greater_than_equal": f"at least {first.get('ctx', {}).get('ge')}",
        "less_than_equal": f"at most {first.get('ctx', {}).get('le')}",
        "too_long": f"a list of at most {first.get('ctx', {}).get('max_length')} entries",
        "string_too_long": f"at most {first.get('ctx', {}).get('max_length')} characters",
    }.get(first["type"], first["msg"].lower())
    return f"{name} must be {rule}, got {reprlib.repr(first['input'])}."


def read_fields(data: str | bytes | Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any], list[str]]:
    """Read and check a config.json.

    Returns:
        The fields that decide sizes, the part of the file they come from, and sentences about what was assumed.

    Raises:
        ModelConfigError: It cannot be read, or a field is missing or out of range.
    """
    config, nested = _text_part(_parsed(data))
    given = config.keys()
    config = _renamed(config)
    notes = ["Only the language model is counted, not the other parts of this multimodal config."] if nested else []
    if filled := _filled(config, given):
        taken = ", ".join(f"{name} {config[name]}" for name in filled)
        notes.append(f"The file leaves these to transformers' defaults for {config['model_type']}: {taken}.")
    try:
        return ModelConfig.model_validate(config), config, notes
    except ValidationError as error:
        raise ModelConfigError(_sentence(error)) from None
