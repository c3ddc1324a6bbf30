"""Timings of attention and encoding alone, without a model: shapes of known models, random numbers in them.

Sides take turns in one process. On a GPU a side is captured in a CUDA graph over several sets of tensors, so that no
launch from Python is timed and nothing is found in the L2 cache; elsewhere calls are timed one by one.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboquant.cache.buffer import TokenBuffer
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.kernels.attention import PackedSegment, attend
from turboquant.kernels.backend import attention_backend
from turboquant.kernels.encode import encode
from turboquant.kernels.scores import scores
from turboquant.kernels.scoring import Scoring
from turboquant.methods import Method
from turboquant.records.environment import device_name
from turboquant.records.settings import (
    KernelAttentionSettings,
    KernelEncodeSettings,
    KernelScoresSettings,
    Shape,
    TimedSettings,
)
from turboquant.records.spread import timing_spread

COLD_BYTES = 2**28
"""Bytes that a side reads before it comes back to the same tensors; several times the L2 cache of today's GPUs."""
MAX_SETS = 64
CALLS = 8
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model."""

    query_heads: int
    kv_heads: int
    head_dim: int


SHAPES: dict[Shape, Heads] = {
    "llama-3.1-8b": Heads(32, 8, 128),  # Mistral-7B's too
    "qwen2.5-3b": Heads(16, 2, 128),
    "phi-2": Heads(32, 32, 80),
    "smollm2-135m": Heads(9, 3, 64),
}


Call = Callable[[], Any]


class _Side:
    """Calls over several sets of tensors, timed together; a GPU's are captured once and replayed.

    Calls that ask the GPU for a value meanwhile cannot be captured (`captured=False`): their launches are timed too.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, captured: bool = True) -> None:
        self.calls, self.device = list(calls), device
        if device.type == "cuda":  # the time to launch a graph is shared by several calls
            self.calls *= -(-CALLS // len(calls))
        self.graph: torch.cuda.CUDAGraph | None = None
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            if captured:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    for call in self.calls:
                        call()
            self.microseconds()

    def microseconds(self) -> float:
        """Time of one call, in this round."""
        if self.graph is None:
            started = time.perf_counter()
            for call in self.calls:
                call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return 1e6 * (time.perf_counter() - started) / len(self.calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / len(self.calls)


def _timed(sides: dict[str, _Side], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(side.microseconds())
    return times


def copy_bandwidth(device: torch.device) -> float:
    """Measure bytes a second, read and written, of a large copy on this device.

    The copy is not captured: in a CUDA graph a copy engine may take it over, which is slower than what kernels reach.
    """
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 8
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    times = []
    for _ in range(16):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size / float(np.median(times[1:]))


def this_device(settings: TimedSettings) -> torch.device:
    """Return the device that settings are about.

    Raises:
        ValueError: If it is another one than this machine has.
    """
    if settings.device != device_name():
        raise ValueError(f"the timings asked for are of {settings.device}, and this is {device_name()}")
    return torch.device(settings.device.partition(":")[0])


def _states(shape: Heads, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(batch, shape.kv_heads, tokens, shape.head_dim, dtype=dtype, device=device)


def packed_segment(
    method: Method, heads: Heads, batch: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> PackedSegment:
    """Return random keys and values, packed as a layer's cache would hold them.

    Raises:
        ValueError: If the method stores plain tensors or is one of Hugging Face's caches.
    """
    quantizers = method.quantizers(heads.head_dim, heads.head_dim, 0, device)
    if quantizers is None:
        raise ValueError(f"{method} has no packed tokens to attend to")
    keys, values = TokenBuffer(), TokenBuffer()
    states = [_states(heads, batch, tokens, dtype, device) for _ in range(2)]
    encode((quantizers[0], states[0], keys), (quantizers[1], states[1], values), None)
    return PackedSegment(keys.view(), values.view(), *quantizers)


def _served(calls: Sequence[Call], device: torch.device) -> _Side | None:
    """Return the side, or None where torch's implementation does not serve the shape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains at length why it does not
            return _Side(calls, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def _baselines(query: Tensor, sets: Sequence[tuple[Tensor, Tensor]]) -> dict[str, _Side]:
    """Torch's attention implementations that run here, with and without packing the queries of a KV head.

    With several query tokens all but "flash causal" see every token: a little more work, where they are fast at all.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = sets[0][0].shape[1]
    packed = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if query.device.type != "cuda":
        backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)  # type: ignore[assignment]
    found: dict[str, _Side] = {}
    variants = [("", query, True), (" packed", packed, False)][: 2 if rows == 1 else 1]  # packed tokens need a mask
    for backend, (name, q, grouped) in product(backends, variants):
        label = backend.name.lower().removesuffix("_attention") + name

        def call(pair: tuple[Tensor, Tensor], q: Tensor = q, grouped: bool = grouped, backend: Any = backend) -> Any:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, *pair, enable_gqa=grouped)

        side = _served([partial(call, pair) for pair in sets], query.device)
        if side is not None:
            found[label] = side
    if rows > 1 and query.device.type == "cuda":
        flash = torch.ops.aten._scaled_dot_product_flash_attention  # the only one aligned to the lower right corner
        side = _served([partial(flash, query, *pair, 0.0, True, False) for pair in sets], query.device)
        found.update({"flash causal": side} if side is not None else {})
    if not found:
        raise ValueError("none of torch's attention implementations serves this shape here")
    return found


def _sets(size: int, device: torch.device) -> int:
    """How many sets of tensors of `size` bytes keep the L2 cache cold."""
    return min(MAX_SETS, max(1, -(-COLD_BYTES // size))) if device.type == "cuda" else 1


Found = Iterator[tuple[Method, Measurement]]


def _start(settings: Any) -> tuple[Heads, torch.device, torch.dtype]:
    """Return heads, device and the dtype of a model there: bfloat16 on a GPU, float32 elsewhere."""
    device = this_device(settings)
    return SHAPES[settings.shape], device, torch.bfloat16 if device.type == "cuda" else torch.float32


def _detail(heads: Heads, device: torch.device, dtype: torch.dtype, sets: int) -> dict[str, Any]:
    return {
        "backend": attention_backend(device),
        **asdict(heads),
        "dtype": str(dtype).removeprefix("torch."),
        "sets": sets,
    }


def check_attention(methods: Sequence[Method], settings: KernelAttentionSettings) -> None:
    """Raise ValueError where a method packs nothing of the context, or holds nothing packed."""
    tokens = settings.context - settings.query_tokens
    for method in methods:
        if method.compresses and not method.packs(tokens):
            raise ValueError(f"{method} packs nothing of {tokens} tokens: give a longer context")
    check_packed(methods, settings)


def check_packed(methods: Sequence[Method], settings: TimedSettings) -> None:
    """Raise ValueError where a method holds no packed tokens of its own."""
    for method in methods:
        if not method.has_quantizers:
            raise ValueError(f"{method} has no packed tokens to attend to")


@torch.no_grad()
def run_attention(_: None, methods: Sequence[Method], settings: KernelAttentionSettings, watch: Watch) -> Found:
    """Time one layer's attention from the last `query_tokens` of `context` tokens a row, full and compressed, in turn.

    The compressed cache holds sinks, window and the query tokens exactly, as the method asks, and the rest packed.

    Raises:
        ValueError: If the settings are of another device.
    """
    heads, device, dtype = _start(settings)
    batch, context, query_tokens, repeats = settings.batch, settings.context, settings.query_tokens, settings.repeats
    copy = copy_bandwidth(device)
    query = torch.randn(batch, heads.query_heads, query_tokens, heads.head_dim, dtype=dtype, device=device)
    full_bytes = 2 * 2 * batch * heads.kv_heads * context * heads.head_dim
    count = _sets(full_bytes, device)
    pairs = [
        (_states(heads, batch, context, dtype, device), _states(heads, batch, context, dtype, device))
        for _ in range(count)
    ]
    baselines = _baselines(query, pairs)
    medians = {name: float(np.median(values)) for name, values in _timed(baselines, repeats).items()}
    fastest = min(medians, key=lambda name: medians[name])
    full = baselines[fastest]
    for method in methods:
        packed_tokens = method.packed_length(context - query_tokens)
        exact = context - packed_tokens
        size = 0
        calls: list[Call] = []
        while not calls or len(calls) < _sets(size, device):
            segment = packed_segment(method, heads, batch, packed_tokens, dtype, device)
            keys, values = (_states(heads, batch, exact, dtype, device) for _ in range(2))
            size = segment.keys.nbytes + segment.values.nbytes + 4 * keys.numel()

            def call(
                segment: Any = segment, keys: Tensor = keys, values: Tensor = values, sinks: int = method.sink_length
            ) -> Any:
                return attend(query, keys, values, segment, sinks, None, Scoring(heads.head_dim**-0.5))

            calls.append(call)
        own = _Side(calls, device)
        times = _timed({"full": full, "own": own}, repeats)
        median = float(np.median(times["own"]))
        floor = 1e6 * size / copy
        yield (
            method,
            Measurement(
                metrics={
                    **timing_spread(times["own"]).metrics("us"),
                    **timing_spread(times["full"]).metrics("us", "full_"),
                    "speed_ratio": float(np.median(times["full"])) / median,
                    "cache_bytes": float(size),
                    "full_cache_bytes": float(full_bytes),
                    "exact_tokens": float(exact),
                    "copy_gb_per_second": copy / 1e9,
                    "floor_us": floor,
                    "floor_fraction": floor / median,
                },
                detail={**_detail(heads, device, dtype, len(calls)), "full": fastest, "full_all_us": medians},
            ),
        )
        del own, calls


@torch.no_grad()
def run_scores(_: None, methods: Sequence[Method], settings: KernelScoresSettings, watch: Watch) -> Found:
    """Time the scores of one query token a row over `context` tokens, from float32 keys and from packed ones, in turn.

    The comparison of the announcement of arXiv:2504.19874 ("up to 8 times at 4 bits on an H100"). Packed keys are whole
    groups of tokens; scores are written in float32 by the full side and in the model's dtype by the other.

    Raises:
        ValueError: If the settings are of another device.
    """
    heads, device, dtype = _start(settings)
    batch, context, repeats = settings.batch, settings.context, settings.repeats
    copy = copy_bandwidth(device)
    query = torch.randn(batch, heads.query_heads, 1, heads.head_dim, dtype=dtype, device=device)
    rows = query.float().reshape(batch, heads.kv_heads, -1, heads.head_dim)
    full_bytes = 4 * batch * heads.kv_heads * context * heads.head_dim
    keys = [_states(heads, batch, context, torch.float32, device) for _ in range(_sets(full_bytes, device))]
    products = {
        "queries @ keys": [partial(torch.matmul, rows, one.mT) for one in keys],
        "keys @ queries": [partial(torch.matmul, one, rows.mT) for one in keys],
    }
    baselines = {name: _Side(calls, device) for name, calls in products.items()}
    medians = {name: float(np.median(values)) for name, values in _timed(baselines, repeats).items()}
    fastest = min(medians, key=lambda name: medians[name])
    for method in methods:
        tokens = context // method.block_length * method.block_length
        segments: list[PackedSegment] = []
        while not segments or len(segments) < _sets(segments[0].keys.nbytes, device):
            segments.append(packed_segment(method, heads, batch, tokens, dtype, device))
        calls = [
            partial(scores, query, one.keys, one.key_quantizer, heads.kv_heads, heads.head_dim**-0.5)
            for one in segments
        ]
        times = _timed({"full": baselines[fastest], "own": _Side(calls, device)}, repeats)
        yield (
            method,
            Measurement(
                metrics={
                    **timing_spread(times["own"]).metrics("us"),
                    **timing_spread(times["full"]).metrics("us", "full_"),
                    "speed_ratio": float(np.median(times["full"])) / float(np.median(times["own"])),
                    "cache_bytes": float(segments[0].keys.nbytes),
                    "full_cache_bytes": float(full_bytes),
                    "compressed_tokens": float(tokens),
                    "copy_gb_per_second": copy / 1e9,
                },
                detail={**_detail(heads, device, dtype, len(segments)), "full": fastest, "full_all_us": medians},
            ),
        )


@torch.no_grad()
def run_encode(_: None, methods: Sequence[Method], settings: KernelEncodeSettings, watch: Watch) -> Found:
    """Time quantizing the keys and values of `tokens` tokens a row (whole groups of them), all heads of one layer.

    As a cache does it: with its launches, and the question whether the kernel's format could hold what was there.

    Raises:
        ValueError: If the settings are of another device.
    """
    heads, device, dtype = _start(settings)
    batch, tokens, repeats = settings.batch, settings.tokens, settings.repeats
    copy = copy_bandwidth(device)
    for method in methods:
        count = -(-tokens // method.block_length) * method.block_length
        states = _states(heads, batch, count, dtype, device)
        calls: list[Call] = []
        size = 0
        while not calls or len(calls) < _sets(size, device):
            first = packed_segment(method, heads, batch, count, dtype, device)
            pair = _states(heads, batch, count, dtype, device), _states(heads, batch, count, dtype, device)
            size = first.keys.nbytes + first.values.nbytes + 2 * states.nbytes

            buffers = TokenBuffer(), TokenBuffer()
            for buffer, packed in zip(buffers, (first.keys, first.values), strict=True):
                buffer.storage = packed.empty(2 * count)  # written behind tokens held, so that the center is kept

            def call(segment: Any = first, pair: Any = pair, buffers: Any = buffers, count: int = count) -> None:
                for buffer in buffers:
                    buffer.length = count
                quantizers = segment.key_quantizer, segment.value_quantizer
                encode((quantizers[0], pair[0], buffers[0]), (quantizers[1], pair[1], buffers[1]), None)

            calls.append(call)
        spent = _timed({"own": _Side(calls, device, captured=False)}, repeats)["own"]
        speed = size / (1e-6 * float(np.median(spent)))
        yield (
            method,
            Measurement(
                metrics={
                    **timing_spread(spent).metrics("us"),
                    "vectors": float(2 * batch * heads.kv_heads * count),
                    "moved_bytes": float(size),
                    "gb_per_second": speed / 1e9,
                    "copy_gb_per_second": copy / 1e9,
                    "copy_fraction": speed / copy,
                },
                detail=_detail(heads, device, dtype, len(calls)),
            ),
        )


KERNEL_ATTENTION = Experiment(
    "kernel-attention", KernelAttentionSettings, run_attention, check_methods=check_attention, model=False, timed=True
)
KERNEL_SCORES = Experiment(
    "kernel-scores", KernelScoresSettings, run_scores, check_methods=check_packed, model=False, timed=True
)
KERNEL_ENCODE = Experiment(
    "kernel-encode", KernelEncodeSettings, run_encode, check_methods=check_packed, model=False, timed=True
)
