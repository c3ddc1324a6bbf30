"""Timings, as records: sides alternated in one process, medians with their spread, machine and commit noted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turboquant.cache.build import NothingCompressedError, build_cache, cache_report
from turboquant.methods import METHODS, Method
from turboquant.models.load import LoadedModel
from turboquant.records.base import Record
from turboquant.records.comparison import CacheReport, Settings
from turboquant.records.environment import Environment, environment
from turboquant.records.experiment import DecodeBench, Spread
from turboquant.records.spread import timing_spread
from turboquant.run.compare import model_info
from turboquant.run.generate import Generation, QueryRecorder, check_length
from turboquant.run.metrics import TOP, Pair, Span, compare_layer
from turboquant.run.threads import busy_processes, spins


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
        build_cache(loaded.model.config, method),
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


def bench_decode(
    loaded: LoadedModel,
    method: Method,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repeats: int = 5,
    busy: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> DecodeBench:
    """Time greedy decoding of `new_tokens` after `prompt_tokens` with the full cache and with `method`, in turn.

    One run of each side warms up (compiled kernels, page cache) and is not counted. Meanwhile `busy` other processes
    compute without a pause.

    Raises:
        PromptError: If prompt and answer do not fit the model's context.
        NothingCompressedError: If the run packed no token, so that its speed would say nothing.
        ValueError: If there are fewer than 2 new tokens, no repeats or less than no busy processes.
    """
    if new_tokens < 2 or repeats < 1 or prompt_tokens < 1 or busy < 0:
        raise ValueError(
            "a benchmark needs at least 1 prompt token, 2 new tokens, 1 repeat and 0 busy processes, "
            f"got {prompt_tokens}, {new_tokens}, {repeats} and {busy}"
        )
    check_length(loaded, prompt_tokens, new_tokens)
    ids = bench_prompt(loaded, prompt_tokens)
    settings = Settings(max_new_tokens=new_tokens)
    sides = (METHODS["full"](), method)
    runs: tuple[list[_Run], list[_Run]] = ([], [])
    with busy_processes(busy):
        for repeat in range(repeats + 1):
            for kept, side in zip(runs, sides, strict=True):
                run = _run(loaded, ids, side, settings)
                which = "warm-up" if repeat == 0 else f"run {repeat} of {repeats}"
                progress(f"{which}: {side} {run.tokens_per_second:.2f} tokens/s")
                if repeat:
                    kept.append(run)
    report = runs[1][-1].report
    if method.compresses and not report.compressed_tokens:
        raise NothingCompressedError(
            f"{method} packed none of {report.tokens} tokens: give a longer prompt or a smaller window"
        )
    full, own = (timing_spread([run.tokens_per_second for run in side]) for side in runs)
    full_prefill, prefill = (timing_spread([run.prefill_ms for run in side]) for side in runs)
    full_worst, worst = (max(run.worst_step_ms for run in side) for side in runs)
    return DecodeBench(
        environment=environment(loaded.model.device),
        model=model_info(loaded),
        method=str(method),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        full_tokens_per_second=full,
        tokens_per_second=own,
        ratio=own.median / full.median,
        full_prefill_ms=full_prefill,
        prefill_ms=prefill,
        full_worst_step_ms=full_worst,
        worst_step_ms=worst,
        busy_processes=busy,
        openmp_spins=spins(),
        report=report,
    )


class MetricsBench(Record):
    """Time to compare the attention of one layer's heads: all at once, and in the obvious loop over heads and queries.

    `ratio` compares medians, loop over vectorised.
    """

    kind: Literal["bench-metrics"] = "bench-metrics"
    environment: Environment
    query_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    queries: int
    repeats: int
    vectorised_ms: Spread
    loop_ms: Spread
    ratio: float


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


def bench_metrics(
    tokens: int, *, queries: int = 64, heads: int = 9, kv_heads: int = 3, head_dim: int = 64, repeats: int = 5
) -> MetricsBench:
    """Time one layer's head metrics, all heads at once against the obvious loop, in turn.

    What is compared is random: the time does not depend on it. It runs where a model would run. One run of each side
    warms up and must give the same figures.

    Args:
        tokens: Keys, more than queries and at least 16 more.
        queries: Queries a head.
        heads: Query heads, a multiple of `kv_heads`.
        kv_heads: KV heads.
        head_dim: Dimension of a head.
        repeats: Runs that count.

    Raises:
        ValueError: If the sizes do not go together.
    """
    if tokens < queries + 16 or queries < 1 or repeats < 1 or heads % kv_heads:
        raise ValueError(
            "a benchmark of metrics needs 1 query, 16 tokens more than queries, 1 repeat and whole groups of heads, "
            f"got {queries} queries, {tokens} tokens, {repeats} repeats and {heads} heads on {kv_heads}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    query, *states = (
        torch.randn(count, length, head_dim, generator=generator).to(device)
        for count, length in ((heads, queries), *[(kv_heads, tokens)] * 4)
    )
    full = states[0], states[1]
    served = states[0] + 0.2 * states[2], states[1] + 0.2 * states[3]
    packed, scaling = Span(4, tokens - queries), head_dim**-0.5
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        started = time.perf_counter()
        fast = compare_layer(query, full, served, scaling, packed, Span(4, 8))
        between = time.perf_counter()
        slow = compare_head_by_head(query, full, served, scaling, packed)
        times[1].append(1e3 * (time.perf_counter() - between))
        times[0].append(1e3 * (between - started))
    same = fast["served"] | {f"packed_{name}": value for name, value in fast["packed"].items()}
    for name, value in slow.items():
        torch.testing.assert_close(same[name], value, atol=1e-4, rtol=1e-4)
    own, loop = (timing_spread(values[1:]) for values in times)
    return MetricsBench(
        environment=environment(device),
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tokens=tokens,
        queries=queries,
        repeats=repeats,
        vectorised_ms=own,
        loop_ms=loop,
        ratio=loop.median / own.median,
    )
