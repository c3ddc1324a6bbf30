"""The Seeds page's cells and rows: what the widgets say, checked; what the records say, by the library's statistics.

The experiment needs the model library, which takes seconds to import; it is imported where it is first needed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from app.config import AppConfig
from app.engine.library import import_library
from app.tab.measure import check_count, check_each
from app.tab.requests import SAME, Choices, RequestError, check_bound, check_loading, method_text
from turboquant.methods import Method, parse_method
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.metrics import metric
from turboquant.records.spread import CONFIDENCE, LEAST_PAIRS, Difference, Spread95
from turboquant.texts import TEXTS

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
NONE = "none"
AGAINST = (NONE, *map(str, BITS))
CONTEXTS = (256, 512, 1024, 2048)
MAX_TEXTS = 3
ROTATIONS, SAMPLINGS = (2, 16), (0, 8)
NEW_TOKENS, BINS = 48, 6
INTERVAL = f"{100 * CONFIDENCE:.0f} % interval"


FIGURES = {
    metric(name).heading: name
    for name in ("kl_mean", "same_top_pct", "delta_ppl_pct", "identical_pct", "agreed_tokens")
}
"""What the page shows, by what it is called there."""
_PAIRS = {
    "over text": "blocks of neighbouring tokens",
    "over rotation seeds": "equal rotation seeds",
    "over answers": "answers to the same prompt under the same sampling seed",
}


@dataclass(frozen=True)
class SeedsChoices:
    """What the page's widgets say, named as in the URL without `seeds_`."""

    bits: int = 3
    against: str = "4"
    rotations: int = LEAST_PAIRS
    samplings: int = 2
    context: int = 256
    texts: tuple[str, ...] = ("persuasion", "factbook")


def check_packs(method: Method, tokens: int, what: str) -> None:
    """Raise RequestError where a method would pack none of so many tokens."""
    if method.compresses and not method.packs(tokens - 1):
        raise RequestError(
            f"{method} packs none of the {tokens} tokens of {what}: choose a longer context or a smaller exact window."
        )


