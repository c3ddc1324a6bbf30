"""Registers the attention function "turboquant" with Hugging Face, together with its mask function.

With a compressed cache the function attends over packed codes; with any other cache, and for layers that are not
compressed, it is exactly Hugging Face's SDPA attention. Both must be registered: without the mask function left
padding and the causal mask of the prefill would silently be lost.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from turboquant.layer import CachedStates, QuantizedLayer
from turboquant.ops.attention import MASKED, PackedSegment, attend, attend_at_lengths

ATTENTION_NAME = "turboquant"
# Options that change the scores in ways the packed path does not compute. None (or False) means not used.
LEFT_PADDED = "turboquant_left_padded"
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


@runtime_checkable
class QueryObserver(Protocol):
    """Sees the queries of every layer, after rotary embedding."""

    def record(self, layer_idx: int, query: Tensor, scaling: float) -> None:
        """Take the queries (batch, heads, queries, dim) of one forward call and the factor on their scores."""


Clock = Callable[[], AbstractContextManager[None]]

_observer: ContextVar[QueryObserver | None] = ContextVar("turboquant_query_observer", default=None)
_clock: ContextVar[Clock] = ContextVar("turboquant_attention_clock", default=nullcontext)


@contextmanager
def observe_queries(observer: QueryObserver) -> Iterator[None]:
    """Send queries to `observer` while the block runs, in this thread or task only."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextmanager
def time_attention(clock: Clock) -> Iterator[None]:
    """Run every attention, without the packing after it, inside `clock()`, in this thread or task only."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | CachedStates,
    value: Tensor | CachedStates,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over a compressed cache, or over plain tensors as SDPA does.

    Raises:
        ValueError: If the model asks for something the packed path does not compute.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    observer = _observer.get()
    if observer is not None:
        observer.record(int(module.layer_idx), query, scaling)  # type: ignore[arg-type]
    if not isinstance(key, CachedStates):
        assert isinstance(value, Tensor)
        with _clock.get()():
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    used = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if used or dropout:
        raise ValueError(f"a compressed cache does not support the attention option {', '.join(used) or 'dropout'}")
    layer = key.layer
    if layer.lengths is not None:
        return _replayed_forward(layer, query, scaling), None
    with _clock.get()():
        if not layer.packed_length:
            keys, values = layer.exact()
            output, _ = sdpa_attention_forward(module, query, keys, values, attention_mask, 0.0, scaling, **kwargs)
        else:
            output = _packed_forward(layer, query, attention_mask, scaling)
    layer.compress(_visible(attention_mask))
    return output, None


def _packed_forward(layer: QuantizedLayer, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    keys, values = layer.exact()
    segment = PackedSegment(
        layer.packed_keys.view(), layer.packed_values.view(), layer.key_quantizer, layer.value_quantizer
    )
    starts = layer.padding if getattr(mask, LEFT_PADDED, False) else None
    if mask is not None and layer.padding is not None:
        slots = layer.slots(mask.shape[-1])[:, None, None, :]
        mask = mask.expand(slots.shape[0], -1, -1, -1).gather(-1, slots.expand(-1, *mask.shape[1:3], -1))
    output = attend(query, keys, values, segment, layer.sink_length, mask, scaling, starts)
    return output.transpose(1, 2).contiguous().to(query.dtype)


def _replayed_forward(layer: QuantizedLayer, query: Tensor, scaling: float) -> Tensor:
    """Attend by kernels that read the lengths on the device; packing is left to `graphs`."""
    keys, values = layer.packed_keys.storage, layer.packed_values.storage
    assert keys is not None
    assert values is not None
    assert layer.exact_keys is not None
    assert layer.exact_values is not None
    assert layer.lengths is not None
    segment = PackedSegment(keys, values, layer.key_quantizer, layer.value_quantizer)
    output = attend_at_lengths(query, layer.exact_keys, layer.exact_values, segment, scaling, layer.lengths)
    return output.transpose(1, 2)


def _visible(mask: Tensor | None) -> Tensor | None:
    """Return which tokens the last query of each row sees, (batch, tokens); None where there is no mask."""
    if mask is None:
        return None
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last > MASKED


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make SDPA's mask, and note on it whether causality and pads in front of rows are all that it says.

    Asking that costs a look at the mask once a forward call, on GPUs, where kernels can do without it.
    """
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    pads = kwargs.get("attention_mask")
    if mask is None or not mask.is_cuda or pads is None or pads.dim() != 2:
        return mask
    if kwargs.get("mask_function", causal_mask_function) is causal_mask_function:
        seen = pads.to(torch.int8)
        setattr(mask, LEFT_PADDED, bool((seen[:, 1:] >= seen[:, :-1]).all()))
    return mask


def register() -> None:
    """Register the attention and the mask function under "turboquant"; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
