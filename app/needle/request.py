"""The needle test: lengths, depths and an own needle as cells, records as places on a map."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from app.config import AppConfig
from app.tab.measure import MAX_SEED, check_count, check_each
from app.tab.requests import Choices, RequestError, check_bound, check_loading, method_texts
from turboquant.methods import parse_method
from turboquant.records.base import first_error
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.texts import TEXTS

LENGTHS = ("256", "512", "1024", "2048", "4096", "8192", "16384", "32768", "65536", "131072")
DEPTHS = ("0", "0.1", "0.25", "0.5", "0.75", "0.9", "1")
FILLERS = ("sentences", *TEXTS)
MAX_REPETITIONS = 10
ANSWER_TOKENS, OWN_ANSWER_TOKENS = 16, 32


@dataclass(frozen=True)
class NeedleChoices:
    """What the page's widgets say, unchecked."""

    lengths: tuple[str, ...] = ("512", "1024")
    depths: tuple[str, ...] = ("0.1", "0.5", "0.9")
    repetitions: int = 2
    seed: int = 0
    filler: str = FILLERS[0]
    own: bool = False
    needle: str = ""
    question: str = ""
    answer: str = ""


DEFAULT = NeedleChoices()


def lengths(config: AppConfig) -> tuple[str, ...]:
    """The lengths that this deployment allows."""
    return tuple(length for length in LENGTHS if int(length) <= config.max_context_tokens)


def cells(chosen: NeedleChoices, choices: Choices, config: AppConfig) -> tuple[Cell, ...]:
    """Check everything and return the cells, the short prompts first.

    Raises:
        RequestError: Something cannot be asked; the message says what.
    """
    from turboquant.experiments.base import cells_for
    from turboquant.experiments.needle import EXPERIMENT
    from turboquant.experiments.needle_prompt import check_filler
    from turboquant.records.settings import NeedleSettings

    model, weights = check_loading(choices, config)
    methods = dict.fromkeys(method_texts(choices))
    shared: dict[str, Any] = {
        "repetitions": check_bound("Repetitions", chosen.repetitions, 1, MAX_REPETITIONS),
        "seed": check_bound("Seed of the needles", chosen.seed, 0, MAX_SEED),
        "filler": check_each("Filler", [chosen.filler], FILLERS)[0],
        "max_new_tokens": OWN_ANSWER_TOKENS if chosen.own else ANSWER_TOKENS,
        "chat": bool(choices.chat),
    }
    if chosen.own:
        texts = {"needle": chosen.needle, "question": chosen.question, "answer": chosen.answer}
        if empty := [name for name, text in texts.items() if not text.strip()]:
            raise RequestError(f"Write the {' and the '.join(empty)} of your own needle.")
        shared |= {name: text.strip() for name, text in texts.items()}
    try:
        grid = [
            NeedleSettings(context=int(length), depth=float(depth), **shared)
            for length in check_each("Lengths", chosen.lengths, lengths(config))
            for depth in check_each("Depths", chosen.depths, DEPTHS)
        ]
        if grid[0].own:
            check_filler(grid[0].own, grid[0].filler)
    except ValidationError as error:
        raise RequestError(f"This needle cannot be asked about: {first_error(error)}.") from None
    except ValueError as error:
        raise RequestError(f"This needle cannot be asked about: {error}.") from None
    found = tuple(cells_for(EXPERIMENT, model, list(map(parse_method, methods)), grid, weights))
    check_count(found, config)
    return found


# --- how long it takes


def seconds(planned: Iterable[Cell], known: Iterable[ExperimentRecord]) -> float | None:
    """About how long cells take, from the timings of others of the same model; None without such.

    Every place (length and depth) is read once with the full cache, then each method answers; both are taken to grow
    with the length from the nearest one that was timed.
    """
    planned = list(planned)
    timed = [record for record in known if record.error is None and "full" in record.timing]
    total, places = 0.0, set()
    for cell in planned:
        same = [record for record in timed if record.cell.model == cell.model]
        if not same:
            return None
        alike = [record for record in same if record.cell.method == cell.method] or same
        total += _seconds(cell, alike, "method")
        place = (cell.settings["context"], cell.settings["depth"])
        if place not in places:
            places.add(place)
            total += _seconds(cell, same, "full")
    return total


