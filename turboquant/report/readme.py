"""Tables of README and docs, made from records: each stands between a marker with its name and an end marker."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from turboquant.records.experiment import ExperimentRecord
from turboquant.report.gpu import (
    attention_table,
    context_table,
    encode_table,
    long_context_table,
    model_table,
    prefill_table,
    scores_table,
    speed_table,
)
from turboquant.report.models import families_table
from turboquant.report.summary import ReportError, Results, on_gpu, read_results, summarize
from turboquant.report.tables import (
    Table,
    busy_table,
    by_group,
    comparison_table,
    decode_table,
    front_table,
    needle_table,
    seeds_table,
)

START, END = "<!-- results: {name} -->", "<!-- end of results -->"
_PLACE = re.compile(r"<!-- results: (?P<name>[^>]*?) -->(?P<table>.*?)(?P<end><!-- end of results -->|\Z)", re.DOTALL)


def _bench(table: Callable[[Sequence[ExperimentRecord]], Table]) -> Callable[[Results], str]:
    def filled(results: Results) -> str:
        made = table([record for record, _ in results.records])
        return made.markdown() if made.rows else ""

    return filled


def _comparison(experiment: str, file: str = "", gpu: bool = False) -> Callable[[Results], str]:
    """Return the tables of an experiment; records from GPUs have tables of their own, with `gpu`."""

    def table(results: Results) -> str:
        groups = by_group(summarize(r for r in results.of(experiment, file) if gpu or not on_gpu(r)))
        return "\n\n".join(comparison_table(group).markdown() for _, _, group in groups)

    return table


def _methods(results: Results) -> str:
    groups = by_group(summarize(results.of("perplexity", "methods")))
    return "\n\n".join(front_table(group).markdown() for _, _, group in groups)


def _needle(results: Results) -> str:
    groups = by_group(summarize(r for r in results.of("needle") if not on_gpu(r)))
    return "\n\n".join(needle_table(group).markdown() for _, _, group in groups)


def _long_context(results: Results) -> str:
    records = [record for record in results.of("attention") if on_gpu(record)]
    return long_context_table(records).markdown() if records else ""


def _variance(results: Results) -> str:
    records = results.of("variance")
    return seeds_table(records).markdown() if records else ""


README_TABLES: dict[str, Callable[[Results], str]] = {
    "decode": _bench(decode_table),
    "decode-busy": _bench(busy_table),
    "methods": _methods,
    "evaluate": _comparison("attention"),
    "perplexity": _comparison("perplexity", "perplexity"),
    "recipe": _comparison("perplexity", "recipe"),
    "needle": _needle,
    "generation": _comparison("generation"),
    "variance": _variance,
    "validate": _comparison("validate"),
    "sweep": _comparison("perplexity", "sweep"),
    "gpu-attention": _bench(attention_table),
    "gpu-speed": _bench(speed_table),
    "gpu-prefill": _bench(prefill_table),
    "gpu-scores": _bench(scores_table),
    "gpu-encode": _bench(encode_table),
    "gpu-model": _bench(model_table),
    "gpu-context": _bench(context_table),
    "gpu-quality": _comparison("perplexity", "gpu-", gpu=True),
    "gpu-long": _long_context,
    "models": _bench(families_table),
}
"""What may stand in such a file: functions by name, which return Markdown, or nothing where there are no records."""


def fill_readme(readme: str, *places: Path) -> tuple[str, list[str]]:
    """Make the tables of a README or another Markdown file anew.

    Args:
        readme: Its text.
        places: Files and folders of records.

    Returns:
        The new text, and the names of the tables that were stale.

    Raises:
        ReportError: If there is no place for a table, a name is unknown, a table has no records or no end.
    """
    results = read_results(places)
    stale: list[str] = []

    def fill(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in README_TABLES:
            raise ReportError(f"it asks for the table {name!r}: choose from {', '.join(README_TABLES)}")
        if not place["end"]:
            raise ReportError(f"its table {name!r} has no end: {END} is missing")
        table = README_TABLES[name](results)
        if not table:
            where = ", ".join(map(str, places))
            raise ReportError(f"it asks for the table {name!r}, and {where} has no records for it")
        text = f"{START.format(name=name)}\n{table}\n{END}"
        if text != place[0]:
            stale.append(name)
        return text

    filled, count = _PLACE.subn(fill, readme)
    if not count:
        raise ReportError(f"it has no place for results: {START.format(name='decode')} ... {END} is missing")
    return filled, stale
