"""Timings, as records: sides alternated in one process, medians with their spread, machine and commit noted."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant.cache.build import NothingCompressedError, cache_report
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.experiments.kernel_speed import this_device
from turboquant.kernels.scoring import Scoring
from turboquant.methods import METHODS, Method
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import CacheReport, Settings
from turboquant.records.environment import device_name
from turboquant.records.settings import DecodeSettings, MetricsSpeedSettings
from turboquant.records.spread import timing_spread
from turboquant.run.generate import Generation, QueryRecorder, check_length, new_cache
from turboquant.run.metrics import TOP, Pair, Span, compare_layer
from turboquant.run.threads import busy_processes


def bench_prompt(loaded: LoadedModel, count: int) -> Tensor:
    """Return `count` tokens that repeat a sentence; decode speed does not depend on what they say."""
    text = "The keeper of the lighthouse wrote down the weather, the ships and the colour of the sea. "
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    return ids.repeat(1, -(-count // ids.shape[1]))[:, :count].to(loaded.model.device)


@dataclass(frozen=True)
class _Run:
    tokens_per_second: float
    prefill_ms: float
    worst_step_ms: float
    report: CacheReport


def _run(loaded: LoadedModel, ids: Tensor, method: Method, settings: Settings) -> _Run:
    generation = Generation(
        loaded,
        ids,
        new_cache(loaded.model.config, loaded.model.device, method),
        settings,
        QueryRecorder(keep=False),
        ignore_eos=True,
        measure_bytes=False,
    )
    generation.run()
    if loaded.model.device.type == "cuda":
        torch.cuda.synchronize()
    assert generation.tokens_per_second is not None
    assert generation.time_to_first_token_ms is not None
    return _Run(
        generation.tokens_per_second,
        generation.time_to_first_token_ms,
        max(generation.step_ms),
        cache_report(generation.cache),
    )


def check_decode(loaded: LoadedModel, settings: DecodeSettings) -> None:
    """Raise ValueError where prompt and answer do not fit the model's context, or the device is another."""
    if settings.device != device_name(loaded.model.device):
        raise ValueError(f"the timings asked for are of {settings.device}, and the model is on {loaded.device}")
    check_length(loaded, settings.prompt_tokens, settings.new_tokens)


def check_packs(methods: Sequence[Method], settings: DecodeSettings) -> None:
    """Raise ValueError where a method packs nothing of prompt and answer, so that its speed would say nothing."""
    tokens = settings.prompt_tokens + settings.new_tokens - 1
    for method in methods:
        if method.compresses and not method.packs(tokens):
            raise ValueError(f"{method} packs none of {tokens} tokens: give a longer prompt or a smaller window")


