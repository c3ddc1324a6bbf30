"""What compression costs and saves while a model generates: the whole loop, with the cache packing as it goes.

After a short warm-up each side (the full cache and every method) is run once with instruments: bytes held after every
step, time spent packing and attending, peak memory. Then come the timed runs without instruments, all sides in turn in
every round.
Rows of a batch read different pieces of a text, decode greedily and do not stop at an end-of-text token.

Peak memory is what the allocator reached on a GPU; on the CPU it is the process's resident memory, sampled, less what
it was before the run (memory that was freed has gone back to the system first).
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache

from turboquant.cache.build import NothingCompressedError, QuantizedLayer, cache_bytes, cache_report
from turboquant.cache.roomy import Replayable
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.hf_attention import time_attention
from turboquant.methods import METHODS, Method
from turboquant.models.checks import free_bytes
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import CacheReport
from turboquant.records.settings import SpeedSettings
from turboquant.run.feed import step
from turboquant.run.generate import PromptError, new_cache
from turboquant.run.memory import check_context, tokens_that_fit, trim
from turboquant.texts import read_text

SAMPLED_MS = 5.0
FIGURES = ("tokens_per_second", "time_to_first_token_ms")


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts; `mask` is None where no row is padded."""

    ids: Int[Tensor, "rows tokens"]
    mask: Bool[Tensor, "rows tokens"] | None


@dataclass
class Instruments:
    """What the instrumented run notes.

    Attributes:
        encode_ms: Milliseconds spent packing, by forward call; the first call is the prompt's.
        attention_ms: Milliseconds spent attending over the cache (scores, softmax, weighted values) in all layers, by
            forward call. Caches of other libraries read their codes back before, which is not in it.
        cache_bytes: Bytes held after each forward call.
    """

    encode_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)

    def begin_call(self) -> None:
        """A forward call starts: its times are 0 so far."""
        self.encode_ms.append(0.0)
        self.attention_ms.append(0.0)

    @contextmanager
    def time_into(self, times: list[float], device: torch.device | str) -> Iterator[None]:
        """Add the time of the block to the last of `times`; it waits for the device before and after."""
        _wait(device)
        began = time.perf_counter()
        yield
        _wait(device)
        times[-1] += 1e3 * (time.perf_counter() - began)


@dataclass(frozen=True)
class Run:
    """One generation: its tokens (rows, new tokens), first token's and remaining tokens' time, and the cache."""

    tokens: Int[Tensor, "rows tokens"]
    first_ms: float
    rest_ms: float
    report: CacheReport

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows a second, the first of each left out."""
        return 1e3 * self.tokens.shape[0] * (self.tokens.shape[1] - 1) / self.rest_ms


@dataclass
class _Side:
    """What is known of one side."""

    instruments: Instruments = field(default_factory=Instruments)
    peak_bytes: int = 0
    warm: Run | None = None
    runs: list[Run] = field(default_factory=list)


class _TimedLayer(QuantizedLayer):
    """A layer that notes how long it packs; only for the instrumented run, since it waits for the device."""

    def __init__(self, layer: QuantizedLayer, notes: Instruments) -> None:
        super().__init__(layer.method, layer.layer_idx, layer.last_reader, layer.config)
        self.notes = notes

    def compress(self, visible: Tensor | None = None, pads: bool = True) -> None:
        """Pack, with a clock."""
        with self.notes.time_into(self.notes.encode_ms, self.device):
            super().compress(visible, pads)


class PeakMemory:
    """Measures by how much memory grows at most while the block runs; `peak_bytes` once it has ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = self._top = self._before = 0
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLED_MS / 1e3):
            self._top = max(self._top, self._process.memory_info().rss)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            trim()
            self._before = self._top = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            top = torch.cuda.max_memory_allocated(self.device)
        else:
            self._ended.set()
            self._thread.join()
            top = max(self._top, self._process.memory_info().rss)
        self.peak_bytes = top - self._before


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def build_prompts(loaded: LoadedModel, settings: SpeedSettings) -> Prompts:
    """Return one prompt a row, cut from successive places of the text; shorter ones are padded on the left."""
    tokenizer: Any = loaded.tokenizer
    count = settings.context - settings.new_tokens
    found = tokenizer(read_text(settings.text), add_special_tokens=False, verbose=False).input_ids
    text = torch.tensor(found, device=loaded.model.device)
    places = torch.arange(settings.batch * count, device=text.device) % len(text)
    ids = text[places].view(settings.batch, count)
    lengths = torch.linspace(1.0, settings.shortest, settings.batch, device=ids.device)
    padding = count - (lengths * count).long().clamp_min(1)
    if not padding.any():
        return Prompts(ids, None)
    mask = torch.arange(count, device=ids.device) >= padding[:, None]
    return Prompts(ids.masked_fill(~mask, tokenizer.pad_token_id or 0), mask)


