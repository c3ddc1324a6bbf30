"""Reports on any set of records: the same sections as Markdown and as one HTML file that works offline."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING

from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import NONE, metric
from turboquant.report.gpu import (
    attention_table,
    context_table,
    encode_table,
    model_table,
    prefill_table,
    scores_table,
)
from turboquant.report.models import families_table
from turboquant.report.summary import ReportError, Results, Summary, summarize
from turboquant.report.tables import (
    Table,
    busy_table,
    by_group,
    comparison_table,
    decode_table,
    failures_table,
    front_table,
    seeds_table,
)

if TYPE_CHECKING:
    from turboquant.report.plots import Plot

TITLES = {
    "attention": "Attention over long contexts (evaluate)",
    "perplexity": "Predictions: perplexity and KL",
    "needle": "Finding a needle",
    "generation": "Generation: speed and memory",
    "validate": "The codes on random unit vectors",
    "variance": "Spread over seeds",
}

BENCHES: "dict[str, Callable[[Sequence[ExperimentRecord]], Table]]" = {
    "Decode speed": decode_table,
    "Decode speed on a busy machine": busy_table,
    "One layer's decode attention": attention_table,
    "Attention from a chunk of a prompt": prefill_table,
    "Attention scores alone": scores_table,
    "Packing keys and values": encode_table,
    "Decode steps of known shapes with random weights": model_table,
    "The longest context in a budget of GPU memory": context_table,
    "Families of models": families_table,
}
OWN_TABLES = (
    *("decode", "kernel-attention", "kernel-scores", "kernel-encode", "model-speed", "longest-context"),
    *("metrics-speed", "families"),
)
"""Experiments whose records are not averaged: each is a row of one of those tables."""


@dataclass(frozen=True)
class Panel:
    """Plots that share a legend: heading (a model), name, colour and sign of each line, and the plots."""

    heading: str
    legend: tuple[tuple[str, str, str], ...]
    plots: "tuple[Plot, ...]"


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        tables: The first things in it.
        panels: What is drawn of its records.
    """

    title: str
    tables: tuple[Table, ...]
    panels: tuple[Panel, ...] = ()


def build_report(results: Results, *, plots: bool = False) -> list[Section]:
    """Return the sections of a report: one for each experiment under the same settings.

    Args:
        results: The records.
        plots: Whether to draw; needs plotly.

    Raises:
        ReportError: If there are no records at all.
        ImportError: If plots are wanted and plotly is missing.
    """
    if not results.records:
        raise ReportError("there are no records to report on")
    sections = []
    summed = (record for record, _ in results.records if record.cell.experiment not in (*OWN_TABLES, "variance"))
    for experiment, _, group in by_group(summarize(summed)):
        tables = [comparison_table(group)]
        if experiment == "perplexity" and len(group) > 2:
            tables.append(
                front_table(
                    group, f"By {metric('bits_per_value').title}, with the Pareto front of {metric('kl_mean').title}"
                )
            )
        drawn = _draw(group) if plots and group[0].model is not None else ()
        sections.append(Section(TITLES.get(experiment, experiment.capitalize()), tuple(tables), drawn))
    if spreads := results.of("variance"):
        sections.append(Section(TITLES["variance"], (seeds_table(spreads),)))
    every = [record for record, _ in results.records]
    for title, table in BENCHES.items():
        if (made := table(every)).rows:
            sections.append(Section(title, (made,)))
    if failed := [record for record, _ in results.records if record.error]:
        sections.append(Section("Failures", (failures_table(failed),)))
    return sections


def _draw(group: Sequence[Summary]) -> tuple[Panel, ...]:
    from turboquant.report.plots import PLOTS, legend

    parts = [(model, list(part), "model") for model, part in groupby(group, key=lambda one: one.model or "")]
    panels = [
        Panel(heading, tuple(legend(part)), tuple(plot for draw in PLOTS[kind] if (plot := draw(part))))
        for heading, part, kind in [*parts, ("All models", list(group), "models")]
    ]
    return tuple(panel for panel in panels if panel.plots)


def to_markdown(sections: Sequence[Section]) -> str:
    """Return a report as Markdown: tables alone."""
    parts = ["# Results"]
    for section in sections:
        parts.append(f"## {section.title}")
        for table in section.tables:
            parts += [f"### {table.title}"] if table.title else []
            parts.append(table.markdown())
    return "\n\n".join(parts) + "\n"


def to_html(sections: Sequence[Section]) -> str:
    """Return a report as one HTML file with everything in it: tables, plots and what draws them.

    Raises:
        ImportError: If jinja2 or plotly is missing.
    """
    from jinja2 import Environment

    from turboquant.report.plots import library_script

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _cell, "json": _json}
    page = environment.from_string(resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))
    return page.render(
        sections=sections,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=library_script() if any(section.panels for section in sections) else "",
    )


def _cell(value: str | float | int | None) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return NONE if value is None else str(value)


def _json(plot: "Plot") -> str:
    """Return a figure as JSON that cannot end the script element it stands in."""
    figure = json.loads(plot.figure.to_json())
    figure["layout"].pop("template", None)
    return json.dumps(figure).replace("<", "\\u003c")
