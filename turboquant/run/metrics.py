"""Pure functions from tensors to numbers: agreement of attention, and of next-token distributions."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from turboquant.kernels.scoring import Scoring

TOP = 5
RULED_OUT = -1e4
"""The log-probability of a token that one side rules out and the other does not."""
TILE_SCORES = 2**20
"""Scores of one side that `compare_layer` holds at once (4 MiB), at least one query's of all heads."""
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Span:
    """Places `start` to `stop` of a context."""

    start: int
    stop: int

    @property
    def places(self) -> slice:
        """As an index."""
        return slice(self.start, self.stop)


def attention_weights(
    scores: Float[Tensor, "*heads queries tokens"],
    visible: Bool[Tensor, "queries tokens"] | None,
    scaling: float,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "*heads queries tokens"]:
    """Return the softmax of raw scores over the visible tokens (None: all of them) and a head's sink; 0 elsewhere."""
    scaled = scores * scaling if visible is None else torch.add(_hiding(visible, scores), scores, alpha=scaling)
    if sinks is None:
        return scaled.softmax(dim=-1)
    column = sinks.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scaled, column], dim=-1).softmax(dim=-1)[..., :-1]


def _hiding(visible: Tensor, like: Tensor) -> Tensor:
    """What is added to scores to hide tokens; adding it is much faster than filling by a mask."""
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, -torch.inf)


