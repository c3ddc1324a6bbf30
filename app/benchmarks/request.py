"""The Benchmarks page's cells and rows: what the widgets say, checked; what records of speed and memory say.

Medians and percentiles are those of the records. The experiment needs the model library, which takes seconds to
import; it is imported where it is first needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.config import AppConfig
from app.tab.measure import check_count
from app.tab.requests import Choices, RequestError, check_bound, check_loading, method_texts
from app.tab.verdict import human_bytes
from turboquant.methods import parse_method
from turboquant.records.comparison import CacheReport
from turboquant.records.environment import Environment
from turboquant.records.experiment import Cell, ExperimentRecord, Spread
from turboquant.records.metrics import metric

CONTEXTS = (256, 384, 640, 1024, 2048, 4096)
MOST_NEW_TOKENS = 256
BATCHES, REPEATS = (1, 8), (1, 10)


@dataclass(frozen=True)
class BenchChoices:
    """What the page's widgets say, named as in the URL without `bench_`."""

    contexts: tuple[int, ...] = (256, 640, 1024)
    tokens: int = 32
    batch: int = 1
    repeats: int = 2


def cells(own: BenchChoices, choices: Choices, config: AppConfig) -> tuple[Cell, ...]:
    """Check what was chosen and make its cells: each context with the sidebar's one or two methods.

    Raises:
        RequestError: Something of it cannot be measured here.
    """
    model, weights = check_loading(choices, config)
    tokens = check_bound("New tokens", own.tokens, 2, min(MOST_NEW_TOKENS, config.max_new_tokens))
    batch, repeats = check_bound("Rows", own.batch, *BATCHES), check_bound("Rounds", own.repeats, *REPEATS)
    contexts = _check_contexts(own.contexts, tokens, batch, config)
    parsed = [parse_method(method) for method in dict.fromkeys(method_texts(choices))]
    for method in parsed:
        if method.compresses and not method.packs(contexts[0] - 1):
            raise RequestError(
                f"{method} packs none of {contexts[0]} tokens: choose longer contexts or a smaller exact window."
            )

    from turboquant.experiments.base import cells_for
    from turboquant.experiments.speed import EXPERIMENT

    shared = {"new_tokens": tokens, "batch": batch, "repeats": repeats}
    every = [EXPERIMENT.settings(context=context, **shared) for context in contexts]
    found = tuple(cells_for(EXPERIMENT, model, parsed, every, weights))
    check_count(found, config)
    return found


def _check_contexts(contexts: Sequence[int], tokens: int, batch: int, config: AppConfig) -> list[int]:
    if not 1 <= len(contexts) <= len(CONTEXTS):
        raise RequestError(f"Choose from 1 to {len(CONTEXTS)} contexts, got {len(contexts)}.")
    most = config.max_context_tokens
    found = sorted({check_bound("A context", context, 3, most) for context in contexts})
    if tokens >= found[0]:
        raise RequestError(f"New tokens must be fewer than the shortest context of {found[0]}, got {tokens}.")
    if batch * found[-1] > most:
        raise RequestError(f"{batch} rows of {found[-1]:,} tokens are more than the {most:,} tokens allowed here.")
    return found


def seconds(planned: Sequence[Cell], known: Iterable[ExperimentRecord]) -> float | None:
    """About how long cells take, by the first token and the speed of others of their model; None without any."""
    if not planned:
        return None
    timed = [r for r in known if r.error is None and r.cell.model == planned[0].model and r.cell.settings["batch"] == 1]
    if not timed:
        return None
    methods = max(1, len({cell.method for cell in planned}))
    read = sum(r.cell.settings["context"] - r.cell.settings["new_tokens"] for r in timed)
    reading_s = sum(r.metrics["time_to_first_token_ms"] or 0.0 for r in timed) / 1e3 / read
    writing_s = sum(1 / (r.metrics["tokens_per_second"] or 1.0) for r in timed) / len(timed)
    spent = 0.0
    for cell in planned:
        s = cell.settings
        runs = (1 + s["repeats"]) * (1 + 1 / methods)
        spent += runs * s["batch"] * ((s["context"] - s["new_tokens"]) * reading_s + s["new_tokens"] * writing_s)
    return spent


# --- records to rows


