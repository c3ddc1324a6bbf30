"""Log-likelihoods through a cache: a context is read into it, and a continuation is scored as decoding would find it.

One forward call over both would measure nothing: in it every token attends to exact keys and values.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from turboquant.cache.build import build_cache, cache_report
from turboquant.methods import Method
from turboquant.run.feed import feed, packing_runs, step

FED_TOGETHER = 64
"""Scored tokens of one forward call at most, since their logits are all held at once."""


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_likelihood: Sum over its tokens, in nats.
        greedy: Whether each of them is the most likely one.
        tokens: How many there are.
        on_packed: How many were predicted while the cache held packed tokens.
    """

    log_likelihood: float
    greedy: bool
    tokens: int
    on_packed: int


def read_context(
    model: PreTrainedModel, method: Method, ids: Int[Tensor, "1 tokens"], chunk_tokens: int = 512
) -> Cache:
    """Return a cache that has read tokens, in calls of `chunk_tokens`.

    After each call the cache packs what is due; the next one reads that from codes, as a server with chunked prefill
    does. With `chunk_tokens` as large as the context all of it is read exactly, as `generate()` reads a prompt.
    """
    cache = build_cache(model.config, method)
    for piece in ids.split(chunk_tokens, dim=1) if ids.shape[1] else ():
        step(model, cache, piece)
    return cache


def score_continuation(
    model: PreTrainedModel,
    method: Method,
    cache: Cache,
    last: Int[Tensor, "1 1"],
    continuation: Int[Tensor, "1 tokens"],
) -> Score:
    """Score a continuation token by token, in as few calls as give the same result; the cache grows by its length.

    Args:
        model: The model.
        method: That of the cache.
        cache: Holds the context but for its last token (`read_context`).
        last: The last token of the context. It comes here so that the first token too is predicted from packed ones.
        continuation: What is scored.
    """
    fed = torch.cat([last, continuation[:, :-1]], dim=1)
    targets = continuation[0]
    runs = packing_runs(method, int(cache.get_seq_length()), fed.shape[1])
    likelihood, greedy, on_packed = 0.0, True, 0
    packed = cache_report(cache).compressed_tokens > 0
    for part, (logits,) in feed(model, cache, fed, runs, FED_TOGETHER):
        logits = logits.float()
        likelihood += float(logits.log_softmax(-1).gather(1, targets[part, None]).sum())
        greedy = greedy and bool((logits.argmax(-1) == targets[part]).all())
        on_packed += len(logits) if packed else 0
        packed = cache_report(cache).compressed_tokens > 0
    return Score(likelihood, greedy, fed.shape[1], on_packed)