def check(loaded: LoadedModel, settings: SpeedSettings) -> None:
    """Raise ValueError where model or machine have no room for the batch, or the text cannot be read."""
    read_text(settings.text)
    config, free = loaded.model.config, free_bytes(torch.device(loaded.device))
    check_context(loaded.spec.name, config, settings.context, loaded.weights, free)
    fit = tokens_that_fit(config, loaded.weights, free)
    if settings.batch * settings.context > fit:
        raise PromptError(
            f"{settings.batch} rows of {settings.context:,} tokens do not fit into the free memory: {fit:,} tokens do"
        )


@torch.no_grad()
def generate_batch(
    loaded: LoadedModel,
    prompts: Prompts,
    cache: Cache,
    new_tokens: int,
    watch: Watch,
    notes: Instruments | None = None,
) -> Run:
    """Generate greedily for all rows.

    Args:
        loaded: The model.
        prompts: The batch.
        cache: Empty.
        new_tokens: Tokens a row, at least 2.
        watch: Asked before every forward call.
        notes: Where the bytes after each call go; measuring them slows the run.

    Raises:
        CancelledError: If the caller asked to stop.
    """
    model, mask, ids = loaded.model, prompts.mask, prompts.ids
    chosen: list[Tensor] = []
    positions = None if mask is None else (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    _wait(ids.device)
    clock = [time.perf_counter()]
    for done in range(new_tokens):
        watch.check()
        if notes is not None:
            notes.begin_call()
        options = {} if mask is None else {"attention_mask": mask.long(), "position_ids": positions}
        ids = step(model, cache, ids, **options).argmax(dim=-1, keepdim=True)
        chosen.append(ids)
        if mask is not None and positions is not None:
            mask, positions = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1), positions[:, -1:] + 1
        if notes is not None:
            notes.cache_bytes.append(cache_bytes(cache))
        if done in (0, new_tokens - 1):
            _wait(ids.device)
            clock.append(time.perf_counter())
    first, rest = 1e3 * (clock[1] - clock[0]), 1e3 * (clock[2] - clock[1])
    if isinstance(cache, Replayable):  # the room of captured steps is no part of what is held in the end
        cache.shrink()
    return Run(torch.cat(chosen, dim=1), first, rest, cache_report(cache))


def _instrumented(
    loaded: LoadedModel, prompts: Prompts, method: Method, settings: SpeedSettings, watch: Watch
) -> _Side:
    side = _Side()
    cache = new_cache(loaded.model.config, loaded.model.device, method)
    cache.layers = [
        _TimedLayer(layer, side.instruments) if isinstance(layer, QuantizedLayer) else layer for layer in cache.layers
    ]
    notes, device = side.instruments, loaded.model.device
    with time_attention(lambda: notes.time_into(notes.attention_ms, device)), PeakMemory(device) as memory:
        side.warm = generate_batch(loaded, prompts, cache, settings.new_tokens, watch, side.instruments)
    side.peak_bytes = memory.peak_bytes
    return side


def _spread(prefix: str, values: Sequence[float], unit: str) -> dict[str, float | None]:
    p20, p80 = np.percentile(values, [20, 80])
    return {
        f"{prefix}{unit}": statistics.median(values),
        f"{prefix}p20_{unit}": float(p20),
        f"{prefix}p80_{unit}": float(p80),
    }


