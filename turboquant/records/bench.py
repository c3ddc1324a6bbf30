"""Records of the GPU benchmarks: kernels alone, and models of a known shape with random weights."""

from typing import ClassVar, Literal

from turboquant.records.base import Record
from turboquant.records.environment import Environment
from turboquant.records.experiment import Spread


class _Bench(Record):
    """What distinguishes one case from another: every field that is asked for, and the device."""

    environment: Environment
    case: ClassVar[tuple[str, ...]] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for records of the same case on the same device."""
        return (type(self).__name__, self.environment.device, *(getattr(self, name) for name in self.case))


class AttentionBench(_Bench):
    """One layer's decode attention over a full 16-bit cache and over a compressed one, in microseconds.

    `full_us` is the fastest of `full_all_us`, torch's attention implementations with the queries of a KV head one by
    one or packed into one. `ratio` is full over compressed. `floor_us` is the time that a copy of this machine takes
    to move `bytes`, what the compressed cache holds, and `floor_fraction` is floor over measured.
    """

    case: ClassVar[tuple[str, ...]] = ("shape", "method", "batch", "context", "query_tokens")
    kind: Literal["bench-attention"] = "bench-attention"
    backend: str
    shape: str
    query_heads: int
    kv_heads: int
    head_dim: int
    method: str
    dtype: str
    batch: int
    context: int
    query_tokens: int
    exact_tokens: int
    sets: int
    repeats: int
    bytes: int
    full_bytes: int
    copy_gb_per_second: float
    us: Spread
    full: str
    full_us: Spread
    full_all_us: dict[str, float]
    ratio: float
    floor_us: float
    floor_fraction: float


class ScoresBench(_Bench):
    """Attention scores alone of one query token a row, in microseconds: float32 keys against packed ones.

    `full_us` is the fastest of `full_all_us`, torch's products of float32 queries and keys; `ratio` is full over
    compressed. `bytes` and `full_bytes` are what the keys take; scores are written in float32 by the full side and in
    `dtype` by the other.
    """

    case: ClassVar[tuple[str, ...]] = ("shape", "method", "batch", "context")
    kind: Literal["bench-scores"] = "bench-scores"
    backend: str
    shape: str
    query_heads: int
    kv_heads: int
    head_dim: int
    method: str
    dtype: str
    batch: int
    context: int
    sets: int
    repeats: int
    bytes: int
    full_bytes: int
    copy_gb_per_second: float
    us: Spread
    full: str
    full_us: Spread
    full_all_us: dict[str, float]
    ratio: float


class EncodeBench(_Bench):
    """Quantizing keys and values into a cache, `tokens` of each in every head, in microseconds.

    `bytes` is what is read and written at least; `copy_fraction` is the share of this machine's copy bandwidth.
    """

    case: ClassVar[tuple[str, ...]] = ("shape", "method", "batch", "tokens")
    kind: Literal["bench-encode"] = "bench-encode"
    backend: str
    shape: str
    kv_heads: int
    head_dim: int
    method: str
    dtype: str
    batch: int
    tokens: int
    vectors: int
    sets: int
    repeats: int
    bytes: int
    copy_gb_per_second: float
    us: Spread
    gb_per_second: float
    copy_fraction: float


class ModelBench(_Bench):
    """Decode steps of one side: how it was run, milliseconds a step, and bytes that its cache holds."""

    case: ClassVar[tuple[str, ...]] = ("model", "weights", "method", "run", "batch", "context")
    kind: Literal["bench-model"] = "bench-model"
    model: str
    weights: str
    method: str
    run: str
    batch: int
    context: int
    steps: int
    step_ms: Spread
    tokens_per_second: float
    cache_bytes: int
    peak_bytes: int


class ContextBench(_Bench):
    """The longest context whose cache fits beside the weights in a budget of GPU memory, reached by filling it."""

    case: ClassVar[tuple[str, ...]] = ("model", "weights", "method", "budget_bytes")
    kind: Literal["bench-memory"] = "bench-memory"
    model: str
    weights: str
    method: str
    budget_bytes: int
    weight_bytes: int
    context: int
    cache_bytes: int
    step_ms: float


GpuBench = AttentionBench | ScoresBench | EncodeBench | ModelBench | ContextBench
GPU_BENCHES: dict[str, type[GpuBench]] = {
    "bench-attention": AttentionBench,
    "bench-scores": ScoresBench,
    "bench-encode": EncodeBench,
    "bench-model": ModelBench,
    "bench-memory": ContextBench,
}