@dataclass(frozen=True)
class Row:
    """One method at one context on one machine, beside the full cache of the same run.

    `p20` and `p80` are percentiles of the timed rounds. What the record does not hold is None.
    """

    method: str
    context: int
    new_tokens: int
    batch: int
    tokens_per_second: Spread
    full_tokens_per_second: Spread
    ratio: float
    first_ms: Spread
    full_first_ms: Spread
    bytes: int
    floor: float | None
    environment: Environment
    model: str
    rounds: int
    encode_prompt_ms: float | None = None
    encode_step_ms: float | None = None
    attention_prompt_ms: float | None = None
    attention_step_ms: float | None = None
    full_attention_prompt_ms: float | None = None
    full_attention_step_ms: float | None = None
    full_bytes: int | None = None
    peak_bytes: int | None = None
    full_peak_bytes: int | None = None

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: one token of every row."""
        return 1e3 * self.batch / self.tokens_per_second.median

    @property
    def full_step_ms(self) -> float:
        """Milliseconds of a step with the full cache."""
        return 1e3 * self.batch / self.full_tokens_per_second.median

    @property
    def where(self) -> str:
        """The machine."""
        threads = self.environment.cpu_threads
        return f"{self.environment.device}, {threads} thread{'s' if threads != 1 else ''}"


def byte_floor(report: CacheReport | None) -> float | None:
    """How many times the packed-code floor a cache holds; None where the floor is not known.

    The floor is what all cached values take at the bits of their codes alone: without scales, exact tokens, spare
    room and tables.
    """
    if report is None or not report.payload_ratio or not report.full_precision_bytes:
        return None
    held, full = (size - report.state_bytes for size in (report.bytes, report.full_precision_bytes))
    return held / (full / report.payload_ratio)


def row(record: ExperimentRecord) -> Row:
    """A row of the experiment `generation`, or of `decode`, which measures no parts of a step."""
    m, s = record.metrics, record.cell.settings

    def whole(name: str) -> int | None:
        return None if (value := m.get(name)) is None else int(value)

    full, new = s.get("context"), s["new_tokens"]
    kinds = ("encode", "attention", "full_attention")
    times = {f"{kind}_{part}_ms": m.get(f"{kind}_{part}_ms") for kind in kinds for part in ("prompt", "step")}
    return Row(
        method=str(record.cell.method),
        context=s["prompt_tokens"] + new if full is None else full,
        new_tokens=new,
        batch=s.get("batch", 1),
        tokens_per_second=Spread.of(m, "tokens_per_second"),
        full_tokens_per_second=Spread.of(m, "tokens_per_second", "full_"),
        ratio=m.get("speed_ratio") or float("nan"),
        first_ms=Spread.of(m, "time_to_first_token_ms"),
        full_first_ms=Spread.of(m, "time_to_first_token_ms", "full_"),
        bytes=whole("cache_bytes") or 0,
        full_bytes=whole("full_cache_bytes"),
        peak_bytes=whole("peak_memory_bytes"),
        full_peak_bytes=whole("full_peak_memory_bytes"),
        floor=byte_floor(record.cache),
        environment=record.environment,
        model=str(record.cell.model),
        rounds=s["repeats"],
        **times,
    )


def rows(records: Iterable[ExperimentRecord]) -> list[Row]:
    """Rows of the good records, by context, then method."""
    found = [row(record) for record in records if record.error is None]
    return sorted(found, key=lambda one: (one.context, one.batch, one.method))


def recorded_decode(records: Iterable[ExperimentRecord]) -> list[ExperimentRecord]:
    """Of recorded runs those of `decode`, but for cases that were also measured on a busy machine."""
    from turboquant.report.tables import decoded

    return decoded(list(records), busy=False)


def recorded_tables(records: Sequence[ExperimentRecord]) -> list[tuple[str, str, list[dict[str, str]]]]:
    """Recorded benchmarks of kernels as tables: what they show, where they were measured, and their rows."""
    from turboquant.report.gpu import (
        attention_table,
        context_table,
        encode_table,
        metrics_table,
        model_table,
        prefill_table,
        scores_table,
    )

    tables = (
        ("One layer's decode attention, full in bfloat16 against compressed", attention_table(records)),
        ("Attention from a chunk of a prompt, full in bfloat16 against compressed", prefill_table(records)),
        ("Attention scores alone, float32 keys against packed ones", scores_table(records)),
        ("Packing keys and values", encode_table(records)),
        ("Decode steps of known shapes with random weights", model_table(records)),
        ("The longest context in a budget of GPU memory", context_table(records)),
        (
            "Comparing one layer's heads: all at once, and in a plain loop over heads and queries",
            metrics_table(records),
        ),
    )
    return [
        (
            title,
            table.note,
            [dict(zip(table.columns, (cell.strip("`") for cell in row), strict=True)) for row in table.rows],
        )
        for title, table in tables
        if table.rows
    ]


def sources(named: Iterable[tuple[str, Environment]]) -> list[dict[str, Any]]:
    """One row for each place that numbers come from: what was measured, on which hardware, when, at which commit."""
    found: dict[tuple[str, str, int, str, str], int] = {}
    for name, e in named:
        key = name, e.device, e.cpu_threads, e.created[:10], e.commit or "no commit"
        found[key] = found.get(key, 0) + 1
    names = ("measured", "hardware", "threads", "date", "commit")
    return [dict(zip(names, key, strict=True)) | {"results": count} for key, count in found.items()]


def encode_share(one: Row) -> float | None:
    """Time spent packing as a share of a step, in percent; None where packing was not timed."""
    return None if one.encode_step_ms is None else 100 * one.encode_step_ms / one.step_ms


def table_rows(found: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with plain values, for tables and files."""
    lines = []
    for one in found:
        values = {**asdict(one), "step_ms": one.step_ms, "full_step_ms": one.full_step_ms}
        flat: dict[str, Any] = {}
        for name, value in values.items():
            if name == "environment":
                flat |= {"hardware": one.where, "date": one.environment.created, "commit": one.environment.commit}
            elif isinstance(getattr(one, name), Spread):
                spread: Spread = getattr(one, name)
                flat |= {name: spread.median, f"{name}_p20": spread.p20, f"{name}_p80": spread.p80}
            else:
                flat[name] = value
        lines.append(flat)
    return lines