def cells(own: SeedsChoices, choices: Choices, config: AppConfig) -> tuple[Cell, ...]:
    """Check what was chosen and make its cells: for each method and rotation seed one without and one a sampling seed.

    The sidebar says how vectors are stored, this page with how many bits and seeds.

    Raises:
        RequestError: Something of it cannot be measured here.
    """
    model, weights = check_loading(choices, config)
    check_bound("The number of rotation seeds", own.rotations, *ROTATIONS)
    check_bound("The number of sampling seeds", own.samplings, *SAMPLINGS)
    check_bound("The context", own.context, CONTEXTS[0], config.max_context_tokens)
    values = {"texts": _check_texts(own.texts), "context": own.context, "prefill": own.context // 2}
    values["new_tokens"] = min(NEW_TOKENS, config.max_new_tokens)
    methods = _methods(own, choices)

    from turboquant.experiments.base import cells_for
    from turboquant.experiments.seeds import EXPERIMENT, with_seeds

    settings = EXPERIMENT.settings(**values)
    for method in methods:
        check_packs(method, settings.context, "a window")
        check_packs(method, settings.prompt_tokens + settings.new_tokens, "prompt and answer")
    turned = {str(one): one for seed in range(own.rotations) for m in methods for one in with_seeds(m, [seed])}
    every = [settings.model_copy(update={"seed": seed}) for seed in (None, *range(own.samplings))]
    found = tuple(cells_for(EXPERIMENT, model, turned.values(), every, weights))
    check_count(found, config)
    return found


def _check_texts(texts: Sequence[str]) -> tuple[str, ...]:
    """Names of shipped texts, never paths."""
    found = check_each("Texts", texts, tuple(TEXTS))
    if len(found) > MAX_TEXTS:
        raise RequestError(f"Choose at most {MAX_TEXTS} texts, got {len(found)}.")
    return found


def _methods(own: SeedsChoices, choices: Choices) -> list[Method]:
    if own.against not in AGAINST:
        raise RequestError(f"Compare with must be one of {', '.join(AGAINST)}, got {str(own.against)[:40]!r}.")
    wanted = [check_bound("Bits", own.bits, BITS[0], BITS[-1])]
    wanted += [] if own.against == NONE else [int(own.against)]
    start = replace(choices, key_bits=SAME, value_bits=SAME, rotation=0)
    return [parse_method(method_text(replace(start, bits=bits))) for bits in sorted(set(wanted))]


def _tokens(settings: Mapping[str, Any]) -> int:
    """Tokens that a cell reads."""
    answers = settings["prompts"] * (settings["prompt_tokens"] + settings["new_tokens"])
    window = settings["context"] if settings["seed"] is None else 0
    return len(settings["texts"]) * (answers + window)


def seconds(planned: Sequence[Cell], known: Iterable[ExperimentRecord]) -> float | None:
    """About how long cells take, by the tokens they read and the time others of the model took; None without any."""
    models = {cell.model for cell in planned}
    timed = [r for r in known if r.error is None and r.cell.model in models and "elapsed" in r.timing]
    spent, read = sum(r.timing["elapsed"] for r in timed), sum(_tokens(r.cell.settings) for r in timed)
    return spent * sum(_tokens(cell.settings) for cell in planned) / read if read else None


# --- records to rows


def record_sets(records: Iterable[ExperimentRecord]) -> dict[str, list[ExperimentRecord]]:
    """Records that may stand together: those of one model under settings that differ in the sampling seed alone."""
    found: dict[str, list[ExperimentRecord]] = {}
    for record in records:
        settings = record.cell.settings
        shared = f"{record.cell.model}, {' + '.join(settings['texts'])}, {settings['context']:,} tokens"
        found.setdefault(shared, []).append(record)
    return found


@dataclass(frozen=True)
class Strip:
    """One line of the strip plot: a value a cell, with (rotation seed, sampling seed), and means with intervals."""

    method: str
    answers: str
    points: tuple[tuple[int, int | None, float], ...]
    means: tuple[tuple[str, Spread95], ...]


@dataclass(frozen=True)
class Gap:
    """How two methods differ, in a sentence, and whether that is real (None: too few pairs to tell)."""

    words: str
    real: bool | None


@dataclass(frozen=True)
class Histogram:
    """Answers by where they first differ: `counts` a bin, the last one for those that never do."""

    method: str
    bins: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Findings:
    """What records of one set show."""

    methods: tuple[str, ...]
    spreads: dict[str, dict[str, Spread95]]
    strips: dict[str, tuple[Strip, ...]]
    gaps: dict[str, tuple[Gap, ...]]
    greedy: tuple[Histogram, ...]
    sampled: tuple[Histogram, ...]


def findings(records: Sequence[ExperimentRecord]) -> Findings:
    """Describe records of one set by the library's statistics; failed ones are passed over."""
    import_library()
    from turboquant.experiments import seeds as variance

    good = [record for record in records if record.error is None]
    named = {variance.without_seed(parse_method(r.cell.method or "")) for r in good}
    methods = sorted((parse_method(name) for name in named), key=lambda m: (getattr(m, "bits", 0), str(m)))
    spreads = {str(method): variance.spreads(good, method) for method in methods}
    strips = {
        label: tuple(s for m in methods for s in _strips(good, m, name, spreads[str(m)]))
        for label, name in FIGURES.items()
    }
    first = methods[:1]
    compared = {str(other): variance.differences(good, one, other) for one in first for other in methods[1:]}
    gaps = {
        label: tuple(
            _gap(name, pairs.removeprefix(f"{name} "), (str(first[0]), other), gap)
            for other, found in compared.items()
            for pairs, gap in found.items()
            if pairs.startswith(f"{name} over ")
        )
        for label, name in FIGURES.items()
    }
    seeds = variance.sampling_seeds(good)
    greedy, sampled = (
        tuple(h for m in methods if (h := _histogram(good, m, wanted)) is not None) for wanted in ([None], seeds)
    )
    return Findings(tuple(map(str, methods)), spreads, strips, gaps, greedy, sampled)


def _strips(
    records: Sequence[ExperimentRecord], method: Method, name: str, spreads: Mapping[str, Spread95]
) -> Iterable[Strip]:
    """The line of the cells without a sampling seed and, of the first divergence, that of sampled answers."""
    from turboquant.experiments.seeds import by_rotation, sampling_seeds

    def points(seeds: Sequence[int | None]) -> tuple[tuple[int, int | None, float], ...]:
        return tuple(
            (rotation, seed, value)
            for seed in seeds
            for rotation, record in by_rotation(records, method, seed).items()
            if (value := record.metrics.get(name)) is not None
        )

    if found := points([None]):
        answers = "greedy answers" if name in ("agreed_tokens", "identical_pct") else "text"
        yield Strip(str(method), answers, found, (("rotation seeds", spreads[name]),))
    sampled = f"sampled_{name}"
    if sampled in spreads:
        means = tuple((f"{axis} seeds", spreads[f"{sampled}_by_{axis}"]) for axis in ("rotation", "sampling"))
        yield Strip(str(method), "sampled answers", points(sampling_seeds(records)), means)


def _gap(name: str, pairs: str, sides: tuple[str, str], gap: Difference) -> Gap:
    figure = metric(name)
    size, low, high = (figure.said(value, sign=True) for value in (gap.difference, gap.low, gap.high))
    start = f"{figure.heading}, {gap.pairs} pairs of {_PAIRS[pairs]}: {sides[0]} less {sides[1]} is {size}"
    if gap.real is None:
        return Gap(f"{start}. That is too few pairs to tell chance from more; {LEAST_PAIRS} are needed.", None)
    best = figure.best((gap.difference, 0.0))
    better = "" if best is None else f": {sides[best]} is better"
    verdict = f"The difference is real{better}" if gap.real else "The difference could be chance"
    return Gap(f"{start}, {INTERVAL} {low} to {high}. {verdict} (p = {gap.p_value:.2g}).", gap.real)


def _histogram(records: Sequence[ExperimentRecord], method: Method, seeds: Sequence[int | None]) -> Histogram | None:
    from turboquant.experiments.seeds import by_rotation

    cells = [record for seed in seeds for record in by_rotation(records, method, seed).values()]
    parted = [place for record in cells for place in record.detail["first_divergence"]]
    if not parted:
        return None
    length = cells[0].cell.settings["new_tokens"]
    edges = list(pairwise(sorted({round(length * part / BINS) for part in range(BINS + 1)})))
    counts = [sum(place is not None and start <= place < stop for place in parted) for start, stop in edges]
    bins = [f"{start + 1}-{stop}" for start, stop in edges]
    return Histogram(str(method), (*bins, "never"), (*counts, sum(place is None for place in parted)))


def seed_words(found: Findings) -> list[str]:
    """How much sampled answers move with either kind of seed, as far as the library says."""
    words = []
    for method, spreads in found.spreads.items():
        pair = [spreads.get(f"sampled_agreed_tokens_by_{axis}") for axis in ("rotation", "sampling")]
        if all(one is not None and one.sd is not None for one in pair):
            sds = [metric("agreed_tokens").said(one.sd) for one in pair if one is not None]
            words.append(
                f"{method}, sampled answers: the {metric('agreed_tokens').title} has a standard deviation of {sds[0]} "
                f"from one rotation seed to the next, and of {sds[1]} from one sampling seed to the next."
            )
    return words


def table_rows(found: Findings) -> list[dict[str, Any]]:
    """Every figure of every method: mean, standard deviation, extremes and interval over seeds."""
    return [
        {
            "method": method,
            "figure": metric(name).label,
            "values": one.count,
            "mean": one.mean,
            "sd": one.sd,
            "smallest": one.minimum,
            "largest": one.maximum,
            f"{INTERVAL}, from": one.low,
            "to": one.high,
        }
        for method, spreads in found.spreads.items()
        for name, one in spreads.items()
    ]
