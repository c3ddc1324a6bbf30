"""The comparison of methods: texts and methods as cells, records as rows, and what each method is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from app.config import AppConfig
from app.tab.measure import check_count, check_each
from app.tab.requests import SAME, Choices, RequestError, check_loading, has_window, method_text, recipes
from turboquant.methods import METHODS, BitsMethod, Method, parse_method, settings_of
from turboquant.records.base import first_error
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.pareto import front_of
from turboquant.texts import TEXTS

FULL = "full"
HELD, PACKED = "bits_per_value", "packed_bits_per_value"
CONTEXTS = ("512", "1024", "2048", "4096", "8192")
MEASURED = ("64", "128", "256", "512")
TEXT_NAMES = tuple(TEXTS)
MAX_METHOD_CHARS, MAX_MORE_CHARS = 200, 2_000
START = (
    "turboquant:bits=2",
    "turboquant:bits=3",
    "turboquant:bits=4",
    "turboquant-paper:bits=4",
    "rtn:bits=4",
    "kivi:bits=4",
)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


@dataclass(frozen=True)
class MethodsChoices:
    """What the page's widgets say, unchecked; `more` are methods typed with spaces between them.

    The last `measured` of the context's tokens are measured.
    """

    chosen: tuple[str, ...] = START
    more: str = ""
    texts: tuple[str, ...] = ("persuasion",)
    context: str = "512"
    measured: str = "128"


DEFAULT = MethodsChoices()


def contexts(config: AppConfig) -> tuple[str, ...]:
    """The contexts that this deployment allows; the shortest one always is."""
    return tuple(c for c in CONTEXTS if int(c) <= config.max_context_tokens) or CONTEXTS[:1]


def offered(recorded: Iterable[ExperimentRecord]) -> list[str]:
    """The methods to choose from: the usual ones, then all that were recorded; the full cache is always measured."""
    found = dict.fromkeys([*START, *settings_of("presets"), *(str(record.cell.method) for record in recorded)])
    return [method for method in found if method != FULL]


def check_method(text: str) -> Method:
    """The method that a text names.

    Raises:
        RequestError: There is none such, or its package is missing here.
    """
    if len(text) > MAX_METHOD_CHARS:
        raise RequestError(f"A method has at most {MAX_METHOD_CHARS} characters, got {len(text)}.")
    try:
        method = parse_method(text.strip())
        method.check_available()
    except (ValueError, ImportError) as error:
        raise RequestError(f"{text[:60]} cannot be used: {error}.") from None
    return method


def cells(chosen: MethodsChoices, choices: Choices, config: AppConfig) -> tuple[Cell, ...]:
    """Check everything and return the cells: the full cache first, then the methods.

    Raises:
        RequestError: Something cannot be measured; the message says what.
    """
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.perplexity import EXPERIMENT
    from turboquant.records.settings import PerplexitySettings

    model, weights = check_loading(choices, config)
    wanted = [*chosen.chosen, *chosen.more.split()]
    if not wanted:
        raise RequestError("Choose at least one method.")
    if len(wanted) >= config.max_cells:
        raise RequestError(f"At most {config.max_cells - 1} methods can be measured at once, got {len(wanted)}.")
    methods = dict.fromkeys([METHODS[FULL](), *map(check_method, wanted)])
    texts = check_each("Texts", chosen.texts, TEXT_NAMES)
    context = int(check_each("Context", [chosen.context], contexts(config))[0])
    measured = int(check_each("Measured tokens", [chosen.measured], MEASURED)[0])
    try:
        settings = PerplexitySettings(texts=texts, context=context, prefill=max(0, context - measured))
    except ValidationError as error:
        raise RequestError(f"Measured tokens must be fewer than the context ({first_error(error)}).") from None
    found = tuple(cells_for(EXPERIMENT, model, methods, [settings], weights))
    check_count(found, config)
    return found


def alike(planned: Sequence[Cell], records: Mapping[str, ExperimentRecord]) -> list[ExperimentRecord]:
    """The records of any method under the plan's model and settings, in the plan's order as far as it goes."""
    if not planned:
        return []
    bare = planned[0].model_copy(update={"method": None}).key
    place = {cell.key: i for i, cell in enumerate(planned)}
    same = [record for record in records.values() if record.cell.model_copy(update={"method": None}).key == bare]
    return sorted(same, key=lambda record: place.get(record.cell.key, len(place)))


# --- how long it takes


def seconds(planned: Sequence[Cell], known: Iterable[ExperimentRecord]) -> float | None:
    """About how long cells take, from the timings of others of the same model; None without such.

    The full cache reads every text once, and so does each method; what a method took longer than that grows with the
    measured tokens.
    """
    timed = [
        record
        for record in known
        if record.error is None and "method" in record.timing and planned and record.cell.model == planned[0].model
    ]
    if not timed:
        return None
    reading = fmean(record.timing["full"] / _tokens(record.cell) for record in timed)
    total = reading * _tokens(planned[0])
    for cell in planned:
        if cell.method == FULL:
            continue
        base = _base(cell.method)
        near = [r for r in timed if r.cell.method == cell.method] or [r for r in timed if _base(r.cell.method) == base]
        slower = [
            max(0.0, r.timing["method"] - r.timing["full"]) / _measured(r.cell)
            for r in near or timed
            if r.cell.method != FULL
        ]
        total += reading * _tokens(cell) + (fmean(slower) if slower else 0.0) * _measured(cell)
    return total


def _base(method: str | None) -> str:
    return str(method).partition(":")[0]


def _tokens(cell: Cell) -> int:
    return int(cell.settings["context"]) * len(cell.settings["texts"])


def _measured(cell: Cell) -> int:
    return (int(cell.settings["context"]) - int(cell.settings["prefill"])) * len(cell.settings["texts"])


# --- records as rows


@dataclass(frozen=True)
class Row:
    """One method's figures by their names in records, and over which bits it stands on the Pareto front."""

    method: str
    figures: Mapping[str, float | None]
    fronts: frozenset[str] = frozenset()


