"""Kinds of packed layers: codes for our attention, dense states for models that compute with them, recurrences too.

Which kind a model needs, its configuration and its class say; whether that is right, a dry run
(`turboquant.models.dry_run`).
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from turboquant.cache.count import Count, state_tensors
from turboquant.cache.layer import Packing, QuantizedLayer
from turboquant.cache.roomy import RoomyLayer
from turboquant.quant.modes import without_gradients

WORK_ON_STATES = {"diffllama", "doge", "jetmoe"}
"""Model types whose layers use the interface, and change keys and values before it."""


def why_dense(config: PreTrainedConfig) -> str | None:
    """Say why a model's layers are handed dense keys and values; None where its attention reads codes."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        return "it caches a joint latent in place of keys and values (MLA), which its layers expand themselves"
    if text.model_type in WORK_ON_STATES:
        return "its layers change keys and values before attention"
    if not takes_our_attention(type(config)):
        return "its attention does not run through the library's AttentionInterface"
    return None


def takes_our_attention(config_class: type[PreTrainedConfig]) -> bool:
    """May the models of a configuration be set to another attention function? Classes of one's own are taken to be."""
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if config_class in kind._model_mapping:
            found = kind._model_mapping[config_class]
            classes: Any = found if isinstance(found, tuple | list) else (found,)
            return all(one._can_set_attn_implementation() for one in classes)
    return True


def keeps_all(layer: Any) -> bool:
    """Is it one of Hugging Face's own layers that keep keys and values of all tokens, with or without other states?"""
    return type(layer) in (DynamicLayer, RoomyLayer, LinearAttentionAndFullAttentionLayer)


class DenseLayer(QuantizedLayer):
    """A layer whose model computes with keys and values itself, so it is handed dense ones.

    All that is packed is dequantized in every call: that saves memory, and no time. The layer packs before the call's
    attention has run and does not see its mask, so pads in front of a row count as tokens.
    """

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of a forward call, return those of all tokens, and pack what is due.

        Raises:
            ValueError: If the call has another number of rows than the cache holds.
        """
        first = not self.get_seq_length()
        self._append(key_states.detach(), value_states.detach())
        keys, values = (key_states, value_states) if first else self.dense()
        self.compress()
        if first:
            return keys, values
        return without_gradients(keys, key_states), without_gradients(values, value_states)


class HybridLayer(LinearAttentionLayer, QuantizedLayer):  # type: ignore[misc, override]
    """A layer with attention and a recurrence side by side (Falcon-H1, Zamba): packed keys and values, plain states.

    Args:
        recurrent: Hugging Face's own layer, which says how many states there are.
        packing: What `QuantizedLayer` takes.
    """

    is_compileable = False

    def __init__(self, recurrent: LinearAttentionLayer, *packing: Any) -> None:
        count = getattr(recurrent, "number_of_states", None)  # always one before transformers 5.20
        LinearAttentionLayer.__init__(self, **({} if count is None else {"number_of_states": count}))
        QuantizedLayer.__init__(self, *packing)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare for keys and values, given by position, or for states, given by name."""
        (QuantizedLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def take_states(self, other: LinearAttentionLayer) -> None:
        """Copy the recurrent states of another layer."""
        for name in vars(LinearAttentionLayer()).keys() - {"dtype", "device"}:
            setattr(self, name, copy.deepcopy(getattr(other, name)))

    def count_bytes(self, count: Count) -> None:
        """Add the bytes of packed tokens and of states."""
        QuantizedLayer.count_bytes(self, count)
        count.add_storages("state", state_tensors(self))

    def _states(self, fn: Callable[[Tensor], Tensor]) -> None:
        for kept in (self.conv_states, self.recurrent_states):
            for key, state in kept.items() if isinstance(kept, dict) else ():
                kept[key] = state if state is None else fn(state)

    def reset(self) -> None:
        """Forget all tokens, and set the states to zero."""
        LinearAttentionLayer.reset(self)
        QuantizedLayer.reset(self)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last tokens, where the states can go back (`activate_past_recording`)."""
        LinearAttentionLayer.crop(self, int(tokens_to_remove))
        QuantizedLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the rows that beam search goes on with."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        QuantizedLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._states(lambda state: state.repeat_interleave(repeats, dim=0))
        QuantizedLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self._states(lambda state: state[indices.to(state.device)])
        QuantizedLayer.batch_select_indices(self, indices)

    def offload(self) -> None:
        """Move the layer to the CPU."""
        LinearAttentionLayer.offload(self)
        QuantizedLayer.offload(self)

    def prefetch(self) -> None:
        """Bring the layer back to its device."""
        LinearAttentionLayer.prefetch(self)
        QuantizedLayer.prefetch(self)


def packed_layer(
    method: Packing, plain: Any, layer_idx: int, last_reader: int | None, config: PreTrainedConfig | None
) -> QuantizedLayer:
    """Return the layer that packs what one of Hugging Face's own layers would keep."""
    if isinstance(plain, LinearAttentionLayer):
        return HybridLayer(plain, method, layer_idx, last_reader, config)
    dense = config is not None and why_dense(config) is not None
    return (DenseLayer if dense else QuantizedLayer)(method, layer_idx, last_reader, config)
