"""The methods beside TurboQuant: their options, groups of tokens, filling one layer and reading it back."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from turboquant.cache.build import QuantizedLayer, build_cache, cache_report, fill_cache, layer_states
from turboquant.methods import METHODS, Method, parse_method
from turboquant.models.dry_run import PlainQuantizer
from turboquant.models.load import tiny_model
from turboquant.quant.quantizer import PackedTensor, Quantizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class GroupedVectors(PackedTensor):
    """Vectors less the mean of their group, and that mean: lossless but for rounding."""

    codes: Tensor
    means: Tensor


class GroupedQuantizer(Quantizer[GroupedVectors]):
    token_group = 8

    def quantize(self, x, like=None, valid=None):
        groups = x.double().unflatten(2, (-1, 8))
        means = groups.mean(dim=3)
        return GroupedVectors((groups - means.unsqueeze(3)).flatten(2, 3), means)

    def dequantize(self, packed):
        return (packed.codes.unflatten(2, (-1, 8)) + packed.means.unsqueeze(3)).flatten(2, 3).float()


@dataclass(frozen=True)
class LosslessGroups(Method):
    """Keys in groups of eight tokens, values one by one; not registered."""

    title: ClassVar[str] = "lossless groups"
    rounds_exact: ClassVar[bool] = False
    residual_length: int = 8
    sink_length: int = 2

    def quantizers(self, key_dim, value_dim, layer_idx, device):
        return GroupedQuantizer(), PlainQuantizer()

    def __str__(self) -> str:
        return "lossless-groups"


LosslessGroups.name = "lossless-groups"


def generated(model: Any, ids: Tensor, method: Method, mask: Tensor, **options: Any) -> tuple[Tensor, Any]:
    cache = build_cache(model.config, method)
    more = {"max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **more), cache


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("pads", [0, 25])
def test_generate_with_groups_gives_the_tokens_of_the_plain_cache(llama, options, pads: int) -> None:
    rows = 1 if "prompt_lookup_num_tokens" in options else 3
    ids = torch.randint(3, 256, (rows, 15), generator=torch.Generator().manual_seed(3)).repeat(1, 7)
    mask = torch.ones_like(ids)
    ids[-1, :pads] = mask[-1, :pads] = 0
    expected, _ = generated(llama, ids, parse_method("full"), mask, **options)
    actual, cache = generated(llama, ids, LosslessGroups(), mask, **options)
    assert cache_report(cache).compressed_tokens > 30
    assert torch.equal(actual, expected)


def filled(spec: str, tokens: int) -> tuple[QuantizedLayer, Tensor]:
    layer = QuantizedLayer(parse_method(spec), 0)
    states = torch.randn(2, 2, tokens, 64, generator=torch.Generator().manual_seed(0))
    layer.update(states, states)
    layer.compress()
    return layer, states


def test_a_crop_into_a_group_keeps_whole_groups_and_what_they_held() -> None:
    layer, _ = filled("kivi:bits=2,residual_length=0", 170)
    before = layer.dense()
    assert (layer.packed_length, layer.exact_length) == (160, 10)
    layer.crop(-30)
    assert (layer.packed_length, layer.exact_length) == (128, 12)
    for one, two in zip(layer.dense(), before, strict=True):
        assert torch.equal(one[:, :, :128], two[:, :, :128])
        assert torch.equal(one[:, :, 128:], two[:, :, 128:140].half().float())  # exact tokens are kept in 16 bits
    layer.update(*(torch.full((2, 2, 60, 64), 9.0),) * 2)
    layer.compress()
    assert (layer.packed_length, layer.exact_length) == (192, 8)
    for one, two in zip(layer.dense(), before, strict=True):  # groups that were not cut are what they were
        assert torch.equal(one[:, :, :128], two[:, :, :128])


@pytest.mark.parametrize("spec", ["kivi:bits=4,residual_length=0", "qjl:residual_length=0"])
def test_a_crop_that_leaves_no_whole_group_gives_up_packing(spec: str) -> None:
    layer, _ = filled(spec, 170)
    before = layer.dense()[0]
    layer.crop(-150)
    assert (layer.packed_length, layer.exact_length) == (0, 20)
    assert torch.equal(layer.dense()[0], before[:, :, :20].half().float())
    assert layer.batch_size == 2


@pytest.mark.parametrize("spec", ["kivi:residual_length=8,sink_length=2", "qjl:residual_length=0"])
@pytest.mark.parametrize("pads", [5, 32, 70])
def test_what_stands_in_pads_never_reaches_a_group(spec: str, pads: int) -> None:
    """Also where pads end inside a group, and where the first blocks hold nothing else."""
    states = torch.randn(2, 2, 200, 64, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(2, 200, dtype=torch.bool)
    visible[0, :pads] = False
    dense = []
    for content in (0.0, 1e4):
        states[0, :, :pads] = content
        layer = QuantizedLayer(parse_method(spec), 0)
        for start in range(0, 200, 50):
            layer.update(*(states[:, :, start : start + 50],) * 2)
            layer.compress(visible[:, : start + 50])
        assert layer.packed_length % 32 == 0
        assert layer.packed_length >= pads
        dense.append(layer.dense())
    for one, two in zip(*dense, strict=True):
        assert torch.equal(one[0, :, pads:], two[0, :, pads:])
        assert torch.equal(one[1], two[1])


def test_filling_a_layer_is_what_a_prefill_call_does(llama) -> None:
    ids = torch.randint(3, 256, (2, 200), generator=torch.Generator().manual_seed(0))
    plain, expected = (build_cache(llama.config, parse_method(name)) for name in ("full", "turboquant:bits=3"))
    llama(ids, past_key_values=plain)
    actual = build_cache(llama.config, parse_method("turboquant:bits=3"))
    for layer_idx in range(3):
        fill_cache(actual, layer_idx, *layer_states(plain, layer_idx))
    # The first layer sees the same states in both runs; the prefill attends exactly, so the others do too.
    llama(ids, past_key_values=expected)
    for layer_idx in range(3):
        for one, two in zip(layer_states(actual, layer_idx), layer_states(expected, layer_idx), strict=True):
            assert torch.allclose(one, two, atol=1e-5)
        assert not torch.allclose(layer_states(actual, layer_idx)[0], layer_states(plain, layer_idx)[0], atol=1e-2)


def test_layer_states_of_a_plain_cache_are_its_tensors() -> None:
    cache = DynamicCache()
    keys, values = torch.randn(2, 1, 2, 9, 16)
    fill_cache(cache, 0, keys, values)
    assert torch.equal(layer_states(cache, 0)[0], keys)
    assert torch.equal(layer_states(cache, 0)[1], values)


def test_an_empty_layer_is_named(llama) -> None:
    for spec in ("full", "turboquant", "kivi"):
        with pytest.raises(ValueError, match="layer 1 of the cache holds no tokens"):
            layer_states(build_cache(llama.config, parse_method(spec)), 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rtn:group_size=33", "group_size must be one of 16, 32, 64, 128, got 33"),
        ("rtn:rotation=qr", "rotation must be one of none, hadamard, got 'qr'"),
        ("kivi:group_size=16", "group_size must be one of 32, 64, 128, got 16"),
        ("polarquant:rotation=none", "rotation must be one of hadamard, qr, got 'none'"),
        ("qjl:outliers=-1", "outliers must be a whole number, 0 or more, got -1"),
        ("qjl:double_layers=-1", "double_layers must be a whole number, 0 or more, got -1"),
        ("hf-quanto:bits=3", "bits must be one of 2, 4, got 3"),
        ("hf-hqq:bits=3", "bits must be one of 1, 2, 4, 8, got 3"),
        ("hf-quanto:axis_key=1", "axis_key must be one of 0, -1, got 1"),
        ("hf-hqq:residual_length=-1", "residual_length must be a whole number of tokens, 0 or more, got -1"),
        ("hf-fp8:bits=8", "hf-fp8 has no options, got 'bits=8'"),
    ],
)
def test_what_is_wrong_is_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(spec)


def test_required_methods_are_registered() -> None:
    assert {"rtn", "kivi", "polarquant", "qjl", "hf-quanto", "hf-hqq", "hf-fp8"} <= set(METHODS)


def test_payload_counts_codes_only() -> None:
    expected = {"rtn": 4, "rtn:key_bits=4,value_bits=2": 3, "kivi": 4, "polarquant": 2.875, "polarquant:bits=3": 1.9375}
    assert {spec: parse_method(spec).payload_bits for spec in expected} == expected
    assert [parse_method(f"hf-{name}").payload_bits for name in ("quanto:bits=2", "hqq", "fp8")] == [2, 4, 8]


def test_where_layers_differ_the_payload_is_what_the_codes_take(llama) -> None:
    """QJL's first layers have twice the signs, so its payload is counted: here key bits 4 + 1 (of 64) and 2."""
    ids = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    for spec, key_bits in (("qjl", 5), ("qjl:double_layers=0", 3), ("qjl:double_layers=0,outliers=0", 2)):
        cache = build_cache(llama.config, parse_method(spec))
        llama(ids, past_key_values=cache)
        assert cache_report(cache).payload_ratio == pytest.approx(16 / ((key_bits + 2) / 2))
        assert parse_method(spec).payload_bits is None


def test_polarquant_needs_dims_that_can_be_halved() -> None:
    with pytest.raises(ValueError, match="polarquant needs an even head_dim, got 5"):
        parse_method("polarquant").quantizers(5, 5, 0, CPU)


def test_shared_tables_are_counted_once() -> None:
    """PolarQuant has one rotation for all layers, QJL one projection for the layers of one width."""
    model = tiny_model("llama")
    ids = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    shared = {}
    for spec in ("polarquant", "qjl", "qjl:double_layers=1", "rtn", "kivi"):
        cache = build_cache(model.config, parse_method(spec))
        model(ids, past_key_values=cache)
        shared[spec] = cache_report(cache).shared_bytes
    matrix = 64 * 64 * 4
    assert shared["qjl"] == 4 * matrix
    assert shared["qjl:double_layers=1"] == (4 + 2) * matrix
    assert matrix < shared["polarquant"] < matrix + 1000
    assert shared["rtn"] == shared["kivi"] == 0
