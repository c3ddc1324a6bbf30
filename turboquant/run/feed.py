"""Tokens through a model and its cache: one call, or known tokens (teacher forcing) as decoding would meet them.

A token that is fed in one call with others attends to them exactly. So known tokens go in runs that end where the
method packs: then every one of them meets the very cache that it would meet if tokens came one by one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from turboquant.cache.build import tokens_held
from turboquant.methods import Method
from turboquant.models.dry_run import feeds_singly

Runs = Sequence[tuple[int, int]]
"""Tokens (start, stop) that go through a cache together."""


def packing_runs(method: Method, held: int, count: int) -> list[tuple[int, int]]:
    """Split `count` tokens behind `held` others into runs (start, stop) during which the cache packs nothing.

    A cache that never packs is fed in blocks all the same, so that it is computed as those that pack block by block.
    """

    def due(place: int) -> int:
        tokens = held + place
        return method.packed_length(tokens) if method.compresses else tokens // method.block_length

    runs: list[tuple[int, int]] = []
    for place in range(count):
        if runs and due(place) == due(runs[-1][0]):
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs


@torch.no_grad()
def step(
    model: PreTrainedModel, cache: Cache, ids: Int[Tensor, "rows tokens"], **options: Any
) -> Float[Tensor, "rows vocabulary"]:
    """Feed tokens in one call, and return the logits of the token behind the last; `options` go to the model.

    Where a model must be given one token at a time behind a filled cache (`models.dry_run`), it is.
    """
    if ids.shape[1] > 1 and _singly(model, cache):
        for token in ids.split(1, dim=1)[:-1]:
            model(input_ids=token, past_key_values=cache, logits_to_keep=1)
        ids = ids[:, -1:]
    logits: Tensor = model(input_ids=ids, past_key_values=cache, logits_to_keep=1, **options).logits
    return logits[:, -1]


@torch.no_grad()
def feed(
    model: PreTrainedModel, cache: Cache, ids: Int[Tensor, "rows tokens"], runs: Runs, at_once: int | None = None
) -> Iterator[tuple[slice, Float[Tensor, "rows fed vocabulary"]]]:
    """Feed known tokens run by run; yield the places that each call fed, and their logits.

    Args:
        model: The model.
        cache: Holds what stands before `ids`; it takes what is fed.
        ids: The tokens.
        runs: Which of them are fed, and which of those together (`packing_runs`).
        at_once: Tokens of one call at most, since all their logits are held; None for whole runs.
    """
    for start, stop in runs:
        while start < stop:
            size = 1 if _singly(model, cache) else at_once or stop - start
            part = slice(start, min(start + size, stop))
            yield part, model(input_ids=ids[:, part], past_key_values=cache).logits
            start = part.stop


def _singly(model: PreTrainedModel, cache: Cache) -> bool:
    return feeds_singly(model) and tokens_held(cache) > 0


def answer_logits(
    model: PreTrainedModel,
    cache: Cache,
    prompt: Int[Tensor, "rows tokens"],
    answer: Int[Tensor, "rows new"],
    runs: Runs,
    at_once: int | None = None,
) -> Iterator[tuple[slice, Float[Tensor, "rows fed vocabulary"]]]:
    """Read a prompt and feed a known answer to it; yield places in the answer, and the logits that choose their tokens.

    The answer's last token is not fed. `runs` are those of the others; see `feed`.
    """
    yield slice(0, 1), step(model, cache, prompt)[:, None]
    for part, logits in feed(model, cache, answer[:, :-1], runs, at_once):
        yield slice(part.start + 1, part.stop + 1), logits
