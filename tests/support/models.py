"""What several tests share: a method that packs without loss, a small model with a tokenizer, a walk over storages."""

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import cache_utils

from turboquant.methods import Method
from turboquant.models import dry_run
from turboquant.models.load import LoadedModel, ModelSpec, tiny_model
from turboquant.models.tiny import tiny_tokenizer

# transformers 5.17, the oldest that is allowed, has no fp8 cache.
HF_FP8 = pytest.param(
    "hf-fp8",
    marks=pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers has no fp8 cache yet"),
)


@dataclass(frozen=True)
class Lossless(dry_run.Lossless):
    """Goes through the whole packing machinery, in blocks and behind a window, and stores float32 vectors."""

    block_length: ClassVar[int] = Method.block_length
    residual_length: int = 8
    sink_length: int = 2


Lossless.name = "lossless"


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    """Random token ids of a tiny model's vocabulary, special tokens left out."""
    return torch.randint(3, 256, (rows, count), generator=torch.Generator().manual_seed(seed))


def tiny_loaded(
    architecture: str = "llama", seed: int = 4, chat_template: str | None = None, **overrides
) -> LoadedModel:
    """A tiny model with a tokenizer, as `load_model` would return it. With seed 4 its greedy answers have variety."""
    model = tiny_model(architecture, seed, **overrides)
    spec = ModelSpec(f"tiny-{architecture}", f"test/tiny-{architecture}", None, "random weights")
    return LoadedModel(model, tiny_tokenizer(chat_template), spec, "fp32", "cpu")


def reachable_storages(thing: object) -> dict[int, int]:
    """Bytes of every tensor storage reachable from an object, found without the code under test."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    queue = [thing]
    skip = (type, types.ModuleType, types.FunctionType, torch.device, torch.dtype)
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, skip):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor) and not hasattr(item, "__tensor_flatten__"):
            storage = item.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        else:
            queue += _contents(item)
    return found


def _contents(item: Any) -> list[Any]:
    """What an object holds; quanto's tensors are shells around plain ones."""
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item)
    walked = ("turboquant", "transformers.cache_utils", "optimum.quanto", "hqq")
    return list(vars(item).values()) if type(item).__module__.startswith(walked) and hasattr(item, "__dict__") else []


class AttentionCalls:
    """Notes the layer of every attention call of a model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.layers: list[int] = []
        for layer in loaded.model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._note)

    def _note(self, module: Any, args: object) -> None:
        self.layers.append(int(module.layer_idx))


def save_tiny(folder: Path, architecture: str = "llama", **overrides) -> Path:
    """Write a tiny model with its tokenizer as a local model folder, for `load_model` and for commands."""
    loaded = tiny_loaded(architecture, **overrides)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder
