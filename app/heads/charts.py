"""Agreement of attention heads under the full and the compressed keys."""

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from app.ui.style import BASELINE, COMPRESSED, ORIGINAL, RISK, RISK_SCALE, Chart, layout, line
from turboquant.records.comparison import Comparison, HeadMetrics, HeadScores
from turboquant.records.metrics import Metric, metric

Part = Literal["packed", "served"]
_MARKED = 5
_OFTEN = 0.25
MARK = "#2f9e8f"
_WORST = {"size": 9, "color": "#ffffff", "line": {"width": 1, "color": "#12151c"}}
_CHOSEN = {"size": 21, "color": MARK, "line": {"width": 3}}


def heads_table(heads: HeadMetrics, part: Part = "packed") -> pd.DataFrame:
    """One row a layer and query head, the most endangered first."""
    scores: HeadScores = getattr(heads, part)
    rows = [
        (
            layer,
            head,
            _at_risk(top1),
            _at_risk(scores.per_head_top5[row][head]),
            scores.per_head_cosine_scores[row][head],
            scores.per_head_cosine_weights[row][head],
        )
        for row, layer in enumerate(heads.layer_indices)
        for head, top1 in enumerate(scores.per_head_top1[row])
    ]
    table = pd.DataFrame(rows, columns=["layer", "head", *_COLUMNS])
    order = [_AT_RISK, _COSINE, "layer", "head"]
    return table.sort_values(order, ascending=[False, True, True, True], ignore_index=True)


def _at_risk(top1: float | None) -> float | None:
    return None if top1 is None else 100.0 * (1.0 - top1)


@dataclass(frozen=True)
class Shown:
    """A figure of one head on the map.

    Attributes:
        figure: Its entry in the catalogue of metrics: a share of steps, or a cosine.
        sentence: What the worst head does, with {value}.
    """

    figure: Metric
    sentence: str

    @property
    def column(self) -> str:
        """Its column in `heads_table`."""
        return self.figure.column

    @property
    def miss(self) -> bool:
        """Is the head with the highest value the worst?"""
        return self.figure.better == "lower"


METRICS = {
    "top1": Shown(metric("top1_miss_pct"), "changes its most attended token in {value} of the steps"),
    "top5": Shown(
        metric("top5_miss_pct"),
        "has its most attended token outside the five most attended ones under compressed keys in {value} of the steps",
    ),
    "cosine_scores": Shown(metric("cosine_scores"), "has scores with a cosine of {value}"),
    "cosine_weights": Shown(metric("cosine_weights"), "has weights with a cosine of {value}"),
}
_COLUMNS = [one.column for one in METRICS.values()]
_AT_RISK, _COSINE = METRICS["top1"].column, METRICS["cosine_scores"].column


def ranked(heads: HeadMetrics, part: Part, metric: str) -> pd.DataFrame:
    """The table of heads, the worst by one metric first; of equals, the one with the lower cosine."""
    chosen = METRICS[metric]
    table = heads_table(heads, part)
    return table.sort_values(chosen.column, ascending=not chosen.miss, ignore_index=True, kind="stable")


def risk_map(c: Comparison, part: Part = "packed") -> Chart:
    """Layer x query head: in which share of the measured steps the most attended token changes."""
    return head_map(c, part)


def head_map(
    c: Comparison, part: Part = "packed", metric: str = "top1", chosen: tuple[int, int] | None = None
) -> Chart:
    """Layer x query head: one metric of every head; diamonds at the worst, a square around the chosen one."""
    assert c.heads is not None
    heads, shown = c.heads, METRICS[metric]
    table = ranked(heads, part, metric)
    known = table.dropna(subset=[shown.column])
    cells = {(row.layer, row.head): value for row, value in zip(table.itertuples(), table[shown.column], strict=True)}
    count = int(table["head"].max()) + 1 if len(table) else 0
    lowest = 0.0 if shown.miss or known.empty else float(known[shown.column].min())
    suffix = " %" if shown.miss else ""
    title = shown.column.replace(" at ", "<br>at ").replace(" of ", " of<br>")
    figure = go.Figure(
        go.Heatmap(
            x=[str(layer) for layer in heads.layer_indices],
            y=list(range(count)),
            z=[[cells.get((layer, head)) for layer in heads.layer_indices] for head in range(count)],
            zmin=lowest,
            zmax=100 if shown.miss else 1,
            xgap=1,
            ygap=1,
            colorscale=RISK_SCALE,
            reversescale=not shown.miss,
            colorbar={
                "title": title,
                "ticksuffix": suffix,
                "thickness": 12,
            },
            hovertemplate=f"layer %{{x}}, head %{{y}}: {shown.column} {shown.figure.hover('z')}<extra></extra>",
        )
    )
    worst = known.head(_MARKED)
    worst = worst[worst[shown.column] > 0] if shown.miss else worst
    figure.add_trace(_marks(worst, "diamond", f"the {len(worst)} worst heads", _WORST))
    if chosen is not None:
        figure.add_trace(
            _marks(pd.DataFrame([chosen], columns=["layer", "head"]), "square-open", "the chosen head", _CHOSEN)
        )
    layout(figure, height=120 + 22 * max(count, 4), hovermode="closest", xaxis_title="layer", yaxis_title="query head")
    figure.update_xaxes(type="category")
    figure.update_yaxes(dtick=1 if count <= 16 else 4, autorange="reversed")
    return Chart(figure, _map_sentence(worst, known, shown), table)


