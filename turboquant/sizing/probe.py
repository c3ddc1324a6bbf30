"""One token through a model without weights, and what the layers of its cache hold then.

Nothing else knows what a model caches: fields of configurations mean different things in different models. On PyTorch's
meta device tensors have shapes and no numbers, so a model of any size is made and run in about a second.
"""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from turboquant.cache.build import compressed_layers
from turboquant.models.checks import skeleton_of
from turboquant.models.registry import ModelError, ModelSpec
from turboquant.sizing.shape import LayerShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SECONDS = 20.0
"""No model takes a quarter of that; a file that asks for a billion blocks of something would take for ever."""
_SPEC = ModelSpec("This model", "", None, "")
_KEPT = ("keys", "values", "indexer_keys")


class ProbeError(RuntimeError):
    """What a model caches cannot be found out; the message says why."""


class _Answers(TorchDispatchMode):
    """Answers what depends on numbers that a tensor without numbers has not, as if all of them were zero.

    Which experts a token goes to is such a question; what they make of it has the same shape whatever the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.end = time.monotonic() + SECONDS

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.end:
            raise ProbeError(f"it has more parts than can be made in {SECONDS:.0f} seconds")
        answer = _ANSWERS.get(func._schema.name)
        return answer(*args) if answer is not None and _is_empty(args[0]) else func(*args, **(kwargs or {}))


def _is_empty(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "meta"


def _zero(tensor: Tensor) -> bool | int | float:
    return False if tensor.dtype is torch.bool else 0.0 if tensor.is_floating_point() else 0


_ANSWERS: dict[str, Any] = {
    "aten::nonzero": lambda x: x.new_empty((0, x.dim()), dtype=torch.long),
    "aten::_local_scalar_dense": _zero,
}


def probe(config: "PreTrainedConfig") -> "tuple[PreTrainedModel, list[LayerShape]]":
    """Run one token through a model without weights.

    Args:
        config: Of a causal language model or an image-text model.

    Returns:
        The model, on the meta device and in bfloat16, and what each layer of its cache keeps.

    Raises:
        ProbeError: No model can be made from the configuration, it cannot be run without weights, or its cache has
            layers that are not known here.
    """
    try:
        with _Answers(), torch.no_grad():
            model: Any = skeleton_of(config, _SPEC)
            model = model.to(torch.bfloat16).eval()
            cache = DynamicCache(config=config)
            with torch.device("meta"):
                model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        packed = set(compressed_layers(config))
    except ProbeError:
        raise
    except ModelError as error:
        raise ProbeError(_why_none(error.__cause__)) from error
    except Exception as error:  # whatever a model's own code makes of fields nobody has checked, or of no numbers
        raise ProbeError(f"transformers cannot run it without its weights ({said(error)})") from error
    alike: dict[LayerShape, LayerShape] = {}  # one object for equal layers: they are counted again and again
    found = [_layer(layer, i in packed) for i, layer in enumerate(cache.layers)]
    return model, [alike.setdefault(layer, layer) for layer in found]


def _why_none(cause: BaseException | None) -> str:
    """Say why no model was made."""
    if cause is None:
        return "it does not generate text token by token"
    made = "no model can be made from its configuration"
    return str(cause) if isinstance(cause, ProbeError) else f"{made} ({said(cause)})"


def _layer(layer: Any, packed: bool) -> LayerShape:
    kind = type(layer)
    if not (kind.__module__ == DynamicCache.__module__ and set(_tensors(layer)) <= {*_KEPT, "_sliding_window_tensor"}):
        raise ProbeError(f"its cache has layers of a kind of its own ({kind.__name__})")
    keys, values, beside = (getattr(layer, name, None) for name in _KEPT)
    states = [t for held in vars(layer).values() if isinstance(held, dict) for t in held.values() if _is_empty(t)]
    found = {
        "state_values": sum(state.numel() for state in states if state.dtype is torch.bfloat16),
        "state_bytes": sum(state.nbytes for state in states if state.dtype is not torch.bfloat16),
    }
    if keys is None or values is None or not keys.numel():
        return LayerShape(**found)
    if keys.shape[-2] != 1:
        raise ProbeError(f"its cache keeps {keys.shape[-2]} keys for one token")
    window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) and not packed else 0
    return LayerShape(
        keeps="window" if window else "all",
        window=window,
        kv_heads=keys.shape[1],
        key_dim=keys.shape[-1],
        value_dim=values.shape[-1],
        beside=0 if beside is None else beside.numel(),
        packed=packed,
        **found,
    )


def _tensors(layer: Any) -> list[str]:
    return [name for name, held in vars(layer).items() if isinstance(held, Tensor)]


def said(error: BaseException) -> str:
    """What an error of a library says, in at most one line of 120 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # transformers' checks of fields put what is wrong into the second line
    line = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    line = line.partition("Error: ")[2] or line
    return line if len(line) <= 120 else f"{line[:117]}..."
