"""Tables: plain rows that print as Markdown and go into pages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import NONE, metric
from turboquant.records.pareto import front_of
from turboquant.records.spread import spread
from turboquant.report.summary import ROW_SETTINGS, Summary, measured_on, summarize

COLUMNS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("compression_ratio", "bits_per_value", "cosine_similarity", "top1_match_pct", "top5_match_pct"),
        *("kl_mean", "same_top_pct", "needle_rank_full", "needle_rank"),
    ),
    "perplexity": (
        *("bits_per_value", "packed_bits_per_value", "compression_ratio", "ppl_full", "ppl", "delta_ppl_pct"),
        *("kl_mean", "kl_p99", "same_top_pct"),
    ),
    "needle": ("bits_per_value", "compression_ratio", "success_full_pct", "success_pct"),
    "generation": (
        *("full_tokens_per_second", "tokens_per_second", "speed_ratio", "full_time_to_first_token_ms"),
        *("time_to_first_token_ms", "encode_step_ms", "bits_per_value", "compression_ratio", "same_tokens_pct"),
    ),
    "validate": ("mse", "mse_theory", "inner_product_prod_gaussian", "inner_product_prod_gaussian_theory"),
}
"""The figures that a table shows, by experiment; of other experiments every figure is shown."""

DECODE = ("full_tokens_per_second", "tokens_per_second", "speed_ratio", "bits_per_value")
BUSY = ("full_tokens_per_second", "tokens_per_second", "full_worst_step_ms", "worst_step_ms")
"""What the tables of decode speed show, on an idle machine and on a busy one."""
GREEDY = ("kl_mean", "same_top_pct", "delta_ppl_pct", "agreed_tokens")
SAMPLED = "agreed_tokens"
"""What the table of `variance` shows of greedy and of sampled answers."""


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: What it shows; "" for none.
        columns: Their names.
        rows: Cells as shown; text in backquotes is code.
        note: A line below: where and when this was measured.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown, with its note below."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        text = text.replace("| --- |", "|---|").replace(" --- |", "---|")
        return f"{text}\n\n{self.note}" if self.note else text


def code(text: str | None) -> str:
    """Return a name as code."""
    return f"`{text}`" if text else NONE


def contexts_of(summary: Summary) -> str:
    """Return the contexts that were averaged, as shown."""
    named = [f"{c:,}" for c in summary.contexts if c]
    return ", ".join(named) or NONE if len(named) < 3 else f"{len(named)}, {named[0]} to {named[-1]}"


def comparison_table(summaries: Sequence[Summary], title: str = "", metrics: Sequence[str] | None = None) -> Table:
    """Return the comparison of methods: means across contexts, a row for each model and method.

    Args:
        summaries: Of one experiment under the same settings.
        title: Of the table.
        metrics: The columns; by default those of `COLUMNS` that were measured.
    """
    names = metrics or _metrics(summaries)
    weights = len({(one.model, one.weights) for one in summaries}) > len({one.model for one in summaries})
    fields: list[tuple[str, Callable[[Summary], str]]] = [
        ("model", lambda one: (one.model or NONE) + (f", {one.weights}" if weights else "")),
        *((name, _from_row(name)) for name in ROW_SETTINGS if any(name in dict(one.row) for one in summaries)),
        ("method", lambda one: code(one.method)),
        ("contexts", contexts_of),
        *((metric(name).label, _from_metrics(name)) for name in names),
        ("records", lambda one: str(one.records)),
    ]
    cells = [(name, [get(one) for one in summaries]) for name, get in fields]
    kept = [(name, column) for name, column in cells if set(column) != {NONE}]
    note = measured_on(environment for one in summaries for environment in one.environments)
    settings = f" Settings: {summaries[0].settings}." if summaries[0].settings else ""
    rows = tuple(zip(*(column for _, column in kept), strict=True))
    return Table(title, tuple(name for name, _ in kept), rows, note + settings)


def _metrics(summaries: Sequence[Summary]) -> list[str]:
    held = dict.fromkeys(name for one in summaries for name in one.metrics if not name.endswith("bytes_per_token"))
    known = COLUMNS.get(summaries[0].experiment)
    return [name for name in known if name in held] if known else list(held)


def _from_row(name: str) -> Callable[[Summary], str]:
    return lambda one: str(dict(one.row).get(name, NONE))


def _from_metrics(name: str) -> Callable[[Summary], str]:
    return lambda one: metric(name).text(one.metrics.get(name))


def front_table(summaries: Sequence[Summary], title: str = "") -> Table:
    """Return methods by the bits they really held, with the Pareto front of mean KL marked, model by model."""
    usable = [one for one in summaries if {"bits_per_value", "kl_mean"} <= one.metrics.keys() and one.method != "full"]
    rows: list[Summary] = []
    marks: dict[int, str] = {}
    for _, group in groupby(usable, key=lambda one: (one.model, one.weights)):
        part = sorted(group, key=lambda one: one.metrics["bits_per_value"])
        marks.update(
            {id(one): "yes" if on else "" for one, on in zip(part, front_of([o.metrics for o in part]), strict=True)}
        )
        rows += part
    if not rows:
        return Table(title, (), ())
    table = comparison_table(rows, title)
    marked = tuple((*row, marks[id(one)]) for row, one in zip(table.rows, rows, strict=True))
    return Table(title, (*table.columns, "on the front"), marked, table.note)


def needle_table(summaries: Sequence[Summary]) -> Table:
    """Return how often the needle was found: a row for each model and method, a column for each context."""
    contexts = sorted({c for one in summaries for c in one.contexts})

    def cell(one: Summary, context: int) -> str:
        found = one.by_context.get(context, {})
        own, full = (metric(name).text(found.get(name)) for name in ("success_pct", "success_full_pct"))
        return f"{own} ({full})"

    rows = tuple(
        (
            one.model or NONE,
            code(one.method),
            metric("bits_per_value").text(one.metrics.get("bits_per_value")),
            *(cell(one, context) for context in contexts),
        )
        for one in summaries
    )
    names = tuple(f"{metric('success_pct').title} at {context:,}, % (full)" for context in contexts)
    note = measured_on(environment for one in summaries for environment in one.environments)
    return Table("", ("model", "method", metric("bits_per_value").label, *names), rows, note)


def _condition(record: ExperimentRecord) -> tuple[object, ...]:
    """Equal for records of `decode` that differ only in what other processes did and how long threads spun."""
    s = record.cell.settings
    return record.cell.model, record.cell.method, s["prompt_tokens"], s["new_tokens"], s["device"]


def decoded(records: Sequence[ExperimentRecord], busy: bool) -> list[ExperimentRecord]:
    """Return the records of `decode` of cases that were measured beside other processes too, or of the others."""
    good = [r for r in records if r.cell.experiment == "decode" and not r.error]
    cases = {_condition(r) for r in good if r.cell.settings["busy"]}
    return [r for r in good if (_condition(r) in cases) == busy]


def _quiet_order(record: ExperimentRecord) -> tuple[object, ...]:
    model, method, prompt_tokens, _, _ = _condition(record)
    return model, prompt_tokens, method


def _decode_cells(record: ExperimentRecord) -> tuple[str, ...]:
    s = record.cell.settings
    weights = record.model.weights if record.model else record.cell.weights
    return f"{record.cell.model}, {weights}", code(record.cell.method), f"{s['prompt_tokens']} + {s['new_tokens']}"


def _figures(record: ExperimentRecord, names: Sequence[str]) -> tuple[str, ...]:
    held = {"bits_per_value": record.cache.bits_per_value} if record.cache else {}
    return tuple(metric(name).text({**held, **record.metrics}.get(name)) for name in names)


def decode_table(records: Sequence[ExperimentRecord]) -> Table:
    """Return decode speed on a machine otherwise idle, with hardware and commit in every row.

    Cases that were measured beside other processes too stand in `busy_table`.
    """
    rows = [
        (
            *_decode_cells(r),
            *_figures(r, DECODE),
            _where(r),
        )
        for r in sorted(decoded(records, busy=False), key=_quiet_order)
    ]
    names = ("model, weights", "method", "prompt + new tokens")
    return Table("", (*names, *(metric(name).label for name in DECODE), "measured on"), tuple(rows))


def busy_table(records: Sequence[ExperimentRecord]) -> Table:
    """Return decode speed while other processes compute, by how long OpenMP's threads spin before they sleep.

    What was measured of the same cases without such processes stands beside it.
    """
    rows = [
        (
            *_decode_cells(r),
            str(r.cell.settings["busy"]),
            "not set" if (spins := r.cell.settings["openmp_spins"]) is None else f"{spins:,}",
            *_figures(r, BUSY),
            _where(r),
        )
        for r in sorted(
            decoded(records, busy=True),
            key=lambda r: (*_condition(r)[:2], r.cell.settings["busy"], -(r.cell.settings["openmp_spins"] or 0)),
        )
    ]
    names = ("model, weights", "method", "prompt + new tokens", "busy processes", "rounds of spinning")
    return Table("", (*names, *(metric(name).label for name in BUSY), "measured on"), tuple(rows))


def _where(record: ExperimentRecord) -> str:
    found = record.environment
    return f"{found.device}, {found.cpu_threads} threads, {found.created[:10]}, {found.commit or 'no commit'}"


def by_group(summaries: Sequence[Summary]) -> list[tuple[str, str, list[Summary]]]:
    """Return summaries that may stand in one table: those of one experiment under the same settings."""

    def key(one: Summary) -> tuple[str, str]:
        return one.experiment, one.settings

    return [(*name, list(group)) for name, group in groupby(sorted(summaries, key=key), key=key)]


def failures_table(failed: Sequence[Any]) -> Table:
    """Return the cells that failed, with their errors."""
    rows = tuple((str(record.cell), record.error or "", record.environment.created[:10]) for record in failed)
    return Table("Cells that failed", ("cell", "error", "when"), rows)


def seeds_table(records: Sequence[ExperimentRecord]) -> Table:
    """Return how far figures spread: mean and standard deviation over rotation seeds, for sampled answers over all.

    Args:
        records: Of the experiment `variance`; a sampling seed of None stands for perplexity and greedy answers.
    """
    kept = [record for record in records if record.error is None]
    rows = []
    for summary in summarize(kept):
        own = [r for r in kept if summarize([r])[0].group == summary.group]
        greedy = [r for r in own if r.cell.settings.get("seed") is None]
        sampled = [r for r in own if r.cell.settings.get("seed") is not None]
        figures = (*(_mean_and_sd(greedy, name) for name in GREEDY), _mean_and_sd(sampled, SAMPLED))
        rows.append((summary.model or NONE, code(summary.method), *figures, f"{len(greedy)} + {len(sampled)}"))
    heads = [f"{metric(name).label} ± sd" for name in (*GREEDY, f"sampled_{SAMPLED}")]
    names = (*heads, "greedy + sampled runs")
    note = measured_on(record.environment for record in kept)
    return Table("", ("model", "method", *names), tuple(rows), note)


def _mean_and_sd(records: Sequence[ExperimentRecord], name: str) -> str:
    values = [value for record in records if (value := record.metrics.get(name)) is not None]
    if not values:
        return NONE
    found = spread(values)
    sd = "" if found.sd is None else f" ± {metric(name).text(found.sd).removeprefix('+')}"
    return metric(name).text(found.mean) + sd
