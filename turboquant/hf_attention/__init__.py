"""Registers the attention function "turboquant" with Hugging Face, together with its mask function.

With a compressed cache the function attends over packed codes; with any other cache, and for layers that are not
compressed, it is exactly Hugging Face's SDPA attention, or, where a model has learned sinks or caps its scores, which
SDPA cannot, that of `kernels.attention`. Both must be registered: without the mask function left padding and the causal
mask of the prefill would silently be lost.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from turboquant.cache.layer import ATTENTION_NAME, CachedStates, QuantizedLayer
from turboquant.cache.roomy import RollingLayer
from turboquant.hf_attention import steps
from turboquant.hf_attention.steps import QueryObserver, segment
from turboquant.kernels.attention import PackedSegment, attend, attend_at_lengths, attend_exact
from turboquant.kernels.scoring import Scoring
from turboquant.quant.modes import plain, without_gradients

__all__ = ["ATTENTION_NAME", "QueryObserver", "observe_queries", "register", "time_attention"]

DROPPED = {
    "sinks": "sinks that depend on the token",
    "indices": "attention to chosen tokens alone",
    "block_indices": "attention to chosen blocks alone",
    "compressor": "attention to summaries of tokens",
}
"""Options of an attention call that nothing here computes; SDPA drops them without a word.

A compressor is no option but a part of the layer: DeepSeek V4 hides summaries by numbers that it adds to a mask, which
is one of yes and no here.
"""
NOT_OURS = {"position_bias": "a learned position bias", "cache": "a paged cache"}
"""Options that SDPA computes and our own attention does not."""
SINKS, CAP = "s_aux", "softcap"
"""Options that SDPA does not compute and our own attention does."""
NOTES = "turboquant_notes"


def observe_queries(observer: QueryObserver) -> AbstractContextManager[None]:
    """Send queries to `observer` while the block runs, in this thread or task only."""
    return steps.observing(observer)


def time_attention(clock: steps.Clock) -> AbstractContextManager[None]:
    """Run every attention, without the packing after it, inside `clock()`, in this thread or task only."""
    return steps.timing(clock)


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
        ValueError: If the model asks for something that is not computed here, or if the mask covers another number of
            tokens than the cache holds. The call leaves no token in a compressed layer then.
    """
    states = key if isinstance(key, CachedStates) else None
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get(CAP), kwargs.get(SINKS))
    if getattr(module, "compressor", None) is not None:
        kwargs["compressor"] = module.compressor
    _check_options(kwargs, dropout, states, scoring)
    observer = steps.observer()
    if observer is not None:
        observer.record(int(module.layer_idx), query, scoring)  # type: ignore[arg-type]
    if states is None:
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        with steps.clock()():
            return _attend_plain(module, query, (key, value), attention_mask, dropout, scoring, kwargs), None
    _check_reading(states, attention_mask)
    layer, home = states.layer, query.device
    if layer.lengths is not None:
        return _replayed_forward(layer, query, scoring), None
    if layer.device != home:  # a layer on another device shares its keys and values
        query, scoring = query.to(layer.device), scoring.on(layer.device)
        attention_mask = None if attention_mask is None else attention_mask.to(layer.device)
    with steps.clock()():
        output = _attend(module, query, states, attention_mask, scoring, kwargs).to(home)
    if layer.last_reader is None or layer.last_reader == module.layer_idx:
        layer.compress(*_visible(attention_mask))
        states.spent, states.own = True, None
    else:
        layer.mark(*_visible(attention_mask))
    return output, None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    states: CachedStates,
    mask: Tensor | None,
    scoring: Scoring,
    options: Mapping[str, Any],
) -> Tensor:
    """Attend to a layer's tokens.

    Those of a call that found the layer empty are read as the model made them, and gradients reach them and no others.
    """
    layer = states.layer
    exact = states.own if states.added == layer.get_seq_length() else None
    if not layer.packed_length:
        output = _attend_plain(module, query, exact or layer.exact(), mask, 0.0, scoring, options)
    else:
        if mask is None and not _is_causal(module, options):
            mask = query.new_ones(1, 1, query.shape[2], layer.get_seq_length(), dtype=torch.bool)
        with plain():
            output = _packed_forward(layer, query, mask, scoring)
    sources = (query, *(states.own or ()))
    return output if exact is not None else without_gradients(output, *sources)


def _attend_plain(
    module: torch.nn.Module,
    query: Tensor,
    states: tuple[Tensor, Tensor],
    mask: Tensor | None,
    dropout: float,
    scoring: Scoring,
    options: Mapping[str, Any],
) -> Tensor:
    """Attend to plain tensors: as SDPA does, or where scores are more than products by our own attention."""
    if scoring.plain:
        output, _ = sdpa_attention_forward(module, query, *states, mask, dropout, scoring.scaling, **options)
        return output
    if mask is None and not _is_causal(module, options):
        mask = query.new_ones(1, 1, query.shape[2], states[0].shape[2], dtype=torch.bool)
    return attend_exact(query, *states, mask, scoring).transpose(1, 2).contiguous().to(query.dtype)


