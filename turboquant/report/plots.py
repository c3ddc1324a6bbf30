"""Figures of reports. The one module that needs plotly.

Each method has its own colour and sign (`Method.color`, `Method.sign`). Text takes the page's colour, so that a figure
serves light and dark pages.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from turboquant.methods import METHODS, in_order
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.pareto import pareto_front
from turboquant.report.style import looks
from turboquant.report.summary import Summary

_GLYPHS = {
    **{"x": "✕", "circle": "●", "circle-open": "○", "square": "■", "diamond": "◆", "triangle-up": "▲"},
    **{"triangle-down": "▼", "square-open": "□", "diamond-open": "◇", "triangle-up-open": "△", "star": "★"},
    **{"cross": "✚", "hexagon": "⬢", "bowtie": "⧓"},
}
_GRID = "rgba(128,128,128,0.28)"
BASELINE_BITS = 16


@dataclass(frozen=True)
class Plot:
    """A figure with what it says in words and the numbers it draws.

    Attributes:
        title: What is drawn against what.
        alt: One sentence for those who do not see it.
        figure: The plotly figure.
        columns: Names of the numbers.
        rows: The numbers, as drawn.
    """

    title: str
    alt: str
    figure: go.Figure
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]


def library_script() -> str:
    """Return plotly's JavaScript, for pages that work offline."""
    return get_plotlyjs()


def _styles(summaries: Iterable[Summary]) -> dict[str, tuple[str, str, str]]:
    return looks((one.base, one.family) for one in summaries)


def legend(summaries: Iterable[Summary]) -> list[tuple[str, str, str]]:
    """Return name, colour and sign (a character) of each family, for the legend that all figures share."""
    return [(family, color, _GLYPHS[sign]) for family, (color, sign, _) in _styles(summaries).items()]


def _layout(figure: go.Figure, x: str, y: str, *, log: bool = False) -> go.Figure:
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": 12, "b": 48},
        height=340,
        hovermode="closest",
        showlegend=False,  # one legend serves all figures of a panel, see `legend`
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_xaxes(title={"text": x, "font": {"size": 13}}, gridcolor=_GRID, zeroline=False, automargin=True)
    figure.update_yaxes(title={"text": y, "font": {"size": 13}}, gridcolor=_GRID, zeroline=False, automargin=True)
    if log:
        figure.update_yaxes(type="log", dtick="D2", tickformat="~g")
    return figure


def _trace(name: str, points: Sequence[tuple[float, float]], style: tuple[str, str, str], **more: object) -> go.Scatter:
    color, sign, dash = style
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        name=name,
        mode="lines+markers",
        line={"color": color, "dash": dash, "width": 2},
        marker={"color": color, "symbol": sign, "size": 9},
        **more,
    )