def figures(row: Row) -> dict[str, float | None]:
    """The figures of a row by their names in records."""
    return {
        "tokens_per_second": row.tokens_per_second.median,
        "full_tokens_per_second": row.full_tokens_per_second.median,
        "speed_ratio": row.ratio,
        "time_to_first_token_ms": row.first_ms.median,
        "full_time_to_first_token_ms": row.full_first_ms.median,
        "encode_step_ms": row.encode_step_ms,
        "encode_share_pct": encode_share(row),
        "encode_prompt_ms": row.encode_prompt_ms,
        "attention_step_ms": row.attention_step_ms,
        "full_attention_step_ms": row.full_attention_step_ms,
        "attention_prompt_ms": row.attention_prompt_ms,
        "full_attention_prompt_ms": row.full_attention_prompt_ms,
        "bytes": row.bytes,
        "full_bytes": row.full_bytes,
        "byte_floor": row.floor,
        "peak_memory_bytes": row.peak_bytes,
        "full_peak_memory_bytes": row.full_peak_bytes,
    }


def words(one: Row) -> str:
    """How fast a method was next to the full cache, and what was measured of why."""
    own, full = one.tokens_per_second, one.full_tokens_per_second
    speed, ratio = metric("tokens_per_second"), metric("speed_ratio").text(one.ratio)
    best = speed.best((own.median, full.median))
    if one.rounds < 2:
        verdict = "a single round does not tell what is chance"
    elif best is not None and (own.p80 < full.p20 or own.p20 > full.p80):
        verdict = f"{('faster', 'slower')[best]} in {one.rounds} rounds"
    else:
        verdict = "no clear difference, the rounds overlap"
    rows = f", {one.batch} rows" if one.batch > 1 else ""
    speeds = f"{speed.text(own.median)} against {speed.said(full.median)}"
    text = f"{one.method} at {one.context:,} tokens{rows}: {ratio} x the full cache on {one.where} ({speeds})"
    text += f": {verdict}."
    parts = []
    if one.encode_step_ms is not None:
        parts.append(f"packing took {metric('encode_step_ms').said(one.encode_step_ms)}")
    if one.attention_step_ms is not None and one.full_attention_step_ms is not None:
        pair = map(metric("attention_step_ms").said, (one.attention_step_ms, one.full_attention_step_ms))
        parts.append(f"attention over codes {' instead of '.join(pair)}")
    step = f" A step takes {' instead of '.join(map(metric('step_ms').said, (one.step_ms, one.full_step_ms)))}"
    apiece = f". In one run with instruments, {' and '.join(parts)} of a step." if parts else ""
    text += step + (apiece or "; its parts were not measured.")
    held = f" It holds {human_bytes(one.bytes)}"
    held += f" instead of {human_bytes(one.full_bytes)}" if one.full_bytes is not None else ""
    return (
        text
        + held
        + (
            f", {metric('byte_floor').text(one.floor)} x the byte floor."
            if one.floor is not None
            else "; no floor is known."
        )
    )
