"""Reading a config.json: which fields decide the cache, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sizing.test_sizing import LLAMA
from turboquant import build_cache, parse_method
from turboquant.models.tiny import tiny_config
from turboquant.sizing import MAX_CONFIG_BYTES, ModelConfigError, kv_bytes, read_config


def test_kv_heads_count_not_query_heads() -> None:
    shape = read_config(LLAMA)
    assert (shape.kv_heads, shape.query_heads, shape.key_dim) == (8, 32, 128)
    assert kv_bytes(shape, parse_method("full"), 1).bytes == 2 * 32 * 8 * (128 + 128)


def test_an_explicit_head_dim_counts_not_the_derived_one() -> None:
    shape = read_config({**LLAMA, "model_type": "qwen3", "hidden_size": 2560, "head_dim": 128})
    assert shape.key_dim == 128 != 2560 // 32


def test_key_and_value_dims_may_differ() -> None:
    shape = read_config({**LLAMA, "head_dim": 192, "v_head_dim": 128})
    assert kv_bytes(shape, parse_method("full"), 1).bytes == 2 * 32 * 8 * (192 + 128)


LISTED = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("fields", "full", "sliding", "linear"),
    [
        ({"layer_types": LISTED * 16, "sliding_window": 128}, 16, 16, 0),
        ({"layer_types": ["chunked_attention", "full_attention"] * 16, "attention_chunk_size": 8192}, 16, 16, 0),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 32, 0, 0),
        ({"model_type": "qwen2", "sliding_window": 4096}, 32, 0, 0),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 30}, 30, 2, 0),
        ({"model_type": "mistral", "sliding_window": 4096}, 0, 32, 0),
        ({"model_type": "mistral", "sliding_window": None}, 32, 0, 0),
        ({"model_type": "gemma2", "sliding_window": 4096, "head_dim": 256}, 16, 16, 0),
        ({"model_type": "gemma3_text", "sliding_window": 512, "head_dim": 256}, 5, 27, 0),
        ({"model_type": "cohere2", "sliding_window": 64, "sliding_window_pattern": 4, "head_dim": 128}, 8, 24, 0),
        ({"full_attention_interval": 4}, 8, 0, 24),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, 4, 0, 28),
        ({"layers_block_type": ["mamba", "attention"] * 16}, 16, 0, 16),
        ({"hybrid_override_pattern": "M*-E" * 8, "mamba_num_heads": 8}, 8, 0, 8),
        ({"full_attn_idxs": [2, 5], "conv_L_cache": 3}, 2, 0, 30),
        ({"attn_type_list": [0, 0, 0, 1] * 8}, 8, 0, 24),
        ({"layer_types": ["full_attention"] * 32, "num_kv_shared_layers": 12}, 20, 0, 0),
    ],
)
def test_layers_are_told_apart(fields: dict[str, Any], full: int, sliding: int, linear: int) -> None:
    shape = read_config({**LLAMA, **fields})
    assert (shape.full_layers, shape.sliding_layers, shape.linear_layers) == (full, sliding, linear)
    assert (shape.window is None) == (sliding == 0)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma3", "mistral", "qwen2", "phi3", "qwen3"])
def test_layers_are_those_of_transformers(name: str) -> None:
    """The kinds are read from the bare fields, and compared with the layers that a real cache gets."""
    config = tiny_config(name)
    bare = {key: value for key, value in config.to_dict().items() if key != "layer_types" or name == "gemma3"}
    kinds = ["sliding" if layer.is_sliding else "full" for layer in build_cache(config, parse_method("full")).layers]
    assert list(read_config(bare).layers) == kinds


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "cohere2", "gpt_oss", "qwen3_next"])
def test_unlisted_layers_are_those_of_transformers_defaults(name: str) -> None:
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[name]().to_dict()
    kinds = [
        {"sliding_attention": "sliding", "linear_attention": "linear"}.get(t, "full") for t in default["layer_types"]
    ]
    assert list(read_config({k: v for k, v in default.items() if k != "layer_types"}).layers) == kinds


def test_the_text_part_of_a_multimodal_config_is_read_with_transformers_defaults() -> None:
    """Gemma-3 4B's own file leaves heads and head_dim to the defaults of its class."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    shape = read_config({"model_type": "gemma3", "text_config": {**text, "intermediate_size": 10240}})
    assert (shape.query_heads, shape.kv_heads, shape.key_dim) == (8, 4, 256)
    assert (shape.full_layers, shape.sliding_layers) == (5, 29)
    assert "num_key_value_heads 4" in shape.notes[1]
    assert "multimodal" in shape.notes[0]