def _check_options(options: Mapping[str, Any], dropout: float, states: CachedStates | None, scoring: Scoring) -> None:
    """Refuse what the model asks for and nothing here computes, whatever the cache.

    A learned parameter among the options always belongs to the scores, under whatever name.
    """
    learned = {
        name: "a learned parameter"
        for name, value in options.items()
        if isinstance(value, torch.nn.Parameter) and name != SINKS
    }
    ours = states is not None or not scoring.plain
    dropped = {**learned, **DROPPED, **(NOT_OURS if ours else {})}
    used = next((name for name in dropped if options.get(name) is not None), None)
    if used is None and not (dropout and ours):
        return
    if states is not None:
        states.undo()
    if used is None:
        what = "a compressed cache" if states else "attention with learned sinks or capped scores"
        raise ValueError(f"{what} does not support dropout in attention: call model.eval()")
    where = "over a compressed cache " if used in NOT_OURS else ""
    raise ValueError(
        f"the attention function 'turboquant' does not compute {dropped[used]} {where}(the option {used!r} of this "
        "model's attention), so its answers would be wrong: use the model's own attention, without a compressed cache"
    )


def _check_reading(states: CachedStates, mask: Tensor | None) -> None:
    """Refuse a mask of another length than the layer's, and states that the layer has packed already."""
    layer = states.layer
    if states.spent:
        raise ValueError(
            f"the keys and values of layer {layer.layer_idx} are read again after it has packed them: this model "
            "shares them between layers in a way that its configuration does not tell"
        )
    held = layer.get_seq_length()
    if mask is not None and layer.lengths is None and mask.shape[-1] != held:
        states.undo()
        raise ValueError(
            f"the attention mask covers {mask.shape[-1]} tokens, layer {layer.layer_idx} of the cache holds {held} "
            "with those of this call: if an earlier call failed midway, call reset() on the cache or build a new one"
        )


def _is_causal(module: torch.nn.Module, options: Mapping[str, Any]) -> bool:
    """Return what the absence of a mask means: causal attention, or that every query sees every token."""
    asked = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _packed_forward(layer: QuantizedLayer, query: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    keys, values = layer.kept()
    segment = PackedSegment(
        layer.packed_keys.view(), layer.packed_values.view(), layer.key_quantizer, layer.value_quantizer
    )
    notes: _Notes | None = getattr(mask, NOTES, None)
    starts = None
    if notes is not None and notes.causal and notes.real is None:
        mask = None  # it says no more than that
    elif notes is not None and notes.hides_pads_of(layer):
        starts = layer.padding
    if mask is not None and layer.padding is not None:
        slots = layer.slots(mask.shape[-1])[:, None, None, :]
        mask = mask.expand(slots.shape[0], -1, -1, -1).gather(-1, slots.expand(-1, *mask.shape[1:3], -1))
    output = attend(query, keys, values, segment, layer.sink_length, mask, scoring, starts)
    return output.transpose(1, 2).contiguous().to(query.dtype)


def _replayed_forward(layer: QuantizedLayer | RollingLayer, query: Tensor, scoring: Scoring) -> Tensor:
    """Attend with the lengths read on the device; packing is left to `steps`."""
    assert layer.exact_keys is not None
    assert layer.exact_values is not None
    assert layer.lengths is not None
    exact, lengths = (layer.exact_keys, layer.exact_values), layer.lengths
    if isinstance(layer, QuantizedLayer) and layer.packed_length:
        return attend_at_lengths(query, *exact, segment(layer), scoring, lengths, layer.padding).transpose(1, 2)
    if isinstance(layer, RollingLayer):
        mask = layer.in_window()[:, None, None]
    else:
        mask = (torch.arange(exact[0].shape[2], device=query.device) < lengths[1])[None, None, None]
    if not scoring.plain:
        output = attend_exact(query, *exact, mask, scoring).to(query.dtype)
    else:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, *exact, attn_mask=mask, scale=scoring.scaling, enable_gqa=True
        )
    return output.transpose(1, 2).contiguous()


@dataclass
class _Notes:
    """What is known of a mask that was made here, beside its entries.

    Attributes:
        real: (batch, tokens) as the 2D mask says; None where every token is real.
        causal: Whether causality and pads are all that the mask says.
    """

    real: Tensor | None
    causal: bool
    _hides_pads: bool | None = None

    def hides_pads_of(self, layer: QuantizedLayer) -> bool:
        """Return whether the mask says no more than causality and hides exactly the pads in front of a layer's rows.

        Only kernels ask: on a GPU the answer is waited for, once for all layers of a call, whose pads are the same.
        """
        if self.real is None or layer.padding is None:
            return False
        if self._hides_pads is None:
            place = torch.arange(self.real.shape[1], device=self.real.device)
            same = self.real == (place >= layer.padding.to(place.device)[:, None])
            self._hides_pads = self.causal and bool(same.all())
        return self._hides_pads


def _visible(mask: Tensor | None) -> tuple[Tensor | None, bool]:
    """Return which tokens count as seen by a call, (batch, tokens), and whether the others are pads.

    What the 2D mask calls real is; without one, what some query of the call sees. None where that is every token.
    """
    notes: _Notes | None = getattr(mask, NOTES, None)
    if mask is None or notes is not None:
        return None if notes is None else notes.real, True
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(dim=2).any(dim=1), False


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make SDPA's mask, and note on it which tokens are real."""
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    pads = kwargs.get("attention_mask")
    if mask is None:
        return None
    causal = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    if pads is None and causal:
        setattr(mask, NOTES, _Notes(None, causal))
    elif pads is not None and pads.dim() == 2 and pads.shape[1] == mask.shape[-1]:
        real = pads.bool()
        setattr(mask, NOTES, _Notes(None if bool(real.all()) else real, causal))
    return mask


def register() -> None:
    """Register the attention and the mask function under "turboquant"; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
