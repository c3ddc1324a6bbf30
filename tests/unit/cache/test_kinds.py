"""Layers whose model computes with keys and values itself, and layers that keep a recurrence beside them."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.models import Lossless, tiny_tokenizer, tokens
from turboquant import attach
from turboquant.cache.build import build_cache, cache_bytes, cache_report, layer_states
from turboquant.cache.kinds import DenseLayer, HybridLayer, why_dense
from turboquant.methods import NoSuchLayerError, parse_method
from turboquant.models.families import FAMILIES, family_model
from turboquant.models.load import LoadedModel, ModelSpec, tiny_model
from turboquant.records.comparison import Settings
from turboquant.run.compare import compare

DENSE = ("deepseek-v3", "falcon-40b", "bloom", "jetmoe", "diffllama")
HYBRID = "falcon-h1"


@pytest.fixture(scope="module", params=[*DENSE, HYBRID])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made = family_model(FAMILIES[request.param])
    assert attach(made).compressed_layers == 4
    return made


def loaded_of(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, tiny_tokenizer(), ModelSpec("tiny", "test/tiny", None, ""), "fp32", "cpu")


def fed(model: PreTrainedModel, method: str | Lossless, pieces: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
    cache = build_cache(model.config, parse_method(method) if isinstance(method, str) else method)
    parts = tokens(2, sum(pieces)).split(pieces, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1), cache


def test_the_kind_is_that_of_the_model(model: PreTrainedModel) -> None:
    kind = HybridLayer if model.config.model_type == "falcon_h1" else DenseLayer
    cache = build_cache(model.config, parse_method("turboquant"))
    assert {type(layer) for layer in cache.layers} == {kind}
    assert (why_dense(model.config) is not None) == (kind is DenseLayer)
    assert why_dense(tiny_model("llama").config) is None


def test_what_is_packed_without_rounding_changes_nothing(model: PreTrainedModel) -> None:
    pieces = (60, 7, 1, 1, 30)
    expected, full = fed(model, "full", pieces)
    actual, cache = fed(model, Lossless(), pieces)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert cache_report(cache).compressed_tokens >= 64
    for layer in range(4):
        for one, other in zip(layer_states(cache, layer), layer_states(full, layer), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_read_exactly_and_later_tokens_read_its_codes(model: PreTrainedModel) -> None:
    expected, _ = fed(model, "full", (200, 5))
    actual, cache = fed(model, "turboquant:bits=2,residual_length=16", (200, 5))
    assert torch.equal(actual[:, :200], expected[:, :200])
    assert not torch.equal(actual[:, 200:], expected[:, 200:])
    report = cache_report(cache)
    assert report.compressed_layers == 4
    assert report.compressed_tokens >= 128
    assert report.bytes == cache_bytes(cache) < report.full_precision_bytes


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_says_the_same(model: Any, beams: int) -> None:
    ids = tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options: dict[str, Any] = {
        "attention_mask": mask, "do_sample": False, "num_beams": beams, "max_new_tokens": 12, "min_new_tokens": 12
    }  # fmt: skip
    full, packed = (
        model.generate(ids, past_key_values=build_cache(model.config, method), **options)
        for method in (parse_method("full"), Lossless())
    )
    assert torch.equal(full, packed)


def test_a_cache_that_was_emptied_starts_anew(model: PreTrainedModel) -> None:
    expected, cache = fed(model, "turboquant:bits=4", (90, 3))
    cache.reset()
    parts = tokens(2, 93).split((90, 3), dim=1)
    again = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
    assert torch.equal(again, expected)


def test_gradients_of_one_call_are_the_models_and_later_ones_are_refused(model: PreTrainedModel) -> None:
    if model.config.model_type == "falcon_h1":
        pytest.skip("its recurrent states are made without gradients by the library")
    with torch.enable_grad():
        embed: Any = model.get_input_embeddings()
        embedded = embed(tokens(1, 80)).requires_grad_()
        found = []
        for method in ("full", "turboquant:bits=2"):
            cache = build_cache(model.config, parse_method(method))
            logits = model(inputs_embeds=embedded, past_key_values=cache).logits
            found.append(torch.autograd.grad(logits.square().mean(), embedded)[0])
        assert torch.equal(*found)
        more = embed(tokens(1, 1)).requires_grad_()
        with pytest.raises(RuntimeError, match="gradients"):
            model(inputs_embeds=more, past_key_values=cache).logits.mean().backward()


def test_a_comparison_measures_tokens_and_says_why_heads_are_missing(model: PreTrainedModel) -> None:
    prompt = "All that is gold does not glitter, not all those who wander are lost. " * 3
    settings = Settings(max_new_tokens=8, seed=0)
    comparison = compare(loaded_of(model), prompt, parse_method("turboquant:bits=2,residual_length=16"), settings)
    assert comparison.tokens is not None
    assert comparison.tokens.mean_kl > 0
    if model.config.model_type == "falcon_h1":
        assert comparison.notes == []
        assert comparison.heads is not None
        assert comparison.heads.layer_indices == [0, 1, 2, 3]
    else:
        assert comparison.heads is None
        assert comparison.notes == [f"There are no figures of attention heads: {why_dense(model.config)}."]


@pytest.fixture(scope="module")
def hybrid() -> PreTrainedModel:
    made = family_model(FAMILIES[HYBRID])
    attach(made)
    return made


class TestHybrid:
    def test_states_are_counted(self, hybrid: PreTrainedModel) -> None:
        _, full = fed(hybrid, "full", (40,))
        _, cache = fed(hybrid, "turboquant:bits=4", (40,))
        assert cache_report(cache).state_bytes == cache_report(full).state_bytes > 0

    def test_rows_can_be_repeated_and_selected(self, hybrid: PreTrainedModel) -> None:
        _, cache = fed(hybrid, "turboquant:bits=8", (90,))
        expected = hybrid(tokens(2, 1, seed=3), past_key_values=cache).logits
        _, cache = fed(hybrid, "turboquant:bits=8", (90,))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        actual = hybrid(tokens(2, 1, seed=3).flip(0), past_key_values=cache).logits
        torch.testing.assert_close(actual, expected.flip(0), atol=1e-5, rtol=1e-4)

    def test_tokens_cannot_be_taken_back(self, hybrid: PreTrainedModel) -> None:
        _, cache = fed(hybrid, "turboquant:bits=8", (30,))
        with pytest.raises(RuntimeError, match="does not track past states"):
            cache.layers[0].crop(-1)
        assert cache.get_seq_length() == 30

    @pytest.mark.parametrize("method", ["hf-quanto", "hf-hqq"])
    def test_methods_of_another_library_are_refused(self, hybrid: PreTrainedModel, method: str) -> None:
        with pytest.raises(NoSuchLayerError, match="cannot hold layer 0, which keeps a recurrent state"):
            build_cache(hybrid.config, parse_method(method))
