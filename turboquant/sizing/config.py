"""From a config.json to the shape of the KV cache: the model is made without weights and its cache is asked."""

import json
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from turboquant.sizing.shape import KVShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_CONFIG_BYTES = 1_000_000
_NOTED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
# No part of a cache: labels, of which a config's class makes lists, how weights are stored, whose code runs.
_LEFT_OUT = {"num_labels", "id2label", "label2id", "quantization_config", "dtype", "torch_dtype", "auto_map"}


class ModelConfigError(ValueError):
    """A config.json cannot be counted; the message is one sentence that names the rule and the value."""


def read_config(data: str | bytes | Mapping[str, Any]) -> KVShape:
    """Read a config.json as found on the model hub.

    The model is made on PyTorch's meta device, without weights, and one token is run through it (about a second for
    models of hundreds of billions of weights; results are kept). Code from a model's repository is never run.

    Args:
        data: The file's text or bytes (at most 1 MB), or what it parses to, or `config.to_dict()` of a model. Of a
            multimodal model the language model is read, where it is a model by itself. What the file leaves to
            transformers' defaults is taken from there, and noted.

    Raises:
        ModelConfigError: It is no config.json, transformers cannot make a causal language model from it, or its cache
            is of a kind that is not counted here; one sentence says which.

    Example:
        >>> from turboquant.sizing import read_config
        >>> fields = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        >>> shape = read_config({"model_type": "llama", **fields})
        >>> 2 * shape.token_values  # bytes a token at 16 bits
        131072
    """
    found = _found(_text(data))
    if isinstance(found, ModelConfigError):
        raise ModelConfigError(str(found))
    return found


@lru_cache(maxsize=64)
def _found(text: str | bytes) -> KVShape | ModelConfigError:
    """Return what `_read` returns, or what it raises: both take time."""
    try:
        return _read(text)
    except ModelConfigError as error:
        return error


def _text(data: str | bytes | Mapping[str, Any]) -> str | bytes:
    if not isinstance(data, Mapping):
        return data
    try:
        return json.dumps(data, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelConfigError(f"This is nothing that a config.json can hold: {str(error)[:120]}.") from None


def _read(text: str | bytes) -> KVShape:
    fields = _parsed(text)
    from turboquant.models.checks import too_many, why_not
    from turboquant.models.sizes import layer_heads
    from turboquant.sizing.probe import ProbeError, probe

    if (reason := too_many(fields)) is not None:
        raise ModelConfigError(f"This model is not counted here: {reason}.")
    config = _config(fields)
    part = _language_model(config)
    try:
        model, layers = probe(part)
    except ProbeError as error:
        raise ModelConfigError(f"This model is not counted here: {error}.") from None
    if not any(layer.keeps != "none" for layer in layers):
        raise ModelConfigError("None of its layers keeps keys and values, so there is no KV cache to count.")
    text_config: Any = part.get_text_config(decoder=True)
    return KVShape(
        model_type=config.model_type,
        layers=tuple(layers),
        query_heads=max(one.query_heads for one in layer_heads(part)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        latent=bool(getattr(text_config, "kv_lora_rank", None)),
        max_positions=_positions(text_config),
        notes=tuple(_notes(fields, config, part, why_not(model))),
    )


def _parsed(data: str | bytes) -> dict[str, Any]:
    size = len(data) if isinstance(data, bytes) else len(data.encode(errors="replace"))
    if size > MAX_CONFIG_BYTES:
        raise ModelConfigError(f"A config.json has at most {MAX_CONFIG_BYTES:,} bytes, got {size:,}.")
    if not data.strip():
        raise ModelConfigError("The config.json is empty; paste the whole file, from { to }.")
    try:
        parsed = json.loads(data)
    except RecursionError:
        raise ModelConfigError("The config.json is nested too deeply to be one of a model.") from None
    except ValueError as error:
        raise ModelConfigError(f"The config.json is no JSON: {str(error)[:120]}.") from None
    if not isinstance(parsed, dict):
        raise ModelConfigError(f"A config.json is an object with named fields, got {reprlib.repr(parsed)}.")
    return parsed


def _config(fields: dict[str, Any]) -> "PreTrainedConfig":
    """Let transformers read the fields, without any code but its own.

    Raises:
        ModelConfigError: It does not know the type of model, or refuses a field.
    """
    import transformers

    from turboquant.sizing.probe import said

    kind = fields.get("model_type")
    if not isinstance(kind, str):
        raise ModelConfigError(f"model_type must be text that names the kind of model, got {reprlib.repr(kind)}.")
    if kind not in transformers.CONFIG_MAPPING:
        raise ModelConfigError(
            f"transformers {transformers.__version__} has no model type {kind[:40]!r}, and code from a model's "
            "repository is not run here: what its layers cache is not known."
        )
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(_own(fields))
        encodes = config.is_encoder_decoder
    except Exception as error:  # whatever a config's own code makes of fields that nobody has checked
        raise ModelConfigError(f"transformers cannot read this config.json: {said(error)}.") from None
    if encodes:
        raise ModelConfigError("This model is not counted here: an encoder-decoder keeps a second cache of its input.")
    return config


def _own(part: Any) -> Any:
    """Return the fields without those that are left out, at any depth."""
    if isinstance(part, list):
        return [_own(one) for one in part]
    if not isinstance(part, dict):
        return part
    left_out = [name for name in part if name in _LEFT_OUT or name.endswith(("_implementation", "_internal"))]
    return {name: _own(value) for name, value in part.items() if name not in left_out}


def _language_model(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return the part of a multimodal configuration that is a language model by itself, else all of it."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    return text if type(text) in AutoModelForCausalLM._model_mapping else config


def _positions(config: Any) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    return limit if type(limit) is int and limit > 0 else None


def _notes(fields: dict[str, Any], config: "PreTrainedConfig", part: "PreTrainedConfig", why: str | None) -> list[str]:
    notes = []
    if part is not config:
        notes.append("Only the language model is counted, not the other parts of this multimodal config.")
        nested = {name: value for name, value in fields.items() if isinstance(value, dict)}
        fields = next((value for name, value in nested.items() if getattr(config, name, None) is part), {})
    missing = [name for name in _NOTED if not {name, part.attribute_map.get(name, name)} & fields.keys()]
    values = {name: getattr(part, name, None) for name in missing}
    if taken := ", ".join(f"{name} {value}" for name, value in values.items() if value is not None):
        notes.append(f"The file leaves these to transformers' defaults for {part.model_type}: {taken}.")
    if why is not None:
        notes.append(f"The sizes are right, but this lab cannot run the model with a compressed cache: {why}.")
    return notes
