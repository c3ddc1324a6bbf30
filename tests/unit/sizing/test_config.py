"""Reading a config.json: what its model keeps is found out from transformers, and what is refused."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sizing.test_sizing import LLAMA
from turboquant import parse_method
from turboquant.models.tiny import tiny_config
from turboquant.sizing import MAX_CONFIG_BYTES, KVShape, ModelConfigError, kv_bytes, read_config


def test_kv_heads_count_not_query_heads() -> None:
    shape = read_config(LLAMA)
    assert (shape.query_heads, shape.first.kv_heads, shape.first.key_dim) == (32, 8, 128)
    assert kv_bytes(shape, parse_method("full"), 1).bytes == 2 * 32 * 8 * (128 + 128)


def test_an_explicit_head_dim_counts_not_the_derived_one() -> None:
    assert read_config({**LLAMA, "model_type": "qwen3", "hidden_size": 2560, "head_dim": 128}).first.key_dim == 128


def kinds(shape: KVShape) -> tuple[int, int, int]:
    """Layers that keep all tokens, those that keep a window, and recurrent ones."""
    recurrent = sum(layer.recurrent and layer.keeps == "none" for layer in shape.layers)
    return len(shape.keeping("all")), len(shape.keeping("window")), recurrent


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, (32, 0, 0)),
        ({"model_type": "qwen2", "sliding_window": 4096}, (32, 0, 0)),
        (
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 30},
            (30, 2, 0),
        ),
        ({"model_type": "mistral", "sliding_window": 4096}, (0, 32, 0)),
        ({"model_type": "mistral", "sliding_window": None}, (32, 0, 0)),
        ({"model_type": "gemma2", "sliding_window": 4096, "head_dim": 256}, (16, 16, 0)),
        ({"model_type": "gemma3_text", "sliding_window": 512, "head_dim": 256}, (5, 27, 0)),
        ({"model_type": "cohere2", "sliding_window": 64, "sliding_window_pattern": 4, "head_dim": 128}, (8, 24, 0)),
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, (8, 0, 24)),
        ({"model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4}, (4, 0, 28)),
        ({"model_type": "lfm2", "full_attn_idxs": [2, 5]}, (2, 0, 30)),
        ({"model_type": "llama4_text", "num_hidden_layers": 8, "num_local_experts": 2}, (2, 6, 0)),
    ],
)
def test_layers_are_told_apart(fields: dict[str, Any], expected: tuple[int, int, int]) -> None:
    assert kinds(read_config({**LLAMA, **fields})) == expected


def test_the_text_part_of_a_multimodal_config_is_read_with_transformers_defaults() -> None:
    """Gemma-3 4B's own file leaves heads and head_dim to the defaults of its class."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    shape = read_config({"model_type": "gemma3", "text_config": {**text, "intermediate_size": 10240}})
    assert (shape.query_heads, shape.first.kv_heads, shape.first.key_dim) == (8, 4, 256)
    assert kinds(shape) == (5, 29, 0)
    assert "multimodal" in shape.notes[0]
    assert "num_attention_heads 8, num_key_value_heads 4." in shape.notes[1]
    assert shape.model_type == "gemma3"


def test_names_of_older_architectures_are_understood() -> None:
    gpt2 = read_config({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024})
    assert (len(gpt2.layers), gpt2.first.kv_heads, gpt2.first.key_dim, gpt2.max_positions) == (12, 12, 64, 1024)
    assert not gpt2.notes
    falcon = {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True}
    assert read_config({"model_type": "falcon", "num_kv_heads": 71, **falcon}).first.kv_heads == 1


@pytest.mark.parametrize("more", [{"rope_theta": float("inf")}, {"id2label": {"0": "a"}, "num_labels": 10**12}])
def test_a_field_that_does_not_matter_refuses_nothing(more: dict[str, Any]) -> None:
    assert read_config({**LLAMA, **more}).layers == read_config(LLAMA).layers


