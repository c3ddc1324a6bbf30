"""Method strings: they read back, and what is wrong is named."""

import contextlib
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant.cache.build import build_cache, cache_report
from turboquant.methods import METHODS, Method, NoSuchLayerError, parse_method
from turboquant.methods.layer_bits import read_layer_bits, write_layer_bits
from turboquant.models.load import tiny_model
from turboquant.sizing import SizingError, kv_bytes, read_config


@pytest.mark.parametrize("name", METHODS)
def test_defaults_read_back(name: str) -> None:
    method: Any = cast(Any, METHODS[name])()
    assert parse_method(str(method)) == method
    assert method.title
    assert method.summary
    assert method.reference


@given(
    st.sampled_from(["turboquant", "turboquant-paper"]),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 4096),
    st.integers(0, 64),
    st.integers(0, 2**31 - 1),
    st.booleans(),
    st.sampled_from(["hadamard", "qr"]),
    st.sampled_from(["none", "gaussian", "orthogonal"]),
    st.sampled_from(["matched", "norm", "unbiased"]),
)
def test_str_and_parse_are_inverse(  # noqa: PLR0913
    name, key, value, residual, sinks, seed, center, rotation, qjl, scale
) -> None:
    method: Any = cast(Any, METHODS[name])(
        key_bits=key,
        value_bits=value,
        residual_length=residual,
        sink_length=sinks,
        seed=seed,
        center=center,
        rotation=rotation,
        qjl=qjl,
        scale=scale,
    )
    assert parse_method(str(method)) == method
    assert method.bits == (key if key == value else None)


@pytest.mark.parametrize(
    "spec",
    [
        "rtn:bits=3,group_size=64,rotation=hadamard",
        "turboquant:bits=3,layers=0+2-3:2+5-999:4/3",
        "turboquant-paper:key_bits=3,value_bits=2,layers=1:3",
        "kivi:key_bits=4,value_bits=2,residual_length=0,group_size=64",
        "polarquant:bits=3,sink_length=4,seed=7,rotation=hadamard",
        "qjl:key_bits=3,value_bits=4,double_layers=0,outliers=4",
        "hf-quanto:bits=2,group_size=32,axis_value=-1",
        "hf-hqq:bits=8,residual_length=64",
        "hf-fp8",
    ],
)
def test_options_read_back(spec: str) -> None:
    assert str(parse_method(spec)) == spec


def test_defaults_are_those_of_the_papers() -> None:
    assert parse_method("qjl") == parse_method("qjl:bits=2,residual_length=128,double_layers=15,outliers=8")
    assert parse_method("kivi") == parse_method("kivi:bits=4,residual_length=128,group_size=32")
    assert parse_method("polarquant") == parse_method("polarquant:bits=4,residual_length=0,rotation=qr")
    assert parse_method("rtn") == parse_method("rtn:bits=4,residual_length=0,group_size=32,rotation=none")


def test_bits_is_a_shorthand() -> None:
    assert parse_method("turboquant:bits=3") == parse_method("turboquant:key_bits=3,value_bits=3")
    assert str(parse_method("turboquant: key_bits = 3 , value_bits=3 ")) == "turboquant:bits=3"
    assert str(parse_method("turboquant:bits=4,value_bits=2")) == "turboquant:key_bits=4,value_bits=2"
    assert parse_method("turboquant").payload_bits == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown method ''"),
        ("turbquant", "did you mean 'turboquant'"),
        ("turboquant:bits=0", "bits must be a whole number from 1 to 8, got 0"),
        ("turboquant:value_bits=9", "value_bits must be a whole number from 1 to 8, got 9"),
        ("turboquant:bits=2.5", "bits must be a whole number, got '2.5'"),
        ("turboquant:bits=²", "bits must be a whole number, got '²'"),
        ("turboquant:bits=" + "9" * 5000, "bits must be a whole number"),
        ("turboquant:bits", "options are written key=value, got 'bits'"),
        ("turboquant:bits=3,bits=4", "bits is given twice"),
        ("turboquant:bitz=3", "did you mean 'bits'"),
        ("turboquant:rotation=haar", "rotation must be one of hadamard, qr, got 'haar'"),
        ("turboquant:center=yes", "center must be true or false, got 'yes'"),
        ("turboquant:residual_length=-1", "residual_length must be a whole number of tokens, 0 or more, got -1"),
        ("turboquant:seed=-1", "seed must be a whole number from 0 to"),
        ("turboquant:layers=2", "layer 2 is given no bits: write them behind it, like 2:2"),
        ("turboquant:layers=2:9", "bits of a layer must be a whole number from 1 to 8, got 9"),
        ("turboquant:layers=5-2:3", "a range of layers runs upwards, got '5-2:3'"),
        ("turboquant:layers=1:3+0-4:2", "layer 1 is given bits twice"),
        ("turboquant:layers=1;2", "layers are written like 0.4-6:2.9:5/3 .layers, then bits., got '1;2'"),
        ("turboquant:layers=1000:3", "layers are written like"),
        ("rtn:layers=1:3", "unknown option of rtn 'layers'"),
        ("full:bits=4", "full has no options, got 'bits=4'"),
        ("x" * 5000, f"unknown method '{'x' * 40}': choose from"),
        (f"turboquant:{'y' * 5000}=1", f"unknown option of turboquant '{'y' * 40}'"),
        (f"turboquant:rotation={'z' * 5000}", f"rotation must be one of hadamard, qr, got '{'z' * 40}'"),
    ],
)
def test_what_is_wrong_is_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_method(spec)


