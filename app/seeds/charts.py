"""How results move with seeds: one dot a cell with means and intervals, and where answers first differ."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from app.seeds.request import INTERVAL, Histogram, Strip
from app.ui.style import BASELINE, COMPRESSED, SECOND, Chart, layout
from turboquant.records.metrics import Metric, metric

_COLORS = (COMPRESSED, SECOND, BASELINE)
_SYMBOLS = ("circle", "diamond", "square")
_PATTERNS = ("", "/", "x")
_MEANS = ("line-ns", "cross-thin")


def _place(names: Sequence[str], name: str) -> int:
    return list(dict.fromkeys(names)).index(name) % len(_COLORS)


def strips(name: str, found: Sequence[Strip]) -> Chart:
    """One line a method and kind of answers: a dot a cell, below it the means with their intervals."""
    figure, names, shown = go.Figure(), [one.method for one in found], metric(name)
    for row, one in enumerate(found):
        place = _place(names, one.method)
        values = [value for _, _, value in one.points]
        figure.add_trace(
            go.Scatter(
                x=values,
                y=[row + 0.12 + 0.24 * (i % 4) / 3 for i in range(len(values))],
                name=one.method,
                mode="markers",
                marker={"color": _COLORS[place], "symbol": _SYMBOLS[place], "size": 9, "opacity": 0.7},
                showlegend=one.method not in names[:row],
                legendgroup=one.method,
                customdata=[_seeds(rotation, seed) for rotation, seed, _ in one.points],
                hovertemplate="%{x}, %{customdata}<extra>%{fullData.name}</extra>",
            )
        )
        for i, (over, _) in enumerate(one.means):
            figure.add_trace(_mean(shown, one, over, row - 0.12 - 0.2 * i, i, _COLORS[place]))
    layout(
        figure,
        height=150 + 95 * max(len(found), 1),
        hovermode="closest",
        xaxis_title=shown.axis,
    )
    ticks = [f"{one.method.replace(':', ': ', 1)}<br>{one.answers}" for one in found]
    figure.update_yaxes(tickvals=list(range(len(found))), ticktext=ticks, autorange="reversed", zeroline=False)
    table = pd.DataFrame(
        [(one.method, one.answers, *point) for one in found for point in one.points],
        columns=["method", "answers", "rotation seed", "sampling seed", shown.heading],
    )
    table["sampling seed"] = table["sampling seed"].astype("Int64")
    return Chart(figure, " ".join(_words(shown, one) for one in found), table)


def _seeds(rotation: int, sampling: int | None) -> str:
    return f"rotation seed {rotation}" + ("" if sampling is None else f", sampling seed {sampling}")


def _mean(shown: Metric, one: Strip, over: str, y: float, number: int, color: str) -> go.Scatter:
    spread = dict(one.means)[over]
    known = spread.low is not None and spread.high is not None
    return go.Scatter(
        x=[spread.mean],
        y=[y],
        name=f"mean, {INTERVAL} over {over}",
        mode="markers",
        marker={"color": color, "symbol": _MEANS[number], "size": 14, "line": {"color": color, "width": 3}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [(spread.high or 0.0) - spread.mean if known else 0.0],
            "arrayminus": [spread.mean - (spread.low or 0.0) if known else 0.0],
            "color": color,
            "thickness": 2,
            "width": 6,
        },
        showlegend=False,
        hovertemplate=f"mean {shown.said(spread.mean)} over {spread.count} {over}<extra>{one.method}</extra>",
    )


def _words(shown: Metric, one: Strip) -> str:
    said = []
    for over, spread in one.means:
        text = f"mean {shown.said(spread.mean)} over {spread.count} {over}"
        if spread.low is None or spread.high is None:
            said.append(f"{text}, no interval yet")
        else:
            said.append(f"{text}, {INTERVAL} {shown.said(spread.low)} to {shown.said(spread.high)}")
    return f"{one.method}, {one.answers}: {'; '.join(said)}."


def first_divergence(found: Sequence[Histogram]) -> Chart:
    """How many answers first differ where, a bar a method."""
    figure, names = go.Figure(), [one.method for one in found]
    for one in found:
        place = _place(names, one.method)
        figure.add_trace(
            go.Bar(
                x=list(one.bins),
                y=list(one.counts),
                name=one.method,
                marker={
                    "color": _COLORS[place],
                    "pattern": {
                        "shape": _PATTERNS[place],
                        "fillmode": "overlay",
                        "fgcolor": "#ffffff",
                        "solidity": 0.25,
                        "size": 7,
                    },
                },
            )
        )
    layout(figure, barmode="group", xaxis_title="first differing token", yaxis_title="answers", height=300)
    figure.update_xaxes(type="category")
    table = pd.DataFrame({"first differing token": list(found[0].bins)} | {one.method: one.counts for one in found})
    alt = "; ".join(f"{one.method}: {one.counts[-1]} of {sum(one.counts)} answers never differ" for one in found)
    return Chart(figure, f"{alt}.", table)
