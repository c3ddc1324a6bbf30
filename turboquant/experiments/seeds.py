"""How far results move from one rotation seed, and from one sampling seed, to the next.

A cell is a method with its rotation seed (the method's own `seed`) under one sampling seed (the settings' `seed`).
Without a sampling seed it holds every figure of the perplexity experiment and the greedy answers; with one, answers
sampled with that seed on both sides. Of an answer, the first token that differs from the full cache's is measured.

The full cache's answers are generated, all prompts at once. For a compressed cache they need not be: up to the first
difference it reads what the full cache has said, so it is fed just that, in pieces during which nothing is packed, and
each next token is chosen from its logits with the numbers that the full side drew for that place. The first difference
is the one that generating would show.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from turboquant.cache.build import NothingCompressedError, cache_report
from turboquant.experiments import perplexity
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.experiments.perplexity import BLOCK, text_windows
from turboquant.hf_attention import observe_queries
from turboquant.methods import METHODS, Method, parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import CacheReport, Settings
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.settings import PerplexitySettings, SeedsSettings
from turboquant.records.spread import Difference, Spread95, paired_difference, spread
from turboquant.run.feed import answer_logits, packing_runs, step
from turboquant.run.generate import QueryRecorder, logits_processors, new_cache

COMPARED = ("kl_mean", "delta_ppl_pct", "same_top_pct", "agreed_tokens")
"""Metrics of the cells without a sampling seed that are compared rotation seed by rotation seed."""

SHARES = {"same_top_pct": (0.0, 100.0), "identical_pct": (0.0, 100.0)}
"""Metrics that cannot leave these bounds, so neither can their intervals."""


def prompts(loaded: LoadedModel, settings: SeedsSettings) -> Int[Tensor, "prompts tokens"]:
    """Return the prompts, stretches of the texts behind what perplexity reads.

    Raises:
        ValueError: If a text cannot be read.
        PromptError: If a text is too short, or prompt and answer are longer than the model's context.
    """
    total = settings.prompt_tokens + settings.new_tokens
    stretch = PerplexitySettings(
        texts=settings.texts,
        context=total,
        prefill=settings.prompt_tokens,
        windows=settings.prompts,
        start=settings.context + 1,
    )
    windows = text_windows(loaded, stretch)
    return torch.cat([window.ids[:, : settings.prompt_tokens] for window in windows])


class _Choice:
    """Chooses next tokens; every prompt has its own generator, so the same numbers are drawn for the same place."""

    def __init__(self, settings: Settings, rows: int, device: torch.device) -> None:
        self.greedy = settings.temperature <= 0
        self.processors = logits_processors(settings)
        seeds = [settings.seed * 1_000_003 + row for row in range(rows)]
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Float[Tensor, "rows vocabulary"]) -> Int[Tensor, " rows"]:
        """Return one token a row."""
        if self.greedy:
            return logits.float().argmax(dim=-1)
        scores: Any = self.processors(None, logits.float())  # type: ignore[arg-type]
        rows = zip(scores.softmax(dim=-1), self.generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


@torch.no_grad()
def full_answers(
    loaded: LoadedModel, ids: Int[Tensor, "prompts tokens"], settings: Settings, watch: Watch
) -> Int[Tensor, "prompts new"]:
    """Generate `max_new_tokens` tokens for every prompt with the full cache, past ends of sequence."""
    cache = new_cache(loaded.model.config, loaded.model.device, METHODS["full"]())
    choose = _Choice(settings, len(ids), ids.device)
    answers: list[Tensor] = []
    with observe_queries(QueryRecorder(watch.cancelled, keep=False)):
        for _ in range(settings.max_new_tokens):
            answers.append(choose(step(loaded.model, cache, answers[-1][:, None] if answers else ids)))
            watch.progress(len(answers) / settings.max_new_tokens, "answers with the full cache")
    return torch.stack(answers, dim=1)


@dataclass(frozen=True)
class Divergences:
    """Where answers part: the index of the first differing token, or None, for each prompt."""

    first: list[int | None]
    new_tokens: int
    report: CacheReport

    @property
    def metrics(self) -> dict[str, float | None]:
        """Tokens that agree before the first difference (all where there is none), and the share without one."""
        agreed = [self.new_tokens if one is None else one for one in self.first]
        return {
            "agreed_tokens": float(np.mean(agreed)),
            "agreed_tokens_median": float(np.median(agreed)),
            "identical_pct": 100 * float(np.mean([one is None for one in self.first])),
        }


@torch.no_grad()
def first_divergences(
    loaded: LoadedModel,
    ids: Int[Tensor, "prompts tokens"],
    answers: Int[Tensor, "prompts new"],
    method: Method,
    settings: Settings,
    watch: Watch,
) -> Divergences:
    """Return where a compressed cache's answers would first differ from the full cache's; see the module's notes."""
    cache = new_cache(loaded.model.config, loaded.model.device, method)
    choose = _Choice(settings, len(ids), ids.device)
    first: list[int | None] = [None] * len(ids)
    runs = packing_runs(method, ids.shape[1], answers.shape[1] - 1)
    with observe_queries(QueryRecorder(watch.cancelled, keep=False)):
        for part, logits in answer_logits(loaded.model, cache, ids, answers, runs):
            for place in range(part.start, part.stop):
                differs = (choose(logits[:, place - part.start]) != answers[:, place]).tolist()
                first = [place if one is None and other else one for one, other in zip(first, differs, strict=True)]
    return Divergences(first, answers.shape[1], cache_report(cache))