@given(
    st.dictionaries(st.integers(0, 999), st.tuples(st.integers(1, 8), st.integers(1, 8)), max_size=12),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_bits_of_layers_read_back(layers: dict[int, tuple[int, int]], key_bits: int, value_bits: int) -> None:
    base = f"turboquant:key_bits={key_bits},value_bits={value_bits}"
    method = parse_method(f"{base},layers={write_layer_bits(layers)}")
    assert parse_method(str(method)) == method
    assert [method.layer_kind(i) for i in range(1000)] == [layers.get(i, (key_bits, value_bits)) for i in range(1000)]
    named = {layer for layer, bits in layers.items() if bits != (key_bits, value_bits)}
    assert set(read_layer_bits(str(method).partition("layers=")[2])) == named  # nothing is said twice


def test_layers_are_packed_in_their_own_bits_and_others_are_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    method = parse_method("turboquant:bits=2,residual_length=0,layers=1:4/3+3:8")
    cache = build_cache(model.config, method)
    model(torch.arange(3, 203)[None] % 250, past_key_values=cache)
    widths = [
        [sum(p.shape[-1] for p in t.storage.codes) for t in (layer.packed_keys, layer.packed_values)]
        for layer in cache.layers
    ]
    dim = model.config.head_dim
    assert [[8 * w // dim for w in pair] for pair in widths] == [[2, 2], [4, 3], [2, 2], [8, 8]]
    report = cache_report(cache)
    shape = read_config(model.config.to_dict())
    estimate = kv_bytes(shape, method, 200, value_bytes=4)
    assert (estimate.bytes, estimate.key_bytes) == (report.bytes, report.key_bytes)
    assert report.payload_ratio == 16 * 8 / (2 + 2 + 4 + 3 + 2 + 2 + 8 + 8)
    with pytest.raises(NoSuchLayerError, match="gives bits to layer 4, the model has layers 0 to 3"):
        build_cache(model.config, parse_method("turboquant:layers=4:2"))
    with pytest.raises(SizingError, match="layers 0 to 3"):
        kv_bytes(shape, parse_method("turboquant:layers=4:2"), 200)


def test_bits_for_layers_that_are_not_compressed_are_refused() -> None:
    """Gemma-3's first two layers of three keep a window: their bits would change nothing, and nobody would notice."""
    config = tiny_model("gemma3").config
    assert build_cache(config, parse_method("turboquant:layers=2:3")).layers[2].method.layers == "2:3"
    message = r"gives bits to layers 0-1, whose cache is not compressed .* \(1 of 3 layers are compressed\)"
    method = parse_method("turboquant:layers=0-1:2+2:3")
    with pytest.raises(NoSuchLayerError, match=message):
        build_cache(config, method)
    with pytest.raises(SizingError, match=message):
        kv_bytes(read_config(config.to_dict()), method, 200)


@given(st.text(max_size=60))
def test_any_text_is_a_method_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_method(text), Method)


def test_packed_length_follows_the_contract() -> None:
    method = parse_method("turboquant:bits=4")
    assert [method.packed_length(n) for n in (0, 131, 132, 195, 196, 512)] == [0, 0, 64, 64, 128, 384]
    loose = parse_method("turboquant:bits=4,group_size=0")
    assert [loose.packed_length(n) for n in (0, 99, 100, 131, 132, 512)] == [0, 0, 32, 32, 64, 416]
    assert parse_method("turboquant-paper:bits=4").packed_length(7) == 7
    assert [parse_method("kivi:group_size=64").packed_length(n) for n in (128, 191, 192, 300)] == [0, 0, 64, 128]
    assert parse_method("hf-quanto").packed_length(7) == 7


def test_two_methods_cannot_share_a_name() -> None:
    with pytest.raises(TypeError, match="two methods are named 'full'"):
        type("Again", (METHODS["full"],), {"name": "full"})
