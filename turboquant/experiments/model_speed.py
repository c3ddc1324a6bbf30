"""Speed and memory of a whole model of a known shape on a GPU. Its weights are random: it says nothing about quality.

The cache is filled with random keys and values instead of a prompt's, so that long contexts take seconds; every byte
is held, and the decode steps that are timed are real.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
)
from transformers.cache_utils import Cache, DynamicLayer, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from turboquant import hf_attention
from turboquant.cache.build import build_cache, cache_bytes, fill_cache
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.experiments.kernel_speed import this_device
from turboquant.hf_attention.steps import capture_steps, no_graphs
from turboquant.methods import Method
from turboquant.records.settings import (
    LongestContextSettings,
    ModelShape,
    ModelSpeedSettings,
    TimedSettings,
)
from turboquant.records.spread import timing_spread

WARM = 4
"""Steps before those that are timed."""
CHUNK = 2048
"""Tokens filled in at once."""
MODELS: dict[ModelShape, dict[str, int]] = {
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


def random_model(name: ModelShape, weights: str = "bf16") -> Any:
    """Return a model of a known shape with random weights on the GPU, attention set to "turboquant".

    Args:
        name: One of `MODELS`.
        weights: "bf16", or "4bit" for bitsandbytes' NF4.
    """
    config = LlamaConfig(**MODELS[name], max_position_embeddings=2**20, tie_word_embeddings=False)  # type: ignore[arg-type]
    hf_attention.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="turboquant")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, _linear(module, weights if "lm_head" not in path else "bf16"))
    for parameter in [p for p in model.named_parameters() if p[1].is_meta]:
        parent, _, last = parameter[0].rpartition(".")
        value = torch.full_like(parameter[1], 1.0, device="cuda") if "norm" in parameter[0] else None
        value = torch.randn(parameter[1].shape, device="cuda", dtype=torch.bfloat16) * 0.02 if value is None else value
        setattr(model.get_submodule(parent), last, nn.Parameter(value, requires_grad=False))
    rotary: Any = model.model.rotary_emb
    with torch.device("cuda"):
        model.model.rotary_emb = type(rotary)(config=config)
    capture_steps(model)
    return model.eval().requires_grad_(False)


def _linear(module: nn.Linear, weights: str) -> nn.Module:
    weight = torch.randn(module.out_features, module.in_features, device="cuda", dtype=torch.bfloat16) * 0.02
    if weights == "bf16":
        layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer
    import bitsandbytes as bnb

    quantized: Any = bnb.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    parameter: Any = bnb.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantized
    )
    quantized.weight = parameter
    return quantized.to("cuda")


def fill(config: PreTrainedConfig, cache: Cache, batch: int, tokens: int) -> None:
    """Hold `tokens` more random tokens a row in every layer."""
    text: Any = config
    heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    states = torch.randn(2, batch, heads, CHUNK, dim, device="cuda", dtype=torch.bfloat16)
    for layer_idx in range(text.num_hidden_layers):
        for start in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - start)
            fill_cache(cache, layer_idx, states[0, :, :, :count], states[1, :, :, :count])


def _timed(step: Any, steps: int) -> list[float]:
    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return times


class _HeldLayer(DynamicLayer):
    """An uncompressed layer of a fixed length: each step overwrites the last token, so that it can be replayed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Fill the layer with what comes first in many tokens, then replace the last one."""
        if key_states.shape[2] > 1:
            return super().update(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values


class _FullGraph:
    """Decode steps of an uncompressed cache in a CUDA graph, with SDPA and without a mask (its fastest path)."""

    def __init__(self, model: Any, cache: Cache, batch: int, context: int) -> None:
        AttentionInterface.register("unmasked_sdpa", sdpa_attention_forward)
        AttentionMaskInterface.register("unmasked_sdpa", lambda *_, **__: None)
        model.set_attn_implementation("unmasked_sdpa")
        self.model, self.cache = model, cache
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        self.positions = torch.full((batch, 1), context - 1, dtype=torch.long, device="cuda")
        for _ in range(2):
            self._forward()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._forward()

    def _forward(self) -> None:
        logits = self.model(self.ids, position_ids=self.positions, past_key_values=self.cache, logits_to_keep=1).logits
        self.ids.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))


def check_gpu(methods: Sequence[Method], settings: TimedSettings) -> None:
    """Raise ValueError where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError("this benchmark needs a CUDA device; `bench decode` and `bench attention` run without one")


