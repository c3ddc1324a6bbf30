"""Hugging Face's own quantized layers beside the plain cache: every operation is right, or clearly refused."""

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, cache_utils

from tests.support.models import reachable_storages, tiny_loaded
from turboquant.cache.build import CompressedCache, build_cache, cache_report, fill_cache, layer_states
from turboquant.cache.foreign import ForeignLayer
from turboquant.methods import parse_method
from turboquant.models.load import tiny_model
from turboquant.records.comparison import Settings
from turboquant.run.compare import compare

HAVE_HQQ = transformers.utils.is_hqq_available()
# quanto compiles its extension at first use.
HAVE_QUANTO = transformers.utils.is_optimum_quanto_available() and shutil.which("ninja") and shutil.which("c++")
HAVE_FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")
BACKENDS = {
    "hf-quanto": pytest.mark.skipif(not HAVE_QUANTO, reason="needs optimum-quanto, ninja and a C++ compiler"),
    "hf-hqq": pytest.mark.skipif(not HAVE_HQQ, reason="hqq is not installed"),
    "hf-fp8": pytest.mark.skipif(not HAVE_FP8, reason="this transformers has no fp8 cache"),
}


def given_backend(*values: Any) -> Any:
    """Parameters of a test, skipped where the first one's backend is missing."""
    return pytest.param(*values, marks=BACKENDS[values[0].partition(":")[0]])


ALL = [given_backend(spec) for spec in ("hf-quanto:residual_length=16", "hf-hqq:residual_length=16", "hf-fp8")]


def logits(model, ids, cache, sizes, mask=None) -> torch.Tensor:
    """Logits of all positions, fed in calls of these sizes."""
    parts, stop = [], 0
    for size in sizes:
        stop += size
        seen = None if mask is None else mask[:, :stop]
        parts.append(model(ids[:, stop - size : stop], past_key_values=cache, attention_mask=seen).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("architecture", ["llama", "phi"])
@pytest.mark.parametrize(
    "spec", [given_backend("hf-hqq:bits=8,group_size=16,residual_length=16"), given_backend("hf-fp8")]
)
@pytest.mark.parametrize("pads", [0, 30])
def test_eight_bits_are_nearly_the_full_cache(architecture: str, spec: str, pads: int) -> None:
    model = tiny_model(architecture)
    ids = torch.randint(3, 256, (2, 121), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    sizes = [71, *[1] * 20, 30]
    expected = logits(model, ids, DynamicCache(config=model.config), sizes, mask)
    cache = build_cache(model.config, parse_method(spec))
    actual = logits(model, ids, cache, sizes, mask)
    real = mask.bool()
    assert cache_report(cache).compressed_tokens > 70
    assert not torch.equal(actual, expected)
    assert (actual - expected)[real].norm() < 0.05 * expected[real].norm()


@pytest.mark.parametrize("spec", ALL)
def test_all_that_is_reached_is_counted(llama, spec: str) -> None:
    cache = build_cache(llama.config, parse_method(spec))
    assert isinstance(cache, CompressedCache)
    assert cache_report(cache).bytes == 0
    ids = torch.randint(3, 256, (3, 150), generator=torch.Generator().manual_seed(0))
    for sizes, rows in (([101, 1, 1], 3), ([20, 7], 3), ([], 2)):
        if sizes:
            logits(llama, ids, cache, sizes)
        else:
            cache.batch_select_indices(torch.tensor([2, 0]))
        report = cache_report(cache)
        assert report.bytes == sum(reachable_storages(cache).values())
        parts = ("key", "value", "scale", "exact", "spare", "shared")
        assert report.bytes == sum(getattr(report, f"{part}_bytes") for part in parts)
        assert min(report.key_bytes, report.value_bytes, report.scale_bytes) > 0
        assert report.full_precision_bytes == 2 * 2 * 3 * rows * 2 * 64 * report.tokens
        assert report.compressed_layers == report.layers == 3


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        given_backend("hf-quanto", 4 + 1),  # a scale and a shift in float32 for 64 values
        given_backend("hf-quanto:bits=2,group_size=32", 2 + 2),
        given_backend("hf-hqq:bits=2", 2 + 1),
        given_backend("hf-fp8", 8),
    ],
)
def test_bits_of_a_value(llama, spec: str, bits: int) -> None:
    cache = build_cache(llama.config, parse_method(spec))
    fill_cache(cache, 0, *torch.randn(2, 2, 2, 256, 64))
    report = cache_report(cache)
    assert (report.compressed_tokens, report.exact_tokens) == (256, 0)
    assert report.bits_per_value == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}])