def run_decode(
    loaded: LoadedModel, methods: Sequence[Method], settings: DecodeSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    """Time greedy decoding with the full cache and with each method, in turn.

    One run of each side warms up (compiled kernels, page cache) and is not counted. Meanwhile `busy` other processes
    compute without a pause.

    Raises:
        PromptError: If prompt and answer do not fit the model's context.
        NothingCompressedError: If a run packed no token, so that its speed would say nothing.
    """
    check_decode(loaded, settings)
    ids = bench_prompt(loaded, settings.prompt_tokens)
    for i, method in enumerate(methods):
        part = watch.part(i / len(methods), (i + 1) / len(methods))
        yield method, _decode(loaded, ids, method, settings, part)


def _decode(loaded: LoadedModel, ids: Tensor, method: Method, settings: DecodeSettings, watch: Watch) -> Measurement:
    sampling = Settings(max_new_tokens=settings.new_tokens)
    sides = (METHODS["full"](), method)
    runs: tuple[list[_Run], list[_Run]] = ([], [])
    rounds = settings.repeats + 1
    with busy_processes(settings.busy):
        for repeat in range(rounds):
            for kept, side in zip(runs, sides, strict=True):
                watch.check()
                run = _run(loaded, ids, side, sampling)
                which = "warm-up" if repeat == 0 else f"run {repeat} of {settings.repeats}"
                watch.progress((repeat + 0.5) / rounds, f"{which}: {side} {run.tokens_per_second:.2f} tokens/s")
                if repeat:
                    kept.append(run)
    report = runs[1][-1].report
    if method.compresses and not report.compressed_tokens:
        raise NothingCompressedError(
            f"{method} packed none of {report.tokens} tokens: give a longer prompt or a smaller window"
        )
    metrics: dict[str, float | None] = {}
    for name, timed in zip(("full_", ""), runs, strict=True):
        metrics |= timing_spread([run.tokens_per_second for run in timed]).metrics("tokens_per_second", name)
        metrics |= timing_spread([run.prefill_ms for run in timed]).metrics("time_to_first_token_ms", name)
        metrics[f"{name}worst_step_ms"] = max(run.worst_step_ms for run in timed)
        metrics[f"{name}cache_bytes"] = float(timed[-1].report.bytes)
    own, full = metrics["tokens_per_second"], metrics["full_tokens_per_second"]
    assert own is not None
    assert full is not None
    return Measurement(metrics={**metrics, "speed_ratio": own / full}, cache=report)


def compare_head_by_head(query: Tensor, full: Pair, served: Pair, scaling: float, packed: Span) -> dict[str, Tensor]:
    """What `compare_layer` says of all tokens (but the needle), the obvious way: head by head, query by query.

    Returns:
        The figures of `compare_layer`'s `served`, and of its `packed` with that before their names, (heads, queries).
    """
    heads, queries = query.shape[:2]
    tokens, groups = full[0].shape[1], heads // full[0].shape[0]
    rows: dict[str, list[float]] = {}
    for head in range(heads):
        keys, values = ([side[i][head // groups] for side in (full, served)] for i in (0, 1))
        for row in range(queries):
            seen = tokens - queries + row + 1
            scores = [side[:seen] @ query[head, row] for side in keys]
            outputs = [(s * scaling).softmax(-1) @ v[:seen] for s, v in zip(scores, values, strict=True)]
            found = {"output_error": float((outputs[1] - outputs[0]).norm() / outputs[0].norm())}
            for name, part in (("", slice(0, seen)), ("packed_", packed.places)):
                one, two = (s[part] for s in scores)
                weights = (one * scaling).softmax(-1), (two * scaling).softmax(-1)
                best = int(one.argmax())
                found |= {
                    f"{name}cosine_scores": float(torch.cosine_similarity(one, two, dim=0)),
                    f"{name}cosine_weights": float(torch.cosine_similarity(weights[0], weights[1], dim=0)),
                    f"{name}top1": float(int(two.argmax()) == best),
                    f"{name}top5": float(best in two.topk(TOP).indices.tolist()),
                }
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
    return {name: torch.tensor(values).view(heads, queries) for name, values in rows.items()}


def run_metrics(
    _: None, methods: Sequence[Method], settings: MetricsSpeedSettings, watch: Watch
) -> Iterator[tuple[None, Measurement]]:
    """Time one layer's head metrics, all heads at once against the obvious loop, in turn.

    What is compared is random: the time does not depend on it. It runs where a model would run. One run of each side
    warms up and must give the same figures.

    Raises:
        ValueError: If the settings are of another device.
    """
    device = this_device(settings)
    heads, kv_heads, tokens, queries = settings.heads, settings.kv_heads, settings.tokens, settings.queries
    generator = torch.Generator().manual_seed(0)
    query, *states = (
        torch.randn(count, length, settings.head_dim, generator=generator).to(device)
        for count, length in ((heads, queries), *[(kv_heads, tokens)] * 4)
    )
    full = states[0], states[1]
    served = states[0] + 0.2 * states[2], states[1] + 0.2 * states[3]
    packed, scaling = Span(4, tokens - queries), settings.head_dim**-0.5
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(settings.repeats + 1):
        watch.check()
        started = time.perf_counter()
        fast = compare_layer(query, full, served, Scoring(scaling), packed, Span(4, 8))
        between = time.perf_counter()
        slow = compare_head_by_head(query, full, served, scaling, packed)
        times[1].append(1e3 * (time.perf_counter() - between))
        times[0].append(1e3 * (between - started))
        watch.progress((repeat + 1) / (settings.repeats + 1), f"{tokens:,} tokens")
    same = fast["served"] | {f"packed_{name}": value for name, value in fast["packed"].items()}
    for name, value in slow.items():
        torch.testing.assert_close(same[name], value, atol=1e-4, rtol=1e-4)
    own, loop = (timing_spread(values[1:]) for values in times)
    metrics = {**own.metrics("vectorised_ms"), **loop.metrics("loop_ms"), "speed_ratio": loop.median / own.median}
    yield None, Measurement(metrics=metrics)


DECODE = Experiment("decode", DecodeSettings, run_decode, check_decode, check_packs, timed=True)
METRICS_SPEED = Experiment("metrics-speed", MetricsSpeedSettings, run_metrics, model=False, methods=False, timed=True)
