"""Every method as a point: how much predictions move against the bits it takes."""

from collections.abc import Sequence

import pandas as pd

from app.methods.request import FULL, HELD, PACKED, Row
from app.ui.style import Chart, layout
from turboquant.records.metrics import metric
from turboquant.report.plots import Point, pareto_figure
from turboquant.report.summary import family_of

FIGURES = ("kl_mean", "same_top_pct", "delta_ppl_pct", HELD, PACKED, "compression_ratio")
"""The columns of the table."""
_LOSS = "kl_mean"


def pareto(rows: Sequence[Row], bits: str = HELD) -> Chart:
    """KL against bits a value; the front is the line that no other method is below and left of.

    Args:
        rows: The methods.
        bits: The metric on the horizontal axis: everything held, or the codes and scales of packed tokens alone.
    """
    points = [
        Point(row.method, family_of(row.method), cost, loss, bits in row.fronts, _note(row))
        for row in rows
        if (cost := row.figures.get(bits)) is not None and (loss := row.figures.get(_LOSS) or 0.0) > 0
    ]
    figure = layout(pareto_figure(points, bits, _LOSS), height=560, hovermode="closest")
    figure.update_layout(legend={"yref": "container", "yanchor": "bottom", "y": 0, "itemsizing": "constant"})
    return Chart(figure, _sentence(rows, points), methods_table(rows, bits))


def _note(row: Row) -> str:
    same = metric("same_top_pct")
    return f"{same.title} {same.said(row.figures.get('same_top_pct'))}"


def _sentence(rows: Sequence[Row], points: Sequence[Point]) -> str:
    if not points:
        return "No compressed method is measured yet."
    front = sorted((point.cost, point.method) for point in points if point.on_front)
    seen = {point.method for point in points}
    full = any(row.method == FULL and row.method not in seen for row in rows)
    unseen = " The full cache has a KL of 0, which a logarithmic axis cannot show." if full else ""
    names = ", ".join(f"{method} ({metric(HELD).text(cost)} bits)" for cost, method in front)
    return f"On the front, from the fewest bits up: {names}.{unseen}"


def methods_table(rows: Sequence[Row], bits: str = HELD) -> pd.DataFrame:
    """One row a method, as on the page."""
    return pd.DataFrame(
        [
            (row.method, *(row.figures.get(name) for name in FIGURES), "front" if bits in row.fronts else "")
            for row in rows
        ],
        columns=["method", *(metric(name).column for name in FIGURES), "front"],
    )
