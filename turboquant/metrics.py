"""Pure functions from tensors to numbers: agreement of attention, and of next-token distributions."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOP = 5


def attention_weights(
    scores: Float[Tensor, "*heads queries tokens"], visible: Bool[Tensor, "queries tokens"], scaling: float
) -> Float[Tensor, "*heads queries tokens"]:
    """Return the softmax of raw scores over the visible tokens; 0 elsewhere."""
    return (scores * scaling).masked_fill_(~visible, -torch.inf).softmax(dim=-1)


def head_agreement(
    full: Float[Tensor, "*heads queries tokens"],
    compressed: Float[Tensor, "*heads queries tokens"],
    visible: Bool[Tensor, "queries tokens"],
    scaling: float,
    weights: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Float[Tensor, "*heads queries"]]:
    """Compare raw attention scores of the same queries under full and compressed keys.

    Args:
        full: Inner products with the full keys, unscaled.
        compressed: The same with the compressed keys.
        visible: Which tokens count for each query; each query sees at least one.
        scaling: The model's factor on scores before softmax.
        weights: Both sides' `attention_weights`, where the caller has them already.

    Returns:
        `cosine_scores` and `cosine_weights` (before and after softmax, -1 to 1), `top1` (the most-attended token is
        the same, 0 or 1) and `top5` (the full cache's most-attended token is among the five of the compressed one).
        Of equal scores the earlier token counts as the higher, on both sides.
    """
    hidden = ~visible
    if weights is None:
        weights = (attention_weights(full, visible, scaling), attention_weights(compressed, visible, scaling))
    cosine_scores = _cosine(full.masked_fill(hidden, 0.0), compressed.masked_fill(hidden, 0.0))
    first = full.masked_fill(hidden, -torch.inf).argmax(dim=-1)
    rank = rank_of(compressed.masked_fill(hidden, -torch.inf), first)
    return {
        "cosine_scores": cosine_scores,
        "cosine_weights": _cosine(*weights),
        "top1": (rank == 0).float(),
        "top5": (rank < TOP).float(),
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity along the last axis, without temporaries of the tensors' size; 0 where one of them is 0."""
    length = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return torch.einsum("...t,...t->...", a, b) / length.clamp_min(torch.finfo(a.dtype).tiny)


def rank_of(
    scores: Float[Tensor, "*heads tokens"], index: Int[Tensor, "*heads"]
) -> Int[Tensor, "*heads"]:
    """Return how many tokens stand before `index`: those with higher scores, and earlier ones with the same."""
    index = index.unsqueeze(-1)
    own = scores.gather(-1, index)
    earlier = torch.arange(scores.shape[-1], device=scores.device) < index
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=-1)


def token_agreement(
    full: Float[Tensor, "tokens vocabulary"], compressed: Float[Tensor, "tokens vocabulary"], targets: Tensor
) -> dict[str, Float[Tensor, " tokens"]]:
    """Compare next-token logits of the same positions.

    Returns:
        `kl` = KL(full || compressed) in nats, `same_top` (0 or 1), and each side's probability of the target token.
    """
    log_full, log_compressed = full.float().log_softmax(dim=-1), compressed.float().log_softmax(dim=-1)
    kl = (log_full.exp() * (log_full - log_compressed)).sum(dim=-1).clamp_min(0.0)
    index = targets.unsqueeze(-1)
    return {
        "kl": kl,
        "same_top": (full.argmax(dim=-1) == compressed.argmax(dim=-1)).float(),
        "probability_full": log_full.gather(-1, index).squeeze(-1).exp(),
        "probability_compressed": log_compressed.gather(-1, index).squeeze(-1).exp(),
    }
