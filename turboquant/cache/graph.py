"""Decoding by a CUDA graph: one launch a token instead of hundreds, for models whose steps are bound by launches.

Between two packings a step changes only what stands on the device: the token, its position and the lengths of the
layers. It is captured once and replayed; when a window is full, the layers pack it as always, outside the graph, into
storage whose place does not change. Where a layer must take another format (its first outlier), the step is captured
anew. Rows must not be padded.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from turboquant.cache.layer import QuantizedLayer

WARM_STEPS = 2
"""Steps run one by one before the capture: kernels compile and libraries choose their algorithms."""


def _hold(layer: QuantizedLayer, tokens: int) -> None:
    """Give a layer room for `tokens` tokens in all, and put its lengths on the device."""
    layer.reserve(tokens)
    lengths = [layer.packed_length, layer.exact_length]
    layer.lengths = torch.tensor(lengths, dtype=torch.int32, device=layer.device)


class GraphDecoder:
    """Greedy decoding of a compressed cache on a GPU, one captured step a token.

    Args:
        model: With the attention function "turboquant".
        cache: From `build_cache`, filled by a prefill that packed something in every layer; no row padded. While the
            decoder is used, nothing else may change it; `close` gives it back.
        max_tokens: The most tokens the cache will hold.

    Raises:
        ValueError: If the cache holds other layers, packed nothing yet, or has padded rows.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, max_tokens: int) -> None:
        layers = [layer for layer in cache.layers if isinstance(layer, QuantizedLayer)]
        if len(layers) < len(cache.layers) or not all(layer.packed_length for layer in layers):
            raise ValueError("only caches whose every layer is compressed and has packed tokens can be replayed")
        if any(layer.padding is not None for layer in layers):
            raise ValueError("padded rows cannot be replayed")
        self.model, self.cache, self.layers, self.max_tokens = model, cache, layers, max_tokens
        rows, device = layers[0].batch_size, layers[0].device
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.full((rows, 1), layers[0].get_seq_length(), dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.steps = 0
        for layer in layers:
            _hold(layer, max_tokens)

    def _forward(self) -> None:
        output: Any = self.model(
            self.ids, position_ids=self.positions, past_key_values=self.cache, logits_to_keep=1, use_cache=True
        )
        self.logits = output.logits[:, -1]
        self.ids.copy_(self.logits.argmax(dim=-1, keepdim=True))
        self.positions += 1

    @torch.no_grad()
    def step(self, ids: Tensor | None = None) -> Tensor:
        """Decode one token a row and return the logits (batch, vocabulary), which the next step overwrites.

        Args:
            ids: The tokens to go on with, (batch, 1); None for the likeliest of the last step.

        Raises:
            ValueError: If the cache is full.
            RuntimeError: If no kernels serve the model here. `close` makes the cache usable again.
        """
        if self.layers[0].get_seq_length() >= self.max_tokens:
            raise ValueError(f"the cache was given room for {self.max_tokens} tokens, and they are there")
        if ids is not None:
            self.ids.copy_(ids)
        if self.steps < WARM_STEPS or self.ids.device.type != "cuda":
            self._forward()
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._forward()
            self.graph.replay()
        self.steps += 1
        before = self._storages()
        for layer in self.layers:
            layer.follow()
        if any(old is not new for old, new in zip(before, self._storages(), strict=True)):
            self.graph, self.steps = None, 0
        assert self.logits is not None
        return self.logits

    def _storages(self) -> list[object]:
        return [buffer.storage for layer in self.layers for buffer in (layer.packed_keys, layer.packed_values)]

    def close(self) -> None:
        """Give the cache back to calls outside the decoder."""
        self.graph = None
        for layer in self.layers:
            layer.lengths = None