def _speeds(prefix: str, side: _Side) -> dict[str, float | None]:
    return {
        **_spread(prefix, [run.tokens_per_second for run in side.runs], "tokens_per_second"),
        **_spread(prefix, [run.first_ms for run in side.runs], "time_to_first_token_ms"),
        **_by_call(f"{prefix}attention", side.instruments.attention_ms),
        f"{prefix}cache_bytes": float(side.instruments.cache_bytes[-1]),
        f"{prefix}peak_memory_bytes": float(side.peak_bytes),
    }


def _by_call(name: str, spent: Sequence[float]) -> dict[str, float | None]:
    """Return the time of the prompt's call, and of each step after it; None where nothing of it can be seen."""
    if not any(spent):
        return {f"{name}_prompt_ms": None, f"{name}_step_ms": None}
    return {f"{name}_prompt_ms": spent[0], f"{name}_step_ms": statistics.mean(spent[1:])}


def _measurement(method: Method, own: _Side, full: _Side, settings: SpeedSettings, device: str) -> Measurement:
    assert own.warm is not None
    assert full.warm is not None
    report = own.warm.report
    speeds = [statistics.median(run.tokens_per_second for run in side.runs) for side in (own, full)]
    same = own.warm.tokens == full.warm.tokens
    return Measurement(
        metrics={
            **_speeds("", own),
            **_speeds("full_", full),
            "speed_ratio": speeds[0] / speeds[1],
            **_by_call("encode", own.instruments.encode_ms),
            "same_tokens_pct": 100 * float(same.float().mean()),
            "bits_per_value": report.bits_per_value,
            "compression_ratio": report.compression_ratio,
            "compressed_tokens": float(report.compressed_tokens),
        },
        cache=report,
        detail={
            "cache_bytes": own.instruments.cache_bytes,
            "full_cache_bytes": full.instruments.cache_bytes,
            "tokens_per_second": [run.tokens_per_second for run in own.runs],
            "full_tokens_per_second": [run.tokens_per_second for run in full.runs],
            "first_difference": [int((~row).int().argmax()) if not row.all() else None for row in same],
            "peak_memory": "allocator" if device.startswith("cuda") else f"resident, sampled every {SAMPLED_MS:g} ms",
        },
    )


def run(
    loaded: LoadedModel, methods: Sequence[Method], settings: SpeedSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    """Time all methods against one full cache, in turn.

    Raises:
        PromptError: If model or machine have no room for the batch.
        NothingCompressedError: If a method packed nothing; the others come first.
        CancelledError: If the caller asked to stop.
    """
    check(loaded, settings)
    prompts = build_prompts(loaded, settings)
    full = METHODS["full"]()
    sides: dict[Method, _Side] = {}
    idle: list[Method] = []
    every = list(dict.fromkeys((full, *methods)))
    total = len(every) * (settings.repeats + 1)
    watch.progress(0.0, f"{settings.batch} rows, warm-up")
    # The first forward call brings weights into memory, which is not what the first side holds.
    generate_batch(loaded, prompts, new_cache(loaded.model.config, loaded.model.device, full), 2, watch)
    for i, method in enumerate(every):
        watch.progress(i / total, f"{settings.batch} rows, instrumented: {method}")
        side = _instrumented(loaded, prompts, method, settings, watch)
        assert side.warm is not None
        if method == full or side.warm.report.compressed_tokens:
            sides[method] = side
        else:
            idle.append(method)
    for repeat in range(settings.repeats):
        for i, (method, side) in enumerate(sides.items()):
            done = (len(every) * (repeat + 1) + i) / total
            watch.progress(done, f"{settings.batch} rows, round {repeat + 1} of {settings.repeats}: {method}")
            cache = new_cache(loaded.model.config, loaded.model.device, method)
            side.runs.append(generate_batch(loaded, prompts, cache, settings.new_tokens, watch))
    for method in methods:
        if method in sides:
            yield method, _measurement(method, sides[method], sides[full], settings, loaded.device)
    if idle:
        raise NothingCompressedError(
            f"{idle[0]} packed none of {settings.context} tokens: give a longer context or a smaller window"
        )


EXPERIMENT = Experiment("generation", SpeedSettings, run, check)