def check_model(methods: Sequence[Method], settings: ModelSpeedSettings) -> None:
    """Raise ValueError where there is no CUDA device, or a compressed cache is to be transformers' static one."""
    packing = [str(method) for method in methods if method.compresses]
    if settings.run == "static" and packing:
        raise ValueError(f"the run 'static' takes transformers' own cache, the method full alone, got {packing[0]}")
    check_gpu(methods, settings)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def run_model(
    _: None, methods: Sequence[Method], settings: ModelSpeedSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    """Time decode steps after `context` tokens, called step by step or replayed as a CUDA graph.

    Raises:
        ValueError: If the settings are of another device.
    """
    this_device(settings)
    model = random_model(settings.shape, settings.weights)
    for i, method in enumerate(methods):
        watch.check()
        watch.progress(i / len(methods), f"{method}: {settings.run}")
        _free()
        torch.cuda.reset_peak_memory_stats()
        yield method, _steps(model, method, settings)


def _steps(model: Any, method: Method, settings: ModelSpeedSettings) -> Measurement:
    batch, context, steps = settings.batch, settings.context, settings.repeats
    graph = settings.run == "graph"
    exact = graph and not method.compresses
    cache: Any
    if settings.run == "static":
        cache = StaticCache(config=model.config, max_cache_len=context + steps + WARM + 2)
    elif exact:
        cache = Cache(layers=[_HeldLayer() for _ in range(model.config.num_hidden_layers)])
    else:
        cache = build_cache(model.config, method)
    fill(model.config, cache, batch, context)
    if settings.run == "generate":
        times = _generated(model, cache, batch, context, steps)
    elif settings.run == "static":
        with _untouched(model):
            times = _generated(model, cache, batch, context, steps)
    elif exact:
        times = _timed(_FullGraph(model, cache, batch, context).graph.replay, steps)
        model.set_attn_implementation("turboquant")
    elif graph:
        ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        times = _timed(lambda: model(input_ids=ids, past_key_values=cache, logits_to_keep=1), steps)
    else:
        ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        with no_graphs():
            times = _timed(lambda: model(input_ids=ids, past_key_values=cache, logits_to_keep=1), steps)
    step_ms = timing_spread(times)
    # A block is packed now and then, which the median leaves out.
    per_step = sum(times) / len(times) if settings.run in ("generate", "static") else step_ms.median
    return Measurement(
        metrics={
            **step_ms.metrics("step_ms"),
            "tokens_per_second": 1e3 * batch / per_step,
            "cache_bytes": float(cache_bytes(cache)),
            "peak_memory_bytes": float(torch.cuda.max_memory_allocated()),
        }
    )


class _Clock(LogitsProcessor):
    """Notes when the logits of each step are there; `generate()` waits for them in every step anyway."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Give a model back the forward and the attention that it has without this package, while the block runs."""
    hook = vars(model).pop("forward")
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("turboquant")
        model.forward = hook
        torch.compiler.reset()


def _generated(model: Any, cache: Cache, batch: int, context: int, steps: int) -> list[float]:
    """Time the steps of stock `generate()`, greedy, behind what the cache holds; packing and capture are among them."""
    clock = _Clock()
    ids = torch.ones(batch, context + 1, dtype=torch.long, device="cuda")
    count = steps + WARM + 1
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, past_key_values=cache, logits_processor=LogitsProcessorList([clock]), **options)
    return [1e3 * (stop - start) for start, stop in pairwise(clock.times[WARM:])]


@torch.no_grad()
def run_longest(
    _: None, methods: Sequence[Method], settings: LongestContextSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    """Fill a cache until the GPU memory of the budget is used up, then decode.

    Raises:
        ValueError: If the settings are of another device.
    """
    this_device(settings)
    total = torch.cuda.get_device_properties(0).total_memory
    for i, method in enumerate(methods):
        watch.check()
        watch.progress(i / len(methods), str(method))
        _free()
        model = random_model(settings.shape, settings.weights)
        _free()
        weight_bytes = torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * settings.budget_gb / total))
        try:
            context, step_ms, held = _longest(model, method, settings.repeats)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        yield (
            method,
            Measurement(
                metrics={
                    "longest_context": float(context),
                    "weight_bytes": float(weight_bytes),
                    "cache_bytes": float(held),
                    "step_ms": step_ms,
                }
            ),
        )
        del model


def _longest(model: Any, method: Method, steps: int) -> tuple[int, float, int]:
    """Grow by ever longer strides until memory runs out, then by shorter ones; the last length that decoded counts."""
    text: Any = model.config
    best = (0, 0.0, 0)
    tokens, stride = 16_384, 16_384
    while stride >= 4096:
        gc.collect()
        torch.cuda.empty_cache()
        cache: Any = build_cache(text, method)
        try:
            fill(text, cache, 1, tokens)
            ids = torch.zeros(1, 1, dtype=torch.long, device="cuda")
            times = _timed(lambda cache=cache, ids=ids: model(ids, past_key_values=cache, logits_to_keep=1), steps)
            best = (tokens, statistics.median(times), cache_bytes(cache))
            stride *= 2
            tokens += stride
        except torch.OutOfMemoryError:
            stride //= 4
            tokens = best[0] + stride
        del cache
    return best


MODEL_SPEED = Experiment(
    "model-speed", ModelSpeedSettings, run_model, check_methods=check_model, model=False, timed=True
)
LONGEST_CONTEXT = Experiment(
    "longest-context", LongestContextSettings, run_longest, check_methods=check_gpu, model=False, timed=True
)
