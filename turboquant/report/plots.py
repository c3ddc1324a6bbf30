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
from turboquant.records.metrics import metric
from turboquant.records.pareto import front_of
from turboquant.report.style import looks
from turboquant.report.summary import Summary

_GLYPHS = {
    **{"x": "✕", "circle": "●", "circle-open": "○", "square": "■", "diamond": "◆", "triangle-up": "▲"},
    **{"triangle-down": "▼", "square-open": "□", "diamond-open": "◇", "triangle-up-open": "△", "star": "★"},
    **{"cross": "✚", "hexagon": "⬢", "bowtie": "⧓"},
}
_GRID = "rgba(128,128,128,0.28)"
BASELINE_16 = metric("full_precision_bytes").title


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


def _lines(summaries: Sequence[Summary], name: str) -> dict[str, list[tuple[float, float]]]:
    """Return (bits, figure) by family, ascending."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in summaries:
        if one.bits is not None and name in one.metrics:
            lines.setdefault(one.family, []).append((one.bits, one.metrics[name]))
    return {family: sorted(points) for family, points in lines.items()}


def against_bits(summaries: Sequence[Summary], name: str, *, log: bool = False) -> Plot | None:
    """Draw a figure against nominal bits, a line for each family.

    Args:
        summaries: Of one model and one experiment.
        name: Of the metric.
        log: Whether its axis is logarithmic; zeros are left out then.

    Returns:
        None where no method has bits and the figure.
    """
    styles, figure, shown, rows = _styles(summaries), go.Figure(), metric(name), []
    for family, points in _lines(summaries, name).items():
        figure.add_trace(_trace(family, [point for point in points if point[1] > 0 or not log], styles[family]))
        rows += [(family, bits, value) for bits, value in points]
    if not rows:
        return None
    ordered = sorted(rows, key=lambda row: shown.loss(row[2]))
    best, worst = (f"{shown.said(row[2])} ({row[0]} at {row[1]:g} bits)" for row in (ordered[0], ordered[-1]))
    _layout(figure, "bits of a code (nominal)", shown.axis, log=log).update_xaxes(dtick=1)
    alt = f"Best {best}, worst {worst}."
    return Plot(f"{shown.heading} against bits", alt, figure, ("method", "bits", shown.label), tuple(rows))


@dataclass(frozen=True)
class Point:
    """A method in the Pareto plot.

    Attributes:
        method: In full.
        family: What shares a colour and a sign, see `family_of`.
        cost: What it takes.
        loss: What it does to predictions; above 0, since the axis is logarithmic.
        on_front: Whether no other method beats it in both.
        note: What else is said of it.
    """

    method: str
    family: str
    cost: float
    loss: float
    on_front: bool
    note: str = ""


def pareto_figure(points: Sequence[Point], cost: str = "bits_per_value", loss: str = "kl_mean") -> go.Figure:
    """Draw one metric against another, a point a method, with the front of methods that no other beats in both.

    Args:
        points: At most those that a logarithmic axis can show.
        cost: The metric of the horizontal axis, by its name in records.
        loss: That of the vertical one.

    Returns:
        The figure with its axes and no further layout.
    """
    figure = go.Figure()
    front = sorted((point.cost, point.loss) for point in points if point.on_front)
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in front],
            y=[y for _, y in front],
            name="Pareto front",
            mode="lines",
            line={"color": "#808080", "width": 2, "dash": "dot", "shape": "hv"},
            hoverinfo="skip",
        )
    )
    families = sorted({point.family for point in points}, key=_family_order)
    for family, style in looks((_base(name), name) for name in families).items():
        own = [point for point in points if point.family == family]
        trace = _trace(family, [(point.cost, point.loss) for point in own], style, customdata=[[p.method] for p in own])
        trace.update(mode="markers", text=[_told(p, cost, loss) for p in own], hovertemplate="%{text}<extra></extra>")
        figure.add_trace(trace)
    figure.update_xaxes(title_text=metric(cost).axis)
    losses = [point.loss for point in points]
    wide = bool(losses) and max(losses) > 100 * min(losses)
    ticks = 1 if wide else "D2"  # at 1, 2 and 5
    return figure.update_yaxes(title_text=metric(loss).axis, type="log", tickformat="~g", dtick=ticks)


def _told(point: Point, cost: str, loss: str) -> str:
    """What is said of a point under the pointer."""
    figures = ", ".join(
        f"{metric(name).title} {metric(name).said(value)}" for name, value in ((cost, point.cost), (loss, point.loss))
    )
    where = "on the front" if point.on_front else "not on the front"
    return "<br>".join(filter(None, (f"<b>{point.method}</b>", figures, point.note, where)))


def _base(family: str) -> str:
    return family.partition(":")[0]


def _family_order(family: str) -> tuple[int, str]:
    order = in_order(METHODS)
    return (order.index(_base(family)) if _base(family) in order else len(order), family)


def pareto(summaries: Sequence[Summary], loss: str = "kl_mean") -> Plot | None:
    """Draw a loss against the bits really held, with the front of methods that no other beats in both."""
    cost = "bits_per_value"
    on = front_of([one.metrics for one in summaries], cost, loss)
    points = sorted(
        (
            Point(str(one.method), one.family, one.metrics[cost], one.metrics[loss], front)
            for one, front in zip(summaries, on, strict=True)
            if one.base != "full" and cost in one.metrics and one.metrics.get(loss, 0) > 0
        ),
        key=lambda point: (point.cost, point.loss),
    )
    if not points:
        return None
    figure = pareto_figure(points, cost, loss)
    _layout(figure, metric(cost).axis, metric(loss).axis)
    names = [point.method for point in points if point.on_front]
    rows = tuple((p.cost, p.loss, p.method, "yes" if p.on_front else "") for p in points)
    columns = (metric(cost).label, metric(loss).label, "method", "on the front")
    alt = f"Of {len(points)} methods {len(names)} are on the front: {', '.join(names)}."
    return Plot(f"{metric(loss).heading} against {metric(cost).title}", alt, figure, columns, rows)


def context_sensitivity(summaries: Sequence[Summary], name: str, *, log: bool = False) -> Plot | None:
    """Draw a figure against the context, a line for each method; None where only one context was measured."""
    styles, figure, shown, rows = _styles(summaries), go.Figure(), metric(name), []
    for one in (one for one in summaries if one.base != "full"):
        points = [(float(c), one.by_context[c][name]) for c in one.contexts if name in one.by_context[c]]
        points = [point for point in points if point[1] > 0 or not log]
        if len(points) > 1:
            trace = _trace(str(one.method), points, styles[one.family])
            trace.mode, trace.textposition = "lines+markers+text", "middle right"
            trace.text = [*[""] * (len(points) - 1), "" if one.bits is None else f" {one.bits:.2g}"]
            figure.add_trace(trace)
            rows += [(one.method, int(c), value) for c, value in points]
    if not rows:
        return None
    _layout(figure, "context, tokens", shown.axis, log=log)
    figure.update_xaxes(type="log", tickvals=sorted({row[1] for row in rows}), tickformat=",d")
    contexts = [row[1] for row in rows]
    alt = f"{len(figure.data)} methods from {min(contexts):,} to {max(contexts):,} tokens; the number is the bits."
    return Plot(f"Context sensitivity: {shown.title}", alt, figure, ("method", "context", shown.label), tuple(rows))


def memory_by_model(summaries: Sequence[Summary]) -> Plot | None:
    """Draw the KiB that each method holds for a token at the longest context of its model, beside 16 bits."""
    rows: list[tuple[str, str, int, float]] = []
    bits = {str(one.method): "" if one.bits is None else f"{one.bits:.2g}" for one in summaries}
    for model, group in groupby(sorted(summaries, key=_model), key=_model):
        part = [one for one in group if one.contexts and "bytes_per_token" in one.by_context[one.contexts[-1]]]
        longest = max((one.contexts[-1] for one in part), default=0)
        at = [(one, one.by_context[longest]) for one in part if longest in one.by_context]
        if at:
            rows.append((model, BASELINE_16, longest, at[0][1]["full_precision_bytes_per_token"] / 1024))
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


def validate_figure(records: Sequence[ExperimentRecord], name: str = "mse") -> go.Figure:
    """Draw a figure of the codes on random unit vectors against bits: measured, and the exact expectation."""
    figure = go.Figure()

    def bits_of(record: ExperimentRecord) -> tuple[int, int]:
        return record.cell.settings["dim"], record.cell.settings["bits"]

    usable = sorted((record for record in records if record.error is None), key=bits_of)
    colors = [METHODS[name].color for name in in_order(METHODS) if name != "full"]
    for number, (dim, group) in enumerate(groupby(usable, key=lambda record: record.cell.settings["dim"])):
        part = list(group)
        for source, sign, dash in ((name, "circle", "solid"), (f"{name}_theory", "x-thin-open", "dot")):
            points = [(float(bits_of(one)[1]), value) for one in part if (value := one.metrics.get(source))]
            line = f"dim {dim}, {'measured' if source == name else 'expected'}"
            figure.add_trace(_trace(line, points, (colors[number % len(colors)], sign, dash)))
    _layout(figure, "bits", metric(name).axis, log=True).update_xaxes(dtick=1)
    return figure.update_layout(showlegend=True)


PLOTS: dict[str, Sequence[Callable[[Sequence[Summary]], Plot | None]]] = {
    "model": (
        lambda s: against_bits(s, "compression_ratio"),
        lambda s: against_bits(s, "cosine_similarity"),
        lambda s: against_bits(s, "top1_match_pct"),
        lambda s: against_bits(s, "top5_match_pct"),
        lambda s: against_bits(s, "kl_mean", log=True),
        pareto,
        lambda s: context_sensitivity(s, "kl_mean", log=True),
        lambda s: context_sensitivity(s, "cosine_similarity"),
        lambda s: context_sensitivity(s, "success_pct"),
    ),
    "models": (memory_by_model,),
}
"""What is drawn for the records of one model, and for those of all models."""
