"""Perplexity and KL by teacher forcing a text through the cache.

A window of a text is fed: its first `prefill` tokens in one call, as the cache's contract has it (they attend to each
other exactly, so nothing is measured on them), then the rest through the cache in chunks; each of those is a measured
position that predicts the next token. By default a chunk ends where the method packs, so every token meets the very
cache that it would meet if tokens came one by one. With `chunk_tokens` chunks have that length instead: that is faster
with methods that pack after every token, and coarser, since the tokens of one chunk attend to each other exactly.
"""

import hashlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from turboquant.cache.build import NothingCompressedError, build_cache, cache_report
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.hf_attention import observe_queries
from turboquant.methods import METHODS, Method
from turboquant.models.checks import free_bytes
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import CacheReport
from turboquant.records.settings import CHUNK, PerplexitySettings
from turboquant.records.spread import block_interval
from turboquant.run.feed import feed, packing_runs, step
from turboquant.run.generate import PromptError, QueryRecorder
from turboquant.run.memory import check_context
from turboquant.run.metrics import token_agreement
from turboquant.texts import read_text, read_texts, reading

BLOCK = 32
"""Neighbouring positions that the bootstrap draws together."""
BUCKETS = 4


@dataclass(frozen=True)
class Window:
    """One piece of a text: `context` tokens and the one that follows."""

    text: str
    start: int
    ids: Int[Tensor, "1 tokens"]


@dataclass(frozen=True)
class _Reference:
    """What the full cache gave: the inputs of the output layer, small beside its logits, and each target's loss."""

    hidden: Float[Tensor, "positions hidden"]
    nll: Float[Tensor, " positions"]
    report: CacheReport


@dataclass(frozen=True)
class FullRun:
    """Windows as the full cache has read them, for the methods that are measured against it.

    `sha256` are the hashes of the texts by name, `seconds` what the reading took.
    """

    settings: PerplexitySettings
    windows: Sequence[Window]
    references: Sequence[_Reference]
    sha256: Mapping[str, str]
    seconds: float


def text_windows(loaded: LoadedModel, settings: PerplexitySettings) -> list[Window]:
    """Return the windows of all texts; each begins as the tokenizer begins a text.

    Raises:
        ValueError: If a text cannot be read or is given twice.
        PromptError: If a text is too short, or the windows longer than the model's context or this machine's memory.
    """
    free = free_bytes(torch.device(loaded.device))
    check_context(loaded.spec.name, loaded.model.config, settings.context, loaded.weights, free)
    tokenizer: Any = loaded.tokenizer
    head: list[int] = list(tokenizer("").input_ids)
    size = settings.context + 1 - len(head)
    windows = []
    for text, words in read_texts(settings.texts).items():
        ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        places = range(settings.start, len(ids) - size + 1, size)
        if len(places) < settings.windows:
            raise PromptError(
                f"the text {text} has {len(ids):,} tokens, too few for {settings.windows} windows of {size:,} "
                f"from token {settings.start:,}"
            )
        drawn = random.Random(settings.seed).sample(places, settings.windows) if settings.seed else places
        for place in list(drawn)[: settings.windows]:
            piece = torch.tensor([head + ids[place : place + size]], device=loaded.model.device)
            windows.append(Window(text, place, piece))
    return windows


def check(loaded: LoadedModel, settings: PerplexitySettings) -> None:
    """Raise ValueError where the texts do not serve the settings, before anything is measured."""
    text_windows(loaded, settings)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


class _OutputInputs:
    """Notes what goes into the model's output layer, and lets rows of an earlier run go through it as well.

    So the full cache's logits are made again chunk by chunk by the model itself (with all that it does to logits),
    beside those of the compressed cache, and never have to be kept. Each call takes as many of the rows in `more`,
    from the first on, as it has rows itself.
    """

    def __init__(self, model: nn.Module) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.seen: Tensor | None = None
        self.more: Tensor | None = None
        self.handle = head.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (self.seen, *rest) = args
        if self.more is None:
            return args
        rows, self.more = self.more.tensor_split([self.seen.shape[1]])
        return (torch.cat([self.seen, rows[None]], dim=1), *rest)

    def __enter__(self) -> "_OutputInputs":
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@torch.no_grad()
def _reference(loaded: LoadedModel, window: Window, prefill: int, watch: Watch) -> _Reference:
    """Run a window with the full cache."""
    model, ids, targets = loaded.model, window.ids, window.ids[0, 1:]
    cache = build_cache(model.config, METHODS["full"]())
    hidden, nll = [], []
    with observe_queries(QueryRecorder(watch.cancelled, keep=False)), _OutputInputs(model) as inputs:
        step(model, cache, ids[:, :prefill])
        for part, (logits,) in feed(model, cache, ids, [(prefill, len(targets))], CHUNK):
            assert inputs.seen is not None
            hidden.append(inputs.seen[0].clone())
            nll.append(_losses(logits, targets[part]))
    return _Reference(torch.cat(hidden), torch.cat(nll).double().cpu(), cache_report(cache))


