"""Where a model's weights go: on one device where they fit, else over all of them, as far as free memory goes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from turboquant.models import checks
from turboquant.models.registry import ModelError, ModelSpec
from turboquant.models.stored import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARGIN = 1.15
"""Activations, the cache and buffers while loading, as a factor on the weights."""
_GIB = 2**30


def devices_of(device: torch.device, asked: str) -> list[torch.device]:
    """Return the devices that a model may be loaded on, the preferred one first: all of them for "auto" with a GPU."""
    if asked != "auto" or device.type == "cpu":
        return [device]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [*gpus, torch.device("cpu")]


def find_place(
    sizes: Mapping[str, int], weights: str, devices: Sequence[torch.device], spec: ModelSpec, parameters: int
) -> list[torch.device]:
    """Return the devices for the weights: one of them where they fit on one, else all that can share them.

    Args:
        sizes: Bytes of the weights at each precision that could be chosen.
        weights: The one that is.
        devices: Those there are, the preferred one first.
        spec: The model, for the message.
        parameters: How many it has, for the message.

    Raises:
        ModelError: If weights and margin need more than is free; says which precision or what size would fit.
    """
    free = {device: checks.free_bytes(device) for device in devices}
    if place := _place(sizes[weights], weights, free):
        return place
    needed = int(sizes[weights] * MARGIN)
    where = " and ".join(map(str, devices))
    room = sum(free[device] for device in _sharing(weights, devices))
    others = [one for one, size in sizes.items() if size < sizes[weights] and _place(size, one, free)]
    if others:
        hint = f"choose weights={' or '.join(others)}, or a smaller model"
    else:
        least = min(sizes, key=lambda one: sizes[one])
        most = max(sum(free[one] for one in _sharing(least, devices)), 0) * parameters / (sizes[least] * MARGIN)
        hint = f"choose a smaller model: about {most / 1e9:.2g} billion parameters fit as {least}"
    raise ModelError(
        f"Not enough memory: {spec.name} as {weights} needs {needed / _GIB:.1f} GiB on {where}, "
        f"{room / _GIB:.1f} GiB are free; {hint}."
    )


def options(place: Sequence[torch.device], *, packed: bool) -> dict[str, Any]:
    """Return what `from_pretrained` is to be told of the devices.

    Args:
        place: As `find_place` gives it.
        packed: Whether the weights are quantized on loading or before.
    """
    if len(place) == 1:
        return {"device_map": {"": str(place[0])}} if packed or place[0].type == "cuda" else {}
    limits = {_key(device): int(checks.free_bytes(device) / MARGIN) for device in place}
    return {"device_map": "auto", "max_memory": limits}


def check_nothing_on_disk(model: "PreTrainedModel", spec: ModelSpec) -> None:
    """Refuse a model of which accelerate has left a part on the disk: single layers can be too large for what is free.

    Raises:
        ModelError: If there is such a part.
    """
    if "disk" in map(str, getattr(model, "hf_device_map", {}).values()):
        raise ModelError(
            f"Not enough memory: the layers of {spec.name} do not divide over the devices here; "
            "choose fewer bits for the weights or a smaller model."
        )


def placement(model: "PreTrainedModel") -> str:
    """Say where a model's layers are: "cpu", or "24 layers on cuda:0, 8 on cpu"."""
    parts = {name: _name(device) for name, device in getattr(model, "hf_device_map", {}).items()}
    places = [_place_of(name, parts) for name in _layers(model)]
    if len({*parts.values()}) < 2 or not places or None in places:
        return ", ".join(dict.fromkeys(parts.values())) or str(model.device)
    return ", ".join(f"{count} on {place}" for place, count in Counter(places).items()).replace(" on", " layers on", 1)


def _sharing(weights: str, devices: Iterable[torch.device]) -> list[torch.device]:
    """The devices that can share weights of a precision; packed ones are not left to the CPU beside GPUs."""
    every = list(devices)
    gpus = [device for device in every if device.type == "cuda"]
    return every if weights in PLAIN or not gpus else gpus


def _place(size: int, weights: str, free: Mapping[torch.device, int]) -> list[torch.device]:
    """The devices for so many bytes; none where they do not fit."""
    sharing, needed = _sharing(weights, free), int(size * MARGIN)
    single = [device for device in sharing if device.type == "cuda"] or sharing
    for device in single:
        if needed <= free[device]:
            return [device]
    return sharing if len(sharing) > 1 and needed <= sum(free[device] for device in sharing) else []


def _key(device: torch.device) -> int | str:
    return int(device.index or 0) if device.type == "cuda" else device.type


def _name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _layers(model: "PreTrainedModel") -> list[str]:
    """The names of the modules that are the model's layers."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    return [f"{lists[0][0]}.{index}" for index in range(count)] if lists else []


def _place_of(name: str, parts: Mapping[str, str]) -> str | None:
    """The device of a module: that of the longest name in the map that it lies in."""
    within = [part for part in parts if not part or name == part or name.startswith(part + ".")]
    return parts[max(within, key=len)] if within else None
