"""What compression does to attention over a long context: agreement of every head, the needle's rank, and KL.

The context is a needle prompt of exact length. Its last `queries` tokens (the question and the beginning of the answer)
ask the cache about everything before them, which stands packed as one forward call would have packed it; they
themselves are exact, as the tokens of a forward call are, in 16 bits where a cache keeps them so (float32 models).
Three things are measured for each method:

1. Attention of the model's own queries over the keys and values that the cache serves, against the full ones: in every
   full-attention layer and query head, as served (all tokens) and over the packed tokens only.
2. Where the needle ranks for the last token, whose next token should be the number.
3. The next-token distributions when those last tokens are read with the compressed cache.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from turboquant.cache.build import NothingCompressedError, QuantizedLayer, cache_report, layer_states
from turboquant.cache.exact import rounded
from turboquant.cache.kinds import why_dense
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.experiments.capture import Captured, capture
from turboquant.experiments.needle_prompt import NeedlePrompt, needle_prompt
from turboquant.methods import Method
from turboquant.models.checks import free_bytes
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import CacheReport, HeadScores
from turboquant.records.settings import HeadsSettings
from turboquant.run.generate import PromptError
from turboquant.run.heads import head_scores, mean_of, row_of
from turboquant.run.memory import check_context, trim
from turboquant.run.metrics import Span, compare_layer, token_agreement

Pair = tuple[Tensor, Tensor]


def _served(captured: Captured, cache: Cache, layer_idx: int) -> Pair:
    """Keys and values that a filled cache serves to the last chunk: what it holds, then the chunk as it keeps it."""
    held = layer_states(cache, layer_idx)
    own = [states[:, :, captured.before :] for states in captured.states(layer_idx)]
    layer = cache.layers[layer_idx]
    if isinstance(layer, QuantizedLayer):
        rounds = layer.method.rounds_exact
        own = [rounded(states, kept, rounds) for states, kept in zip(own, layer.kept(), strict=True)]
    keys, values = (torch.cat([a.float(), b.float()], dim=2)[0] for a, b in zip(held, own, strict=True))
    return keys, values


def _packed_span(layer: Any) -> Span | None:
    """Where the packed tokens of a filled layer stand: behind its sinks, where it has any."""
    count = int(getattr(layer, "packed_length", 0))
    start = int(getattr(layer, "sink_length", 0))
    return Span(start, start + count) if count else None


@torch.no_grad()
def compare_attention(
    captured: Captured, cache: Cache, needle: Span, watch: Watch
) -> dict[str, list[dict[str, Tensor]]]:
    """Return what `compare_layer` finds, by side a list of layers. The cache is left as it was.

    Raises:
        CancelledError: If the caller asked to stop; asked between layers.
    """
    layers: dict[str, list[dict[str, Tensor]]] = {"served": [], "packed": [], "needle": []}
    for done, layer_idx in enumerate(captured.layer_indices):
        watch.check()
        watch.progress(done / len(captured.layer_indices), "Comparing attention")
        keys, values = (states[0].float() for states in captured.states(layer_idx))
        found = compare_layer(
            captured.queries[layer_idx][0].float(),
            (keys, values),
            _served(captured, cache, layer_idx),
            captured.scoring[layer_idx],
            _packed_span(cache.layers[layer_idx]),
            needle,
        )
        for side, values_of in found.items():
            if values_of:
                layers[side].append(values_of)
        trim()
    return layers


def _figures(layers: dict[str, list[dict[str, Tensor]]]) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Return headline figures, and the matrices [layer][head] behind them, from what `compare_attention` found."""
    served = head_scores(layers["served"])
    packed = head_scores(layers["packed"]) if layers["packed"] else None
    errors = torch.stack([layer["output_error"] for layer in layers["served"]])
    needle = {name: torch.stack([layer[name] for layer in layers["needle"]]) for name in layers["needle"][0]}
    metrics = {
        **_head_metrics("", served),
        "output_error": mean_of(errors),
        **(_head_metrics("packed_", packed) if packed else {}),
        **_needle_metrics(needle),
    }
    detail = {
        "served": served.model_dump(),
        "packed": packed.model_dump() if packed else None,
        "per_head_output_error": [row_of(row) for row in errors.nanmean(dim=-1)],
        **{f"per_head_needle_{name}": [row_of(row) for row in values] for name, values in needle.items()},
    }
    return metrics, detail


def _needle_metrics(needle: dict[str, Tensor]) -> dict[str, float | None]:
    """Over all layers and heads: the median rank, the heads that rank the needle first, its share of attention."""
    first, still = needle["rank_full"] == 1, needle["rank"] == 1
    heads = int(first.sum())
    return {
        "needle_rank_full": float(needle["rank_full"].median()),
        "needle_rank": float(needle["rank"].median()),
        "needle_heads_full": float(heads),
        "needle_heads": float(still.sum()),
        "needle_heads_kept_pct": 100 * float((first & still).sum()) / heads if heads else None,
        "needle_mass_full_pct": 100 * float(needle["mass_full"].mean()),
        "needle_mass_pct": 100 * float(needle["mass"].mean()),
    }


