"""What all charts share: one colour a side, shapes besides colours, and the triple of figure, summary and table."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

ORIGINAL = "#3f7fbf"
COMPRESSED = "#8b5cf6"
SECOND = "#2f9e8f"
BASELINE = "#7a8494"
RISK = "#d9682b"
PARTS = {
    "keys": "#8b5cf6",
    "values": "#6d7fd6",
    "scales": "#2f9e8f",
    "exact": "#c2742c",
    "spare": "#8a8f98",
    "shared": "#b0559b",
    "states": "#4d8f3a",
}
RISK_SCALE = [[0.0, "#eef1f6"], [0.25, "#f0c27b"], [0.5, "#d9682b"], [0.75, "#8e2f5c"], [1.0, "#33164f"]]


@dataclass(frozen=True)
class Chart:
    """A figure, the sentence that says what it shows (also its alternative text), and the same data as a table."""

    figure: go.Figure
    alt: str
    table: pd.DataFrame


def layout(figure: go.Figure, *, height: int = 280, **options: Any) -> go.Figure:
    """Apply the shared look: no title inside, the legend above the plot, nothing clipped on a phone."""
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 36, "b": 8},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        hovermode=options.pop("hovermode", "x unified"),
        **options,
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def line(name: str, x: list[int], y: list[Any], color: str, *, dash: str = "solid", symbol: str | None = None) -> Any:
    """A line whose dash, and markers if asked for, tell it apart without its colour."""
    kind = go.Scattergl if len(x) > 1000 else go.Scatter
    mode = "lines+markers" if symbol and len(x) <= 80 else "lines"
    return kind(
        x=x,
        y=y,
        name=name,
        mode=mode,
        line={"color": color, "width": 2, "dash": dash},
        marker={"symbol": symbol or "circle", "size": 6},
    )