def check(loaded: LoadedModel, settings: SeedsSettings) -> None:
    """Raise ValueError where the texts or the model do not serve the settings."""
    perplexity.check(loaded, settings.perplexity)
    prompts(loaded, settings)


def run(
    loaded: LoadedModel, methods: Sequence[Method], settings: SeedsSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    """Measure methods, rotation seeds among them; the full cache's answers are shared.

    Raises:
        PromptError: If a text is too short, or the model's context.
        NothingCompressedError: If a method packs nothing.
    """
    ids = prompts(loaded, settings)
    answers = full_answers(loaded, ids, settings.sampling, watch.part(0.0, 0.1))
    found: Iterator[tuple[Method, Measurement]] = ((method, Measurement({})) for method in methods)
    if settings.seed is None:
        found = perplexity.run(loaded, methods, settings.perplexity, watch.part(0.1, 1.0))
    for i, (method, measured) in enumerate(found):
        if watch.stopping() and i:
            return
        if settings.seed is not None:
            watch.progress(0.1 + 0.9 * i / len(methods), f"answers with {method}")
        parted = first_divergences(loaded, ids, answers, method, settings.sampling, watch)
        if method.compresses and not parted.report.compressed_tokens:
            raise NothingCompressedError(
                f"{method} packs none of {parted.report.tokens} tokens: give longer prompts or a smaller window"
            )
        yield (
            method,
            Measurement(
                metrics={**measured.metrics, **parted.metrics},
                cache=measured.cache or parted.report,
                timing=measured.timing,
                detail={**measured.detail, "first_divergence": parted.first},
            ),
        )


EXPERIMENT = Experiment("variance", SeedsSettings, run, check)


def with_seeds(method: Method, seeds: Sequence[int]) -> list[Method]:
    """Return a method once for every rotation seed; once as it is where it has none."""
    if "seed" not in {field.name for field in fields(method)}:
        return [method]
    return [replace(method, seed=seed) for seed in seeds]  # type: ignore[call-arg]


def without_seed(method: Method) -> str:
    """Return what the rotation seeds of a method have in common."""
    return str(with_seeds(method, [0])[0])


Records = Mapping[int, ExperimentRecord]


def by_rotation(records: Sequence[ExperimentRecord], method: Method, seed: int | None) -> dict[int, ExperimentRecord]:
    """Return the finished cells of a method under one sampling seed, by rotation seed."""
    found = {}
    for record in records:
        own = parse_method(record.cell.method or "")
        if not record.error and record.cell.settings["seed"] == seed and without_seed(own) == without_seed(method):
            found[int(getattr(own, "seed", 0))] = record
    return dict(sorted(found.items()))


def sampling_seeds(records: Sequence[ExperimentRecord]) -> list[int]:
    """Return the sampling seeds of which there are cells."""
    return sorted({seed for record in records if (seed := record.cell.settings["seed"]) is not None})


def spreads(records: Sequence[ExperimentRecord], method: Method) -> dict[str, Spread95]:
    """Describe every metric of a method: over rotation seeds, and for sampled answers over all cells.

    Metrics of sampled answers are named `sampled_...`; `sampled_..._by_rotation` are means over sampling seeds, spread
    over rotation seeds, and `sampled_..._by_sampling` the other way round.
    """
    greedy = by_rotation(records, method, None).values()
    names = list(dict.fromkeys(name for record in greedy for name in record.metrics))
    found = {}
    for name in names:
        values = [value for record in greedy if (value := record.metrics.get(name)) is not None]
        if values:
            found[name] = spread(values, SHARES.get(name))
    cells = {
        (rotation, seed): record.metrics["agreed_tokens"]
        for seed in sampling_seeds(records)
        for rotation, record in by_rotation(records, method, seed).items()
    }
    if cells:
        # Cells that share a seed are not independent: no interval here, but of the means below.
        every = spread([float(value or 0) for value in cells.values()])
        found["sampled_agreed_tokens"] = every.model_copy(update={"low": None, "high": None})
        for axis, name in ((0, "rotation"), (1, "sampling")):
            groups = {key[axis] for key in cells}
            means = [np.mean([float(v or 0) for key, v in cells.items() if key[axis] == one]) for one in sorted(groups)]
            found[f"sampled_agreed_tokens_by_{name}"] = spread([float(mean) for mean in means])
    return found


def differences(records: Sequence[ExperimentRecord], method: Method, against: Method) -> dict[str, Difference]:
    """Compare two methods on what both have measured, `method` less `against`.

    `kl_mean over text`: blocks of neighbouring tokens are the pairs, rotation seeds averaged. `... over rotation
    seeds`: the same seed on both sides is a pair (a method without seeds is the same for all). `agreed_tokens over
    answers`: each prompt under each sampling seed, greedy included, is a pair, rotation seeds averaged; answers to one
    prompt resemble each other, so what that says holds for these prompts and not for others.
    """
    own, other = by_rotation(records, method, None), by_rotation(records, against, None)
    found = {}
    if own and other:
        found["kl_mean over text"] = paired_difference(_block_means(own), _block_means(other))
        for name in COMPARED:
            pairs = list(_seed_pairs(own, other, name))
            if pairs:
                found[f"{name} over rotation seeds"] = paired_difference(*zip(*pairs, strict=True))
    answers = [
        pair
        for seed in (None, *sampling_seeds(records))
        for pair in _answer_pairs(by_rotation(records, method, seed), by_rotation(records, against, seed))
    ]
    if answers:
        found["agreed_tokens over answers"] = paired_difference(*zip(*answers, strict=True))
    return found


def _block_means(records: Records) -> Float[np.ndarray, " blocks"]:
    """KL of each block of tokens, averaged over its tokens and over rotation seeds."""
    by_seed = [
        [
            np.mean(window["kl"][start : start + BLOCK])
            for window in record.detail["windows"]
            for start in range(0, len(window["kl"]), BLOCK)
        ]
        for record in records.values()
    ]
    return np.asarray(by_seed, dtype=np.float64).mean(axis=0)


def _seed_pairs(own: Records, other: Records, name: str) -> Iterator[tuple[float, float]]:
    for seed, record in own.items():
        partner = other.get(seed) or (next(iter(other.values())) if len(other) == 1 else None)
        a, b = record.metrics.get(name), None if partner is None else partner.metrics.get(name)
        if a is not None and b is not None:
            yield a, b


def _answer_pairs(own: Records, other: Records) -> list[tuple[float, float]]:
    if not own or not other:
        return []
    return list(zip(_agreed(own), _agreed(other), strict=True))


def _agreed(records: Records) -> list[float]:
    """Tokens that agree, for each prompt, averaged over rotation seeds."""
    length = next(iter(records.values())).cell.settings["new_tokens"]
    parted = [record.detail["first_divergence"] for record in records.values()]
    return [float(np.mean([length if one is None else one for one in prompt])) for prompt in zip(*parted, strict=True)]
