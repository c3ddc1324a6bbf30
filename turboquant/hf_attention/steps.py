"""Decode steps on a GPU, captured as a CUDA graph and replayed: one launch in place of hundreds.

`capture_steps(model)` (which `turboquant.attach` and `load_model` call) lets a model's own `forward` do so, as a hook
around it. `model.generate()` and every other caller get it without knowing: a call with one token a row and a cache of
ours that can be replayed is, every other call goes to the model as it came. Ours are compressed caches, and the
uncompressed one that comparisons are made with (`turboquant.cache.roomy`).

Between two packings a step changes only what stands on the device: the tokens, their positions and the lengths of the
layers. When a window is full, the layers pack it as always, outside the graph, into storage whose place does not
change. Where a storage moves, or a layer takes another format, the step is captured anew.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import MethodType
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from turboquant.cache.build import CompressedCache, tokens_held
from turboquant.cache.layer import ATTENTION_NAME, QuantizedLayer
from turboquant.cache.roomy import RollingLayer, RoomyCache, RoomyLayer
from turboquant.kernels.attention import PackedSegment, why_no_kernels
from turboquant.kernels.scoring import Scoring
from turboquant.quant.modes import in_plain_modes

WARM_STEPS = 1
"""Steps run one by one before a capture: kernels compile and libraries choose their algorithms."""
TRIES = 2
"""How often a cache may give up a captured step at once before no other is tried."""
AHEAD = 128
"""Tokens that there is room for, at least, when a step is captured; an eighth of what is held where that is more."""
INPUTS = ("input_ids", "position_ids", "cache_position")
"""Tensors that change from step to step; they are copied to where the graph reads them."""
TOLD = {"use_cache": True, "return_dict": True, "logits_to_keep": None, "output_attentions": None}
"""What else a call may say, and what it says where it says nothing."""

Clock = Callable[[], AbstractContextManager[None]]
Watched = Callable[[int, Tensor, Scoring], None]
"""Takes the queries of one layer in one call."""

_off: ContextVar[bool] = ContextVar("turboquant_no_graphs", default=False)
_observer: ContextVar["QueryObserver | None"] = ContextVar("turboquant_query_observer", default=None)
_clock: ContextVar[Clock] = ContextVar("turboquant_attention_clock", default=nullcontext)
_failed: "WeakSet[PreTrainedModel]" = WeakSet()


@contextmanager
def no_graphs() -> Iterator[None]:
    """Run every step call by call while the block runs, in this thread or task only."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


@runtime_checkable
class QueryObserver(Protocol):
    """Sees the queries of every layer, after rotary embedding.

    One whose attribute `keep` is false is not asked in steps that are replayed.
    """

    def record(self, layer_idx: int, query: Tensor, scoring: Scoring) -> None:
        """Take the queries (batch, heads, queries, dim) of one forward call and what becomes of their scores."""


