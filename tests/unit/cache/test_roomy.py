"""The uncompressed cache with room against Hugging Face's own."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, FalconH1Config
from transformers.cache_utils import DynamicSlidingWindowLayer

from tests.support.models import tokens
from turboquant.cache.build import build_cache, cache_report, layer_states
from turboquant.cache.roomy import RoomyCache, RoomyLayer, roomy
from turboquant.methods import parse_method
from turboquant.models.tiny import tiny_model
from turboquant.run.generate import new_cache

FULL = parse_method("full")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def two(model: Any, rows: int = 2) -> list[Any]:
    return [DynamicCache(config=model.config), roomy(build_cache(model.config, FULL), model.config)]


def test_it_gives_the_same_logits_and_states(model: Any) -> None:
    plain, held = two(model)
    assert type(held) is RoomyCache
    for piece in tokens(2, 60).split((20, 1, 1, 30, 8), dim=1):
        expected, actual = (model(piece, past_key_values=cache).logits for cache in (plain, held))
        assert torch.equal(actual, expected)
    for layer in range(3):
        assert all(
            torch.equal(*pair) for pair in zip(layer_states(held, layer), layer_states(plain, layer), strict=True)
        )
    assert held.get_seq_length() == 60
    held.shrink()
    reports = [cache_report(cache).model_dump() for cache in (plain, held)]
    assert reports[0] | {"cache_class": "RoomyCache"} == reports[1]


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "reset", "copy"])
def test_it_can_be_changed_as_the_other(model: Any, change: str) -> None:
    found = []
    for cache in two(model):
        model(tokens(2, 40), past_key_values=cache)
        used: Any = cache
        if change == "crop":
            cache.crop(-7)
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
        elif change == "reset":
            used = two(model)[0] if type(cache) is DynamicCache else cache
            used.reset()
        else:
            used = copy.deepcopy(cache)
            cache.crop(-30)
        rows = {"repeat": 4, "select": 1}.get(change, 2)
        found.append(model(tokens(rows, 3, seed=1), past_key_values=used).logits)
    assert torch.equal(*found)


def test_room_grows_by_an_eighth_and_is_given_back(model: Any) -> None:
    held = two(model)[1]
    model(tokens(1, 80), past_key_values=held)
    layer: RoomyLayer = held.layers[0]
    assert layer.full
    model(tokens(1, 1), past_key_values=held)
    assert layer.exact_keys is not None
    assert layer.exact_keys.shape[2] == 81 + 10
    assert not layer.full
    held.shrink()
    assert layer.exact_keys.shape[2] == 81


def test_only_what_keeps_all_tokens_gets_room() -> None:
    sliding = tiny_model("gemma3").config
    kinds = [type(layer) for layer in roomy(build_cache(sliding, FULL), sliding).layers]
    assert kinds == [DynamicSlidingWindowLayer, DynamicSlidingWindowLayer, RoomyLayer]
    recurrent = FalconH1Config(num_hidden_layers=1)
    plain = build_cache(recurrent, FULL)
    assert roomy(plain, recurrent) is plain
    llama = tiny_model("llama").config
    packed = build_cache(llama, parse_method("turboquant"))
    assert roomy(packed, llama) is packed
    assert type(new_cache(llama, torch.device("cpu"), FULL)) is DynamicCache
    assert type(new_cache(llama, torch.device("cuda"), FULL)) is RoomyCache
