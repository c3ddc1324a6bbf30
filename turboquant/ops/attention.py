"""Attention over exact and packed tokens, tile by tile (plain torch; the reference for every kernel).

One online softmax (Milakov and Gimelshein, 2018) runs over the exact tokens and over tiles of packed ones, so neither
the history nor a full score matrix is ever built. Queries are projected once, packed values are summed in the value
quantizer's space and mapped back once. All query heads of a KV head share one unpacking of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from turboquant.quantizer import PackedTensor, Quantizer

EXACT_TILE_TOKENS = 512
MASKED = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True)
class PackedSegment:
    """Packed keys and values of some tokens, and the quantizers that read them."""

    keys: PackedTensor
    values: PackedTensor
    key_quantizer: Quantizer[Any]
    value_quantizer: Quantizer[Any]


class _OnlineSoftmax:
    """Running maximum, sum and weighted values of softmax rows whose scores come in tiles."""

    def __init__(self) -> None:
        self.maximum: Tensor | None = None
        self.total: Tensor
        self.outputs: dict[str, Tensor] = {}

    def add(self, scores: Tensor, combine: Callable[[Tensor], Tensor], space: str) -> None:
        """Take a tile of scores (batch, kv_heads, rows, tokens); `combine` maps its weights to a sum of values."""
        maximum = scores.amax(dim=-1, keepdim=True)
        if self.maximum is None:
            weights = (scores - maximum).exp_()
            self.total = weights.sum(dim=-1, keepdim=True)
        else:
            maximum = torch.maximum(maximum, self.maximum)
            weights = (scores - maximum).exp_()
            decay = (self.maximum - maximum).exp_()
            self.total = self.total * decay + weights.sum(dim=-1, keepdim=True)
            self.outputs = {name: output * decay for name, output in self.outputs.items()}
        self.maximum = maximum
        added = combine(weights)
        self.outputs[space] = self.outputs[space] + added if space in self.outputs else added

    def result(self, unproject: Callable[[Tensor], Tensor]) -> Tensor:
        """Return softmax(scores) @ values, mapping the packed part back to the space of values."""
        output = self.outputs["exact"]
        if "packed" in self.outputs:
            output = output + unproject(self.outputs["packed"])
        return output / self.total


def _bias(mask: Tensor | None, places: Tensor, rows: int, tokens: int, groups: int) -> Tensor | None:
    """Return what masking adds to the scores of the tokens at `places`, or None where all of them are visible.

    `mask` is boolean (True is visible) or additive, (batch, 1 or heads, rows, tokens); without one the last `rows` of
    `tokens` tokens attend causally. The result is float32 with rows repeated for the query heads of a group.
    """
    if mask is None:
        if rows == 1:
            return None
        limit = torch.arange(tokens - rows, tokens, device=places.device)[:, None]
        part = (places <= limit)[None, None]
    else:
        part = mask[..., places]
    if part.dtype == torch.bool:
        part = torch.zeros(part.shape, device=part.device).masked_fill_(~part, MASKED)
    part = part.float().clamp_min(MASKED)
    if part.shape[1] == 1:  # one mask for all heads
        return part if rows == 1 else part.repeat(1, 1, groups, 1)
    return part.unflatten(1, (-1, groups)).flatten(2, 3)


def attend(
    query: Float[Tensor, "batch heads queries dim"],
    exact_keys: Float[Tensor, "batch kv_heads exact dim"],
    exact_values: Float[Tensor, "batch kv_heads exact value_dim"],
    packed: PackedSegment,
    sink_length: int,
    mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attend from the last `queries` tokens to all tokens of a layer.

    Args:
        query: Queries after rotary embedding; heads are grouped by KV head as in Hugging Face's `repeat_kv`.
        exact_keys: Sinks, then the exact window, which ends with the tokens of the present call.
        exact_values: The same for values.
        packed: The packed tokens, which stand between the sinks and the window.
        sink_length: How many of the exact tokens are sinks.
        mask: (batch, 1 or heads, queries, tokens) in stored order, boolean (True is visible) or additive; None for a
            plain causal mask.
        scaling: Factor on the scores.

    Returns:
        The attention output in float32.
    """
    batch, heads, rows, _ = query.shape
    kv_heads, exact_length = exact_keys.shape[1:3]
    groups, packed_length = heads // kv_heads, packed.keys.tokens
    tokens = exact_length + packed_length
    grouped = (query.float() * scaling).reshape(batch, kv_heads, groups * rows, -1)
    softmax = _OnlineSoftmax()

    # Exact tokens: the sinks keep their places, the window stands behind the packed tokens.
    places = torch.arange(exact_length, device=query.device)
    places[sink_length:] += packed_length
    for tile in _tiles(exact_length, EXACT_TILE_TOKENS):
        scores = grouped @ exact_keys[:, :, tile].float().mT
        bias = _bias(mask, places[tile], rows, tokens, groups)
        combine = partial(torch.matmul, other=exact_values[:, :, tile].float())
        softmax.add(scores if bias is None else scores + bias, combine, "exact")
    # Packed tokens are older than the present call: without a mask every query sees them.
    projected = packed.key_quantizer.project(grouped)
    tile_tokens = min(q.tile_tokens(projected) for q in (packed.key_quantizer, packed.value_quantizer))
    for tile in _tiles(packed_length, tile_tokens):
        keys, values = (part.narrow(tile.start, tile.stop - tile.start) for part in (packed.keys, packed.values))
        scores = packed.key_quantizer.scores(projected, keys)
        if mask is not None:
            place = torch.arange(sink_length + tile.start, sink_length + tile.stop, device=query.device)
            scores = scores + _bias(mask, place, rows, tokens, groups)
        softmax.add(scores, partial(packed.value_quantizer.combine, packed=values), "packed")
    output = softmax.result(packed.value_quantizer.unproject)
    return output.reshape(batch, heads, rows, -1)


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