def _seconds(cell: Cell, timed: Sequence[ExperimentRecord], part: str) -> float:
    context = cell.settings["context"]
    distances = {record.cell.key: abs(record.cell.settings["context"] - context) for record in timed}
    least = min(distances.values())
    near = [record for record in timed if distances[record.cell.key] == least]
    return fmean(
        record.timing[part]
        / record.cell.settings["repetitions"]
        * cell.settings["repetitions"]
        * (context / record.cell.settings["context"])
        for record in near
    )


# --- records as places


@dataclass(frozen=True)
class Share:
    """How often something was found, in percent, with its Wilson interval at a confidence of 0.95."""

    pct: float
    low: float
    high: float


@dataclass(frozen=True)
class Place:
    """One length and depth under one method. A place that failed has its error and no shares."""

    method: str
    context: int
    depth: float
    repetitions: int
    own: Share | None
    full: Share | None
    bits: float | None
    error: str | None


def places(records: Iterable[ExperimentRecord]) -> list[Place]:
    """Every record as a place, by length, then depth."""
    found = [
        Place(
            method=str(record.cell.method),
            context=record.cell.settings["context"],
            depth=record.cell.settings["depth"],
            repetitions=record.cell.settings["repetitions"],
            own=_share(record, "success"),
            full=_share(record, "success_full"),
            bits=record.metrics.get("bits_per_value"),
            error=record.error,
        )
        for record in records
    ]
    return sorted(found, key=lambda place: (place.context, place.depth))


def _share(record: ExperimentRecord, name: str) -> Share | None:
    figures = [record.metrics.get(f"{name}{end}_pct") for end in ("", "_low", "_high")]
    return None if None in figures else Share(*(float(figure or 0.0) for figure in figures))


@dataclass(frozen=True)
class Total:
    """All places of a method together: needles found and asked for, and the bits a value on average."""

    method: str
    found: int
    asked: int
    share: Share
    bits: float | None


def totals(found: Sequence[Place], full: str = "full cache") -> list[Total]:
    """The full cache's total, then each method's."""
    measured = [place for place in found if place.own and place.full]
    rows = []
    for method in dict.fromkeys(place.method for place in measured):
        own = [place for place in measured if place.method == method]
        rows.append(_total(method, own, [place.own for place in own]))
    once = list({(place.context, place.depth): place for place in measured}.values())
    return [_total(full, once, [place.full for place in once], bits=False), *rows] if once else []


def _total(method: str, of: Sequence[Place], shares: Sequence[Share | None], *, bits: bool = True) -> Total:
    from turboquant.experiments.needle import success

    counts = [
        round((share.pct if share else 0.0) / 100 * place.repetitions) for share, place in zip(shares, of, strict=True)
    ]
    found, asked = sum(counts), sum(place.repetitions for place in of)
    figures = success([True] * found + [False] * (asked - found))
    share = Share(*(float(figures[f"success{end}_pct"] or 0.0) for end in ("", "_low", "_high")))
    held = [place.bits for place in of if place.bits is not None] if bits else []
    return Total(method, found, asked, share, fmean(held) if held else None)


@dataclass(frozen=True)
class Reply:
    """What was answered to one prompt."""

    hidden: str
    full: str
    full_found: bool
    method: str
    method_found: bool


def replies(record: ExperimentRecord) -> list[Reply]:
    """The answers of one record."""
    return [
        Reply(
            " ".join(filter(None, (one.get("word", ""), one["answer"]))),
            one["text_full"],
            one["found_full"],
            one["text"],
            one["found"],
        )
        for one in record.detail.get("repetitions", [])
    ]


def place_name(record: ExperimentRecord) -> str:
    """A record's place and method in words."""
    settings = record.cell.settings
    return f"{settings['context']:,} tokens, depth {settings['depth']:g}, {record.cell.method}"
