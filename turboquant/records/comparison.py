"""Records of two answers side by side: plain pydantic models that travel as JSON.

One comparison (`Comparison`) is what the Compare page shows, what the exports contain and what a recorded run in
`assets/runs/` holds. Every number in it was measured in that run; fields that could not be measured are None.
"""

from typing import Literal

from pydantic import Field

from turboquant.records.base import Matrix, Record
from turboquant.records.environment import Environment
from turboquant.records.heads import AttentionDetail


class ModelInfo(Record):
    """The model as it was really loaded; `stored` is how its weights are stored, where that is no plain number."""

    name: str
    hub_id: str
    revision: str | None
    weights: str
    device: str
    dtype: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    stored: str | None = None

    @property
    def weights_said(self) -> str:
        """The precision of the weights, and what they were before."""
        return self.weights if self.stored in (None, self.weights) else f"{self.weights} from {self.stored}"


class CacheReport(Record):
    """What a cache holds, summed over the storages reachable from it (no formula except `payload_ratio`).

    All sizes are bytes. `state_bytes` are those of recurrent layers, which nothing compresses. `full_precision_bytes`
    is the 16-bit baseline: 2 bytes a cached value whatever dtype the run uses, and the states. `bits_per_value` is all
    that is held but the states, divided by the number of cached values. `misread_vectors` are keys and
    values (of one head and token each) that are read back as something else, since an outlier shares their range.
    `graph_bytes` is what captured decode steps take on a GPU beside the cache: their own tensors, for one step,
    whatever the length of the context.
    """

    cache_class: str
    tokens: int
    compressed_tokens: int
    exact_tokens: int
    layers: int
    compressed_layers: int
    bytes: int
    key_bytes: int
    value_bytes: int
    scale_bytes: int
    exact_bytes: int
    spare_bytes: int
    shared_bytes: int
    state_bytes: int = 0
    full_precision_bytes: int
    bits_per_value: float
    compression_ratio: float
    payload_ratio: float | None
    misread_vectors: int = 0
    graph_bytes: int = 0


class SideResult(Record):
    """One of the two answers: its text, timing and memory."""

    method: str
    text: str
    token_ids: list[int]
    token_texts: list[str]
    finish: Literal["stop", "length", "cancelled"]
    time_to_first_token_ms: float | None
    tokens_per_second: float | None
    step_ms: list[float]
    cache_bytes: list[int]
    report: CacheReport


class Divergence(Record):
    """The first position where the two answers differ; a token text is None where that answer had ended."""

    index: int
    original: str | None
    compressed: str | None


class HeadScores(Record):
    """Agreement of attention under the full and the compressed keys.

    `per_head` values are [layer][query head], averaged over the measured query positions; `per_step` values are one
    number a query position, averaged over layers and query heads. Cosines are -1 to 1, matches are fractions 0 to 1.
    """

    per_head_cosine_scores: Matrix
    per_head_cosine_weights: Matrix
    per_head_top1: Matrix
    per_head_top5: Matrix
    per_step_cosine_scores: list[float | None]
    per_step_cosine_weights: list[float | None]
    per_step_top1: list[float | None]
    per_step_top5: list[float | None]
    cosine_scores: float | None
    cosine_weights: float | None
    top1_match_pct: float | None
    top5_match_pct: float | None
    heads_at_risk_pct: float | None


class HeadMetrics(Record):
    """Head agreement as the cache serves attention, and over the packed positions only.

    `positions` are the measured query positions: the last prompt token, then every generated token of the original
    answer that was fed back to the model (the very last one is not). `layer_indices` names the compressed layers, one
    a row of the per-head matrices.
    """

    positions: list[int]
    packed_tokens: list[int]
    layer_indices: list[int]
    served: HeadScores
    packed: HeadScores


class TokenMetrics(Record):
    """Teacher forcing of the original answer through a fresh compressed cache; one entry a token of that answer.

    `kl` is KL(full || compressed) of the next-token distribution in nats.
    """

    kl: list[float]
    same_top: list[bool]
    probability_full: list[float]
    probability_compressed: list[float]
    mean_kl: float
    same_top_pct: float


class Settings(Record):
    """Sampling settings, the same for both answers. Temperature 0 is greedy."""

    max_new_tokens: int = Field(128, ge=1, le=65536)
    temperature: float = Field(0.0, ge=0.0, le=5.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, le=2**63 - 1)
    stop: tuple[str, ...] = ()


class Comparison(Record):
    """One prompt answered twice: with the full cache (`original`) and with a compressed one (`compressed`).

    `attention` explains the heads at risk; it is there only where it was asked for.
    """

    schema_version: Literal[1] = 1
    environment: Environment
    model: ModelInfo
    prompt: str
    chat: bool
    prompt_tokens: int
    settings: Settings
    original: SideResult
    compressed: SideResult
    divergence: Divergence | None
    heads: HeadMetrics | None
    tokens: TokenMetrics | None
    attention: AttentionDetail | None = None
    notes: list[str] = Field([])
