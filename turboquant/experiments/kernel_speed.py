"""Timings of attention and encoding alone, without a model: shapes of known models, random numbers in them.

Sides take turns in one process. On a GPU a side is captured in a CUDA graph over several sets of tensors, so that no
launch from Python is timed and nothing is found in the L2 cache; elsewhere calls are timed one by one.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboquant.cache.buffer import TokenBuffer
from turboquant.kernels.attention import PackedSegment, attend
from turboquant.kernels.backend import attention_backend
from turboquant.kernels.encode import encode
from turboquant.kernels.scores import scores
from turboquant.methods import Method
from turboquant.records.bench import AttentionBench, EncodeBench, ScoresBench
from turboquant.records.environment import environment
from turboquant.records.spread import timing_spread

COLD_BYTES = 2**28
"""Bytes that a side reads before it comes back to the same tensors; several times the L2 cache of today's GPUs."""
MAX_SETS = 64
CALLS = 8
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Shape:
    """Attention heads of a model."""

    query_heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128),  # Mistral-7B's too
    "qwen2.5-3b": Shape(16, 2, 128),
    "phi-2": Shape(32, 32, 80),
    "smollm2-135m": Shape(9, 3, 64),
}


Call = Callable[[], Any]


class _Side:
    """Calls over several sets of tensors, timed together; a GPU's are captured once and replayed."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self.calls, self.device = list(calls), device
        if device.type == "cuda":  # the time to launch a graph is shared by several calls
            self.calls *= -(-CALLS // len(calls))
        self.graph: torch.cuda.CUDAGraph | None = None
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
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


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shape(name: str, *sizes: int) -> Shape:
    """Look up a shape, and refuse sizes below 1."""
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
    if min(sizes) < 1:
        raise ValueError(f"sizes must be at least 1, got {', '.join(map(str, sizes))}")
    return SHAPES[name]


def _states(shape: Shape, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(batch, shape.kv_heads, tokens, shape.head_dim, dtype=dtype, device=device)


def packed_segment(
    method: Method, shape: Shape, batch: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> PackedSegment:
    """Return random keys and values, packed as a layer's cache would hold them.

    Raises:
        ValueError: If the method stores plain tensors or is one of Hugging Face's caches.
    """
    quantizers = method.quantizers(shape.head_dim, shape.head_dim, 0, device)
    if quantizers is None:
        raise ValueError(f"{method} has no packed tokens to attend to")
    keys, values = TokenBuffer(), TokenBuffer()
    states = [_states(shape, batch, tokens, dtype, device) for _ in range(2)]
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


@torch.no_grad()
def bench_attention(
    shape: str,
    methods: Sequence[Method],
    *,
    batch: int = 1,
    context: int = 32_768,
    query_tokens: int = 1,
    repeats: int = 20,
) -> Iterator[AttentionBench]:
    """Time one layer's attention from the last `query_tokens` of `context` tokens a row, full and compressed, in turn.

    The compressed cache holds sinks, window and the query tokens exactly, as the method asks, and the rest packed. On a
    GPU the dtype is bfloat16, elsewhere float32.

    Raises:
        ValueError: If a size or the shape's name is out of range, or the context leaves nothing to pack.
    """
    heads, device = _shape(shape, batch, context, query_tokens, repeats), _device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for method in methods:
        if method.compresses and not method.packs(context - query_tokens):
            raise ValueError(f"{method} packs nothing of {context - query_tokens} tokens: give a longer context")
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
                return attend(query, keys, values, segment, sinks, None, heads.head_dim**-0.5)

            calls.append(call)
        own = _Side(calls, device)
        times = _timed({"full": full, "own": own}, repeats)
        median = float(np.median(times["own"]))
        floor = 1e6 * size / copy
        yield AttentionBench(
            environment=environment(device),
            backend=attention_backend(device),
            shape=shape,
            query_heads=heads.query_heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            method=str(method),
            dtype=str(dtype).removeprefix("torch."),
            batch=batch,
            context=context,
            query_tokens=query_tokens,
            exact_tokens=exact,
            sets=len(calls),
            repeats=repeats,
            bytes=size,
            full_bytes=full_bytes,
            copy_gb_per_second=copy / 1e9,
            us=timing_spread(times["own"]),
            full=fastest,
            full_us=timing_spread(times["full"]),
            full_all_us=medians,
            ratio=float(np.median(times["full"])) / median,
            floor_us=floor,
            floor_fraction=floor / median,
        )
        del own, calls


@torch.no_grad()
def bench_scores(
    shape: str, methods: Sequence[Method], *, batch: int = 1, context: int = 32_768, repeats: int = 20
) -> Iterator[ScoresBench]:
    """Time the scores of one query token a row over `context` tokens, from float32 keys and from packed ones, in turn.

    The comparison of the announcement of arXiv:2504.19874 ("up to 8 times at 4 bits on an H100").

    Raises:
        ValueError: If a size or the shape's name is out of range.
    """
    heads, device = _shape(shape, batch, context, repeats), _device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
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
        yield ScoresBench(
            environment=environment(device),
            backend=attention_backend(device),
            shape=shape,
            query_heads=heads.query_heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            method=str(method),
            dtype=str(dtype).removeprefix("torch."),
            batch=batch,
            context=tokens,
            sets=len(segments),
            repeats=repeats,
            bytes=segments[0].keys.nbytes,
            full_bytes=full_bytes,
            copy_gb_per_second=copy / 1e9,
            us=timing_spread(times["own"]),
            full=fastest,
            full_us=timing_spread(times["full"]),
            full_all_us=medians,
            ratio=float(np.median(times["full"])) / float(np.median(times["own"])),
        )


@torch.no_grad()
def bench_encode(
    shape: str, methods: Sequence[Method], *, batch: int = 1, tokens: int = 12_800, repeats: int = 20
) -> Iterator[EncodeBench]:
    """Time quantizing the keys and values of `tokens` tokens a row, all heads of one layer.

    Raises:
        ValueError: If a size or the shape's name is out of range.
    """
    heads, device = _shape(shape, batch, tokens, repeats), _device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
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
        spent = _timed({"own": _Side(calls, device)}, repeats)["own"]
        speed = size / (1e-6 * float(np.median(spent)))
        yield EncodeBench(
            environment=environment(device),
            backend=attention_backend(device),
            shape=shape,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            method=str(method),
            dtype=str(dtype).removeprefix("torch."),
            batch=batch,
            tokens=count,
            vectors=2 * batch * heads.kv_heads * count,
            sets=len(calls),
            repeats=repeats,
            bytes=size,
            copy_gb_per_second=copy / 1e9,
            us=timing_spread(spent),
            gb_per_second=speed / 1e9,
            copy_fraction=speed / copy,
        )