def test_a_model_in_use_is_read_alike_and_left_alone() -> None:
    config = tiny_config("gemma3")
    config._attn_implementation = "eager"
    before = config.to_dict()
    assert kinds(read_config(config.to_dict())) == (1, 2, 0)
    assert config.to_dict() == before
    assert config._attn_implementation == "eager"


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", "empty"),
        ("not json", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        ("[1, 2]", "object with named fields"),
        ('{"num_hidden_layers": ' + "9" * 5000 + "}", "no JSON"),
        (deep(100_000), "nested too deeply"),
        ("{" + " " * MAX_CONFIG_BYTES + "}", "at most 1,000,000 bytes"),
        ({}, "model_type must be text that names the kind of model, got None"),
        ({**LLAMA, "model_type": ["x"]}, r"model_type must be text that names the kind of model, got \['x'\]"),
        ({**LLAMA, "model_type": "newmodel"}, "no model type 'newmodel'"),
        ({**LLAMA, "num_hidden_layers": 1e400}, "'num_hidden_layers' expected int, got float"),
        ({**LLAMA, "num_hidden_layers": 10**30}, "num_hidden_layers must be at most 1024, got 10000"),
        ({**LLAMA, "num_hidden_layers": True}, "'num_hidden_layers' expected int, got bool"),
        ({**LLAMA, "num_hidden_layers": 0}, "no KV cache to count"),
        ({**LLAMA, "num_key_value_heads": "8"}, "'num_key_value_heads' with value '8' doesn't match"),
        ({**LLAMA, "num_key_value_heads": 5}, "must divide the number of heads"),
        ({**LLAMA, "num_attention_heads": 0}, "cannot read this config.json|division"),
        ({**LLAMA, "hidden_size": 4097}, r"not a multiple of the number of attention heads \(32\)"),
        ({**LLAMA, "hidden_size": 10**30 * 32}, "not counted here"),
        ({**LLAMA, "vocab_size": -1}, "negative dimension"),
        ({**LLAMA, "layer_types": ["psychic_attention"] * 32}, "layer_types"),
        ({**LLAMA, "is_encoder_decoder": True}, "second cache"),
        ({"model_type": "t5"}, "second cache"),
        ({"model_type": "clip"}, "does not generate text token by token"),
        ({"model_type": "mamba"}, "no KV cache to count"),
        ({"model_type": "deepseek_v4", "num_hidden_layers": 4}, "layers of a kind of its own"),
    ],
    ids=range(26),
)
def test_what_cannot_be_counted_is_refused_in_one_sentence(data: Any, words: str) -> None:
    with pytest.raises(ModelConfigError, match=words) as error:
        read_config(data)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "gemma3n_text", "altup_num_inputs": 10**5},
        {"model_type": "glm4v", "vision_config": {"depth": 10**9}},
    ],
)
def test_a_file_that_asks_for_a_billion_parts_is_refused_in_time(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboquant.sizing.probe.SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(ModelConfigError, match="more parts than can be made in"):
        read_config(fields)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_file_does_not_choose_whose_code_runs(name: str) -> None:
    """transformers would fetch a kernel of that name from the hub."""
    assert read_config({**LLAMA, name: "somebody/kernel"}).layers == read_config(LLAMA).layers


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = [*LLAMA, "head_dim", "layer_types", "sliding_window", "rope_parameters", "text_config", "attention_bias"]
NAMES += ["full_attention_interval", "attn_layer_period", "use_sliding_window", "num_labels", "dtype", "_name_or_path"]
SMALL = {**LLAMA, "num_hidden_layers": 2}
KINDS = st.sampled_from(["llama", "qwen2", "gemma3", "gpt2", "falcon", "deepseek_v3", "jamba", "llava"])


@given(KINDS, st.dictionaries(st.sampled_from(NAMES), JSON | st.integers(1, 64), max_size=4), st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_object_is_counted_or_refused(kind: str, fields: dict[str, Any], as_text: bool) -> None:
    data = {**SMALL, "model_type": kind, **fields}
    try:
        shape = read_config(json.dumps(data) if as_text else data)
    except ModelConfigError as error:
        words = str(error)
    else:
        words = ""
        assert kv_bytes(shape, parse_method("full"), 100).bytes > 0
    assert "\n" not in words
    assert len(words) < 400
