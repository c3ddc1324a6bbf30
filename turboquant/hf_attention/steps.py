"""Decode steps of a compressed cache on a GPU, captured as a CUDA graph and replayed: one launch in place of hundreds.

`capture_steps(model)` (which `turboquant.attach` and `load_model` call) lets a model's own `forward` do so, as a hook
around it. `model.generate()` and every other caller get it without knowing: a call with one token a row and a
compressed cache that can be replayed is, every other call goes to the model as it came.

Between two packings a step changes only what stands on the device: the tokens, their positions and the lengths of the
layers. When a window is full, the layers pack it as always, outside the graph, into storage whose place does not
change. Where a storage moves, or a layer takes another format, the step is captured anew.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from turboquant.cache.build import CompressedCache
from turboquant.cache.layer import ATTENTION_NAME, QuantizedLayer
from turboquant.kernels.attention import PackedSegment, why_no_kernels

WARM_STEPS = 1
"""Steps run one by one before a capture: kernels compile and libraries choose their algorithms."""
AHEAD = 256
"""Tokens that there is room for, at least, when a step is captured; an eighth of what is held where that is more."""
INPUTS = ("input_ids", "position_ids", "cache_position")
"""Tensors that change from step to step; they are copied to where the graph reads them."""
TOLD = {"use_cache": True, "return_dict": True, "logits_to_keep": None, "output_attentions": None}
"""What else a call may say, and what it says where it says nothing."""

_off: ContextVar[bool] = ContextVar("turboquant_no_graphs", default=False)
_failed: "WeakSet[PreTrainedModel]" = WeakSet()


@contextmanager
def no_graphs() -> Iterator[None]:
    """Run every step call by call while the block runs, in this thread or task only."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def capture_steps(model: PreTrainedModel) -> None:
    """Let a model's decode steps over compressed caches be captured; calling it again changes nothing.

    Where something else has put itself around the model's `forward` already, or around one of its modules' (the hooks
    of `device_map`), nothing is changed and steps run call by call.
    """
    if "forward" in vars(model) or any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    model.forward = MethodType(_around(type(model).forward), model)


