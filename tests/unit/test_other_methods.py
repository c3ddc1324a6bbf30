"""The methods beside TurboQuant, and what serves all of them: filling one layer, reading it back."""

import pytest
import torch
from transformers import DynamicCache

from turboquant.cache import build_cache, fill_cache, layer_states
from turboquant.methods import parse_method


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
    for spec in ("full", "turboquant"):
        with pytest.raises(ValueError, match="layer 1 of the cache holds no tokens"):
            layer_states(build_cache(llama.config, parse_method(spec)), 1)
