"""From a config.json to the shape of the KV cache."""

from collections.abc import Mapping
from typing import Any

from turboquant.records.base import Record
from turboquant.sizing.fields import MAX_CONFIG_BYTES, ModelConfig, ModelConfigError, read_fields
from turboquant.sizing.layers import Kind, layer_kinds, window
from turboquant.sizing.parameters import parameter_count

__all__ = ["MAX_CONFIG_BYTES", "KVShape", "ModelConfigError", "read_config"]

# What changes the cache in a way that is not counted here.
_REFUSED = {
    "is_encoder_decoder": "an encoder-decoder keeps a second cache over its input",
    "cross_attention_layers": "its cross-attention layers cache what they see of an image",
    "global_head_dim": "its full layers have another head_dim than its sliding ones",
    "num_global_key_value_heads": "its full layers have another number of KV heads than its sliding ones",
    "swa_num_key_value_heads": "its sliding layers have another number of KV heads than its full ones",
    "attention_k_eq_v": "its keys serve as values too",
    "index_topk": "its sparse attention caches keys of an indexer as well",
    "compress_ratios": "its layers compress successive tokens into one",
    "block_configs": "its layers differ in their numbers of KV heads",
}


class KVShape(Record):
    """What decides the size of a model's KV cache.

    Attributes:
        model_type: As in config.json.
        layers: The kind of every layer: "full" keeps all tokens, "sliding" the last `window`, "linear" (recurrent) a
            state of fixed size that is no KV cache and is not counted, "none" keeps nothing.
        window: Tokens that a sliding layer sees; None where there is none.
        query_heads: Query heads; they take no room in a cache.
        kv_heads: Heads whose keys and values are cached; 1 for a joint latent.
        key_dim: Values of a key of one head; for a joint latent, of the latent.
        value_dim: Values of a value of one head; for a joint latent, of the rotary part beside it.
        latent: Multi-head latent attention (MLA): one latent a token in place of keys and values.
        max_positions: Positions the model has; None where the file does not say.
        parameters: Estimated number of weights; None where it cannot be estimated.
        notes: Sentences about what was counted and what was assumed.
    """

    model_type: str
    layers: tuple[Kind, ...]
    window: int | None
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    max_positions: int | None = None
    parameters: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def full_layers(self) -> int:
        """Layers that keep keys and values of all tokens."""
        return self.layers.count("full")

    @property
    def sliding_layers(self) -> int:
        """Layers that keep the last tokens only."""
        return self.layers.count("sliding")

    @property
    def linear_layers(self) -> int:
        """Recurrent layers, whose state does not grow and is not counted."""
        return self.layers.count("linear")

    @property
    def token_values(self) -> int:
        """Values that one token adds to one layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def read_config(data: str | bytes | Mapping[str, Any]) -> KVShape:
    """Read a config.json as found on the model hub.

    Args:
        data: The file's text or bytes (at most 1 MB), or what it parses to. `text_config` of multimodal models is
            followed. What the file leaves to transformers' defaults is looked up there, and noted.

    Raises:
        ModelConfigError: A field is missing, wrong or contradicts another, or the cache is of a kind that is not
            counted here; one sentence says which field, the rule and the value.

    Example:
        >>> from turboquant.sizing import read_config
        >>> fields = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        >>> shape = read_config({"model_type": "llama", **fields})
        >>> 2 * shape.full_layers * shape.token_values  # bytes a token at 16 bits
        131072
    """
    config, raw, notes = read_fields(data)
    for name, reason in _REFUSED.items():
        if raw.get(name) not in (None, False, 0, []):
            raise ModelConfigError(f"This model is not counted here: {reason} ({name}).")
    kinds = layer_kinds(config, raw)
    latent = config.kv_lora_rank is not None
    key_dim, value_dim = _latent_dims(config) if latent else _head_dims(config)
    return KVShape(
        model_type=config.model_type,
        layers=kinds,
        window=window(config, kinds),
        query_heads=config.num_attention_heads,
        kv_heads=1 if latent else _kv_heads(config),
        key_dim=key_dim,
        value_dim=value_dim,
        latent=latent,
        max_positions=config.max_position_embeddings,
        parameters=parameter_count(config, kinds),
        notes=(*notes, *_notes(config, raw, kinds)),
    )


def _latent_dims(config: ModelConfig) -> tuple[int, int]:
    if config.kv_lora_rank is None or config.qk_rope_head_dim is None:
        raise ModelConfigError("qk_rope_head_dim is missing; with kv_lora_rank it says how long a cached latent is.")
    return config.kv_lora_rank, config.qk_rope_head_dim


def _head_dims(config: ModelConfig) -> tuple[int, int]:
    """head_dim where the file has one, else hidden_size / num_attention_heads: both occur and may differ."""
    dim = config.head_dim
    if dim is None:
        hidden, heads = config.hidden_size, config.num_attention_heads
        if hidden is None:
            raise ModelConfigError("head_dim is missing, and hidden_size to derive it from as well.")
        if hidden % heads:
            raise ModelConfigError(
                f"hidden_size must be a multiple of num_attention_heads ({heads}) without a head_dim, got {hidden}."
            )
        dim = hidden // heads
        if not 2 <= dim <= 512:
            raise ModelConfigError(f"hidden_size / num_attention_heads must be from 2 to 512, got {dim}.")
    return dim, config.v_head_dim or dim


def _kv_heads(config: ModelConfig) -> int:
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    if heads % kv_heads:
        raise ModelConfigError(
            f"num_attention_heads must be a multiple of num_key_value_heads ({kv_heads}), got {heads}."
        )
    return kv_heads


def _notes(config: ModelConfig, raw: dict[str, Any], kinds: tuple[Kind, ...]) -> list[str]:
    notes = []
    if config.num_key_value_heads is None and config.kv_lora_rank is None:
        notes.append("num_key_value_heads is not given: as many as query heads are counted.")
    if shared := config.num_kv_shared_layers:
        notes.append(f"The last {shared} layers reuse the keys and values of others and keep none.")
    if linear := kinds.count("linear"):
        notes.append(f"{linear} of {len(kinds)} layers are recurrent: their state has a fixed size and is not counted.")
    if raw.get("attn_logit_softcapping") or config.model_type == "gpt_oss":
        why = "its attention has learned sinks" if config.model_type == "gpt_oss" else "it caps its attention scores"
        notes.append(f"The sizes are right, but this lab cannot run the model with a compressed cache: {why}.")
    return notes
