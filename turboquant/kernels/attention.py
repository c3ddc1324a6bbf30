"""Attention over exact and packed tokens (plain torch; the reference for every kernel).

The history is never rebuilt: queries are projected once, keys are scored from their codes tile by tile, packed values
are summed in the value quantizer's space and mapped back once. All query heads of a KV head share one unpacking of a
tile. Long chunks of queries are taken in blocks of rows, so that the score matrix stays bounded too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from turboquant.kernels.backend import guarded, usable, usable_on_cpu
from turboquant.kernels.scoring import Scoring
from turboquant.quant.quantizer import PackedTensor, Quantizer

MAX_SCORES = 2**24
"""Score elements held at once (64 MiB in float32), at least one query token's."""


@dataclass(frozen=True)
class PackedSegment:
    """Packed keys and values of some tokens, and the quantizers that read them."""

    keys: PackedTensor
    values: PackedTensor
    key_quantizer: Quantizer[Any]
    value_quantizer: Quantizer[Any]


def _bias(mask: Tensor, places: Tensor, groups: int) -> Tensor:
    """Return what masking adds to the scores of the tokens at `places`, rows repeated for the heads of a group.

    `mask` is boolean (True is visible) or additive, (batch, 1 or heads, queries, tokens).
    """
    part = mask[..., places]
    if part.dtype == torch.bool:
        part = torch.zeros(part.shape, dtype=torch.float32, device=part.device).masked_fill_(~part, -torch.inf)
    part = part.float()
    if part.shape[1] == 1:  # one mask for all heads
        return part if part.shape[2] == 1 else part.repeat(1, 1, groups, 1)
    return part.unflatten(1, (-1, groups)).flatten(2, 3)


def _split(packed: PackedTensor, size: int) -> list[PackedTensor]:
    """Split packed tokens into tiles of at most `size`."""
    count = packed.tokens
    if 0 < count <= size:
        return [packed]
    return [packed.narrow(start, min(size, count - start)) for start in range(0, count, size)]