def feeding_runs(method: Method, settings: PerplexitySettings) -> list[tuple[int, int]]:
    """Return the runs of measured tokens (start, stop) that go through the cache together.

    The last token goes alone, so that the cache ends as decoding leaves it.
    """
    begin, end, step = settings.prefill, settings.context, settings.chunk_tokens
    if step:
        return [(start, min(start + step, end)) for start in range(begin, end, step)]
    runs = [(begin + start, begin + stop) for start, stop in packing_runs(method, begin, end - 1 - begin)]
    return [*runs, (end - 1, end)]


@torch.no_grad()
def _through_cache(
    loaded: LoadedModel,
    window: Window,
    reference: _Reference,
    method: Method,
    settings: PerplexitySettings,
    watch: Watch,
) -> tuple[dict[str, Tensor], CacheReport]:
    """Run a window with a method's cache; return agreement with the full cache at each position."""
    model, ids, targets = loaded.model, window.ids, window.ids[0, 1:]
    cache = build_cache(model.config, method)
    parts: list[dict[str, Tensor]] = []
    with observe_queries(QueryRecorder(watch.cancelled, keep=False)), _OutputInputs(model) as inputs:
        step(model, cache, ids[:, : settings.prefill])
        inputs.more = reference.hidden
        for part, (logits,) in feed(model, cache, ids, feeding_runs(method, settings), CHUNK):
            own, full = logits.chunk(2)
            agreement = token_agreement(full, own, targets[part])
            parts.append({"kl": agreement["kl"], "same_top": agreement["same_top"], "nll": _losses(own, targets[part])})
            done = (part.stop - settings.prefill) / (settings.context - settings.prefill)
            watch.progress(done, f"{method}: {window.text}")
    return {name: torch.cat([part[name] for part in parts]).double().cpu() for name in parts[0]}, cache_report(cache)


def _relative_pct(loss: float | None) -> float | None:
    """Return by how many percent a difference of mean losses raises perplexity."""
    return None if loss is None else 100 * math.expm1(min(loss, 700.0))


def packed_bits_per_value(report: CacheReport) -> float | None:
    """Return the bits of codes and scales for each packed value: what a token costs once the exact window is full.

    None where nothing is packed, or where some layers are not compressed, so that their values cannot be told apart.
    """
    if not report.compressed_tokens or report.compressed_layers != report.layers:
        return None
    values = report.full_precision_bytes / 2 * report.compressed_tokens / report.tokens
    return 8 * (report.key_bytes + report.value_bytes + report.scale_bytes) / values


def _measurement(full: FullRun, results: Sequence[dict[str, Tensor]], report: CacheReport) -> Measurement:
    """Put the positions of all windows together."""
    kl, same, nll = (torch.stack([one[name] for one in results]) for name in ("kl", "same_top", "nll"))
    nll_full = torch.stack([one.nll for one in full.references])
    loss_low, loss_high = block_interval((nll - nll_full).numpy(), BLOCK)
    kl_low, kl_high = block_interval(kl.numpy(), BLOCK)
    same_low, same_high = block_interval(same.numpy(), BLOCK)
    return Measurement(
        metrics={
            "ppl_full": math.exp(float(nll_full.mean())),
            "ppl": math.exp(min(float(nll.mean()), 700.0)),
            "delta_ppl_pct": _relative_pct(float((nll - nll_full).mean())),
            "delta_ppl_low_pct": _relative_pct(loss_low),
            "delta_ppl_high_pct": _relative_pct(loss_high),
            "kl_mean": float(kl.mean()),
            "kl_low": kl_low,
            "kl_high": kl_high,
            "kl_p99": float(kl.flatten().quantile(0.99)),
            "same_top_pct": 100 * float(same.mean()),
            "same_top_low_pct": None if same_low is None else 100 * same_low,
            "same_top_high_pct": None if same_high is None else 100 * same_high,
            "bits_per_value": report.bits_per_value,
            "packed_bits_per_value": packed_bits_per_value(report),
            "compressed_tokens": float(report.compressed_tokens),
            "measured_tokens": float(kl.numel()),
        },
        cache=report,
        detail={
            "windows": [_window_detail(*one) for one in zip(full.windows, kl, same, nll, nll_full, strict=True)],
            "by_position": _by_position(kl, same, full.settings.prefill),
            "sha256": dict(full.sha256),
        },
    )


