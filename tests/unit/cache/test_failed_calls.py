"""A forward call that fails midway leaves a cache that works, or one that says so at the next call."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from tests.support.models import tokens
from turboquant import hf_attention
from turboquant.cache.build import build_cache, cache_report
from turboquant.hf_attention import observe_queries
from turboquant.kernels.scoring import Scoring
from turboquant.methods import parse_method
from turboquant.models.families import FAMILIES, family_model
from turboquant.models.load import tiny_model

SPECS = ["turboquant:bits=4,residual_length=16", "kivi:residual_length=16", "hf-quanto:residual_length=16"]


class Failing:
    """Raises in the attention of one layer, as a lack of memory would."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def record(self, layer_idx: int, query: torch.Tensor, scoring: Scoring) -> None:
        if layer_idx == self.layer:
            raise MemoryError


def fail(model, cache, ids: torch.Tensor, layer: int) -> None:
    with observe_queries(Failing(layer)), pytest.raises(MemoryError):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("before", [0, 150])
@pytest.mark.parametrize("rows", [1, 2])
def test_layers_of_different_lengths_are_refused_until_the_cache_is_reset(
    llama, spec: str, layer: int, before: int, rows: int
) -> None:
    cache = build_cache(llama.config, parse_method(spec))
    if before:
        llama(tokens(rows, before), past_key_values=cache)
    fail(llama, cache, tokens(rows, 5), layer)
    for count in (1, 7):  # with and without a mask
        with pytest.raises(ValueError, match=r"an earlier call failed midway; call reset\(\) on the cache") as caught:
            llama(tokens(rows, count), past_key_values=cache)
        assert "\n" not in str(caught.value)
    cache.reset()
    fresh = build_cache(llama.config, parse_method(spec))
    logits = [llama(tokens(rows, 160), past_key_values=one).logits for one in (cache, fresh)]
    assert torch.equal(*logits)


def test_windows_that_a_failed_call_has_reached_are_noticed() -> None:
    """In Gemma-3 the only compressed layer is the last one; the sliding ones before it have taken the call."""
    model = tiny_model("gemma3")
    cache = build_cache(model.config, parse_method("turboquant:bits=4"))
    model(tokens(1, 150), past_key_values=cache)
    fail(model, cache, tokens(1, 5), layer=1)
    with pytest.raises(ValueError, match="layer 0 of the cache holds 156 tokens, and 151 by what layer 2 holds"):
        model(tokens(1, 1), past_key_values=cache)
    cache.reset()
    fresh = build_cache(model.config, parse_method("turboquant:bits=4"))
    logits = [model(tokens(1, 160), past_key_values=one).logits for one in (cache, fresh)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("spec", SPECS[:2])
def test_a_wrong_attention_function_does_not_poison_an_empty_cache(architecture: str, spec: str) -> None:
    model = tiny_model(architecture)
    cache, fresh = (build_cache(model.config, parse_method(spec)) for _ in range(2))
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="needs the attention function 'turboquant'"):
        model(tokens(2, 150), past_key_values=cache)
    model.set_attn_implementation("turboquant")
    logits = [model(tokens(2, 150), past_key_values=one).logits for one in (cache, fresh)]
    assert torch.equal(*logits)
    assert cache_report(cache).tokens == 150


def test_a_wrong_attention_function_takes_nothing_from_a_filled_cache() -> None:
    model = tiny_model("llama")
    cache, fresh = (build_cache(model.config, parse_method("turboquant:bits=4")) for _ in range(2))
    for one in (cache, fresh):
        model(tokens(2, 150), past_key_values=one)
    model.set_attn_implementation("eager")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="needs the attention function 'turboquant'"):
            model(tokens(2, 4), past_key_values=cache)
    model.set_attn_implementation("turboquant")
    logits = [model(tokens(2, 4), past_key_values=one).logits for one in (cache, fresh)]
    assert torch.equal(*logits)


def test_the_advice_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    cache = build_cache(model.config, parse_method("turboquant"))
    with pytest.raises(RuntimeError, match="it is registered, and the model must be set to it, which is 'sdpa' now"):
        model(tokens(1, 20), past_key_values=cache)
    monkeypatch.delitem(AttentionInterface._global_mapping, "turboquant")
    with pytest.raises(RuntimeError, match=r"call turboquant.attach\(model\)"):
        model(tokens(1, 20), past_key_values=cache)


def test_a_model_that_works_on_keys_itself_is_not_told_to_do_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JetMoE does, if nothing here knew it: a model that is new and does so too."""
    monkeypatch.setattr("turboquant.cache.kinds.WORK_ON_STATES", set())
    model = family_model(FAMILIES["jetmoe"])
    hf_attention.register()
    model.set_attn_implementation("turboquant")
    with pytest.raises(RuntimeError, match="this model cannot use a compressed cache: its layers work on") as caught:
        model(tokens(1, 20), past_key_values=build_cache(model.config, parse_method("turboquant")))
    assert "register()" not in str(caught.value)


@pytest.mark.parametrize("spec", ["turboquant:bits=4,residual_length=16", "kivi", "hf-quanto", "turboquant-paper"])
class TestGradients:
    @pytest.fixture(autouse=True)
    def _gradients(self):
        with torch.enable_grad():
            yield

    def gradients(self, cache, *pieces: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of a loss on the last piece, with the others read before."""
        self.model.zero_grad()
        for piece in pieces[:-1]:
            self.model(piece, past_key_values=cache)
        self.model(pieces[-1], past_key_values=cache, labels=pieces[-1]).loss.backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def test_one_call_trains_as_with_the_full_cache(self, spec: str) -> None:
        """Also where most of its tokens are packed behind it."""
        self.model = tiny_model("llama").requires_grad_(True)
        cache = build_cache(self.model.config, parse_method(spec))
        expected = self.gradients(DynamicCache(config=self.model.config), tokens(2, 180))
        actual = self.gradients(cache, tokens(2, 180))
        assert cache_report(cache).compressed_tokens
        assert actual.keys() == expected.keys()
        assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in expected)

    @pytest.mark.parametrize("first", [8, 170])
    @pytest.mark.parametrize("trained", ["", "layers.0.self_attn.k_proj", "layers.2.self_attn.v_proj"])
    def test_a_second_call_refuses_to_train(self, spec: str, first: int, trained: str) -> None:
        """Packed or not, what the cache holds has no way back; adapters on single projections are no exception."""
        self.model = tiny_model("llama")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained in name)
        cache = build_cache(self.model.config, parse_method(spec))
        with pytest.raises(RuntimeError, match="no gradients flow through the tokens that a compressed cache"):
            self.gradients(cache, tokens(1, first), tokens(1, 20, seed=1))

    def test_calls_that_nobody_trains_on_need_no_no_grad(self, spec: str) -> None:
        self.model = tiny_model("llama").requires_grad_(True)
        cache = build_cache(self.model.config, parse_method(spec))
        for size in (170, 1, 1):
            self.model(tokens(1, size), past_key_values=cache)
        assert cache_report(cache).tokens == 172
