"""From captured queries to per-head agreement, and from an answer to per-token KL.

Queries are the model's own, after rotary embedding, at the last prompt token and every generated one that was fed
back (the very last one is not). For each of them the scores under the full keys are compared with the scores under
the same keys compressed as the cache holds them once that token has been processed: the same packing, the same exact
tokens, the same codes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from turboquant.cache.build import build_cache
from turboquant.cache.exact import appended
from turboquant.cache.kinds import keeps_all
from turboquant.hf_attention import observe_queries
from turboquant.kernels.scoring import Scoring
from turboquant.methods import METHODS, Method
from turboquant.models.load import LoadedModel
from turboquant.quant.quantizer import Quantizer
from turboquant.records.comparison import HeadMetrics, HeadScores, TokenMetrics
from turboquant.run.feed import answer_logits, packing_runs, step
from turboquant.run.generate import CancelledError, QueryRecorder
from turboquant.run.margins import AttentionCollector
from turboquant.run.metrics import head_agreement, token_agreement

METRICS = ("cosine_scores", "cosine_weights", "top1", "top5")
CHUNK_TOKENS = 16
Progress = Callable[[float], None]


class _LayerKeys:
    """The keys of one layer, kept and packed as a cache would have done after a given number of tokens."""

    def __init__(self, keys: Tensor, quantizer: Quantizer[Any], method: Method, scoring: Scoring) -> None:
        self.keys, self.quantizer, self.method, self.scoring = keys, quantizer, method, scoring
        self.kept = keys[:, :, :0]
        self.packed: list[Any] = []
        self.packed_length = 0

    def pack(self, tokens: int) -> None:
        """Take the keys of calls up to one that ended with `tokens` tokens, and pack what is due then."""
        sinks = self.method.sink_length
        if (held := self.kept.shape[2]) < tokens:
            self.kept = appended(self.kept, self.keys[:, :, held:tokens], self.method.rounds_exact)
        if self.packed_length < (due := self.method.packed_length(tokens)):
            block = self.kept[:, :, sinks + self.packed_length : sinks + due].float()
            self.packed.append(self.quantizer.quantize(block, like=self.packed[0] if self.packed else None))
            self.packed_length = due

    def scores(self, query: Tensor, tokens: int) -> tuple[Tensor, Tensor, int]:
        """Return full and compressed scores (heads, queries, tokens), unscaled, and how many tokens are packed."""
        sinks = self.method.sink_length
        self.pack(tokens)
        kv_heads = self.keys.shape[1]
        grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        full = grouped @ self.keys[:, :, :tokens].float().mT
        compressed = grouped @ self.kept[:, :, :tokens].float().mT
        if self.packed:
            projected = self.quantizer.project(grouped)
            parts = [self.quantizer.scores(projected, part) for part in self.packed]
            compressed[..., sinks : sinks + self.packed_length] = torch.cat(parts, dim=-1)
        shape = (query.shape[1], query.shape[2], tokens)
        full, compressed = (self.scoring.capped(side).reshape(shape) for side in (full, compressed))
        return full, compressed, self.packed_length


def _layer_agreement(
    layer: _LayerKeys, query: Tensor, prompt_tokens: int, collector: AttentionCollector | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Return agreement (heads, steps) as served and over packed positions (NaN where none), and packed counts."""
    served: list[dict[str, Tensor]] = []
    packed: list[dict[str, Tensor]] = []
    counts: list[int] = []
    sinks, scaling = layer.method.sink_length, layer.scoring.scaling
    for start, stop in packing_runs(layer.method, prompt_tokens, query.shape[2]):
        tokens = prompt_tokens + stop - 1
        full, compressed, count = layer.scores(query[:, :, start:stop], tokens)
        if collector is not None:
            collector.take(start, full, compressed)
        seen = torch.arange(prompt_tokens + start, prompt_tokens + stop, device="cpu")[:, None]
        served.append(head_agreement(full, compressed, torch.arange(tokens, device="cpu") < seen, scaling))
        if count:
            part = slice(sinks, sinks + count)
            visible = torch.ones(stop - start, count, dtype=torch.bool, device="cpu")
            packed.append(head_agreement(full[..., part], compressed[..., part], visible, scaling))
        else:
            packed.append({name: full.new_full(full.shape[:2], torch.nan) for name in METRICS})
        counts += [count] * (stop - start)
    join = {name: torch.cat([g[name] for g in served], dim=-1) for name in METRICS}
    join_packed = {name: torch.cat([g[name] for g in packed], dim=-1) for name in METRICS}
    return join, join_packed, counts


def mean_of(values: Tensor) -> float | None:
    """Return the mean of the numbers that are there (not NaN), or None."""
    mean = float(values.nanmean())
    return None if mean != mean else mean


def row_of(values: Tensor) -> list[float | None]:
    """Return numbers as a list, NaN as None."""
    return [None if value != value else value for value in values.tolist()]


