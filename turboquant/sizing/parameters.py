"""An estimate of the number of weights from a config.json: matrices only, without biases and norms."""

from turboquant.sizing.fields import ModelConfig
from turboquant.sizing.layers import Kind

# Their MLP has one matrix in and one out; everything newer is gated and has a third.
_PLAIN_MLP = {
    "bloom",
    "codegen",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "mpt",
    "opt",
    "phi",
    "starcoder2",
}
_UNKNOWN = {"dbrx", "llama4", "llama4_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "nemotron_h"}


def parameter_count(config: ModelConfig, kinds: tuple[Kind, ...]) -> int | None:
    """Return the estimated number of weights, None where the config does not say enough.

    Embeddings, attention, MLP and experts are counted; biases and norms (less than 0.1 % of them) are not. Recurrent
    layers differ too much from one another to be counted.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    if hidden is None or vocab is None or "linear" in kinds or config.model_type in _UNKNOWN:
        return None
    mlps = [_mlp(config, hidden, index) for index in range(config.num_hidden_layers)]
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * _attention(config, hidden) + sum(mlps) if all(mlps) else None


def _attention(config: ModelConfig, hidden: int) -> int:
    heads = config.num_attention_heads
    rope = config.qk_rope_head_dim or 0
    if config.kv_lora_rank:
        nope, value = config.qk_nope_head_dim or 0, config.v_head_dim or 0
        query = heads * (nope + rope)
        queries = config.q_lora_rank * (hidden + query) if config.q_lora_rank else hidden * query
        latent = hidden * (config.kv_lora_rank + rope)
        return queries + latent + config.kv_lora_rank * heads * (nope + value) + heads * value * hidden
    dim = config.head_dim or hidden // heads
    value = config.v_head_dim or dim
    kv_heads = config.num_key_value_heads or heads
    return hidden * (heads * dim + kv_heads * (dim + value) + heads * value)


def _mlp(config: ModelConfig, hidden: int, index: int) -> int:
    """Weights of one layer's MLP or experts; 0 where a size is missing."""
    matrices = 2 if config.model_type in _PLAIN_MLP else 3
    experts = config.num_local_experts or config.num_experts or config.n_routed_experts or 0
    dense = config.intermediate_size or (4 * hidden if config.model_type in _PLAIN_MLP else 0)
    routed = index >= config.first_k_dense_replace and (index + 1) % config.decoder_sparse_step == 0
    if not experts or not routed or index in (config.mlp_only_layers or ()):
        return matrices * hidden * dense
    width = config.moe_intermediate_size or dense
    shared = (config.n_shared_experts or 0) * width + (config.shared_expert_intermediate_size or 0)
    return matrices * hidden * (experts * width + shared) + hidden * experts