def _weights(scores: Tensor, bias: Tensor | None, cap: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax over all tokens of each query row, whose sink takes a share and is left out."""
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if bias is not None:
        scores = scores.add_(bias)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)
    if sinks is not None:
        return weights[..., :-1]
    if bias is not None:  # a query that sees nothing gets zeros, as from SDPA
        weights = weights.masked_fill(bias.amax(dim=-1, keepdim=True) == -torch.inf, 0)
    return weights


def _attend_rows(
    query: Float[Tensor, "batch kv_heads rows dim"],
    exact: tuple[Tensor, Tensor],
    packed: PackedSegment | None,
    bias: Tensor | None,
    scoring: Scoring,
) -> Float[Tensor, "batch kv_heads rows value_dim"]:
    """Attend from scaled query rows; `bias` is in the order exact tokens, packed tokens."""
    keys, values = exact
    groups = 1 if scoring.sinks is None else scoring.sinks.shape[0] // keys.shape[1]
    sinks = scoring.row_sinks(keys.shape[1], query.shape[2] // groups)
    scores = query @ keys.mT
    if packed is None:
        return _weights(scores, bias, scoring.cap, sinks) @ values
    projected = packed.key_quantizer.project(query)  # <q, x^> = <R q, y~>: keys are never rotated back
    tiles = _split(packed.keys, packed.key_quantizer.tile_tokens(projected))
    scores = torch.cat([scores, *(packed.key_quantizer.scores(projected, tile) for tile in tiles)], dim=-1)
    weights = _weights(scores, bias, scoring.cap, sinks)
    # One softmax over both, so that exact and packed tokens are weighed against each other.
    exact_weights, packed_weights = weights.split([keys.shape[2], packed.keys.tokens], dim=-1)
    output = exact_weights @ values
    tiles = _split(packed.values, packed.value_quantizer.tile_tokens(packed_weights))
    parts = zip(packed_weights.split([tile.tokens for tile in tiles], dim=-1), tiles, strict=True)
    # Rotation is linear: the weighted sum is rotated back once, not each value.
    total = sum(packed.value_quantizer.combine(*part) for part in parts)
    return output + packed.value_quantizer.unproject(total) if isinstance(total, Tensor) else output


def attend(
    query: Float[Tensor, "batch heads queries dim"],
    exact_keys: Float[Tensor, "batch kv_heads exact dim"],
    exact_values: Float[Tensor, "batch kv_heads exact value_dim"],
    packed: PackedSegment,
    sink_length: int,
    mask: Tensor | None,
    scoring: Scoring,
    starts: Tensor | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attend from the last `queries` tokens to all tokens of a layer, by compiled kernels where they can serve it.

    Args:
        query: Queries after rotary embedding; heads are grouped by KV head as in Hugging Face's `repeat_kv`.
        exact_keys: Sinks, then the exact window, which ends with the tokens of the present call; float32, or 16 bits.
        exact_values: The same for values.
        packed: The packed tokens, which stand between the sinks and the window.
        sink_length: How many of the exact tokens are sinks.
        mask: (batch, 1 or heads, queries, tokens) in stored order, boolean (True is visible) or additive; None for a
            plain causal mask.
        scoring: From scores to weights.
        starts: (batch,) packed tokens at the front of each row that are pads, where that and causality are all that
            the mask says; None where the mask may say more.

    Returns:
        The attention output, in the dtype of the query from GPU kernels and otherwise in float32.
    """
    compiled = _fused if query.is_cuda else _fused_on_cpu
    fused = compiled(query, (exact_keys, exact_values), packed, mask, scoring, starts)
    if fused is not None:
        return fused
    return _reference(query, (exact_keys, exact_values), packed, sink_length, mask, scoring)


def attend_exact(
    query: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    mask: Tensor | None,
    scoring: Scoring,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attend to plain tensors where scores are more than products, which torch's own attention does not compute.

    Arguments as in `attend`; in float32, with a bounded matrix of scores. Gradients go through. On a GPU learned sinks
    alone are left to torch's kernels, which tell the log-sum-exp that a sink is weighed against.
    """
    prefill = usable(query, "prefill")
    if prefill is not None and mask is None and not torch.is_grad_enabled():
        fused = guarded("prefill", lambda: prefill.attend_exact(query, keys, values, scoring))
        if fused is not None:
            return fused
    return _reference(query, (keys, values), None, keys.shape[2], mask, scoring)


def attend_at_lengths(
    query: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    packed: PackedSegment,
    scoring: Scoring,
    lengths: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Attend by kernels over tensors with spare room; (packed, exact) tokens that count are told on the device.

    Nothing here waits for the device, so a CUDA graph can hold it. Only where `why_no_kernels` has nothing to say. See
    `kernels.attention.attend`.
    """
    kernels = usable(query, "attention")
    assert kernels is not None
    views = packed.key_quantizer.view(packed.keys), packed.value_quantizer.view(packed.values)
    output: Tensor = kernels.attend(query, exact_keys, exact_values, *views, scoring, starts, lengths)
    return output


def why_no_kernels(query: Tensor, packed: PackedSegment) -> str | None:
    """Say why no GPU kernels attend from queries such as this one to packed tokens; None where they do."""
    kernels = usable(query, "attention")
    views = packed.key_quantizer.view(packed.keys), packed.value_quantizer.view(packed.values)
    reason: str | None = "Triton or CUDA is missing" if kernels is None else kernels.unsupported(query, *views)
    return reason


def _fused(
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    packed: PackedSegment,
    mask: Tensor | None,
    scoring: Scoring,
    starts: Tensor | None,
) -> Tensor | None:
    """Attend by GPU kernels; None where they cannot serve the call."""
    kernels = usable(query, "attention")
    # Kernels know causality and pads in front of a row, nothing else of a mask.
    if kernels is None or (mask is not None and starts is None):
        return None
    views = packed.key_quantizer.view(packed.keys), packed.value_quantizer.view(packed.values)
    if kernels.unsupported(query, *views) is not None:
        return None
    exact = exact[0].to(query.dtype), exact[1].to(query.dtype)
    if kernels.few_rows(query, exact[0].shape[1]):
        return guarded("attention", lambda: kernels.attend(query, *exact, *views, scoring, starts))
    prefill = usable(query, "prefill")
    if prefill is None or prefill.unsupported(query, *views, scoring) is not None:
        return None
    return guarded("prefill", lambda: prefill.attend(query, *exact, *views, scoring, starts))


def _fused_on_cpu(
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    packed: PackedSegment,
    mask: Tensor | None,
    scoring: Scoring,
    starts: Tensor | None,
) -> Tensor | None:
    """Attend by the CPU kernel; None where it cannot serve the call."""
    kernels = usable_on_cpu(query, "attention")
    if kernels is None or (mask is not None and starts is None):
        return None
    sides = (packed.key_quantizer, packed.keys), (packed.value_quantizer, packed.values)
    return guarded("CPU attention", lambda: kernels.attend(query, exact, sides, scoring, starts))


def _reference(
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    packed: PackedSegment | None,
    sink_length: int,
    mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    batch, heads, rows, dim = query.shape
    kv_heads, exact_length = exact[0].shape[1:3]
    groups, tokens = heads // kv_heads, exact_length + (packed.keys.tokens if packed else 0)
    exact = (exact[0].float(), exact[1].float())
    scaled = (query.float() * scoring.scaling).unflatten(1, (kv_heads, groups))
    if mask is None and rows == 1:
        output = _attend_rows(scaled.reshape(batch, kv_heads, groups, dim), exact, packed, None, scoring)
        return output.reshape(batch, heads, 1, -1)
    # Places of the tokens in the order they are scored here: exact ones first. Packed ones follow the sinks.
    place = torch.arange(tokens, device=query.device)
    window = sink_length + tokens - exact_length
    places = torch.cat([place[:sink_length], place[window:], place[sink_length:window]])
    outputs = []
    size = max(1, MAX_SCORES // (batch * heads * tokens))
    for start in range(0, rows, size):
        count = min(size, rows - start)
        if mask is None:
            limit = torch.arange(tokens - rows + start, tokens - rows + start + count, device=query.device)
            part = (place <= limit[:, None])[None, None]
        else:
            part = mask[:, :, start : start + count]
        block = scaled[:, :, :, start : start + count].reshape(batch, kv_heads, groups * count, dim)
        output = _attend_rows(block, exact, packed, _bias(part, places, groups), scoring)
        outputs.append(output.reshape(batch, heads, count, -1))
    return torch.cat(outputs, dim=2)
