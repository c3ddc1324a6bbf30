"""Tiny models with random weights of the families that people run: text alone, and image-text models asked for text."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_WIDE = {"head_dim": 64}
_SLIDING = {"sliding_window": 32}
_GEMMA4 = {**_WIDE, **_SLIDING, "global_head_dim": 128, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
_ROUTED = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
WORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama 3": ("llama", {}, 4),
    "Qwen2.5": ("qwen2", {}, 4),
    "Qwen3": ("qwen3", _WIDE, 4),
    "Qwen3 MoE": ("qwen3_moe", {**_WIDE, **_EXPERTS}, 4),
    "Qwen3.5": ("qwen3_5_text", {**_WIDE, **_LINEAR}, 1),
    "Qwen3-Next": ("qwen3_next", {**_WIDE, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 64}, 1),
    "Gemma 3": ("gemma3_text", {**_WIDE, **_SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
    "Gemma 4": ("gemma4_text", _GEMMA4, 1),
    "Mistral": ("mistral", {"sliding_window": None}, 4),
    "Ministral 3": ("ministral3", {}, 4),
    "Phi-2": ("phi", {}, 4),
    "Phi-4": ("phi3", {}, 4),
    "Phi-4-mini, whose window is none": ("phi3", {"sliding_window": 1024}, 4),
    "Pythia": ("gpt_neox", {}, 4),
    "StableLM": ("stablelm", {}, 4),
    "GLM-4": ("glm4", _WIDE, 4),
    "GLM-4.5": ("glm4_moe", {**_WIDE, "n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64}, 4),
    "SmolLM3": ("smollm3", {}, 4),
    "Granite": ("granite", {}, 4),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {**_MAMBA, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 64},
        2,
    ),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, 2),
    "OLMo 3": ("olmo3", _SLIDING, 1),
    "Command R7B": ("cohere2", _SLIDING, 1),
    "EXAONE 4": ("exaone4", _SLIDING, 1),
    "gpt-oss": ("gpt_oss", {**_WIDE, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 4}, 2),
    "Gemma 2": ("gemma2", {**_WIDE, **_SLIDING}, 2),
    "DeepSeek V3": ("deepseek_v3", {**_LATENT, **_ROUTED}, 4),
    "Falcon-H1": ("falcon_h1", {**_MAMBA, "head_dim": 32, "mamba_d_ssm": 256, "mamba_n_groups": 1}, 4),
    "Falcon": ("falcon", {}, 4),
    "BLOOM": ("bloom", {"n_head": 4, "n_layer": 4}, 4),
    "JetMoE": ("jetmoe", {"num_key_value_heads": 4, "kv_channels": 32, "num_local_experts": 4}, 4),
    "DiffLlama": ("diffllama", {"head_dim": 32}, 4),
    "Jamba": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2},
        2,
    ),
    "GPT-2": ("gpt2", {"n_embd": 128, "n_head": 4, "n_layer": 2}, 4),
}
"""Kind of configuration, its fields, and how many of the layers are compressed."""
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Phi-3-mini-4k": ("phi3", {"sliding_window": 100}, "none of its layers keeps keys and values of all tokens"),
    "BERT": ("bert", {}, "reads text with an encoder"),
    "Mamba": ("mamba", {}, "none of its layers"),
    "RWKV": ("rwkv", {}, "does not use the cache of keys and values"),
    "MiniMax": ("minimax", {}, "does not run by its own attention"),
    "Bamba": ("bamba", {**_MAMBA, "attn_layer_indices": [1, 3]}, "transformers itself computes something else"),
}
_THREE = {**_TEXT, "num_hidden_layers": 3}
_EYE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_EYE = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 128}


def _turned(*sections: int, share: float = 1.0) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), "partial_rotary_factor": share}
    return {"rope_parameters": rope}


IMAGE_TEXT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Mistral Small 3": (
        "mistral3",
        {"model_type": "mistral", **_WIDE, "sliding_window": None},
        {"model_type": "pixtral", **_EYE},
    ),
    "LLaVA": ("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", **_EYE}),
    "Qwen2.5-VL": ("qwen2_5_vl", _turned(4, 6, 6), {**_QWEN_EYE, "patch_size": 14}),
    "Qwen3-VL": ("qwen3_vl", {**_WIDE, **_turned(12, 10, 10)}, {**_QWEN_EYE, "deepstack_visual_indexes": [0]}),
    "Qwen3.5": (
        "qwen3_5",
        {**_WIDE, **_LINEAR, "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        _QWEN_EYE,
    ),
    "Gemma 3": (
        "gemma3",
        {**_WIDE, **_SLIDING, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        _EYE,
    ),
    "InternVL": (
        "internvl",
        {"model_type": "qwen2"},
        {**_EYE, "image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "SmolVLM": ("smolvlm", {"model_type": "llama"}, _EYE),
    "GLM-4.1V": ("glm4v", _turned(2, 3, 3, share=0.5), _QWEN_EYE),
}
"""Kind of configuration, fields of its text part and of its eye."""


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Make weights large enough that tokens get different attention; the library's are so small that they do not."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


def text_model(kind: str, fields: dict[str, Any]) -> PreTrainedModel:
    """A model with its own attention function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](**{**_TEXT, **fields})
        return _spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def image_text_model(kind: str, text: dict[str, Any], eye: dict[str, Any]) -> PreTrainedModel:
    """A model of images and text with its own attention function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds: dict[str, Any] = CONFIG_MAPPING
        config = kinds[kind](text_config={**_THREE, **text}, vision_config=eye)
        return _spread(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
