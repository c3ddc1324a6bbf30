"""Speed and memory of the full cache and of compressed ones: bars with their spread, and lines against context."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from app.benchmarks.request import Row, figures
from app.ui.style import COMPRESSED, ORIGINAL, SECOND, Chart, layout
from turboquant.records.experiment import Spread
from turboquant.records.metrics import metric

_COLORS = (COMPRESSED, SECOND, "#b0559b", "#7a8494")
_PATTERNS = ("/", "x", ".", "\\")
_DASHES = ("dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("diamond", "square", "triangle-up", "star")


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))


def _name(row: Row) -> str:
    return f"{row.context:,} tokens" + (f", {row.batch} rows" if row.batch > 1 else "")


def _whiskers(spreads: Sequence[Spread]) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [one.p80 - one.median for one in spreads],
        "arrayminus": [one.median - one.p20 for one in spreads],
        "thickness": 1.5,
        "width": 5,
    }


def _bar(name: str, x: list[str], spreads: Sequence[Spread], color: str, pattern: str) -> go.Bar:
    shape = {"shape": pattern, "fillmode": "overlay", "fgcolor": "#ffffff", "solidity": 0.2, "size": 7}
    return go.Bar(
        name=name,
        x=x,
        y=[one.median for one in spreads],
        error_y=_whiskers(spreads),
        marker={"color": color, "pattern": shape},
    )


def speed(rows: Sequence[Row]) -> Chart:
    """Tokens a second at each context: the full cache beside every method, with the spread of the rounds."""
    figure, methods, speed = go.Figure(), _methods(rows), metric("tokens_per_second")
    first = [row for row in rows if row.method == methods[0]]
    figure.add_trace(_bar("full cache", [*map(_name, first)], [r.full_tokens_per_second for r in first], ORIGINAL, ""))
    for i, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        color, pattern = _COLORS[i % len(_COLORS)], _PATTERNS[i % len(_PATTERNS)]
        figure.add_trace(_bar(method, [*map(_name, own)], [row.tokens_per_second for row in own], color, pattern))
    bargap = 0.6 if len(first) == 1 else 0.25
    layout(figure, barmode="group", bargap=bargap, yaxis_title=speed.axis, height=330)
    figure.update_xaxes(type="category")
    table = pd.DataFrame(
        [
            (r.method, r.context, r.batch, *_three(r.tokens_per_second), *_three(r.full_tokens_per_second), r.ratio)
            for r in rows
        ],
        columns=[
            "method",
            "context",
            "rows",
            speed.unit,
            "p20",
            "p80",
            f"full, {speed.unit}",
            "full p20",
            "full p80",
            "ratio",
        ],
    )
    alt = "; ".join(f"{r.method} at {_name(r)}: {metric('speed_ratio').text(r.ratio)} x the full cache" for r in rows)
    return Chart(figure, f"Median speed, {alt}.", table)


def _three(one: Spread) -> tuple[float, float, float]:
    return one.median, one.p20, one.p80


def against_context(rows: Sequence[Row], name: str) -> Chart | None:
    """A metric against context, a line a method and one for the full cache where that was measured; None for none."""
    figure, columns, shown = go.Figure(), [], metric(name)
    lines: list[tuple[str, list[tuple[int, float]], tuple[str, str, str]]] = []
    methods = _methods(rows)
    first = [row for row in rows if row.method == methods[0]]
    lines.append(("full cache", _points(first, f"full_{name}"), (ORIGINAL, "solid", "circle")))
    for i, method in enumerate(methods):
        style = _COLORS[i % len(_COLORS)], _DASHES[i % len(_DASHES)], _SYMBOLS[i % len(_SYMBOLS)]
        lines.append((method, _points([row for row in rows if row.method == method], name), style))
    for line, points, (color, dash, symbol) in lines:
        if points:
            figure.add_trace(
                go.Scatter(
                    x=[x for x, _ in points],
                    y=[y for _, y in points],
                    name=line,
                    mode="lines+markers",
                    line={"color": color, "dash": dash, "width": 2},
                    marker={"symbol": symbol, "size": 8},
                )
            )
            columns += [(line, x, y) for x, y in points]
    if not columns:
        return None
    layout(figure, xaxis_title="context, tokens a row", yaxis_title=shown.axis, height=300)
    figure.update_xaxes(tickvals=sorted({x for _, x, _ in columns}))
    figure.update_yaxes(rangemode="tozero")
    last = "; ".join(
        f"{line} {shown.said(points[-1][1])} at {points[-1][0]:,} tokens" for line, points, _ in lines if points
    )
    table = pd.DataFrame(columns, columns=["cache", "context", shown.label])
    return Chart(figure, f"{shown.heading}: {last}.", table)


def _points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    return [(row.context, value) for row in rows if (value := figures(row).get(name)) is not None]