def test_generate_runs_in_every_mode(llama, spec: str, options) -> None:
    ids = torch.randint(3, 256, (1, 15), generator=torch.Generator().manual_seed(3)).repeat(1, 5)
    cache = build_cache(llama.config, parse_method(spec))
    text = llama.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=25,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    assert text.shape == (1, 100)
    assert cache.get_seq_length() == 99
    assert layer_states(cache, 0)[0].shape[2] == 99


@pytest.mark.parametrize("spec", ALL)
def test_layers_that_are_not_full_attention_keep_their_own_kind(spec: str) -> None:
    model = tiny_model("gemma3")
    cache = build_cache(model.config, parse_method(spec))
    assert [isinstance(layer, ForeignLayer) for layer in cache.layers] == [False, False, True]
    ids = torch.randint(3, 256, (1, 80), generator=torch.Generator().manual_seed(0))
    logits(model, ids, cache, [60, 20])
    report = cache_report(cache)
    assert (report.compressed_layers, report.layers, report.tokens) == (1, 3, 80)
    assert report.bytes == sum(reachable_storages(cache).values())


@BACKENDS["hf-fp8"]
def test_values_beyond_the_first_scale_are_clamped_not_lost(llama) -> None:
    cache = build_cache(llama.config, parse_method("hf-fp8"))
    fill_cache(cache, 0, *torch.ones(2, 1, 2, 8, 64))
    fill_cache(cache, 0, *torch.full((2, 1, 2, 1, 64), -50.0))
    assert torch.equal(layer_states(cache, 0)[0][:, :, 8:], torch.full((1, 2, 1, 64), -1.0))


@pytest.mark.parametrize("spec", [given_backend("hf-quanto"), given_backend("hf-hqq")])
def test_groups_that_do_not_fit_are_refused_at_the_first_call(spec: str) -> None:
    model = tiny_model("llama", head_dim=80)
    ids = torch.randint(3, 256, (1, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="group_size 64 must divide head_dim, got 80"):
        model(ids, past_key_values=build_cache(model.config, parse_method(spec)))
    cache = build_cache(model.config, parse_method(f"{spec}:group_size=16"))
    model(ids, past_key_values=cache)
    assert cache_report(cache).compressed_tokens == 8


@BACKENDS["hf-quanto"]
def test_groups_of_tokens_that_do_not_fit_are_named(llama) -> None:
    cache = build_cache(llama.config, parse_method("hf-quanto:axis_key=-1"))
    with pytest.raises(ValueError, match="shape 1x2x7x64 cannot be split into groups of 64 along axis -1"):
        fill_cache(cache, 0, *torch.randn(2, 1, 2, 7, 64))


@pytest.mark.parametrize(("spec", "package"), [("hf-quanto", "optimum-quanto"), ("hf-hqq", "hqq")])
def test_a_missing_package_is_named(llama, monkeypatch, spec: str, package: str) -> None:
    for name in ("is_optimum_quanto_available", "is_hqq_available"):
        monkeypatch.setattr(transformers.utils, name, lambda: False)
    with pytest.raises(ImportError, match=f"{spec} needs the package {package}: pip install {package}"):
        build_cache(llama.config, parse_method(spec))


@BACKENDS["hf-quanto"]
def test_without_a_compiler_quanto_says_what_it_needs() -> None:
    code = (
        "import torch; from turboquant.methods import parse_method; layer = parse_method('hf-quanto').layer(None, 0); "
        "layer.update(*torch.randn(2, 1, 2, 8, 64)); layer.dense()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PATH": ""}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "could not build its extension at first use (it needs ninja and a C++ compiler" in done.stderr


def test_a_transformers_without_fp8_is_named(llama, monkeypatch) -> None:
    monkeypatch.delattr(cache_utils, "Fp8QuantizedLayer", raising=False)
    with pytest.raises(ImportError, match="hf-fp8 needs a transformers with Fp8QuantizedLayer"):
        build_cache(llama.config, parse_method("hf-fp8"))


@pytest.mark.parametrize("spec", ALL)
def test_crop_takes_a_negative_number(spec: str) -> None:
    layer = parse_method(spec).layer(cache_utils.DynamicLayer(), 0)
    with pytest.raises(ValueError, match="negative integer, got 3"):
        layer.crop(3)
    layer.crop(-3)  # an empty layer has nothing to remove
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize("spec", ALL)
def test_a_comparison_has_token_figures_and_no_head_figures(spec: str) -> None:
    loaded = tiny_loaded()
    result = compare(loaded, "A cat sat on the mat. " * 6, parse_method(spec), Settings(max_new_tokens=20))
    assert result.compressed.report.compressed_tokens > 100
    assert result.heads is None
    assert result.tokens is not None
    assert 0 < result.tokens.mean_kl < 1
    assert len(result.tokens.kl) == len(result.original.token_ids)