@functools.cache
def _around(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def captured(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if args or not isinstance(cache, CompressedCache):
            return forward(self, *args, **kwargs)
        own = functools.partial(forward, self)
        replay = _replay_of(self, cache, kwargs)
        if replay is not None:
            output = replay.run(own, kwargs)
            if output is not None:
                return output
        cache.release()
        return own(**kwargs)

    return captured


def _replay_of(model: PreTrainedModel, cache: CompressedCache, call: Mapping[str, Any]) -> "Replay | None":
    """Return what replays a call, made anew where the last one does not fit; None where nothing can."""
    if _off.get() or torch.is_grad_enabled() or model in _failed or not _is_step(call):
        return None
    if cache.replay is not None and cache.replay.fits(call):
        return cache.replay
    cache.release()
    if not _can_replay(model, cache, call):
        return None
    cache.replay = Replay(model, cache, call)
    return cache.replay if cache.replay.fits(call) else None


def _is_step(call: Mapping[str, Any]) -> bool:
    """Is it one token a row on a GPU, and nothing that a graph could not be told?"""
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape[1:] != (1,) or not _on_gpu(ids):
        return False
    known = {*INPUTS, *TOLD, "past_key_values", "attention_mask"}
    return all(value is None or value is False or name in known for name, value in call.items())


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _can_replay(model: PreTrainedModel, cache: CompressedCache, call: Mapping[str, Any]) -> bool:
    """Have all layers packed something, in a way that kernels read with their lengths on the device?"""
    layers = [layer for layer in cache.layers if type(layer) is QuantizedLayer]
    set_to = model.config.get_text_config(decoder=True)._attn_implementation
    if len(layers) < len(cache.layers) or set_to != ATTENTION_NAME:
        return False
    if call.get("position_ids") is None and not _takes_positions(model):
        return False
    if any(_hooked(module) for module in model.modules()):
        return False
    return all(_is_replayable(layer, call["input_ids"]) for layer in layers)


def _is_replayable(layer: QuantizedLayer, ids: Tensor) -> bool:
    if not layer.packed_length or layer.exact_keys is None or layer.seen is not None or layer.last_reader is not None:
        return False
    if layer.device != ids.device or layer.batch_size != ids.shape[0]:
        return False
    if layer.exact_keys.dtype != layer.dtype:  # a float32 model, whose own tokens are read unrounded
        return False
    return why_no_kernels(layer.exact_keys, segment(layer)) is None


def _takes_positions(model: PreTrainedModel) -> bool:
    """Are positions that a caller leaves out those of the cache? Not in Qwen-VL, which counts them by its images."""
    named = inspect.signature(model.forward).parameters
    return "position_ids" in named and not any(hasattr(module, "rope_deltas") for module in model.modules())


def _hooked(module: torch.nn.Module) -> bool:
    """Has a module hooks other than transformers' own, which note hidden states where a call asks for them?"""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def segment(layer: QuantizedLayer) -> PackedSegment:
    """Return a layer's packed tokens, with the room behind them."""
    keys, values = layer.packed_keys.storage, layer.packed_values.storage
    assert keys is not None
    assert values is not None
    return PackedSegment(keys, values, layer.key_quantizer, layer.value_quantizer)


class Replay:
    """A captured decode step of one cache.

    Args:
        model: The model.
        cache: All of its layers are packed ones, and hold packed tokens.
        call: The arguments of the first call; later ones differ in their tensors' contents alone.
    """

    def __init__(self, model: PreTrainedModel, cache: CompressedCache, call: Mapping[str, Any]) -> None:
        self.model, self.cache = model, cache
        self.layers: list[QuantizedLayer] = list(cache.layers)  # type: ignore[arg-type]
        self.inputs = {name: call[name].clone() for name in INPUTS if isinstance(call.get(name), Tensor)}
        self.given = {name: tensor.shape for name, tensor in self.inputs.items()}
        if "position_ids" not in self.inputs:
            self.inputs["position_ids"] = torch.empty_like(self.inputs["input_ids"])
        self.told = {name: call.get(name, told) for name, told in TOLD.items()}
        self.padding = self.layers[0].padding
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None
        self.warm = 0
        self.lengths = (0, 0)
        self._make_room()
        for layer in self.layers:
            layer.lengths = torch.tensor(
                [layer.packed_length, layer.exact_length], dtype=torch.int32, device=layer.device
            )
        self.storages = self._storages()
        self._count()

    def _make_room(self) -> None:
        held = self.layers[0].get_seq_length()
        for layer in self.layers:
            layer.reserve(held + max(AHEAD, held // 8))

    def fits(self, call: Mapping[str, Any]) -> bool:
        """Can this call be replayed: is the cache as the last step left it, and does the mask say nothing else?"""
        if {name: call.get(name, told) for name, told in TOLD.items()} != self.told:
            return False
        if {name: call[name].shape for name in INPUTS if isinstance(call.get(name), Tensor)} != self.given:
            return False
        if any((layer.packed_length, layer.exact_length) != self.lengths for layer in self.layers):
            return False
        same = zip(self._storages(), self.storages, strict=True)
        return all(one is other for one, other in same) and self._hides_pads_alone(call.get("attention_mask"))

    def _hides_pads_alone(self, mask: Tensor | None) -> bool:
        """Does a 2D mask hide the pads in front of each row and nothing else?"""
        if mask is None:
            return self.padding is None
        held = sum(self.lengths) + 1
        if mask.dim() != 2 or mask.shape[1] != held:
            return False
        if self.padding is None:
            return bool(mask.all())
        real = torch.arange(held, device=mask.device) >= self.padding[:, None]
        return bool((mask.bool() == real).all())

    def _storages(self) -> list[object]:
        return [
            held
            for layer in self.layers
            for held in (
                layer.packed_keys.storage, layer.packed_values.storage, layer.exact_keys, layer.exact_values,
                layer.padding,
            )
        ]  # fmt: skip

    def _count(self) -> None:
        self.lengths = (self.layers[0].packed_length, self.layers[0].exact_length)

    def run(self, forward: Callable[..., Any], call: Mapping[str, Any]) -> Any:
        """Run the step, and return the model's output; None where it cannot be captured, and then nothing was done."""
        for name, held in self.inputs.items():
            if name in self.given:
                held.copy_(call[name])
            else:  # positions are those of the cache
                held.fill_(sum(self.lengths))
        if self.graph is None and not self._capture(forward):
            return None
        if self.graph is not None:
            self.graph.replay()
        self._follow()
        return type(self.output)(
            **{name: value.clone() if isinstance(value, Tensor) else value for name, value in self.output.items()}
        )

    def _forward(self, forward: Callable[..., Any]) -> None:
        told = {name: value for name, value in self.told.items() if value is not None}
        self.output = forward(**self.inputs, **told, past_key_values=self.cache)

    def _capture(self, forward: Callable[..., Any]) -> bool:
        """Run the step by calls while kernels are warmed up, then capture it."""
        try:
            if self.warm < WARM_STEPS or not _on_gpu(self.inputs["input_ids"]) or not torch.cuda.is_available():
                self._forward(forward)
                self.warm += 1
                return True
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with their own work meanwhile (sessions of the app).
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._forward(forward)
            self.graph = graph
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a model's own code does that no graph can hold
            if self.warm < WARM_STEPS:
                raise
            _failed.add(self.model)
            warnings.warn(
                "decode steps of this model run call by call, for they cannot be captured as a CUDA graph: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
                RuntimeWarning,
                stacklevel=4,
            )
            return False
        return True

    def _follow(self) -> None:
        """Count the token of a step, and pack what has left the window."""
        for layer in self.layers:
            layer.exact_length += 1
        if self.layers[0].due:
            for layer in self.layers:
                layer.compress()
                assert layer.lengths is not None
                layer.lengths[0], layer.lengths[1] = layer.packed_length, layer.exact_length
            if any(one is not other for one, other in zip(self._storages(), self.storages, strict=True)):
                self._make_room()
                self.graph, self.storages = None, self._storages()
        self._count()
