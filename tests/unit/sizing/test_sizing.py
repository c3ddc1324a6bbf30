"""Sizes of caches from a config.json: what is read, what is refused, and that the figures are those measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant import build_cache, cache_report, parse_method
from turboquant.methods import METHODS, BitsMethod
from turboquant.models.tiny import tiny_config, tiny_model
from turboquant.sizing import (
    MOST_ROWS,
    MOST_TOKENS,
    KVShape,
    SizingError,
    kv_bytes,
    largest_batch,
    longest_context,
    read_config,
    weight_bytes,
)

PRESETS = sorted((Path(__file__).resolve().parents[3] / "assets" / "models").glob("*.json"))
OWN = sorted(name for name, method in METHODS.items() if issubclass(method, BitsMethod))
PARTS = ("tokens", "compressed_tokens", "key_bytes", "value_bytes", "scale_bytes", "exact_bytes", "shared_bytes")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def preset(name: str) -> KVShape:
    found = next(path for path in PRESETS if path.stem == name)
    return read_config(json.loads(found.read_text())["config"])


@torch.no_grad()
def measured(architecture: str, method: str, tokens: int, batch: int = 1, single: int = 0, **overrides: Any) -> Any:
    """What a tiny model in bfloat16 really holds after one long call and some single steps, and the same estimated."""
    model = tiny_model(architecture, **overrides).to(torch.bfloat16)
    cache = build_cache(model.config, parse_method(method))
    ids = torch.randint(3, 250, (batch, tokens), generator=torch.Generator().manual_seed(0))
    model(ids, past_key_values=cache)
    for _ in range(single):
        model(ids[:, :1], past_key_values=cache)
    return cache_report(cache), read_config(model.config.to_dict())


# --- bytes


@pytest.mark.parametrize("bits", [4, 3, 1])
@pytest.mark.parametrize("name", ["full", *OWN])
def test_every_part_is_what_a_cache_really_holds(name: str, bits: int) -> None:
    method = name if name == "full" else f"{name}:bits={bits}"
    report, shape = measured("llama", method, 300, batch=2)
    estimate = kv_bytes(shape, parse_method(method), 300, 2)
    assert {part: getattr(estimate, part) for part in PARTS} == {part: getattr(report, part) for part in PARTS}
    assert estimate.spare_bytes == report.spare_bytes
    assert estimate.bytes == report.bytes
    assert estimate.bits_per_value == pytest.approx(report.bits_per_value)
    assert estimate.compression_ratio == pytest.approx(report.compression_ratio)
    assert (estimate.compressed_tokens > 0) == (name != "full")


@pytest.mark.parametrize("method", ["turboquant:key_bits=3,value_bits=2", "turboquant-paper:bits=3", "kivi:bits=2"])
@pytest.mark.parametrize(("architecture", "overrides"), [("phi", {}), ("llama", {"num_hidden_layers": 17})])
def test_other_shapes_are_counted_as_measured(architecture: str, overrides: dict[str, int], method: str) -> None:
    """MHA with head_dim 80 (no power of two), and more layers than tables are sampled from."""
    report, shape = measured(architecture, method, 260, **overrides)
    assert kv_bytes(shape, parse_method(method), 260).bytes == report.bytes


def test_qjls_first_layers_are_counted_with_twice_the_signs() -> None:
    report, shape = measured("llama", "qjl:bits=2", 260, num_hidden_layers=18)
    assert kv_bytes(shape, parse_method("qjl:bits=2"), 260).bytes == report.bytes


@pytest.mark.parametrize("method", ["turboquant:bits=4", "turboquant-paper:bits=2", "rtn:bits=4"])
@pytest.mark.parametrize("tokens", [1, 40, 131, 132, 133, 250])
def test_room_that_depends_on_how_tokens_came_stays_within_what_is_stated(method: str, tokens: int) -> None:
    parsed = parse_method(method)
    for single in (0, 60):
        report, shape = measured("llama", method, tokens, single=single)
        least, most = (kv_bytes(shape, parsed, tokens + single, growing=growing) for growing in (False, True))
        for part in PARTS:
            assert getattr(least, part) == getattr(report, part)
        assert report.spare_bytes <= most.spare_bytes
        assert least.bytes <= most.bytes


@pytest.mark.parametrize("tokens", [20, 31, 32, 200])
def test_sliding_layers_hold_a_window(tokens: int) -> None:
    report, shape = measured("gemma3", "turboquant:bits=4", tokens - 1, single=1)
    assert [layer.window for layer in shape.layers] == [32, 32, 0]
    estimate = kv_bytes(shape, parse_method("turboquant:bits=4"), tokens)
    assert estimate.exact_bytes == report.exact_bytes
    assert estimate.full_precision_bytes == report.full_precision_bytes
    if tokens == 200:  # but for the 8-byte counter that Hugging Face's layers hold
        assert report.bytes - estimate.bytes == 8 * 2


@pytest.mark.parametrize(("spec", "number"), [("full", 4), ("turboquant:bits=4", 2)])
def test_float32_models_keep_values_in_four_bytes_but_for_packed_layers(spec: str, number: int) -> None:
    model = tiny_model("llama")
    cache = build_cache(model.config, parse_method(spec))
    with torch.no_grad():
        model(torch.full((1, 300), 5), past_key_values=cache)
    report = cache_report(cache)
    estimate = kv_bytes(read_config(model.config.to_dict()), parse_method(spec), 300, value_bytes=4)
    assert (estimate.bytes, estimate.exact_bytes) == (report.bytes, report.exact_bytes)
    assert report.exact_bytes == 3 * 2 * 2 * 64 * report.exact_tokens * number


def test_a_joint_latent_is_counted_like_one_head_with_keys_and_values_of_two_widths() -> None:
    shape, method = preset("deepseek-v2-lite"), parse_method("turboquant:bits=4")
    assert (shape.latent, shape.first.kv_heads, shape.first.key_dim, shape.first.value_dim) == (True, 1, 512, 64)
    assert kv_bytes(shape, parse_method("full"), 1000).bytes == 2 * 27 * 1000 * (512 + 64)
    estimate = kv_bytes(shape, method, 1000)
    assert estimate.key_bytes == 27 * estimate.compressed_tokens * 512 // 2
    assert estimate.value_bytes == 27 * estimate.compressed_tokens * 64 // 2


@pytest.mark.parametrize("spec", ["kivi:bits=4", "turboquant:bits=4", "turboquant:bits=4,residual_length=1024"])
@pytest.mark.parametrize("tokens", [100, 131])
def test_a_context_that_came_in_one_call_and_is_too_short_to_be_packed_has_no_room(spec: str, tokens: int) -> None:
    report, shape = measured("llama", spec, tokens)
    assert kv_bytes(shape, parse_method(spec), tokens).bytes == report.bytes


def test_what_fits_below_the_window_is_not_refused_for_room_that_nothing_takes() -> None:
    shape, method = read_config({**LLAMA, "num_key_value_heads": 32}), parse_method("turboquant:residual_length=32768")
    longest = longest_context(shape, method, 12 * 2**30, 8 * 2**30)
    assert longest == longest_context(shape, parse_method("full"), 12 * 2**30, 8 * 2**30) - 1  # tables
    assert largest_batch(shape, method, 24 * 2**30, 8 * 2**30, 32) == 15 * 2**30 // (32 * 2**19) - 1


def test_caches_of_hugging_face_are_not_estimated() -> None:
    with pytest.raises(SizingError, match="hf-quanto belongs to"):
        longest_context(read_config(LLAMA), parse_method("hf-quanto"), 0, 0)


def test_a_methods_own_rule_about_dims_is_a_refusal() -> None:
    odd = read_config({"model_type": "gpt2", "n_layer": 4, "n_embd": 132, "n_head": 4})
    with pytest.raises(SizingError, match=r"polarquant cannot hold this model's cache: .* even head_dim, got 33"):
        largest_batch(odd, parse_method("polarquant"), 2**40, 0, 100)
    assert kv_bytes(odd, parse_method("turboquant"), 10_000).compression_ratio > 3


@pytest.mark.parametrize(("tokens", "batch"), [(-1, 1), (True, 1), (1.5, 1), (10, -1), (MOST_TOKENS + 1, 1)])
def test_numbers_out_of_range_are_refused(tokens: Any, batch: Any) -> None:
    with pytest.raises(SizingError, match="must be a whole number from 0"):
        kv_bytes(read_config(LLAMA), parse_method("full"), tokens, batch)


def test_an_empty_cache_holds_nothing() -> None:
    estimate = kv_bytes(read_config(LLAMA), parse_method("turboquant"), 0)
    assert (estimate.bytes, estimate.bits_per_value, estimate.compression_ratio) == (0, 0.0, 1.0)


# --- what fits

SHAPES = st.sampled_from([read_config(LLAMA), preset("gemma-3-1b"), preset("phi-2"), preset("qwen3-next-80b")])
SPECS = st.one_of(
    st.just("full"), st.builds("{}:bits={}".format, st.sampled_from(["turboquant", "kivi"]), st.integers(1, 8))
)
TOKENS, ROWS = st.integers(0, 200_000), st.integers(1, 64)


@given(SHAPES, SPECS, TOKENS, ROWS, st.integers(0, 5000), st.booleans())
@settings(deadline=None)
def test_more_rows_never_take_less_nor_do_more_tokens_but_for_those_that_packing_saves(
    shape: KVShape, spec: str, tokens: int, batch: int, more: int, growing: bool
) -> None:
    method = parse_method(spec)
    held = kv_bytes(shape, method, tokens, batch, growing=growing).bytes
    if growing or method.packed_length(tokens + more) == method.packed_length(tokens):
        assert kv_bytes(shape, method, tokens + more, batch, growing=growing).bytes >= held
    assert kv_bytes(shape, method, tokens, batch + 1, growing=growing).bytes >= held


@given(SHAPES, st.sampled_from(["turboquant", "turboquant-paper", "kivi", "rtn"]), TOKENS, st.integers(1, 7))
@settings(deadline=None)
def test_more_bits_never_take_less(shape: KVShape, name: str, tokens: int, bits: int) -> None:
    fewer, more = (kv_bytes(shape, parse_method(f"{name}:bits={b}"), tokens).bytes for b in (bits, bits + 1))
    assert fewer <= more


@given(SHAPES, SPECS, ROWS, st.integers(0, 10**11), st.integers(0, 10**11), st.integers(0, 2**32), st.booleans())
@settings(deadline=None)
def test_the_longest_context_fits_and_one_token_more_does_not(
    shape: KVShape, spec: str, batch: int, gpu: int, weights: int, reserve: int, growing: bool
) -> None:
    method = parse_method(spec)
    tokens = longest_context(shape, method, gpu, weights, batch, reserve_bytes=reserve, growing=growing)
    room = gpu - weights - reserve
    if tokens:
        assert kv_bytes(shape, method, tokens, batch, growing=growing).bytes <= room
    if tokens < MOST_TOKENS:
        assert room < 0 or kv_bytes(shape, method, tokens + 1, batch, growing=growing).bytes > room


@given(SHAPES, SPECS, st.integers(1, 200_000), st.integers(0, 10**11), st.integers(0, 10**11))
@settings(deadline=None)
def test_the_largest_batch_fits_and_one_row_more_does_not(
    shape: KVShape, spec: str, tokens: int, gpu: int, weights: int
) -> None:
    method = parse_method(spec)
    rows = largest_batch(shape, method, gpu, weights, tokens, reserve_bytes=0)
    if rows:
        assert kv_bytes(shape, method, tokens, rows).bytes <= gpu - weights
    assert rows < MOST_ROWS
    assert gpu < weights or kv_bytes(shape, method, tokens, rows + 1).bytes > gpu - weights


def test_nothing_fits_beside_weights_that_do_not() -> None:
    shape, full = read_config(LLAMA), parse_method("full")
    assert longest_context(shape, full, 8 * 2**30, 16 * 10**9) == 0
    assert largest_batch(shape, full, 8 * 2**30, 16 * 10**9, 1) == 0


def test_a_window_in_every_layer_limits_no_context() -> None:
    shape = read_config(tiny_config("mistral").to_dict())
    assert len(shape.keeping("window")) == 3
    assert longest_context(shape, parse_method("turboquant"), 2**30, 0, reserve_bytes=0) == MOST_TOKENS


# --- presets and weights


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_where_its_numbers_come_from(path: Path) -> None:
    entry = json.loads(path.read_text())
    assert set(entry) == {"title", "source", "parameters", "config"}
    assert "hub" in entry["source"]
    shape = read_config(entry["config"])
    assert kv_bytes(shape, parse_method("full"), 1000).bytes > 0
    assert shape.parameters == entry["parameters"]
    assert not any("leaves these" in note for note in shape.notes)


def test_presets_of_registered_models_have_their_size() -> None:
    from turboquant.models.registry import MODELS

    for name, known in (("qwen2.5-3b", "qwen2.5-3b-instruct"), ("mistral-7b-v0.3", "mistral-7b-instruct")):
        assert preset(name).parameters == pytest.approx(MODELS[known].parameters * 1e9, rel=0.005)


def test_bytes_of_weights() -> None:
    assert [weight_bytes(10, bits) for bits in (32, 16, 8, 4)] == [40, 20, 10, 5]