@contextmanager
def observing(observer: QueryObserver | None) -> Iterator[None]:
    """Send queries to `observer`, or to nobody, while the block runs, in this thread or task only."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def observer() -> QueryObserver | None:
    """Return who sees the queries of this thread or task."""
    return _observer.get()


def clock() -> Clock:
    """Return what attention is timed by in this thread or task."""
    return _clock.get()


@contextmanager
def timing(clock: Clock) -> Iterator[None]:
    """Run every attention, without the packing after it, inside `clock()`, in this thread or task only."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)


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
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def captured(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = call.get("past_key_values")
        if not isinstance(cache, CompressedCache | RoomyCache):
            return forward(self, *args, **kwargs)
        watcher = observer()
        watched = watcher is not None and getattr(watcher, "keep", True)
        replay = _replay_of(self, cache, call, watched)
        if replay is not None:
            own = functools.partial(forward, self)
            output = replay.run(own, call, watcher.record if watcher is not None and watched else None)
            if output is not None:
                return output
        cache.release()
        return forward(self, *args, **kwargs)

    return captured


def _replay_of(
    model: PreTrainedModel, cache: CompressedCache | RoomyCache, call: Mapping[str, Any], watched: bool
) -> "Replay | None":
    """Return what replays a call, made anew where the last one does not fit; None where nothing can."""
    if _off.get() or torch.is_grad_enabled() or model in _failed or not _is_step(call) or clock() is not nullcontext:
        return None
    if cache.replay is not None and cache.replay.model is model and cache.replay.fits(call, watched):
        found: Replay = cache.replay
        return found
    cache.release()
    if cache.given_up > TRIES or not _can_replay(model, cache, call):
        return None
    new = cache.replay = Replay(model, cache, call, watched)
    return new if new.fits(call, watched) else None


def _is_step(call: Mapping[str, Any]) -> bool:
    """Is it one token a row on a GPU, and nothing that a graph could not be told?"""
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape[1:] != (1,) or not _on_gpu(ids):
        return False
    known = {*INPUTS, *TOLD, "past_key_values", "attention_mask"}
    return all(value is None or value is False or name in known for name, value in call.items())


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _can_replay(model: PreTrainedModel, cache: CompressedCache | RoomyCache, call: Mapping[str, Any]) -> bool:
    """Can all layers be read with their lengths on the device?"""
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
        return False
    if call.get("position_ids") is None and not _takes_positions(model):
        return False
    if any(_hooked(module) for module in model.modules()):
        return False
    return all(_is_replayable(layer, call["input_ids"]) for layer in cache.layers)


def _is_replayable(layer: Any, ids: Tensor) -> bool:
    if RollingLayer.can_take(layer):
        return bool(layer.device == ids.device and layer.keys.shape[0] == ids.shape[0])
    if type(layer) not in (QuantizedLayer, RoomyLayer) or not layer.replayable:
        return False
    if layer.device != ids.device or layer.exact_keys.shape[0] != ids.shape[0]:
        return False
    if not layer.packed_length:
        return True
    # Packed layers of float32 models, whose exact tokens are kept in 16 bits, are not read by GPU kernels.
    return layer.exact_keys.dtype == layer.read_as[0] and why_no_kernels(layer.exact_keys, segment(layer)) is None


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
        cache: All of its layers can be replayed.
        call: The arguments of the first call; later ones differ in their tensors' contents alone.
        watched: Whether somebody wants to see queries.
    """

    @in_plain_modes
    def __init__(
        self, model: PreTrainedModel, cache: CompressedCache | RoomyCache, call: Mapping[str, Any], watched: bool
    ) -> None:
        self.model, self.cache, self.watched = model, cache, watched
        self.inputs = {name: call[name].clone() for name in INPUTS if isinstance(call.get(name), Tensor)}
        self.given = {name: tensor.shape for name, tensor in self.inputs.items()}
        if "position_ids" not in self.inputs:
            self.inputs["position_ids"] = torch.empty_like(self.inputs["input_ids"])
        self.told = {name: call.get(name, told) for name, told in TOLD.items()}
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None
        self.queries: dict[int, tuple[Tensor, Scoring]] = {}
        self.warm = self.runs = 0
        self.held_bytes: int | None = None  # of the cache, once somebody has counted; forgotten where that changes
        self.held = tokens_held(cache)
        room = self._room()
        self.layers: list[Any] = [
            RollingLayer(layer, room) if RollingLayer.can_take(layer) else layer for layer in cache.layers
        ]
        self.packing = [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]
        self.padding = self.packing[0].padding if self.packing else None
        self._make_room()
        for layer in self.layers:
            counts = [layer.packed_length, layer.exact_length]
            layer.lengths = torch.tensor(counts, dtype=torch.int32, device=layer.device)
            if isinstance(layer, RollingLayer):
                layer.padding = self.padding
        cache.layers = self.layers
        self._count()

    def _make_room(self) -> None:
        for layer in self.layers:
            layer.reserve(self._room())
        self.graph, self.storages, self.held_bytes = None, self._storages(), None

    def _room(self) -> int:
        return self.held + max(AHEAD, self.held // 8)

    def _storages(self) -> list[object]:
        return [held for layer in self.layers for held in layer.storages()]

    def _count(self) -> None:
        self.lengths = [(layer.packed_length, layer.exact_length) for layer in self.layers]
        self.held = sum(self.lengths[0])

    def fits(self, call: Mapping[str, Any], watched: bool) -> bool:
        """Can this call be replayed: is the cache as the last step left it, and does the mask say nothing else?"""
        if {name: call.get(name, told) for name, told in TOLD.items()} != self.told or watched != self.watched:
            return False
        if {name: call[name].shape for name in INPUTS if isinstance(call.get(name), Tensor)} != self.given:
            return False
        if [(layer.packed_length, layer.exact_length) for layer in self.layers] != self.lengths:
            return False
        same = zip(self._storages(), self.storages, strict=True)
        return all(one is other for one, other in same) and self._hides_pads_alone(call.get("attention_mask"))

    def _hides_pads_alone(self, mask: Tensor | None) -> bool:
        """Does a 2D mask hide the pads in front of each row and nothing else?"""
        if mask is None:
            return self.padding is None
        held = self.held + 1
        if mask.dim() != 2 or mask.shape[1] != held:
            return False
        if self.padding is None:
            return bool(mask.all())
        real = torch.arange(held, device=mask.device) >= self.padding[:, None]
        return bool((mask.bool() == real).all())

    def run(self, forward: Callable[..., Any], call: Mapping[str, Any], watch: Watched | None) -> Any:
        """Run the step, and return the model's output; None where it cannot be captured, and then nothing was done."""
        for name, held in self.inputs.items():
            if name in self.given:
                held.copy_(call[name])
            else:  # positions are those of the cache
                held.fill_(self.held)
        if self.graph is None and not self._capture(forward):
            return None
        if self.graph is not None:
            self.graph.replay()
        self.runs += 1
        if watch is not None:
            for layer_idx, seen in self.queries.items():
                watch(layer_idx, *seen)
        self._follow()
        return type(self.output)(
            **{name: value.clone() if isinstance(value, Tensor) else value for name, value in self.output.items()}
        )

    def record(self, layer_idx: int, query: Tensor, scoring: Scoring) -> None:
        """Note where a captured step leaves the queries of a layer."""
        self.queries[layer_idx] = query, scoring

    def _forward(self, forward: Callable[..., Any]) -> None:
        told = {name: value for name, value in self.told.items() if value is not None}
        self.output = forward(**self.inputs, **told, past_key_values=self.cache)

    def _capture(self, forward: Callable[..., Any]) -> bool:
        """Run the step by calls while kernels are warmed up, then capture it; what fails so has changed nothing."""
        try:
            with observing(self if self.watched else None):
                if self.warm < WARM_STEPS or not torch.cuda.is_available():
                    self._forward(forward)
                    self.warm += 1
                    return True
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on with their own work meanwhile (sessions of the app).
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    self._forward(forward)
                    own = torch.cuda.memory_reserved() - before  # a graph's tensors lie in a pool of its own
            self.graph = graph
            self.cache.graph_bytes = max(self.cache.graph_bytes, own)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a model's own code does that no graph can hold
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
        """Count the token of a step, pack what has left the window, and see to room for the next one."""
        for layer in self.layers:
            layer.exact_length += 1
        self._count()
        if self.packing and self.packing[0].due:
            if not self.packing[0].has_room:
                self._make_room()
            for layer in self.packing:
                layer.compress()
                assert layer.lengths is not None
                layer.lengths[0], layer.lengths[1] = layer.packed_length, layer.exact_length
            # Where that moved them, for the first time or into another format, `fits` sees it, and all begins anew.
            self.held_bytes = None
            self._count()
        if any(getattr(layer, "full", False) for layer in self.layers):
            self._make_room()
