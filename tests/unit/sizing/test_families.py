"""Sizes of the families that people run: what is said from a config.json is what a tiny model's cache really holds."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.families import IMAGE_TEXT, REFUSED, WORKS, image_text_model, text_model
from turboquant import attach, build_cache, cache_report, parse_method
from turboquant.sizing import KVShape, ModelConfigError, kv_bytes, read_config

_MLA = {"kv_lora_rank": 48, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
_MLA |= {"num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_d_ssm": 256, "mamba_n_groups": 1}
_LINEAR = {
    "kda_layers": [1, 2, 3],
    "full_attn_layers": [4],
    "num_heads": 4,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
}
_SLIDING = {"head_dim": 64, "sliding_window": 32}
_GEMMA4 = {**_SLIDING, "global_head_dim": 128, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek V2": ("deepseek_v2", {**_MLA, **_ROUTED, "first_k_dense_replace": 1}),
    "DeepSeek V3": ("deepseek_v3", {**_MLA, **_ROUTED, "first_k_dense_replace": 1}),
    "DeepSeek V3.2": (
        "deepseek_v32",
        {**_MLA, **_ROUTED, "index_topk": 64, "index_n_heads": 4, "index_head_dim": 32, "first_k_dense_replace": 1},
    ),
    "LongCat-Flash": (
        "longcat_flash",
        {
            **_MLA,
            "head_dim": 16,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 64,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "zero_expert_num": 2,
        },
    ),
    "Falcon 40B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}),
    "Gemma 4 E2B": (
        "gemma4_text",
        {
            **_GEMMA4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 256,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "Gemma 4 31B": (
        "gemma4_text",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_key_value_heads": 2},
    ),
    "MiMo-V2-Flash": (
        "mimo_v2_flash",
        {
            **_SLIDING,
            **_ROUTED,
            "head_dim": 48,
            "v_head_dim": 32,
            "swa_num_key_value_heads": 4,
            "swa_num_attention_heads": 4,
            "swa_head_dim": 48,
            "swa_v_head_dim": 32,
        },
    ),
    "Gemma 3n": (
        "gemma3n_text",
        {
            **_SLIDING,
            "num_hidden_layers": 6,
            "intermediate_size": [192] * 6,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "Hunyuan-A13B": (
        "hunyuan_v1_moe",
        {"head_dim": 32, "num_experts": 4, "moe_topk": 2, "moe_intermediate_size": [64] * 4, "intermediate_size": 192},
    ),
    "Granite 4 micro": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 4, "num_local_experts": 0, "shared_intermediate_size": 64},
    ),
    "EXAONE 4 with a pattern in letters": (
        "exaone4",
        {
            "sliding_window": 32,
            "sliding_window_pattern": "LLLG",
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    "Qwen2-MoE with a window of 0": (
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 64, "sliding_window": 0, "use_sliding_window": False},
    ),
    "Llama 4 without layer types": (
        "llama4_text",
        {"head_dim": 32, "attention_chunk_size": 32, "num_local_experts": 2, "intermediate_size_mlp": 64},
    ),
    "Phi-3.5-MoE": ("phimoe", {"num_local_experts": 4, "sliding_window": 512}),
    "Falcon-H1": ("falcon_h1", {**_MAMBA, "head_dim": 32}),
    "Zamba2": (
        "zamba2",
        {
            **_MAMBA,
            "num_key_value_heads": 4,
            "attention_hidden_size": 256,
            "attention_head_dim": 64,
            "n_mamba_heads": 8,
            "hybrid_layer_ids": [1, 3],
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_mem_blocks": 1,
        },
    ),
    "Nemotron-H": (
        "nemotron_h",
        {
            "hybrid_override_pattern": "M*-M",
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "GPT-Neo": (
        "gpt_neo",
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 32},
    ),
    "XGLM": ("xglm", {"d_model": 128, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4}),
    "Kimi Linear": ("kimi_linear", {**_MLA, **_EXPERTS, "linear_attn_config": _LINEAR, "num_shared_experts": 1}),
    "Ling 2.5": (
        "bailing_hybrid",
        {**_MLA, **_EXPERTS, "layer_group_size": 4, "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
    "DBRX": (
        "dbrx",
        {
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "MPT": ("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 4, "max_seq_len": 512}),
    "ModernBERT decoder": ("modernbert-decoder", {"global_attn_every_n_layers": 2, "local_attention": 64}),
}
PARTS = ("compressed_tokens", "key_bytes", "value_bytes", "scale_bytes", "exact_bytes", "shared_bytes", "state_bytes")
_FULL_ONLY = {"DeepSeek V3.2"}  # only the page counts it: an indexer chooses what its attention sees
_NOT_COUNTED = {"Mamba", "RWKV", "JetMoE", "MiniMax"}
TEXT = {name: one[:2] for name, one in (WORKS | REFUSED).items() if name not in _NOT_COUNTED} | MORE
SERVED = [name for name in (*WORKS, *MORE) if name not in _FULL_ONLY | _NOT_COUNTED]


@torch.no_grad()
def held(model: PreTrainedModel, method: str, *calls: int) -> tuple[Any, int]:
    """What the cache of two rows really holds after calls of so many tokens, and the bytes of windows' counters."""
    cache = build_cache(model.config, parse_method(method))
    for count in calls:
        model(input_ids=torch.randint(3, 250, (2, count)), past_key_values=cache)
    counters = sum(8 for layer in cache.layers if type(layer).__name__ == "DynamicSlidingWindowLayer")
    return cache_report(cache), counters