def head_agreement(
    full: Float[Tensor, "*heads queries tokens"],
    compressed: Float[Tensor, "*heads queries tokens"],
    visible: Bool[Tensor, "queries tokens"] | None,
    scaling: float,
    weights: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Float[Tensor, "*heads queries"]]:
    """Compare raw attention scores of the same queries under full and compressed keys.

    Args:
        full: Inner products with the full keys, unscaled.
        compressed: The same with the compressed keys.
        visible: Which tokens count for each query; each query sees at least one. None: all of them.
        scaling: The model's factor on scores before softmax.
        weights: Both sides' `attention_weights`, where the caller has them already.

    Returns:
        `cosine_scores` and `cosine_weights` (before and after softmax, -1 to 1), `top1` (the most-attended token is
        the same, 0 or 1) and `top5` (the full cache's most-attended token is among the five of the compressed one).
        Of equal scores the earlier token counts as the higher, on both sides. Where the compressed side is not a number
        there is no agreement: cosines are 0 and nothing matches.
    """
    if weights is None:
        weights = (attention_weights(full, visible, scaling), attention_weights(compressed, visible, scaling))
    if visible is None:
        cosine_scores = _cosine(full, compressed)
    else:
        shown, hiding = visible.to(full.dtype), _hiding(visible, full)
        cosine_scores = _cosine(full * shown, compressed * shown)
        full, compressed = full + hiding, compressed + hiding
    rank = rank_of(compressed, full.argmax(dim=-1))
    return {
        "cosine_scores": cosine_scores,
        "cosine_weights": _cosine(*weights),
        "top1": (rank == 0).float(),
        "top5": (rank < TOP).float(),
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity along the last axis; 0 where one of them is 0 or not finite."""
    length = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (torch.linalg.vecdot(a, b) / length.clamp_min(torch.finfo(a.dtype).tiny)).nan_to_num_(nan=0.0)


def rank_of(scores: Float[Tensor, "*heads tokens"], index: Int[Tensor, "*heads"]) -> Int[Tensor, "*heads"]:
    """Return how many tokens stand before `index`: those with higher scores, and earlier ones with the same.

    A score that is not a number is no agreement: as the own one it comes last, as another's it stands before.
    """
    index = index.unsqueeze(-1)
    own = scores.gather(-1, index)
    above = scores.shape[-1] - (scores <= own).sum(dim=-1)
    if bool(((scores >= own).sum(dim=-1) > above + 1).any()):  # equal scores are rare
        earlier = torch.arange(scores.shape[-1], device=scores.device) < index
        above += ((scores == own) & earlier).sum(dim=-1)
    return above


def _scores(query: Float[Tensor, "heads queries dim"], keys: Float[Tensor, "kv_heads tokens dim"]) -> Tensor:
    """Inner products of all query heads with the keys of their KV head, (heads, queries, tokens)."""
    grouped = query.unflatten(0, (keys.shape[0], -1))
    return (grouped.flatten(1, 2) @ keys.mT).view(*query.shape[:2], -1)


def _outputs(weights: Float[Tensor, "heads queries tokens"], values: Float[Tensor, "kv_heads tokens dim"]) -> Tensor:
    """Weighted sums of the values of each head's KV head, (heads, queries, dim)."""
    grouped = weights.unflatten(0, (values.shape[0], -1))
    return (grouped.flatten(1, 2) @ values).view(*weights.shape[:2], -1)


def compare_layer(
    query: Float[Tensor, "heads queries dim"],
    full: Pair,
    served: Pair,
    scoring: Scoring,
    packed: Span | None,
    needle: Span,
) -> dict[str, dict[str, Tensor]]:
    """Compare attention of the last queries of a context in one layer, all query heads at once, in tiles of queries.

    Args:
        query: After rotary embedding; query i of n stands at token `tokens - n + i` and sees everything up to itself.
        full: Keys and values, (kv_heads, tokens, dim) each, as the model computed them.
        served: The same as a compressed cache serves them.
        scoring: What the model makes of scores.
        packed: Which places are packed; None for none.
        needle: Where the needle is.

    Returns:
        `served` and `packed`: what `head_agreement` gives, (heads, queries), over all visible tokens and over the
        packed ones (empty if none are). `served` has `output_error` too: the length of the attention output's error,
        relative to the output's. `needle`, (heads,), for the last query: on either side the rank of the needle's most
        attended token (1 is the highest of all tokens) and the share of attention that the needle gets.
    """
    heads, queries = query.shape[:2]
    tokens = full[0].shape[1]
    size = max(1, TILE_SCORES // (heads * tokens))
    place = torch.arange(tokens, device=query.device)
    found: dict[str, list[dict[str, Tensor]]] = {"served": [], "packed": []}
    last: dict[str, Tensor] = {}
    for start in range(0, queries, size):
        rows = query[:, start : start + size]
        own = torch.arange(tokens - queries + start, tokens - queries + start + rows.shape[1], device=query.device)
        visible = place <= own[:, None]
        scores = scoring.capped(_scores(rows, full[0])), scoring.capped(_scores(rows, served[0]))
        shown = visible, scoring.scaling, scoring.sinks
        weights = attention_weights(scores[0], *shown), attention_weights(scores[1], *shown)
        outputs = _outputs(weights[0], full[1]), _outputs(weights[1], served[1])
        agreement = head_agreement(*scores, visible, scoring.scaling, weights)
        error = (outputs[1] - outputs[0]).norm(dim=-1) / outputs[0].norm(dim=-1)
        agreement["output_error"] = error.nan_to_num(nan=torch.inf, posinf=torch.inf)  # means would pass NaN over
        found["served"].append(agreement)
        if packed is not None:
            part = scores[0][..., packed.places], scores[1][..., packed.places]
            found["packed"].append(head_agreement(*part, None, scoring.scaling))
        last = _needle(scores, weights, needle)
    joined = {side: _joined(tiles) for side, tiles in found.items()}
    return {**joined, "needle": last}


def _joined(tiles: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([tile[name] for tile in tiles], dim=-1).cpu() for name in (tiles[0] if tiles else ())}


def _needle(scores: Pair, weights: Pair, needle: Span) -> dict[str, Tensor]:
    """Rank and mass of the needle for the last query of a tile, under full and compressed states."""
    found = {}
    for name, side, weight in zip(("_full", ""), scores, weights, strict=True):
        row = side[:, -1]
        best = row[:, needle.places].argmax(dim=-1) + needle.start
        found[f"rank{name}"] = (rank_of(row, best) + 1).float().cpu()
        found[f"mass{name}"] = weight[:, -1, needle.places].sum(dim=-1).cpu()
    return found


def token_agreement(
    full: Float[Tensor, "tokens vocabulary"], compressed: Float[Tensor, "tokens vocabulary"], targets: Tensor
) -> dict[str, Float[Tensor, " tokens"]]:
    """Compare next-token logits of the same positions.

    Returns:
        `kl` = KL(full || compressed) in nats, `same_top` (0 or 1), and each side's probability of the target token.
        Tokens that the full side rules out (a logit of minus infinity) add nothing to `kl`; where the compressed side
        alone rules one out, its log-probability counts as `RULED_OUT`, so that `kl` stays a number.
    """
    log_full, log_compressed = full.float().log_softmax(dim=-1), compressed.float().log_softmax(dim=-1)
    terms = log_full.exp() * (log_full - log_compressed.clamp_min(RULED_OUT))
    kl = torch.where(log_full > -torch.inf, terms, 0).sum(dim=-1).clamp_min(0.0)
    index = targets.unsqueeze(-1)
    return {
        "kl": kl,
        "same_top": (full.argmax(dim=-1) == compressed.argmax(dim=-1)).float(),
        "probability_full": log_full.gather(-1, index).squeeze(-1).exp(),
        "probability_compressed": log_compressed.gather(-1, index).squeeze(-1).exp(),
    }