def _lines(summaries: Sequence[Summary], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Return (bits, figure) by family, ascending."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in summaries:
        if one.bits is not None and metric in one.metrics:
            lines.setdefault(one.family, []).append((one.bits, one.metrics[metric]))
    return {family: sorted(points) for family, points in lines.items()}


def against_bits(
    summaries: Sequence[Summary], metrics: Sequence[str], title: str, y: str, *, log: bool = False
) -> Plot | None:
    """Draw figures against nominal bits, a line for each family; a second metric of it is dotted.

    Args:
        summaries: Of one model and one experiment.
        metrics: One or two names.
        title: Of the plot.
        y: Title of the axis.
        log: Whether it is logarithmic; zeros are left out then.

    Returns:
        None where no method has bits and figures.
    """
    styles, figure, rows = _styles(summaries), go.Figure(), []
    for number, metric in enumerate(metrics):
        for family, points in _lines(summaries, metric).items():
            drawn = [point for point in points if point[1] > 0 or not log]
            color, sign, dash = styles[family]
            name = family if len(metrics) == 1 else f"{family}, {_short(metric)}"
            figure.add_trace(_trace(name, drawn, (color, sign, "dot" if number else dash)))
            rows += [(family, _short(metric), bits, value) for bits, value in points]
    if not rows:
        return None
    best = max((value, f"{family} at {bits:g} bits") for family, _, bits, value in rows)
    low = min((value, f"{family} at {bits:g} bits") for family, _, bits, value in rows)
    alt = f"From {low[0]:.4g} ({low[1]}) to {best[0]:.4g} ({best[1]})."
    _layout(figure, "bits of a code (nominal)", y, log=log).update_xaxes(dtick=1)
    return Plot(title, alt, figure, ("method", "figure", "bits", "value"), tuple(rows))


def _short(metric: str) -> str:
    return metric.removesuffix("_pct").replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")


def pareto(summaries: Sequence[Summary], metric: str = "kl_mean") -> Plot | None:
    """Draw a loss against the bits really held, with the front of methods that no other beats in both."""
    held = [
        one
        for one in summaries
        if one.base != "full" and "bits_per_value" in one.metrics and one.metrics.get(metric, 0) > 0
    ]
    if not held:
        return None
    points = [(one.metrics["bits_per_value"], one.metrics[metric]) for one in held]
    front = pareto_front(points)
    styles, figure = _styles(summaries), go.Figure()
    line = sorted(point for point, on in zip(points, front, strict=True) if on)
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in line],
            y=[y for _, y in line],
            name="front",
            mode="lines",
            line={"color": "#808080", "width": 1.5, "dash": "dot", "shape": "hv"},
            hoverinfo="skip",
        )
    )
    for family, group in groupby(sorted(zip(held, points, strict=True), key=lambda one: one[0].family), _family):
        part = list(group)
        trace = _trace(family, [point for _, point in part], styles[family], text=[one.method for one, _ in part])
        trace.mode = "markers"
        trace.hovertemplate = "%{text}<br>%{x:.2f} bits a value, %{y:.3g} nats<extra></extra>"
        figure.add_trace(trace)
    _layout(figure, "bits a value really held", "KL, nats (mean)", log=True)
    names = [one.method for one, on in zip(held, front, strict=True) if on]
    rows = sorted(
        ((x, y, one.method, "yes" if on else "") for one, (x, y), on in zip(held, points, front, strict=True)),
        key=lambda row: row[:2],
    )
    columns = ("bits a value held", "KL, nats", "method", "on the front")
    alt = f"Of {len(held)} methods {len(names)} are on the front: {', '.join(str(name) for name in names)}."
    return Plot("Quality against bits really held", alt, figure, columns, tuple(rows))


def _family(one: tuple[Summary, tuple[float, float]]) -> str:
    return one[0].family


def context_sensitivity(summaries: Sequence[Summary], metric: str, y: str, *, log: bool = False) -> Plot | None:
    """Draw a figure against the context, a line for each method; None where only one context was measured."""
    styles, figure, rows = _styles(summaries), go.Figure(), []
    for one in (one for one in summaries if one.base != "full"):
        points = [(float(c), one.by_context[c][metric]) for c in one.contexts if metric in one.by_context[c]]
        points = [point for point in points if point[1] > 0 or not log]
        if len(points) > 1:
            trace = _trace(str(one.method), points, styles[one.family])
            trace.mode, trace.textposition = "lines+markers+text", "middle right"
            trace.text = [*[""] * (len(points) - 1), "" if one.bits is None else f" {one.bits:.2g}"]
            figure.add_trace(trace)
            rows += [(one.method, int(c), value) for c, value in points]
    if not rows:
        return None
    _layout(figure, "context, tokens", y, log=log)
    figure.update_xaxes(type="log", tickvals=sorted({row[1] for row in rows}), tickformat=",d")
    contexts = [row[1] for row in rows]
    alt = f"{len(figure.data)} methods from {min(contexts):,} to {max(contexts):,} tokens; the number is the bits."
    return Plot(f"Context sensitivity: {y}", alt, figure, ("method", "context", y), tuple(rows))


