"""Sizes against what caches really hold: tiny models of many families, and published sizes."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from turboquant import attach, build_cache, cache_report, parse_method
from turboquant.models.families import FAMILIES, Family, config_of, family_model
from turboquant.sizing import KVShape, ModelConfigError, kv_bytes, read_config

LLLG = {"layer_types": [*["sliding_attention"] * 3, "full_attention"]}
# Files with fields that do not matter to a cache, or that say the same in another way.
ODD = {
    "EXAONE 4 with a pattern in letters": Family("", "", 0, "exaone4", {"sliding_window_pattern": "LLLG", **LLLG}),
    "Qwen2-MoE with a window of 0": Family("", "", 0, "qwen2_moe", {"sliding_window": 0}),
    "Phi-3.5-MoE, whose window is its positions": Family("", "", 0, "phimoe", {"sliding_window": 512}),
}
OFTEN = (
    *(name for name, family in FAMILIES.items() if family.users == 5),
    *("hunyuan-moe", "granite-4-dense", "llama4-text", "falcon-h1", "zamba2", "nemotron-h", "gpt-neo", "xglm"),
    *(
        "kimi-linear",
        "bailing-hybrid",
        "dbrx",
        "mpt",
        "longcat-flash",
        "falcon-40b",
        "mimo-v2-flash",
        "gemma4-e2b-text",
    ),
    *("gemma4-31b-text", "gemma3n-text", "deepseek-v3.2", "lfm2", "granite-4-h", "bloom", "mllama", "jamba"),
)
ALL = {**FAMILIES, **ODD}
EACH = [pytest.param(name, marks=() if name in (*OFTEN, *ODD) else pytest.mark.nightly) for name in ALL]
PARTS = ("compressed_tokens", "key_bytes", "value_bytes", "scale_bytes", "exact_bytes", "shared_bytes", "state_bytes")


def sized(name: str) -> tuple[PreTrainedModel, KVShape]:
    """A model, and what its config.json says; skipped where that is refused, which other tests are about."""
    try:
        shape = read_config(config_of(ALL[name]).to_dict())
    except ModelConfigError as error:
        assert name not in OFTEN
        pytest.skip(str(error))
    return family_model(ALL[name]), shape


@torch.no_grad()
def held(model: PreTrainedModel, method: str, *calls: int) -> tuple[Any, int]:
    """What the cache of two rows really holds after calls of so many tokens, and the bytes of windows' counters."""
    cache = build_cache(model.config, parse_method(method))
    for count in calls:
        model(input_ids=torch.randint(3, 250, (2, count)), past_key_values=cache)
    counters = sum(8 for layer in cache.layers if type(layer).__name__ == "DynamicSlidingWindowLayer")
    return cache_report(cache), counters


@pytest.mark.parametrize("name", EACH)
def test_a_full_cache_takes_what_is_said(name: str) -> None:
    model, shape = sized(name)
    for tokens in (20, 150):
        report, counters = held(model, "full", tokens - 1, 1)
        estimate = kv_bytes(shape, parse_method("full"), tokens, 2, value_bytes=4)
        assert estimate.bytes == report.bytes - counters
        assert estimate.state_bytes == report.state_bytes
        # An indexer's keys stand in the report's spare room
        beside = 2 * 2 * tokens * sum(layer.beside for layer in shape.layers)
        assert estimate.full_precision_bytes - beside == report.full_precision_bytes
    if ALL[name].eye is None:
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(shape.layers) == len(build_cache(model.config, parse_method("full")).layers)


@pytest.mark.parametrize("name", EACH)
def test_a_compressed_cache_takes_what_is_said(name: str) -> None:
    model, shape = sized(name)
    if not shape.packed_layers or any(layer.beside for layer in shape.layers):
        pytest.skip("nothing of it is packed")
    attach(model)
    for tokens in (100, 150, 300):
        report, _ = held(model, "turboquant:bits=3", tokens)
        estimate = kv_bytes(shape, parse_method("turboquant:bits=3"), tokens, 2, value_bytes=4)
        assert {part: getattr(estimate, part) for part in PARTS} == {part: getattr(report, part) for part in PARTS}
        assert estimate.full_precision_bytes == report.full_precision_bytes
        if not shape.keeping("window"):  # there the first call's tensors live until the next one
            assert estimate.bytes == report.bytes
    assert estimate.compressed_tokens > 0


@pytest.mark.parametrize(("name", "words"), [("mamba", "no KV cache to count"), ("minimax", "uses cache of its own")])
def test_what_keeps_no_keys_and_values_is_refused(name: str, words: str) -> None:
    with pytest.raises(ModelConfigError, match=words):
        read_config(config_of(FAMILIES[name]).to_dict())


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
