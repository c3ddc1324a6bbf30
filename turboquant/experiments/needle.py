"""Does a model still find a fact in a long text when its cache is compressed? RULER's needle (arXiv:2404.06654).

Everything before the question is read first, in one forward call as far as the cache is concerned, and packed; then the
question is fed and the answer decoded greedily, so both really read the packed text. The full cache answers the same
prompts. A repetition has its own needle; success is the number, all seven digits of it, in the answer. Needle, question
and answer can be given as texts instead; then repetitions differ in where the filler begins.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import binomtest
from transformers.cache_utils import Cache

from turboquant.cache.build import NothingCompressedError, cache_report
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.experiments.capture import Captured, capture
from turboquant.experiments.needle_prompt import NeedlePrompt, needle_prompt
from turboquant.methods import METHODS, Method
from turboquant.models.checks import free_bytes
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import CacheReport, Settings
from turboquant.records.settings import NeedleSettings
from turboquant.run.generate import Generation, QueryRecorder
from turboquant.run.memory import check_context


@dataclass
class _Answers:
    """What one method answered so far."""

    texts: list[str] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    report: CacheReport | None = None
    seconds: float = 0.0

    def add(self, text: str, prompt: NeedlePrompt) -> None:
        self.texts.append(text)
        self.found.append(prompt.is_answered_by(text))


def build_prompt(loaded: LoadedModel, settings: NeedleSettings, repetition: int) -> NeedlePrompt:
    """Return the prompt of one repetition.

    Raises:
        PromptError: If it has no room for needle and question, or the chat template cannot be used.
        ValueError: If there is no such filler.
    """
    seed = settings.seed * settings.repetitions + repetition
    where = settings.context, settings.depth, seed, settings.filler
    return needle_prompt(loaded.tokenizer, *where, settings.own, settings.chat)


def check(loaded: LoadedModel, settings: NeedleSettings) -> None:
    """Raise ValueError where model or machine have no room for prompt and answer, or the prompt cannot be built."""
    tokens = settings.context + settings.max_new_tokens
    free = free_bytes(torch.device(loaded.device))
    check_context(loaded.spec.name, loaded.model.config, tokens, loaded.weights, free)
    build_prompt(loaded, settings, 0)


def answer(loaded: LoadedModel, captured: Captured, cache: Cache, max_new_tokens: int, watch: Watch) -> str:
    """Feed the question to a cache that holds all before it, and decode greedily.

    Raises:
        CancelledError: If the caller asked to stop.
    """
    generation = Generation(
        loaded,
        captured.ids[:, captured.before :],
        cache,
        Settings(max_new_tokens=max_new_tokens),
        QueryRecorder(watch.cancelled, keep=False),
        measure_bytes=False,
    )
    generation.run()
    return generation.text


def success(found: Sequence[bool], prefix: str = "success") -> dict[str, float | None]:
    """Return the share of successes in percent, with its 95 % Wilson interval."""
    interval = binomtest(sum(found), len(found)).proportion_ci(method="wilson")
    return {
        f"{prefix}_pct": 100 * sum(found) / len(found),
        f"{prefix}_low_pct": 100 * float(interval.low),
        f"{prefix}_high_pct": 100 * float(interval.high),
    }


def _measurement(prompts: list[dict[str, Any]], own: _Answers, full: _Answers) -> Measurement:
    report = own.report
    assert report is not None
    return Measurement(
        metrics={
            **success(own.found),
            **success(full.found, "success_full"),
            "repetitions": float(len(own.found)),
            "bits_per_value": report.bits_per_value,
            "compression_ratio": report.compression_ratio,
            "compressed_tokens": float(report.compressed_tokens),
        },
        cache=report,
        timing={"full": full.seconds, "method": own.seconds},
        detail={
            "repetitions": [
                {**prompt, "text": text, "found": found, "text_full": text_full, "found_full": found_full}
                for prompt, text, found, text_full, found_full in zip(
                    prompts, own.texts, own.found, full.texts, full.found, strict=True
                )
            ]
        },
    )


def _repetition(
    loaded: LoadedModel,
    prompt: NeedlePrompt,
    answers: dict[Method, _Answers],
    settings: NeedleSettings,
    watch: Watch,
) -> None:
    """Read one prompt with the full cache, then let every method answer it; one compressed cache is alive at a time.

    `full` comes first in `answers`. A method that packed nothing is left without an answer.
    """
    began = time.perf_counter()
    ids = prompt.ids.to(loaded.model.device)
    last = ids.shape[1] - prompt.question_start
    reading = watch.part(0.0, 1 / (len(answers) + 1))
    captured = capture(loaded, ids, last, settings.chunk_tokens, reading, room=settings.max_new_tokens)
    for i, (method, so_far) in enumerate(answers.items(), start=1):
        watch.progress(i / (len(answers) + 1), f"{settings.context:,} tokens, depth {settings.depth:g}: {method}")
        cache = captured.filled(loaded, method)
        if not method.compresses or cache_report(cache).compressed_tokens:
            so_far.add(answer(loaded, captured, cache, settings.max_new_tokens, watch), prompt)
            so_far.report = cache_report(cache)
        so_far.seconds += time.perf_counter() - began
        began = time.perf_counter()


def run(
    loaded: LoadedModel, methods: Sequence[Method], settings: NeedleSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    """Ask all methods the same questions; the full cache's reading is shared.

    Raises:
        PromptError: If model or machine have no room for the prompt, or it has none for the needle.
        NothingCompressedError: If a method packed nothing; the others come first.
        CancelledError: If the caller asked to stop.
    """
    check(loaded, settings)
    full = METHODS["full"]()
    read = build_prompt(loaded, settings, 0).question_start
    asked = [method for method in methods if not method.compresses or method.packs(read)]
    answers = {method: _Answers() for method in ((full, *asked) if asked else ())}
    prompts = []
    for repetition in range(settings.repetitions if asked else 0):
        prompt = build_prompt(loaded, settings, repetition)
        part = watch.part(repetition / settings.repetitions, (repetition + 1) / settings.repetitions)
        _repetition(loaded, prompt, answers, settings, part)
        prompts.append({"word": prompt.word, "answer": prompt.answer, "needle_start": prompt.needle_start})
    # Prompts differ by a few tokens before the question, so a window may be filled in some repetitions only.
    idle = [method for method in methods if method not in answers or len(answers[method].found) < len(prompts)]
    for method in methods:
        if method not in idle:
            yield method, _measurement(prompts, answers[method], answers[full])
    if idle:
        raise NothingCompressedError(
            f"{idle[0]} packs none of {settings.context} tokens: give a longer context or a smaller window"
        )


EXPERIMENT = Experiment("needle", NeedleSettings, run, check)
