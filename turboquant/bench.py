"""Timings, as records: sides alternated in one process, medians with their spread, machine and commit noted."""

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from turboquant.cache import NothingCompressedError, build_cache, cache_report
from turboquant.comparison import model_info
from turboquant.generate import Generation, QueryRecorder, check_length
from turboquant.methods import METHODS, Method
from turboquant.models import LoadedModel
from turboquant.results import CacheReport, DecodeBench, Settings, Spread, environment


def _spread(values: list[float]) -> Spread:
    p20, p80 = np.percentile(values, [20, 80])
    return Spread(median=statistics.median(values), p20=float(p20), p80=float(p80))


def bench_prompt(loaded: LoadedModel, count: int) -> Tensor:
    """Return `count` tokens that repeat a sentence; decode speed does not depend on what they say."""
    text = "The keeper of the lighthouse wrote down the weather, the ships and the colour of the sea. "
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    return ids.repeat(1, -(-count // ids.shape[1]))[:, :count].to(loaded.model.device)


def _run(loaded: LoadedModel, ids: Tensor, method: Method, settings: Settings) -> tuple[float, float, CacheReport]:
    """Return tokens a second of decode, milliseconds of prefill and what the cache holds at the end."""
    generation = Generation(
        loaded,
        ids,
        build_cache(loaded.model.config, method),
        settings,
        QueryRecorder(keep=False),
        ignore_eos=True,
        measure_bytes=False,
    )
    while generation.finish is None:
        generation.step()
    if loaded.model.device.type == "cuda":
        torch.cuda.synchronize()
    assert generation.tokens_per_second is not None
    assert generation.time_to_first_token_ms is not None
    return generation.tokens_per_second, generation.time_to_first_token_ms, cache_report(generation.cache)


def bench_decode(
    loaded: LoadedModel,
    method: Method,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> DecodeBench:
    """Time greedy decoding of `new_tokens` after `prompt_tokens` with the full cache and with `method`, in turn.

    One run of each side warms up (compiled kernels, page cache) and is not counted.

    Raises:
        PromptError: If prompt and answer do not fit the model's context.
        NothingCompressedError: If the run packed no token, so that its speed would say nothing.
        ValueError: If there are fewer than 2 new tokens or no repeats.
    """
    if new_tokens < 2 or repeats < 1 or prompt_tokens < 1:
        raise ValueError(
            "a benchmark needs at least 1 prompt token, 2 new tokens and 1 repeat, "
            f"got {prompt_tokens}, {new_tokens} and {repeats}"
        )
    check_length(loaded, prompt_tokens, new_tokens)
    ids = bench_prompt(loaded, prompt_tokens)
    settings = Settings(max_new_tokens=new_tokens)
    sides = (METHODS["full"](), method)
    speeds: tuple[list[float], list[float]] = ([], [])
    prefills: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for i, side in enumerate(sides):
            speed, prefill, report = _run(loaded, ids, side, settings)
            progress(f"{'warm-up' if repeat == 0 else f'run {repeat} of {repeats}'}: {side} {speed:.2f} tokens/s")
            if repeat:
                speeds[i].append(speed)
                prefills[i].append(prefill)
    if method.name != "full" and not report.compressed_tokens:
        raise NothingCompressedError(
            f"{method} packed none of {report.tokens} tokens: give a longer prompt or a smaller window"
        )
    full, own = (_spread(values) for values in speeds)
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
        full_prefill_ms=_spread(prefills[0]),
        prefill_ms=_spread(prefills[1]),
        report=report,
    )