def head_scores(layers: list[dict[str, Tensor]]) -> HeadScores:
    """Average agreement, (heads, steps) a layer, over steps, over heads, and over all."""
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in METRICS}
    fields: dict[str, Any] = {}
    for name, values in stacked.items():
        fields[f"per_head_{name}"] = [row_of(row) for row in values.nanmean(dim=2)]
        fields[f"per_step_{name}"] = row_of(values.flatten(0, 1).nanmean(dim=0))
    top1, top5 = mean_of(stacked["top1"]), mean_of(stacked["top5"])
    return HeadScores(
        **fields,
        cosine_scores=mean_of(stacked["cosine_scores"]),
        cosine_weights=mean_of(stacked["cosine_weights"]),
        top1_match_pct=None if top1 is None else 100 * top1,
        top5_match_pct=None if top5 is None else 100 * top5,
        heads_at_risk_pct=None if top1 is None else 100 - 100 * top1,
    )


def attention_collector(method: Method, prompt_tokens: int, recorder: QueryRecorder) -> AttentionCollector:
    """Return a collector for the recorded queries of an answer that follows `prompt_tokens` tokens."""
    steps = max((len(queries) for queries in recorder.queries.values()), default=0)
    packed = [method.packed_length(prompt_tokens + step) for step in range(steps)]
    return AttentionCollector(prompt_tokens, packed, method.sink_length)


def head_metrics(
    cache: Cache,
    recorder: QueryRecorder,
    method: Method,
    prompt_tokens: int,
    progress: Progress = lambda _: None,
    earlier: Sequence[int] = (),
    collector: AttentionCollector | None = None,
) -> HeadMetrics:
    """Compare attention under full and compressed keys for every recorded query, layer and query head.

    Args:
        cache: The full cache at the end of the run, whose plain layers hold every key.
        recorder: The queries of that run: one a forward call, the first for the last prompt token.
        method: How the keys are compressed.
        prompt_tokens: Tokens of the prompt, with all that stands before it.
        progress: Called with the fraction done.
        earlier: How many tokens the cache held after each forward call before the prompt's (turns of a conversation).
        collector: Takes the scores as they are compared, to explain them (`attention_collector`).

    Raises:
        CancelledError: If the recorder's caller asked to stop; asked between layers.
    """
    indices = [i for i, layer in enumerate(cache.layers) if keeps_all(layer) and i in recorder.queries]
    served, packed, counts = [], [], [0]
    for done, layer_idx in enumerate(indices):
        if recorder.cancelled():
            raise CancelledError
        layer: Any = cache.layers[layer_idx]
        keys, values = layer.keys, layer.values
        pair = method.quantizers(keys.shape[-1], values.shape[-1], layer_idx, torch.device("cpu"))
        assert pair is not None, "a method that packs has quantizers"
        query = torch.cat(recorder.queries[layer_idx], dim=2).float().cpu()
        layer_keys = _LayerKeys(keys.cpu(), pair[0], method, recorder.scoring[layer_idx])
        for tokens in earlier:
            layer_keys.pack(tokens)
        agreement = _layer_agreement(layer_keys, query, prompt_tokens, collector)
        if collector is not None:
            collector.end_layer(layer_idx, layer_keys.scoring.scaling, agreement[1])
        served.append(agreement[0])
        packed.append(agreement[1])
        counts = agreement[2]
        progress((done + 1) / len(indices))
    return HeadMetrics(
        positions=[prompt_tokens - 1 + step for step in range(len(counts))],
        packed_tokens=counts,
        layer_indices=indices,
        served=head_scores(served),
        packed=head_scores(packed),
    )


@torch.no_grad()
def token_metrics(
    loaded: LoadedModel,
    prompt: Tensor,
    answer: list[int],
    method: Method,
    progress: Progress = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
    history: Sequence[Tensor] = (),
) -> TokenMetrics:
    """Feed the original answer through a fresh full and a fresh compressed cache, and compare every next token.

    Tokens go in chunks during which decoding would have packed nothing, so every token meets the cache that it would
    have met one by one.

    Args:
        loaded: The model.
        prompt: Prompt tokens (1, tokens).
        answer: Tokens of the original answer, at least one.
        method: The compressed side.
        progress: Called with the fraction done.
        cancelled: Asked between layers.
        history: What the cache held before the prompt, in the pieces (1, tokens) that went through it.

    Raises:
        CancelledError: If the caller asked to stop.
    """
    model = loaded.model
    caches = [build_cache(model.config, m) for m in (METHODS["full"](), method)]
    targets = torch.tensor([answer], device=prompt.device)
    runs = packing_runs(method, sum(piece.shape[1] for piece in (*history, prompt)), len(answer) - 1)
    parts: list[dict[str, Tensor]] = []
    with observe_queries(QueryRecorder(cancelled, keep=False)):
        for piece in history:
            for cache in caches:
                step(model, cache, piece)
        sides = [answer_logits(model, cache, prompt, targets, runs, CHUNK_TOKENS) for cache in caches]
        for (part, full), (_, compressed) in zip(*sides, strict=True):
            agreement = token_agreement(full[0], compressed[0], targets[0, part])
            parts.append({name: value.cpu() for name, value in agreement.items()})
            progress(part.stop / len(answer))
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return TokenMetrics(
        kl=joined["kl"].tolist(),
        same_top=joined["same_top"].bool().tolist(),
        probability_full=joined["probability_full"].tolist(),
        probability_compressed=joined["probability_compressed"].tolist(),
        mean_kl=float(joined["kl"].mean()),
        same_top_pct=100 * float(joined["same_top"].mean()),
    )