def memory_by_model(summaries: Sequence[Summary]) -> Plot | None:
    """Draw the KiB that each method holds for a token at the longest context of its model, beside 16 bits."""
    rows: list[tuple[str, str, int, float]] = []
    bits = {str(one.method): "" if one.bits is None else f"{one.bits:.2g}" for one in summaries}
    for model, group in groupby(sorted(summaries, key=_model), key=_model):
        part = [one for one in group if one.contexts and "bytes_per_token" in one.by_context[one.contexts[-1]]]
        longest = max((one.contexts[-1] for one in part), default=0)
        at = [(one, one.by_context[longest]) for one in part if longest in one.by_context]
        if at:
            rows.append((model, "16-bit baseline", longest, at[0][1]["full_precision_bytes_per_token"] / 1024))
        rows += [(model, str(one.method), longest, held["bytes_per_token"] / 1024) for one, held in at]
    if not rows:
        return None
    figure = go.Figure()
    for method in dict.fromkeys(row[1] for row in rows):
        own = [row for row in rows if row[1] == method]
        known = METHODS.get(method.split(":")[0])
        color = known.color if known else "#b8b8b8"
        figure.add_trace(
            go.Bar(
                x=[f"{row[0]}, {row[2]:,} tokens" for row in own],
                y=[row[3] for row in own],
                name=method,
                text=[bits.get(method, "16")] * len(own),
                textposition="outside",
                constraintext="none",
                textfont={"size": 11},
                marker={"color": color, "line": {"color": "rgba(128,128,128,0.8)", "width": 1}},
            )
        )
    _layout(figure, "", "KiB a token")
    figure.update_layout(barmode="group")
    alt = (
        "Bytes really held for a token at the longest context, beside 16 bits a value (light); the number is the bits."
    )
    figure.update_yaxes(rangemode="tozero")
    return Plot("Memory by model", alt, figure, ("model", "method", "context", "KiB a token"), tuple(rows))


def _model(one: Summary) -> str:
    return one.model or ""


def validate_figure(
    records: Sequence[ExperimentRecord], metric: str = "mse", axis: str = "mean squared error of a unit vector"
) -> go.Figure:
    """Draw a figure of the codes on random unit vectors against bits: measured, and the exact expectation."""
    figure = go.Figure()

    def bits_of(record: ExperimentRecord) -> tuple[int, int]:
        return record.cell.settings["dim"], record.cell.settings["bits"]

    usable = sorted((record for record in records if record.error is None), key=bits_of)
    colors = [METHODS[name].color for name in in_order(METHODS) if name != "full"]
    for number, (dim, group) in enumerate(groupby(usable, key=lambda record: record.cell.settings["dim"])):
        part = list(group)
        for source, sign, dash in ((metric, "circle", "solid"), (f"{metric}_theory", "x-thin-open", "dot")):
            points = [(float(bits_of(one)[1]), value) for one in part if (value := one.metrics.get(source))]
            name = f"dim {dim}, {'measured' if source == metric else 'expected'}"
            figure.add_trace(_trace(name, points, (colors[number % len(colors)], sign, dash)))
    _layout(figure, "bits", axis, log=True).update_xaxes(dtick=1)
    return figure.update_layout(showlegend=True)


PLOTS: dict[str, Sequence[Callable[[Sequence[Summary]], Plot | None]]] = {
    "model": (
        lambda s: against_bits(s, ("compression_ratio",), "Compression against bits", "compression, measured"),
        lambda s: against_bits(s, ("cosine_similarity",), "Cosine against bits", "cosine of scores"),
        lambda s: against_bits(
            s,
            ("top1_match_pct", "top5_match_pct"),
            "Top-1 (solid) and top-5 match (dotted) against bits",
            "heads that match, %",
        ),
        lambda s: against_bits(s, ("kl_mean",), "KL against bits", "KL, nats (mean)", log=True),
        pareto,
        lambda s: context_sensitivity(s, "kl_mean", "KL, nats (mean)", log=True),
        lambda s: context_sensitivity(s, "cosine_similarity", "cosine of scores"),
        lambda s: context_sensitivity(s, "success_pct", "needles found, %"),
    ),
    "models": (memory_by_model,),
}
"""What is drawn for the records of one model, and for those of all models."""