def check_full(model: PreTrainedModel, shape: KVShape) -> None:
    for tokens in (20, 150):
        report, counters = held(model, "full", tokens - 1, 1)
        estimate = kv_bytes(shape, parse_method("full"), tokens, 2, value_bytes=4)
        assert estimate.bytes == report.bytes - counters
        assert estimate.state_bytes == report.state_bytes
        # An indexer's keys stand in the report's spare room
        beside = 2 * 2 * tokens * sum(layer.beside for layer in shape.layers)
        assert estimate.full_precision_bytes - beside == report.full_precision_bytes


def check_packed(model: PreTrainedModel, shape: KVShape) -> None:
    attach(model)
    for tokens in (100, 150, 300):
        report, _ = held(model, "turboquant:bits=3", tokens)
        estimate = kv_bytes(shape, parse_method("turboquant:bits=3"), tokens, 2, value_bytes=4)
        assert {part: getattr(estimate, part) for part in PARTS} == {part: getattr(report, part) for part in PARTS}
        assert estimate.full_precision_bytes == report.full_precision_bytes
        if not shape.keeping("window"):  # there the first call's tensors live until the next one
            assert estimate.bytes == report.bytes
    assert estimate.compressed_tokens > 0


@pytest.mark.parametrize("name", TEXT)
def test_a_full_cache_takes_what_is_said(name: str) -> None:
    model = text_model(*TEXT[name])
    shape = read_config(model.config.to_dict())
    check_full(model, shape)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(shape.layers) == len(build_cache(model.config, parse_method("full")).layers)


@pytest.mark.parametrize("name", SERVED)
def test_a_compressed_cache_takes_what_is_said(name: str) -> None:
    model = text_model(*TEXT[name])
    check_packed(model, read_config(model.config.to_dict()))


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_an_image_text_model_keeps_of_text_what_is_said(name: str) -> None:
    model = image_text_model(*IMAGE_TEXT[name])
    shape = read_config(model.config.to_dict())
    check_full(model, shape)
    check_packed(model, shape)


@pytest.mark.parametrize(("name", "words"), [("Mamba", "no KV cache to count"), ("MiniMax", "uses cache of its own")])
def test_what_keeps_no_keys_and_values_is_refused(name: str, words: str) -> None:
    with pytest.raises(ModelConfigError, match=words):
        read_config(text_model(*REFUSED[name][:2]).config.to_dict())


MLA = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "LongCat-Flash": ({"model_type": "longcat_flash", "num_layers": 28, "num_attention_heads": 64}, 2 * 56 * 576),
    "DBRX": (
        {
            "model_type": "dbrx",
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
        2 * 2 * 40 * 8 * 128,
    ),
    "Kimi Linear": (
        {
            "model_type": "kimi_linear",
            "num_hidden_layers": 27,
            "linear_attn_config": {
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                "kda_layers": [i for i in range(1, 27) if i % 4],
                "num_heads": 32,
                "head_dim": 128,
                "short_conv_kernel_size": 4,
            },
        },
        2 * 7 * 576,
    ),
    "DeepSeek V3": (
        {"model_type": "deepseek_v3", "num_hidden_layers": 61, "quantization_config": {"quant_method": "fp8"}, **MLA},
        2 * 61 * 576,
    ),
    "Falcon 40B": (
        {
            "model_type": "falcon",
            "hidden_size": 8192,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
        },
        2 * 2 * 60 * 128 * 64,
    ),
    "ERNIE 4.5 VL": (
        {
            "model_type": "ernie4_5_vl_moe",
            "text_config": {"moe_intermediate_size": [1536, 512], "num_hidden_layers": 28},
        },
        2 * 2 * 28 * 4 * 128,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_a_token_of_published_sizes(name: str) -> None:
    config, expected = PUBLISHED[name]
    assert 2 * read_config(config).token_values == expected


@pytest.mark.parametrize("kind", ["deci", "step3_text", "bailing_moe_linear", "hunyuan", "chatglm"])
def test_what_only_code_from_a_repository_knows_is_refused(kind: str) -> None:
    fields = {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "auto_map": {"AutoConfig": "x.Y"},
    }
    with pytest.raises(ModelConfigError, match=f"has no model type '{kind}', and code from a model's repository"):
        read_config({"model_type": kind, **fields})
