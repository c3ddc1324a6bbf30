"""Log-likelihoods through caches, against one forward call and against feeding token by token."""

import copy

import pytest
import torch

from tests.support.models import HF_FP8, Lossless, tokens
from turboquant.cache.build import build_cache
from turboquant.methods import METHODS, Method, parse_method
from turboquant.run.scoring import Score, read_context, score_continuation

CONTEXT, CONTINUATION = tokens(1, 180, seed=1), tokens(1, 40, seed=2)


def through_cache(model, method: Method, chunk_tokens: int = 512, context=CONTEXT, continuation=CONTINUATION) -> Score:
    cache = read_context(model, method, context[:, :-1], chunk_tokens)
    return score_continuation(model, method, cache, context[:, -1:], continuation)


def in_one_call(model) -> tuple[float, bool]:
    """What the usual way gives: every token attends to exact keys and values."""
    logits = model(torch.cat([CONTEXT, CONTINUATION], dim=1)).logits[0, CONTEXT.shape[1] - 1 : -1]
    likelihood = logits.log_softmax(-1).gather(1, CONTINUATION[0, :, None]).sum()
    return float(likelihood), bool((logits.argmax(-1) == CONTINUATION[0]).all())


@pytest.mark.parametrize("chunk_tokens", [7, 512])
@pytest.mark.parametrize("method", [METHODS["full"](), Lossless()], ids=str)
def test_without_loss_it_is_the_usual_figure_whatever_the_chunks(llama, method: Method, chunk_tokens: int) -> None:
    likelihood, greedy = in_one_call(llama)
    found = through_cache(llama, method, chunk_tokens)
    assert found.log_likelihood == pytest.approx(likelihood, abs=1e-3)
    assert (found.greedy, found.tokens) == (greedy, 40)
    assert found.on_packed == (40 if method.name == "lossless" else 0)


@pytest.mark.parametrize("spec", ["turboquant:bits=2", "rtn:bits=2"])
def test_it_is_what_decoding_finds_in_the_cache(llama, spec: str) -> None:
    method = parse_method(spec)
    cache = build_cache(llama.config, method)
    llama(CONTEXT[:, :-1], past_key_values=cache)
    expected = 0.0
    for last, target in zip([CONTEXT[0, -1], *CONTINUATION[0, :-1]], CONTINUATION[0], strict=True):
        expected += float(llama(last[None, None], past_key_values=cache).logits[0, -1].log_softmax(-1)[target])
    found = through_cache(llama, method)
    assert found.log_likelihood == pytest.approx(expected, abs=1e-3)
    assert found.on_packed == 40
    assert abs(found.log_likelihood - in_one_call(llama)[0]) > 0.1


def test_the_first_token_is_predicted_from_packed_ones(llama) -> None:
    """In a multiple choice of one token each, nothing else is scored."""
    method = parse_method("turboquant-paper:bits=2")
    found = through_cache(llama, method, continuation=CONTINUATION[:, :1])
    exact = through_cache(llama, METHODS["full"](), continuation=CONTINUATION[:, :1])
    assert (found.tokens, found.on_packed) == (1, 1)
    assert abs(found.log_likelihood - exact.log_likelihood) > 0.01


def test_tokens_scored_before_anything_is_packed_are_told_apart(llama) -> None:
    method = parse_method("turboquant:bits=4")  # packs from 132 tokens on
    found = through_cache(llama, method, context=CONTEXT[:, :120])
    assert (found.tokens, found.on_packed) == (40, 119 + 40 - 132)


@pytest.mark.parametrize("spec", ["full", "turboquant:bits=2", HF_FP8])
def test_a_copy_of_what_was_read_serves_another_continuation(llama, spec: str) -> None:
    method = parse_method(spec)
    read = read_context(llama, method, CONTEXT[:, :-1], 64)
    for seed in (5, 6):
        other = tokens(1, 20, seed=seed)
        copied = score_continuation(llama, method, copy.deepcopy(read), CONTEXT[:, -1:], other)
        assert copied == through_cache(llama, method, 64, continuation=other)


def test_a_context_of_one_token_is_all_scored(llama) -> None:
    found = through_cache(llama, METHODS["full"](), context=CONTEXT[:, :1])
    assert found.tokens == 40