def _rounded(value: Any) -> Any:
    """Six digits behind the point are more than a measurement means, and half the file."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def _head_metrics(prefix: str, scores: HeadScores) -> dict[str, float | None]:
    return {
        f"{prefix}cosine_similarity": scores.cosine_scores,
        f"{prefix}cosine_weights": scores.cosine_weights,
        f"{prefix}top1_match_pct": scores.top1_match_pct,
        f"{prefix}top5_match_pct": scores.top5_match_pct,
    }


def _check_packed(method: Method, report: CacheReport) -> None:
    if method.compresses and not report.compressed_tokens:
        raise NothingCompressedError(
            f"{method} packed none of the {report.tokens:,} tokens before the last ones: give a longer context, fewer "
            "queries or a smaller window"
        )


def measure(loaded: LoadedModel, method: Method, captured: Captured, prompt: NeedlePrompt, watch: Watch) -> Measurement:
    """Measure one method against a captured pass; its cache lives no longer than this call.

    Raises:
        NothingCompressedError: If the method packed no token.
        CancelledError: If the caller asked to stop.
    """
    times = [time.perf_counter()]
    with torch.no_grad():
        cache = captured.filled(loaded, method)
    _check_packed(method, cache_report(cache))
    times.append(time.perf_counter())
    layers = compare_attention(captured, cache, Span(prompt.needle_start, prompt.needle_stop), watch.part(0.0, 0.8))
    times.append(time.perf_counter())
    replayed = captured.replay(loaded, cache, watch)
    tokens = token_agreement(captured.logits, replayed, captured.logits.argmax(dim=-1))
    times.append(time.perf_counter())
    report = cache_report(cache)
    watch.progress(1.0, f"Measured {method}")
    metrics, detail = _figures(layers)
    return Measurement(
        metrics={
            **metrics,
            "kl_mean": float(tokens["kl"].mean()),
            "same_top_pct": 100 * float(tokens["same_top"].mean()),
            "compression_ratio": report.compression_ratio,
            "payload_ratio": report.payload_ratio,
            "bits_per_value": report.bits_per_value,
        },
        cache=report,
        timing={name: times[i + 1] - times[i] for i, name in enumerate(("fill", "compare", "replay"))},
        detail={
            "layer_indices": captured.layer_indices,
            "window_layers": len(captured.windows),
            "positions": [captured.before, captured.ids.shape[1]],
            "needle": [prompt.needle_start, prompt.needle_stop],
            "word": prompt.word,
            "answer": prompt.answer,
            "kl": _rounded(tokens["kl"].tolist()),
            "same_top": tokens["same_top"].bool().tolist(),
            **_rounded(detail),
        },
    )


def build_prompt(loaded: LoadedModel, settings: HeadsSettings) -> NeedlePrompt:
    """Return the prompt of some settings.

    Raises:
        PromptError: If the context has no room for the needle and the question, or for the queries, or the chat
            template cannot be used.
        ValueError: If there is no such filler.
    """
    if settings.queries >= settings.context:
        raise PromptError(f"queries must be fewer than the context's {settings.context:,}, got {settings.queries:,}")
    where = settings.context, settings.depth, settings.seed, settings.filler
    return needle_prompt(loaded.tokenizer, *where, chat=settings.chat)


def check(loaded: LoadedModel, settings: HeadsSettings) -> None:
    """Refuse what cannot be measured.

    Raises:
        PromptError: If model or machine have no room for the context, or it has none for the needle or the queries, or
            the model's layers have no keys of heads to compare.
        ValueError: If there is no such filler.
    """
    if (reason := why_dense(loaded.model.config)) is not None:
        raise PromptError(f"attention heads of {loaded.spec.name} cannot be compared: {reason}")
    free = free_bytes(torch.device(loaded.device))
    check_context(loaded.spec.name, loaded.model.config, settings.context, loaded.weights, free)
    build_prompt(loaded, settings)


def run(
    loaded: LoadedModel, methods: Sequence[Method], settings: HeadsSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    """Read the context once, then measure one method after the other."""
    check(loaded, settings)
    prompt = build_prompt(loaded, settings)
    ids = prompt.ids.to(loaded.model.device)
    forward = 0.7  # of the progress; the methods share the rest
    captured = capture(loaded, ids, settings.queries, settings.chunk_tokens, watch.part(0.0, forward))
    share = (1 - forward) / len(methods)
    for done, method in enumerate(methods):
        if watch.stopping():
            return
        part = watch.part(forward + done * share, forward + (done + 1) * share)
        yield method, measure(loaded, method, captured, prompt, part)


EXPERIMENT = Experiment("attention", HeadsSettings, run, check)
