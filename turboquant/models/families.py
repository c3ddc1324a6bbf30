"""Tiny models with random weights of the families that people run, each with the structure of the real one.

Grouped heads, head dims, partial rotary embeddings, mixtures of layers, joint latents, recurrent layers, image-text
models asked for text. All experts are routed to, so that no rounding chooses another one. What stands in a row is what
makes the family; the rest are `TEXT` and `EYE`, of which a configuration gets the fields that it has.
"""

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# fmt: off
TEXT: dict[str, Any] = {
    "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 512,
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 32,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 4, "moe_topk": 4, "moe_k": 4, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "decoder_sparse_step": 1,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    # Joint latents, and indexers that choose among 200 tokens.
    "kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "index_topk": 64, "index_head_dim": 32, "index_n_heads": 4,
    # Recurrent layers.
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32,
}
EYE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "depth": 1, "num_heads": 4, "embed_dim": 64, "out_hidden_size": 128, "image_size": 28, "patch_size": 14,
}
# fmt: on


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: What it is called here.
        stands_for: Published models that have this structure.
        users: How many people are thought to use it: 5 very many, 1 few. A judgement, not a count.
        kind: Its `model_type`; of an image-text model that of the whole.
        text: Fields of the text model that differ from `TEXT`.
        eye: Fields of the image part that differ from `EYE`; None for a text model.
        whole: Other fields of an image-text model.
    """

    name: str
    stands_for: str
    users: int
    kind: str
    text: dict[str, Any] = field(default_factory=dict)
    eye: dict[str, Any] | None = None
    whole: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {}
"""All of them by name, those with the most users first."""


def _text(users: int, name: str, stands_for: str, kind: str, /, **fields: Any) -> None:
    FAMILIES[name] = Family(name, stands_for, users, kind, fields)


def _seen(
    users: int, name: str, stands_for: str, kind: str, text: dict[str, Any], eye: dict[str, Any], /, **whole: Any
) -> None:
    FAMILIES[name] = Family(name, stands_for, users, kind, text, eye, whole)


def _rope(share: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share, **more}


def _turned(*sections: int, share: float = 1.0, **more: Any) -> dict[str, Any]:
    """Rotary embeddings whose frequencies are those of time, height and width by sections."""
    return {"rope_parameters": _rope(share, mrope_section=list(sections), **more)}


_LLAMA3 = {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_MOSTLY_SLIDING = [_SLIDING, _SLIDING, _SLIDING, _FULL]
_MAMBAS = {"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 1, "chunk_size": 32}
_MAMBA2 = {"num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 32, "head_dim": 32}
# fmt: off
_GEMMA4 = {
    "num_hidden_layers": 6, "global_head_dim": 128, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 256,
}
_GEMMA4_E2B = {
    **_GEMMA4, "num_hidden_layers": 8, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 4,
    "layer_types": _MOSTLY_SLIDING * 2,
}
_GEMMA3N = {
    "num_hidden_layers": 6, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16, "laurel_rank": 16,
    "num_kv_shared_layers": 2, "layer_types": [_SLIDING, _FULL] * 3, "activation_sparsity_pattern": [0.0] * 6,
}
# fmt: on
_GATED = {"rope_parameters": _rope(0.25)}
_EAR = {"ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 64}
_PIXTRAL, _SIGLIP = {"model_type": "pixtral"}, {"model_type": "siglip_vision_model"}

# fmt: off
# Five: what very many people run.
_text(5, "llama-3", "Llama 3.1 to 3.3, DeepSeek-R1-Distill-Llama, SmolLM2", "llama", rope_parameters={"rope_type": "llama3", "original_max_position_embeddings": 256, **_LLAMA3})
_text(5, "qwen2.5", "Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen", "qwen2")
_text(5, "qwen3", "Qwen3 0.6B to 32B", "qwen3", head_dim=128)
_text(5, "qwen3-moe", "Qwen3-30B-A3B, Qwen3-Coder", "qwen3_moe", head_dim=128)
_text(5, "qwen3.5-text", "Qwen3.5, text part", "qwen3_5_text", **_GATED)
_TURNED = _turned(4, 2, 2, share=0.25, mrope_interleaved=True)
_seen(5, "qwen3.5", "Qwen3.5 0.8B to 27B as published (vision and text)", "qwen3_5", _TURNED, {})
_seen(5, "qwen3.5-moe", "Qwen3.5-35B-A3B, 397B-A17B (vision and text)", "qwen3_5_moe", _TURNED, {})
_text(5, "gemma3-text", "Gemma 3 270M and 1B", "gemma3_text", num_hidden_layers=6, head_dim=256, num_key_value_heads=1)
_seen(5, "gemma3", "Gemma 3 4B, 12B and 27B (vision and text)", "gemma3", {"num_hidden_layers": 6, "head_dim": 256}, _SIGLIP, mm_tokens_per_image=4)
_text(5, "gemma4-e2b-text", "Gemma 4 E2B and E4B, text part (layers share keys and values)", "gemma4_text", **_GEMMA4_E2B)
_text(5, "gemma4-31b-text", "Gemma 4 31B, text part (keys are values, two head dims)", "gemma4_text", **{**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1})
_text(5, "gemma4-26b-a4b-text", "Gemma 4 26B-A4B, text part", "gemma4_text", **{**_GEMMA4, "enable_moe_block": True, "top_k_experts": 4, "num_global_key_value_heads": 1})
_seen(5, "gemma4", "Gemma 4 E2B as published", "gemma4", _GEMMA4_E2B, {"head_dim": 16, "pooling_kernel_size": 1})
_text(5, "mistral", "Mistral 7B v0.2 and v0.3, Nemo, Small 3", "mistral", head_dim=128, sliding_window=None)
_seen(5, "mistral3", "Mistral Small 3.1 and 3.2, Magistral, Devstral (vision and text)", "mistral3", {"model_type": "mistral", "head_dim": 128, "sliding_window": None}, _PIXTRAL)
_seen(5, "mistral3-ministral3", "Ministral 3 3B, 8B and 14B as published", "mistral3", {"model_type": "ministral3", "head_dim": 128, "sliding_window": None}, _PIXTRAL)
_text(5, "gpt-oss", "gpt-oss-20b and 120b (learned sinks)", "gpt_oss")
_text(5, "deepseek-v3", "DeepSeek V3 and R1, Kimi K2 (MLA)", "deepseek_v3")
_text(5, "glm4-moe", "GLM-4.5, 4.6 and 4.7", "glm4_moe", head_dim=128, **_GATED)
_seen(5, "qwen2.5-vl", "Qwen2.5-VL", "qwen2_5_vl", _turned(8, 12, 12), {"fullatt_block_indexes": [0]})
_seen(5, "qwen3-vl", "Qwen3-VL", "qwen3_vl", {"head_dim": 128, **_turned(24, 20, 20)}, {"deepstack_visual_indexes": [0]})
_text(5, "phi4-mini-hub", "Phi-4-mini and Phi-3.5-mini as published (a window beyond their positions)", "phi3", hidden_size=512, sliding_window=1024, rope_parameters=_rope(0.75))

# Four.
_text(4, "qwen3-next", "Qwen3-Next-80B-A3B, Qwen3-Coder-Next", "qwen3_next", **_GATED)
_text(4, "gemma2", "Gemma 2 (soft caps)", "gemma2", head_dim=256)
_seen(4, "gemma3n", "Gemma 3n E2B and E4B (vision, audio and text)", "gemma3n", _GEMMA3N, {}, audio_config={"conf_num_hidden_layers": 1, "hidden_size": 64, "conf_num_attention_heads": 4})
_text(4, "llama4-text", "Llama 4, text part", "llama4_text", attention_chunk_size=32, intermediate_size_mlp=192)
_seen(4, "llama4", "Llama 4 Scout and Maverick as published", "llama4", {"attention_chunk_size": 32, "intermediate_size_mlp": 192}, {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64})
_text(4, "ministral3", "Ministral 3, text part", "ministral3", head_dim=128, sliding_window=None)
_text(4, "mixtral", "Mixtral 8x7B", "mixtral", sliding_window=None)
_seen(4, "mistral4", "Mistral Small 4 (MLA)", "mistral3", {"model_type": "mistral4"}, _PIXTRAL)
_text(4, "phi3", "Phi-3, Phi-3.5-mini, Phi-4 14B", "phi3", hidden_size=384, sliding_window=None)
_text(4, "phi4-mini", "Phi-4-mini without its window", "phi3", hidden_size=512, sliding_window=None, rope_parameters=_rope(0.75))
_text(4, "deepseek-v2-lite", "DeepSeek-V2-Lite, Coder-V2-Lite (MLA)", "deepseek_v2", q_lora_rank=None)
_text(4, "deepseek-v3.2", "DeepSeek V3.2 (MLA, sparse indexer)", "deepseek_v32")
_text(4, "deepseek-v4", "DeepSeek V4 (compressed layers, learned sinks)", "deepseek_v4", num_key_value_heads=1, o_groups=2, o_lora_rank=32, num_hidden_layers=6)
_text(4, "glm4", "GLM-4-0414, GLM-Z1", "glm4", head_dim=128, rope_parameters=_rope(0.5))
_text(4, "glm4-moe-lite", "GLM-4.7-Flash (MLA)", "glm4_moe_lite")
_text(4, "glm-5", "GLM-5 (MLA, sparse indexer)", "glm_moe_dsa")
_text(4, "granite-4-h", "Granite 4.0 H (Mamba 2 and attention)", "granitemoehybrid", layer_types=["mamba", "mamba", "mamba", "attention"], attention_multiplier=0.0156)
_text(4, "smollm3", "SmolLM3 (layers without rotary embedding)", "smollm3", sliding_window=None)
_text(4, "lfm2", "LFM2, LFM2.5", "lfm2", layer_types=["conv", "conv", _FULL] * 2, num_hidden_layers=6)
_text(4, "gpt2", "GPT-2, DistilGPT-2", "gpt2")
_text(4, "nemotron-h", "Nemotron-H, Nemotron Nano 2 and 3 (Mamba 2, experts and attention)", "nemotron_h", **{**_MAMBAS, "layers_block_type": ["mamba", "moe", "attention", "mamba"], "moe_shared_expert_intermediate_size": 64})
_text(4, "minimax-m2", "MiniMax-M2", "minimax_m2", head_dim=128, rope_parameters=_rope(0.5))
_seen(4, "qwen3-vl-moe", "Qwen3-VL-30B-A3B", "qwen3_vl_moe", {"head_dim": 128, **_turned(24, 20, 20)}, {"deepstack_visual_indexes": [0]})
_seen(4, "internvl", "InternVL 3 and 3.5", "internvl", {"model_type": "qwen2"}, {"image_size": [28, 28], "patch_size": [14, 14]})
_seen(4, "smolvlm", "SmolVLM 2", "smolvlm", {"model_type": "llama"}, {})
_seen(4, "kimi-k2.5", "Kimi K2.5 (MLA)", "kimi_k25", {"model_type": "deepseek_v3"}, {}, projection_hidden_size=64)

# Three.
_text(3, "qwen4-exp-text", "Qwen4 experimental, text part", "qwen4_exp_text", hc_count=2, hc_lowrank=16, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=64, indexer_compress_ratio=4, rope_parameters=_rope(0.5))
_text(3, "gemma", "Gemma 1", "gemma", head_dim=256, num_key_value_heads=1)
_text(3, "gemma3n-text", "Gemma 3n, text part", "gemma3n_text", **_GEMMA3N)
_text(3, "ministral", "Ministral 8B 2410", "ministral", layer_types=_MOSTLY_SLIDING)
_text(3, "phi", "Phi-1.5, Phi-2", "phi", hidden_size=320, num_key_value_heads=4, rope_parameters=_rope(0.4))
_text(3, "phi4-multimodal", "Phi-4-multimodal", "phi4_multimodal", hidden_size=512, sliding_window=None, rope_parameters=_rope(0.75), vision_config={**EYE, "crop_size": 28, "num_hidden_layers": 2}, audio_config={"hidden_size": 64, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 4, **_EAR})
_text(3, "granite", "Granite 3.x", "granite", attention_multiplier=0.0156, logits_scaling=8.0)
_text(3, "granite-4-dense", "Granite 4.0 micro (no Mamba)", "granitemoehybrid", layer_types=["attention"] * 4, num_local_experts=0, attention_multiplier=0.0156)
_text(3, "olmo2", "OLMo 2", "olmo2")
_text(3, "olmo3", "OLMo 3", "olmo3")
_text(3, "gpt-neox", "Pythia, GPT-NeoX-20B", "gpt_neox", rope_parameters=_rope(0.25))
_seen(3, "mllama", "Llama 3.2 Vision (cross-attention layers)", "mllama", {"cross_attention_layers": [1]}, {"intermediate_layers_indices": [0], "vision_output_dim": 128, "num_global_layers": 1, "attention_heads": 4})
_text(3, "falcon-h1", "Falcon-H1 (Mamba 2 and attention in each layer)", "falcon_h1", mamba_d_ssm=512)
_text(3, "exaone4", "EXAONE 4.0 32B", "exaone4")
_text(3, "nemotron", "Nemotron-4, Minitron", "nemotron", rope_parameters=_rope(0.5))
_text(3, "glm", "GLM-4-9B, GLM-Edge", "glm", head_dim=128, rope_parameters=_rope(0.5))
_text(3, "ernie4.5", "ERNIE 4.5 0.3B", "ernie4_5", head_dim=128)
_text(3, "llama-2", "Llama 2, Vicuna (no grouping)", "llama", head_dim=128, num_key_value_heads=4)
_text(3, "granitemoe", "Granite 3.x 1B-A400M, 3B-A800M", "granitemoe", attention_multiplier=0.0156)
_text(3, "lfm2-moe", "LFM2-8B-A1B", "lfm2_moe", layer_types=["conv", "conv", _FULL, "conv"])
_text(3, "lfm3", "LFM3", "lfm3", layer_types=["conv", _SLIDING, "conv", _FULL])
_text(3, "falcon3", "Falcon 3 (classes of Llama, head dim 256)", "llama", head_dim=256)
_text(3, "cohere", "Command R", "cohere", logit_scale=1.0)
_text(3, "cohere2", "Command R7B, Command A", "cohere2", logit_scale=1.0)
_text(3, "starcoder2", "StarCoder2", "starcoder2", sliding_window=None)
_text(3, "opt", "OPT", "opt", ffn_dim=192, word_embed_proj_dim=256)
_text(3, "jamba", "Jamba", "jamba", attn_layer_period=4, attn_layer_offset=1, use_mamba_kernels=False, mamba_dt_rank=8)
_text(3, "mamba", "Mamba 1", "mamba")
_text(3, "hunyuan-dense", "Hunyuan dense", "hunyuan_v1_dense", head_dim=128)
_text(3, "hunyuan-moe", "Hunyuan-A13B", "hunyuan_v1_moe", head_dim=128)
_text(3, "hy-v3", "Hunyuan 3", "hy_v3", head_dim=128)
_text(3, "ernie4.5-moe", "ERNIE 4.5 A3B", "ernie4_5_moe")
_text(3, "minimax-m3-text", "MiniMax-M3, text part (blocks chosen by an indexer)", "minimax_m3_vl_text", layer_types=[_FULL, *["minimax_m3_sparse"] * 3], dense_intermediate_size=192, rotary_dim=32, index_block_size=16, index_topk_blocks=3, rope_parameters=_rope(0.5))
_text(3, "seed-oss", "Seed-OSS-36B", "seed_oss", head_dim=128)
_text(3, "afmoe", "Arcee Trinity", "afmoe")
_text(3, "bitnet", "BitNet b1.58 2B4T", "bitnet")
_text(3, "kimi-linear", "Kimi Linear (KDA and MLA)", "kimi_linear", linear_head_dim=32, linear_num_heads=4, layer_types=[*[_LINEAR] * 3, _FULL])
_text(3, "mimo-v2-flash", "MiMo-V2-Flash (sinks, two head dims)", "mimo_v2_flash", head_dim=96, v_head_dim=64, swa_num_key_value_heads=4, num_key_value_heads=2)
_seen(3, "mistral-large-4", "Mistral Large 4 (MLA, indexer)", "mistral_large4", {}, _PIXTRAL)
_seen(3, "qwen2-vl", "Qwen2-VL", "qwen2_vl", _turned(8, 12, 12), {"hidden_size": 128})
_seen(3, "llava", "LLaVA 1.5, Pixtral", "llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"})
_seen(3, "llava-onevision", "LLaVA-OneVision", "llava_onevision", {"model_type": "qwen2"}, _SIGLIP)
_seen(3, "paligemma", "PaliGemma", "paligemma", {"model_type": "gemma", "head_dim": 128}, _SIGLIP, projection_dim=128)
_seen(3, "glm4v", "GLM-4.1V", "glm4v", _turned(4, 6, 6, share=0.5), {})
_seen(3, "glm4v-moe", "GLM-4.5V, 4.6V", "glm4v_moe", {"head_dim": 64, **_turned(4, 6, 6, share=0.5)}, {})
_seen(3, "gemma4-unified", "Gemma 4 unified", "gemma4_unified", {**_GEMMA4, "attention_k_eq_v": True}, {"mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64})
_seen(3, "lfm2-vl", "LFM2-VL", "lfm2_vl", {"model_type": "lfm2", "layer_types": ["conv", "conv", _FULL, "conv"]}, {"model_type": "siglip2_vision_model", "num_patches": 4}, projector_hidden_size=64)
_seen(3, "ernie4.5-vl", "ERNIE 4.5 VL 28B-A3B", "ernie4_5_vl_moe", {"moe_intermediate_size": [64, 64], **_turned(10, 10, 12)}, {})

# Two.
_text(2, "qwen1.5-moe", "Qwen1.5-MoE-A2.7B", "qwen2_moe")
_text(2, "olmoe", "OLMoE-1B-7B", "olmoe", hidden_size=256)
_text(2, "gptj", "GPT-J-6B", "gptj", rotary_dim=32, n_embd=256)
_text(2, "apertus", "Apertus 8B and 70B", "apertus")
_text(2, "arcee", "Arcee AFM-4.5B", "arcee")
_text(2, "internlm3", "InternLM 3", "internlm3")
_text(2, "youtu", "Youtu-LLM (MLA)", "youtu")
_text(2, "cohere2-moe", "Command A with experts", "cohere2_moe", prefix_dense_intermediate_size=192, logit_scale=1.0)
_text(2, "zamba2", "Zamba 2", "zamba2", n_mamba_heads=8, mamba_d_state=16, chunk_size=32, adapter_rank=16, num_hidden_layers=6, layers_block_type=["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"], head_dim=128, num_key_value_heads=4)
_text(2, "mistral-v0.1", "Mistral 7B v0.1, Zephyr (all layers slide)", "mistral", head_dim=128)
_text(2, "phi3-sliding", "Phi-3-mini-4k as published (all layers slide)", "phi3", hidden_size=384)
_text(2, "phimoe", "Phi-3.5-MoE", "phimoe", sliding_window=None, hidden_size=256)
_text(2, "granite-swa", "Granite SWA (learned sinks)", "granite_swa", attention_multiplier=0.0156)
_text(2, "granitemoe-swa", "Granite MoE SWA (learned sinks)", "granitemoe_swa", attention_multiplier=0.0156)
_text(2, "olmo", "OLMo 1", "olmo")
_text(2, "olmo-hybrid", "OLMo Hybrid", "olmo_hybrid", layer_types=[*[_LINEAR] * 3, _FULL], linear_num_key_heads=4)
_text(2, "falcon-7b", "Falcon 7B (multi-query)", "falcon")
_text(2, "falcon-40b", "Falcon 40B, Falcon 2 (grouped)", "falcon", new_decoder_architecture=True, num_kv_heads=2)
_text(2, "stablelm", "StableLM 2", "stablelm", rope_parameters=_rope(0.25))
_text(2, "gpt-bigcode", "StarCoder, SantaCoder", "gpt_bigcode")
_text(2, "gpt-neo", "GPT-Neo", "gpt_neo", attention_types=[[["global", "local"], 2]], window_size=32)
_text(2, "bloom", "BLOOM (ALiBi)", "bloom")
_text(2, "mpt", "MPT (ALiBi)", "mpt", max_seq_len=512)
_text(2, "mamba2", "Mamba 2, Codestral Mamba", "mamba2", **_MAMBA2)
_text(2, "exaone-moe", "K-EXAONE", "exaone_moe")
_text(2, "hy-v4", "Hunyuan 4 (MLA, indexer, sinks)", "hy_v4", hc_mult=2)
_text(2, "minimax", "MiniMax-Text-01, M1 (lightning attention)", "minimax", sliding_window=None, block_size=32)
_text(2, "helium", "Helium", "helium", head_dim=32)
_text(2, "dots1", "dots.llm1", "dots1")
_text(2, "nanochat", "nanochat", "nanochat")
_text(2, "minicpm3", "MiniCPM3 (MLA)", "minicpm3", dim_model_base=128)
_text(2, "longcat-flash", "LongCat-Flash (MLA)", "longcat_flash", head_dim=32, num_layers=2, zero_expert_num=0)
_text(2, "solar-open", "Solar Open", "solar_open", head_dim=128)
_text(2, "recurrent-gemma", "RecurrentGemma", "recurrent_gemma", num_hidden_layers=6, attention_window_size=32)
_text(2, "dbrx", "DBRX", "dbrx", attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 4, "hidden_size": 256})
_text(2, "vaultgemma", "VaultGemma (soft caps)", "vaultgemma", attn_logit_softcapping=50.0)
_text(2, "hyperclovax", "HyperCLOVA X SEED", "hyperclovax")
_text(2, "bailing-hybrid", "Ling and Ring 2.5 (linear attention and MLA)", "bailing_hybrid", layer_group_size=2, num_key_value_heads=4)
_text(2, "mellum", "Mellum", "mellum", layer_types=_MOSTLY_SLIDING)
_text(2, "inkling2-text", "Inkling 2, text part", "inkling2_text", swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=64, sliding_window_size=32, num_hidden_layers=6, unpadded_vocab_size=256, rel_extent=64)
_text(2, "inkling-text", "Inkling, text part", "inkling_text", logits_mup_width_multiplier=1.0, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=64, sliding_window_size=32, num_hidden_layers=6, unpadded_vocab_size=256, rel_extent=64)
_text(2, "bart", "Decoder of BART", "bart", d_model=256, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=192, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=192, is_encoder_decoder=False, is_decoder=True)
_seen(2, "idefics3", "Idefics 3", "idefics3", {"model_type": "llama"}, {})
_seen(2, "cohere2-vision", "Command A Vision", "cohere2_vision", {"model_type": "cohere2"}, _SIGLIP, alignment_intermediate_size=128)
_seen(2, "aya-vision", "Aya Vision", "aya_vision", {"model_type": "cohere2"}, _SIGLIP)
_text(2, "xlstm", "xLSTM-7B", "xlstm", num_heads=2, hidden_size=128, embedding_dim=128, num_blocks=2, chunk_size=16)
_text(2, "modernbert-decoder", "ModernBERT decoder, Ettin", "modernbert-decoder", local_attention=32, hidden_size=256)
_text(2, "cwm", "Code World Model", "cwm")

# One.
_text(1, "beam", "Beam", "beam")
_text(1, "doge", "Doge", "doge", sliding_window=None, keep_window_size=512)
_text(1, "hrm-text", "HRM, text", "hrm_text", prefix_lm=False)
_text(1, "iquestcoder", "IQuest-Coder", "iquestcoder")
_text(1, "granitemoeshared", "Granite MoE shared", "granitemoeshared", attention_multiplier=0.0156)
_text(1, "flex-olmo", "FlexOlmo", "flex_olmo")
_text(1, "codegen", "CodeGen", "codegen", rotary_dim=32)
_text(1, "bamba", "Bamba", "bamba", attn_layer_indices=[1])
_text(1, "falcon-mamba", "Falcon Mamba", "falcon_mamba", state_size=16)
_text(1, "zamba", "Zamba", "zamba", num_hidden_layers=6, num_key_value_heads=4, layers_block_type=["mamba", "mamba", "hybrid"] * 2)
_text(1, "zaya", "ZAYA1", "zaya", num_experts_per_tok=1, num_experts=1, sliding_window=None, router_hidden_size=32)
_text(1, "rwkv", "RWKV-4", "rwkv")
_text(1, "jetmoe", "JetMoE", "jetmoe", kv_channels=64)
_text(1, "persimmon", "Persimmon-8B", "persimmon", rope_parameters=_rope(0.5))
_text(1, "diffllama", "DiffLlama", "diffllama")
_text(1, "jais2", "Jais 2", "jais2", head_dim=128)
_text(1, "axk1", "A.X K1 (MLA)", "axk1")
_text(1, "axk2", "A.X K2 (MLA, indexer)", "axk2")
_text(1, "flint", "Flint (learned sinks)", "flint")
_text(1, "kolibri1", "Kolibri", "kolibri1", layer_types=_MOSTLY_SLIDING)
_text(1, "laguna", "Laguna", "laguna", layer_types=_MOSTLY_SLIDING)
_text(1, "cohere-compass-text", "Cohere Compass, text part", "cohere_compass_text", rope_parameters=dict.fromkeys((_SLIDING, _FULL), _rope()), layer_types=_MOSTLY_SLIDING)
_text(1, "dots3-note-text", "dots3 note, text part (MLA, indexer)", "dots3_note_text", swa_num_key_value_heads=4, swa_head_dim=96, swa_qk_nope_head_dim=64, index_topk=64, shared_experts_intermediate_size=64, **{f"swa_{name}": TEXT[name] for name in ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim")})
_text(1, "aria-text", "Aria, text part", "aria_text")
_text(1, "biogpt", "BioGPT", "biogpt", hidden_size=256)
_text(1, "xglm", "XGLM", "xglm", ffn_dim=192, attention_heads=4, num_layers=4, d_model=256)
_text(1, "openai-gpt", "GPT-1", "openai-gpt")
# fmt: on


class UnknownFamilyError(LookupError):
    """This version of transformers does not know the family."""


def config_of(family: Family) -> "PreTrainedConfig":
    """Return the configuration of a family's tiny model.

    Raises:
        UnknownFamilyError: If this version of transformers does not know it, or other fields of it.
    """
    from transformers import CONFIG_MAPPING, __version__

    kinds: Any = CONFIG_MAPPING
    try:
        kind = kinds[family.kind]
        if family.eye is None:
            return kind(**_fields(kind, family.text, TEXT))
        parts = {
            name: _fields(kinds[own["model_type"]] if "model_type" in own else kind.sub_configs[name], own, shared)
            for name, own, shared in (("text_config", family.text, TEXT), ("vision_config", family.eye, EYE))
        }
        return kind(**parts, **family.whole)
    except KeyError as error:
        raise UnknownFamilyError(f"transformers {__version__} does not know {error}") from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever its class makes of fields that it did not have yet
        last = str(error).strip().rpartition("\n")[2].strip()
        raise UnknownFamilyError(f"transformers {__version__} knows it otherwise ({last})") from error


def _fields(kind: Any, own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Return the shared fields that a class of configurations has, and a family's own."""
    other_names: dict[str, str] = kind.attribute_map or {}
    known = {*inspect.signature(kind.__init__).parameters, *other_names}
    if "kv_lora_rank" in known:
        shared = {**shared, "num_key_value_heads": shared["num_attention_heads"]}
        known -= {"head_dim"}
    elif "head_dim" not in known and shared is TEXT:  # its heads are parts of the whole
        shared = {**shared, "hidden_size": 256, "mamba_n_heads": 16}
    return {other_names.get(name, name): value for name, value in shared.items() if name in known} | own


def family_model(family: Family) -> "PreTrainedModel":
    """Return a family's tiny model with random weights and its own attention function; the same every time.

    Weights are large enough that tokens get different attention; the library's are so small that they do not.

    Raises:
        UnknownFamilyError: If this version of transformers does not know it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = config_of(family)
    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    if family.eye is not None:  # published so, also where its text part alone could be made
        kinds = kinds[::-1]
    kind = next(one for one in kinds if type(config) in one._model_mapping)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5)
                elif "sink" in name:
                    parameter.normal_()
            for module in model.modules():
                if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0.0  # as it is when files are read
    return model.eval().requires_grad_(False)
