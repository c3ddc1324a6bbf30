"""Agreement of attention heads under the full and the compressed keys."""

from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from app.charts.style import COMPRESSED, RISK, RISK_SCALE, Chart, layout, line
from app.verdict import percent
from turboquant.results import Comparison, HeadMetrics, HeadScores

Part = Literal["packed", "served"]
_MARKED = 5


def heads_table(heads: HeadMetrics, part: Part = "packed") -> pd.DataFrame:
    """One row a layer and query head, the most endangered first."""
    scores: HeadScores = getattr(heads, part)
    rows = [
        (
            layer,
            head,
            _at_risk(top1),
            _percent(scores.per_head_top5[row][head]),
            scores.per_head_cosine_scores[row][head],
            scores.per_head_cosine_weights[row][head],
        )
        for row, layer in enumerate(heads.layer_indices)
        for head, top1 in enumerate(scores.per_head_top1[row])
    ]
    columns = ["layer", "head", "steps at risk", "top-5 match", "cosine of scores", "cosine of weights"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["steps at risk", "layer", "head"], ascending=[False, True, True], ignore_index=True)


def _at_risk(top1: float | None) -> float | None:
    return None if top1 is None else 100.0 * (1.0 - top1)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100.0 * fraction


def risk_map(c: Comparison, part: Part = "packed") -> Chart:
    """Layer x query head: in which share of the measured steps the most attended token changes."""
    assert c.heads is not None
    heads = c.heads
    table = heads_table(heads, part)
    scores: HeadScores = getattr(heads, part)
    count = max((len(row) for row in scores.per_head_top1), default=0)
    layers = [str(layer) for layer in heads.layer_indices]
    grid = [[_at_risk(row[head]) for row in scores.per_head_top1] for head in range(count)]
    figure = go.Figure(
        go.Heatmap(
            x=layers,
            y=list(range(count)),
            z=grid,
            zmin=0,
            zmax=100,
            xgap=1,
            ygap=1,
            colorscale=RISK_SCALE,
            colorbar={"title": "steps<br>at risk", "ticksuffix": " %", "thickness": 12},
            hovertemplate="layer %{x}, head %{y}: %{z:.1f} % of steps at risk<extra></extra>",
        )
    )
    worst = table.dropna(subset=["steps at risk"]).head(_MARKED)
    worst = worst[worst["steps at risk"] > 0]
    figure.add_trace(
        go.Scatter(
            x=[str(layer) for layer in worst["layer"]],
            y=worst["head"],
            mode="markers",
            name=f"the {len(worst)} most endangered heads",
            marker={"symbol": "diamond-open", "size": 11, "color": "#ffffff", "line": {"width": 2}},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    layout(figure, height=120 + 22 * max(count, 4), hovermode="closest", xaxis_title="layer", yaxis_title="query head")
    figure.update_xaxes(type="category")
    figure.update_yaxes(dtick=1 if count <= 16 else 4, autorange="reversed")
    return Chart(figure, _risk_sentence(worst, table), table)


def _risk_sentence(worst: pd.DataFrame, table: pd.DataFrame) -> str:
    if worst.empty:
        return "No head changes its most attended token in any measured step."
    some = int((table["steps at risk"] > 0).sum())
    first = worst.iloc[0]
    return (
        f"{some} of {len(table)} heads change their most attended token in at least one step; the most endangered "
        f"(marked by diamonds) is layer {first['layer']:.0f}, head {first['head']:.0f}, in "
        f"{percent(first['steps at risk'])} of the steps."
    )


def risk_per_step(c: Comparison) -> Chart:
    """Share of heads at risk at each measured query position, and the cosine beside it in the table."""
    assert c.heads is not None
    heads = c.heads
    x = list(range(len(heads.positions)))
    packed = [_at_risk(value) for value in heads.packed.per_step_top1]
    served = [_at_risk(value) for value in heads.served.per_step_top1]
    table = pd.DataFrame(
        {
            "token": x,
            "position": heads.positions,
            "packed tokens": pd.array(heads.packed_tokens[: len(x)], dtype="Int64") if heads.packed_tokens else None,
            "at risk, packed": packed,
            "at risk, served": served,
            "cosine of scores, packed": heads.packed.per_step_cosine_scores,
            "cosine of weights, packed": heads.packed.per_step_cosine_weights,
        }
    )
    figure = go.Figure()
    figure.add_trace(line("packed positions only", x, packed, RISK, symbol="diamond"))
    figure.add_trace(line("as served (with the exact window)", x, served, COMPRESSED, dash="dash"))
    figure.update_traces(hovertemplate="%{y:.1f} %")
    layout(figure, xaxis_title="generated token (0 is the end of the prompt)", yaxis_title="heads at risk")
    figure.update_yaxes(ticksuffix=" %", rangemode="tozero")
    known = [(value, i) for i, value in enumerate(packed) if value is not None]
    if not known:
        return Chart(figure, "No step has packed positions to measure.", table)
    highest, where = max(known)
    mean = sum(value for value, _ in known) / len(known)
    alt = (
        f"On average {percent(mean)} of the heads are at risk over packed positions; "
        f"most at token {where}, {percent(highest)}."
    )
    return Chart(figure, alt, table)
