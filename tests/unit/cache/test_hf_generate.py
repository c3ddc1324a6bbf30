"""Stock `model.generate()` with a packed cache: every decoding mode gives the tokens of the plain cache.

The method here packs without loss, so that any difference is the cache's fault and not the rounding's.
"""

from typing import Any, cast

import pytest
import torch

from tests.support.models import Lossless
from turboquant.cache.build import build_cache, cache_report
from turboquant.methods import parse_method
from turboquant.models.load import tiny_model

LOSSLESS = Lossless()
FULL = parse_method("full")
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returning several": {"num_beams": 4, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 5},
    "several return sequences": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_k": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 32},
}


def run(model, ids, method, mask=None, **options):
    torch.manual_seed(0)
    cache = build_cache(model.config, method)
    mask = torch.ones_like(ids) if mask is None else mask
    text = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, pad_token_id=0, eos_token_id=None, **options
    )
    return text, cache


# Hugging Face's own sliding layers do not crop past their window, so Gemma-3 has no prompt lookup on long prompts.
PAIRS = [(a, m) for a in ("llama", "qwen2", "gemma3") for m in MODES if (a, m) != ("gemma3", "prompt lookup")]


@pytest.mark.parametrize(("architecture", "mode"), PAIRS)
def test_modes(architecture: str, mode: str) -> None:
    model = tiny_model(architecture)
    ids = torch.randint(3, 256, (1, 90), generator=torch.Generator().manual_seed(2))
    if mode == "prompt lookup":
        ids = ids[:, :15].repeat(1, 6)
    expected, _ = run(model, ids, FULL, **MODES[mode])
    actual, cache = run(model, ids, LOSSLESS, **MODES[mode])
    assert cache_report(cache).compressed_tokens > 30
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_left_padded_batch(mode: str) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 256, (3, 90), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    ids[1, :25] = 0
    expected, _ = run(model, ids, FULL, mask, **MODES[mode])
    actual, cache = run(model, ids, LOSSLESS, mask, **MODES[mode])
    assert cache_report(cache).compressed_tokens > 30
    assert torch.equal(actual, expected)


def test_beams_follow_their_rows() -> None:
    """If reordering missed any part of the state, beams would read each other's history."""
    model = tiny_model("llama")
    ids = torch.randint(3, 256, (2, 120), generator=torch.Generator().manual_seed(4))
    for beams in (2, 5):
        expected, _ = run(model, ids, FULL, num_beams=beams)
        assert torch.equal(run(model, ids, LOSSLESS, num_beams=beams)[0], expected)


def test_second_turn() -> None:
    model = tiny_model("llama")
    first = torch.randint(3, 256, (1, 80), generator=torch.Generator().manual_seed(5))
    texts = []
    for method in (FULL, LOSSLESS):
        answer, cache = run(model, first, method)
        more = torch.cat([answer, first[:, :30]], dim=1)
        texts.append(
            cast(Any, model).generate(more, past_key_values=cache, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
        )
        assert cache.get_seq_length() == more.shape[1] + 19
    assert torch.equal(*texts)


def test_two_bits_differ_from_four_and_from_full() -> None:
    """The compressed cache is really read: if it were not, fewer bits would change nothing."""
    model = tiny_model("llama")
    ids = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(6))
    results = []
    for spec in ("full", "turboquant-paper:bits=4", "turboquant-paper:bits=2"):
        cache = build_cache(model.config, parse_method(spec))
        model(ids, past_key_values=cache)
        results.append(model(ids[:, :1], past_key_values=cache).logits)
    full, four, two = results
    assert (four - full).abs().max() > 1e-4
    assert (two - full).norm() > 2 * (four - full).norm()
