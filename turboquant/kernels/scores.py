"""Attention scores over packed keys, without softmax and values."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from turboquant.kernels.backend import guarded, usable
from turboquant.quant.quantizer import PackedTensor, Quantizer


def scores(
    query: Float[Tensor, "batch heads queries dim"],
    packed: PackedTensor,
    quantizer: Quantizer[Any],
    kv_heads: int,
    scaling: float,
) -> Float[Tensor, "batch heads queries tokens"]:
    """Score packed keys from their codes, on a GPU by its kernel where it can serve them.

    Args:
        query: Queries after rotary embedding; heads are grouped by KV head as in Hugging Face's `repeat_kv`.
        packed: Packed keys (batch, kv_heads, tokens).
        quantizer: What packed them.
        kv_heads: KV heads of `packed`.
        scaling: Factor on the scores.

    Returns:
        Scores in the dtype of the query from the kernel, in float32 from the reference.
    """
    kernels, view = usable(query, "scores"), quantizer.view(packed)
    if kernels is not None and kernels.unsupported(query, view) is None:
        found: Tensor | None = guarded("scores", lambda: kernels.scores(query, view, scaling))
        if found is not None:
            return found
    return _reference(query, packed, quantizer, kv_heads, scaling)


def _reference(query: Tensor, packed: PackedTensor, quantizer: Quantizer[Any], kv_heads: int, scaling: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    # Query heads of a KV head are rows of one product, so that its keys are unpacked once for all of them.
    rows = (query.float() * scaling).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    return quantizer.scores(quantizer.project(rows), packed).reshape(batch, heads, queries, -1)