def test_names_of_older_architectures_are_understood() -> None:
    gpt2 = read_config({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024})
    assert (len(gpt2.layers), gpt2.kv_heads, gpt2.key_dim, gpt2.max_positions) == (12, 12, 64, 1024)
    assert "as many as query heads" in gpt2.notes[0]
    falcon = {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True}
    assert read_config({"model_type": "falcon", "num_kv_heads": 71, **falcon}).kv_heads == 1


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", "empty"),
        ("not json", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        ("[1, 2]", "object with named fields"),
        ('{"num_hidden_layers": NaN}', "NaN is no number"),
        ('{"num_hidden_layers": -Infinity}', "-Infinity is no number"),
        ('{"num_hidden_layers": ' + "9" * 5000 + "}", "no JSON"),
        (deep(100_000), "nested too deeply"),
        ("{" + " " * MAX_CONFIG_BYTES + "}", "at most 1,000,000 bytes"),
        ({}, "num_hidden_layers is missing"),
        ({**LLAMA, "num_hidden_layers": 1e400}, "num_hidden_layers must be a whole number, got inf"),
        ({**LLAMA, "num_hidden_layers": 10**30}, "num_hidden_layers must be at most 1024, got 10000"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers must be a whole number, got True"),
        ({**LLAMA, "num_key_value_heads": "8"}, "num_key_value_heads must be a whole number, got '8'"),
        ({**LLAMA, "num_key_value_heads": [8, 4]}, r"num_key_value_heads must be a whole number, got \[8, 4\]"),
        ({**LLAMA, "num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({**LLAMA, "num_key_value_heads": 5}, r"multiple of num_key_value_heads \(5\), got 32"),
        ({**LLAMA, "hidden_size": 4097}, r"multiple of num_attention_heads \(32\)"),
        ({**LLAMA, "hidden_size": 10**6}, "hidden_size / num_attention_heads must be from 2 to 512, got 31250"),
        ({**LLAMA, "head_dim": 100_000}, "head_dim must be at most 512"),
        ({**LLAMA, "model_type": ["x"]}, "model_type must be text"),
        ({**LLAMA, "layer_types": ["full_attention"]}, r"num_hidden_layers entries \(32\), got 1"),
        ({**LLAMA, "layer_types": ["psychic_attention"] * 32}, "got 'psychic_attention'"),
        ({**LLAMA, "layer_types": LISTED * 16}, "sliding_window is missing"),
        ({**LLAMA, "layer_types": ["mamba"] * 32}, "no KV cache to count"),
        ({**LLAMA, "model_type": "newmodel", "sliding_window": 4096, "head_dim": 64}, "nothing says which layers"),
        ({**LLAMA, "mamba_d_state": 16}, r"recurrent layers \(mamba_d_state\)"),
        ({**LLAMA, "kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
        ({**LLAMA, "is_encoder_decoder": True}, "second cache"),
        ({**LLAMA, "global_head_dim": 512}, "another head_dim"),
        ({**LLAMA, "index_topk": 2048}, "keys of an indexer"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_sentence(data: Any, words: str) -> None:
    with pytest.raises(ModelConfigError, match=words) as error:
        read_config(data)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = [*LLAMA, "head_dim", "layer_types", "sliding_window", "kv_lora_rank", "text_config", "num_kv_shared_layers"]
NAMES += ["full_attention_interval", "attn_layer_period", "use_sliding_window", "hybrid_override_pattern", "n_layer"]


@given(st.dictionaries(st.sampled_from(NAMES), JSON | st.integers(1, 64), max_size=6), st.booleans())
@settings(deadline=None, max_examples=200)
def test_any_object_is_counted_or_refused(fields: dict[str, Any], as_text: bool) -> None:
    data = {**LLAMA, **fields}
    try:
        shape = read_config(json.dumps(data) if as_text else data)
    except ModelConfigError:
        return
    assert kv_bytes(shape, parse_method("full"), 100).bytes > 0