def rows(records: Iterable[ExperimentRecord]) -> list[Row]:
    """The methods that were measured, by the bits they hold; each knows on which Pareto fronts it stands."""
    good = [record for record in records if record.error is None]
    figures = [
        {**record.metrics, "compression_ratio": record.cache.compression_ratio if record.cache else None}
        for record in good
    ]
    on = {bits: front_of(figures, bits) for bits in (HELD, PACKED)}
    found = [
        Row(str(record.cell.method), figures[i], frozenset(bits for bits, front in on.items() if front[i]))
        for i, record in enumerate(good)
    ]
    return sorted(found, key=lambda row: value if (value := row.figures.get(HELD)) is not None else float("inf"))


def failures(records: Iterable[ExperimentRecord]) -> list[tuple[str, str]]:
    """The methods that could not be measured, and why."""
    return [(str(record.cell.method), record.error) for record in records if record.error is not None]


def what_was_read(records: Sequence[ExperimentRecord]) -> str:
    """Texts, context and measured tokens of some records that share them; nothing where there are none."""
    if not records:
        return ""
    settings = records[0].cell.settings
    each = settings["context"] - settings["prefill"]
    return (
        f"{', '.join(settings['texts'])}: {settings['context']:,} tokens each, the first {settings['prefill']:,} read "
        f"in one call, the last {each:,} measured."
    )


# --- what a method is


@dataclass(frozen=True)
class About:
    """A method in words, with the address of its paper where there is one."""

    title: str
    summary: str
    reference: str
    paper: str | None


def about(method: str) -> About | None:
    """What a method is; None where there is none such any more."""
    cls = METHODS.get(_base(method))
    if cls is None:
        return None
    paper = _ARXIV.search(cls.reference)
    return About(cls.title, cls.summary, cls.reference, f"https://arxiv.org/abs/{paper[1]}" if paper else None)


def compare_settings(method: str, choices: Choices) -> dict[str, Any]:
    """The sidebar's settings that compare a method: as its recipe where the sidebar can say it, else as the second."""
    wanted = _as_recipe(method, choices) or replace(choices, second=method)
    names = ("recipe", "bits", "key_bits", "value_bits", "rotation", "residual", "sinks")
    found = {name: getattr(wanted, name) for name in names}
    return found | {"second": wanted.second or None}


def _as_recipe(method: str, choices: Choices) -> Choices | None:
    try:
        parsed = parse_method(method)
    except ValueError:
        return None
    if parsed.name not in recipes() or not isinstance(parsed, BitsMethod):
        return None
    keys, values = parsed.resolved_bits
    same = keys == values and keys in (2, 3, 4)
    wanted = replace(
        choices,
        recipe=parsed.name,
        bits=keys if same else choices.bits,
        key_bits=SAME if same else str(keys),
        value_bits=SAME if same else str(values),
        rotation=parsed.seed,
        second="",
    )
    if has_window(parsed.name):
        wanted = replace(wanted, residual=parsed.residual_length, sinks=parsed.sink_length)
    try:
        return wanted if method_text(wanted) == str(parsed) else None
    except RequestError:
        return None
