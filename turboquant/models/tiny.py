"""Tiny models with random weights, one for each attention shape that matters to a compressed cache.

They need no download and are made for tests: float32, on the CPU, a few hundred thousand parameters.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "dtype": "float32",
}
# What each architecture has that a plain Llama has not. Phi and Phi-3 derive head_dim from hidden_size.
_DIFFERENCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"hidden_size": 256},
    "qwen3": {},
    "phi": {
        "hidden_size": 320,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
    },
    "phi3": {"hidden_size": 256},
    "mistral": {"sliding_window": 32},
    "gemma3": {
        "sliding_window": 32,
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}
ARCHITECTURES = tuple(_DIFFERENCES)


def tiny_config(architecture: str, **overrides: Any) -> "PreTrainedConfig":
    """Return the configuration of a tiny model (see `tiny_model`)."""
    import transformers

    if architecture not in _DIFFERENCES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    if "num_hidden_layers" in overrides and "layer_types" in _DIFFERENCES[architecture]:
        count = overrides["num_hidden_layers"]
        overrides = {"layer_types": ["sliding_attention"] * (count - 1) + ["full_attention"], **overrides}
    fields = {**_SHAPE, **_DIFFERENCES[architecture], **overrides}
    if architecture in ("qwen2", "phi", "phi3") and "head_dim" not in overrides:
        del fields["head_dim"]
    kind = {"gemma3": "Gemma3Text"}.get(architecture, architecture.title())
    return getattr(transformers, f"{kind}Config")(**fields)


def tiny_model(architecture: str, seed: int = 0, **overrides: Any) -> "PreTrainedModel":
    """Return a small causal language model with random weights and the attention function "turboquant" set.

    Three layers, 4 query heads, 2 KV heads, head_dim 64 (Phi: 80), 256 tokens in the vocabulary, 512 positions.
    Phi rotates 40 % of each head, Qwen2 has a key bias far from zero, Mistral slides a window of 32 tokens over every
    layer, Gemma-3 over the first two of three.

    Args:
        architecture: One of `ARCHITECTURES`.
        seed: Of the weights; the same seed gives the same weights, and the global generator is left as it was.
        **overrides: Fields of the configuration.

    Raises:
        ValueError: If the architecture is not known.
    """
    from transformers import AutoModelForCausalLM

    from turboquant import hf_attention

    config = tiny_config(architecture, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # The library starts biases at zero and other weights so small that every token gets the same attention.
                if name.endswith("k_proj.bias"):
                    parameter.normal_(0.0, 2.0)
                elif parameter.dim() == 2:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    hf_attention.register()
    model.set_attn_implementation("turboquant")
    return model.eval().requires_grad_(False)


def tiny_tokenizer(chat_template: str | None = None) -> "PreTrainedTokenizerFast":
    """One token a character: padding, start, end and unknown, then 252 characters; nothing is added to a text."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in (*range(32, 127), 10, *range(0xA1, 0xA1 + 156))]
    names = ["<pad>", "<s>", "</s>", "<unk>", *characters]
    core = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **special)