def _marks(heads: pd.DataFrame, symbol: str, name: str, marker: dict[str, Any]) -> go.Scatter:
    return go.Scatter(
        x=[str(layer) for layer in heads["layer"]],
        y=heads["head"],
        mode="markers",
        name=name,
        marker={"symbol": symbol, **marker},
        hoverinfo="skip",
        showlegend=False,
    )


def _map_sentence(worst: pd.DataFrame, known: pd.DataFrame, shown: Shown) -> str:
    if known.empty:
        return "No step has packed positions, so there is nothing to show."
    if worst.empty:
        return "No head changes its most attended token in any measured step."
    first = worst.iloc[0]
    does = shown.sentence.format(value=shown.figure.said(first[shown.column]))
    which = f"layer {first['layer']:.0f}, head {first['head']:.0f}"
    if not shown.miss:
        return f"The worst head (the worst are marked by diamonds) is {which}: it {does}."
    some = int((known[shown.column] > 0).sum())
    return (
        f"{some} of {len(known)} heads miss in at least one step; the worst (marked by diamonds) is {which}: it {does}."
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
            f"{_COSINE}, packed": heads.packed.per_step_cosine_scores,
            f"{METRICS['cosine_weights'].column}, packed": heads.packed.per_step_cosine_weights,
        }
    )
    figure = go.Figure()
    figure.add_trace(line("packed positions only", x, packed, RISK, symbol="diamond"))
    figure.add_trace(line("as served (with the exact window)", x, served, COMPRESSED, dash="dash"))
    risk = metric("heads_at_risk_pct")
    figure.update_traces(hovertemplate=risk.hover())
    layout(figure, xaxis_title="generated token (0 is the end of the prompt)", yaxis_title=risk.axis)
    figure.update_yaxes(ticksuffix=" %", rangemode="tozero")
    known = [(value, i) for i, value in enumerate(packed) if value is not None]
    if not known:
        return Chart(figure, "No step has packed positions to measure.", table)
    highest, where = max(known)
    mean = sum(value for value, _ in known) / len(known)
    alt = (
        f"On average {risk.said(mean)} of the heads are at risk over packed positions; "
        f"most at token {where}, {risk.said(highest)}."
    )
    return Chart(figure, alt, table)


def diagonal(ends: list[float], name: str) -> go.Scatter:
    """The line where both axes are equal."""
    style = {"color": BASELINE, "width": 1, "dash": "dot"}
    return go.Scatter(x=ends, y=ends, mode="lines", name=name, line=style, hoverinfo="skip")


def margins_table(c: Comparison) -> pd.DataFrame:
    """One row a head: its mean margin, the error of its scores, and how often it misses; packed positions."""
    assert c.heads is not None
    assert c.attention is not None
    rows = [
        (layer, head, margin, c.attention.errors[row][head], None if top1 is None else 100 * (1 - top1))
        for row, layer in enumerate(c.heads.layer_indices)
        for head, (margin, top1) in enumerate(
            zip(c.attention.margins[row], c.heads.packed.per_head_top1[row], strict=True)
        )
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "margin", "error", _AT_RISK])


def margins(c: Comparison, chosen: tuple[int, int] | None = None) -> Chart:
    """One point a head: top-1 margin against the error of its scores; symbols say how often the head misses."""
    table = margins_table(c)
    known = table.dropna()
    misses = known[_AT_RISK] / 100
    figure = go.Figure()
    for name, group, marker in (
        ("never misses", misses == 0, {"symbol": "circle-open", "size": 7, "color": ORIGINAL}),
        ("misses sometimes", (misses > 0) & (misses < _OFTEN), {"symbol": "circle", "size": 7, "color": COMPRESSED}),
        ("misses in a quarter of the steps or more", misses >= _OFTEN, {"symbol": "x", "size": 8, "color": RISK}),
    ):
        heads = known[group]
        figure.add_trace(
            go.Scatter(
                x=heads["margin"],
                y=heads["error"],
                customdata=heads[["layer", "head", _AT_RISK]],
                mode="markers",
                name=name,
                marker={**marker, "opacity": 0.85},
                hovertemplate=(
                    "layer %{customdata[0]}, head %{customdata[1]}: margin %{x:.3f}, error %{y:.3f}, "
                    f"at risk in {METRICS['top1'].figure.hover('customdata[2]')}<extra></extra>"
                ),
            )
        )
    own = known[(known["layer"] == chosen[0]) & (known["head"] == chosen[1])] if chosen else known[:0]
    if len(own):
        figure.add_trace(
            go.Scatter(
                x=own["margin"],
                y=own["error"],
                mode="markers",
                name="the chosen head",
                marker={"symbol": "square-open", "size": 15, "color": MARK, "line": {"width": 2}},
                hoverinfo="skip",
            )
        )
    if len(known):
        figure.add_trace(diagonal([0.0, float(known["error"].max())], "error = margin"))
    layout(
        figure, height=380, hovermode="closest", xaxis_title="mean top-1 margin", yaxis_title="error of scores (RMS)"
    )
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    return Chart(figure, _margins_sentence(known), table.sort_values("margin", ignore_index=True))


def _margins_sentence(known: pd.DataFrame) -> str:
    if known.empty:
        return "No head has a margin to compare with: fewer than two tokens were packed."
    ratio = (known["margin"] / known["error"].clip(lower=1e-12)).rank(method="first")
    third = len(known) / 3
    least, most = (
        METRICS["top1"].figure.said(float(known[group][_AT_RISK].mean()))
        for group in (ratio <= max(third, 1), ratio > 2 * third)
    )
    return (
        f"The third of the heads with the smallest margin for their error misses in {least} of the steps on average, "
        f"the third with the largest in {most}."
    )