def _window_detail(window: Window, kl: Tensor, same: Tensor, nll: Tensor, nll_full: Tensor) -> dict[str, Any]:
    """Return one window's own figures and its KL at each position (6 digits), for paired comparisons."""
    return {
        "text": window.text,
        "start": window.start,
        "ppl_full": math.exp(float(nll_full.mean())),
        "delta_ppl_pct": _relative_pct(float((nll - nll_full).mean())),
        "kl_mean": float(kl.mean()),
        "same_top_pct": 100 * float(same.mean()),
        "kl": [float(f"{value:.6g}") for value in kl.tolist()],
    }


def _by_position(kl: Tensor, same: Tensor, prefill: int) -> list[dict[str, float]]:
    """Return the figures of equal stretches of positions, over all windows."""
    edges = np.linspace(0, kl.shape[1], min(BUCKETS, kl.shape[1]) + 1).astype(int).tolist()
    return [
        {
            "start": prefill + start,
            "stop": prefill + stop,
            "kl_mean": float(kl[:, start:stop].mean()),
            "same_top_pct": 100 * float(same[:, start:stop].mean()),
        }
        for start, stop in pairwise(edges)
    ]


@reading()
def read_full(loaded: LoadedModel, settings: PerplexitySettings, watch: Watch) -> FullRun:
    """Read the windows with the full cache.

    Raises:
        PromptError: If a text is too short, or the context longer than the model's.
        CancelledError: If the caller asked to stop.
    """
    windows = text_windows(loaded, settings)
    began = time.perf_counter()
    references = []
    for i, window in enumerate(windows):
        watch.progress(i / len(windows), f"full cache: {window.text}")
        references.append(_reference(loaded, window, settings.prefill, watch))
    sums = {text: hashlib.sha256(read_text(text).encode()).hexdigest() for text in settings.texts}
    return FullRun(settings, windows, references, sums, time.perf_counter() - began)


def run(
    loaded: LoadedModel,
    methods: Sequence[Method],
    settings: PerplexitySettings,
    watch: Watch,
    full: FullRun | None = None,
) -> Iterator[tuple[Method, Measurement]]:
    """Measure methods on the same windows; the full cache's run is shared.

    Args:
        loaded: The model.
        methods: What to measure.
        settings: What is read.
        watch: Progress and cancelling.
        full: The full cache's run over the same model and settings, where there is one from before.

    Raises:
        PromptError: If a text is too short, or the context longer than the model's.
        NothingCompressedError: If a method has packed nothing before the last position; the others come first.
        CancelledError: If the caller asked to stop.
    """
    idle = [one for one in methods if one.compresses and not one.packs(settings.context - 1)]
    wanted = [one for one in methods if one not in idle]
    if wanted:
        full = full or read_full(loaded, settings, watch.part(0, 1 / (len(wanted) + 1)))
        yield from _measured(loaded, wanted, full, watch)
    if idle and not watch.stopping():
        raise NothingCompressedError(
            f"{idle[0]} packs none of {settings.context} tokens: give a longer context or a smaller window"
        )


def _measured(
    loaded: LoadedModel, methods: Sequence[Method], full: FullRun, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    share = 1 / (len(methods) + 1)
    for i, method in enumerate(methods):
        if watch.stopping():
            return
        part = watch.part(share * (i + 1), share * (i + 2))
        began = time.perf_counter()
        if not method.compresses:
            results, report = [_unchanged(one) for one in full.references], full.references[-1].report
        else:
            results, report = _all_windows(loaded, full, method, part)
        found = _measurement(full, results, report)
        found.timing.update(full=full.seconds, method=time.perf_counter() - began)
        yield method, found


def _all_windows(
    loaded: LoadedModel, full: FullRun, method: Method, watch: Watch
) -> tuple[list[dict[str, Tensor]], CacheReport]:
    results = []
    for i, (window, reference) in enumerate(zip(full.windows, full.references, strict=True)):
        part = watch.part(i / len(full.windows), (i + 1) / len(full.windows))
        agreement, report = _through_cache(loaded, window, reference, method, full.settings, part)
        results.append(agreement)
    if not report.compressed_tokens:
        raise NothingCompressedError(f"{method} packed none of {report.tokens} tokens")
    return results, report


def _unchanged(reference: _Reference) -> dict[str, Tensor]:
    """Return the full cache's agreement with itself."""
    return {"kl": torch.zeros_like(reference.nll), "same_top": torch.ones_like(reference.nll), "nll": reference.nll}


EXPERIMENT = Experiment("perplexity", PerplexitySettings, run, check)
