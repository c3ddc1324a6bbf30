"""Every method as a point: how much predictions move against the bits it takes."""

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from app.methods.request import FULL, Row
from app.ui.style import BASELINE, Chart, layout
from turboquant.methods import METHODS, in_order
from turboquant.report.style import looks

Bits = Literal["held", "packed"]
COLUMNS = (
    "method",
    "KL",
    "same top",
    "perplexity change",
    "bits held",
    "packed bits",
    "times smaller",
    "front",
)


def family(method: str) -> str:
    """A method without its bits: what a line of the plot follows."""
    name, _, rest = method.partition(":")
    bits = ("bits=", "key_bits=", "value_bits=", "layers=")
    options = [one for one in rest.split(",") if one and not one.startswith(bits)]
    if "key_bits=" in rest:
        options.insert(0, "keys and values apart")
    if "layers=" in rest:
        options.insert(0, "layers apart")
    return ", ".join([name, *options])


def pareto(rows: Sequence[Row], bits: Bits = "held") -> Chart:
    """KL against bits a value; the front is the line that no other method is below and left of.

    Args:
        rows: The methods.
        bits: Everything held, or the codes and scales of packed tokens alone.
    """
    points = [(row, getattr(row, bits)) for row in rows]
    drawn = [(row, cost) for row, cost in points if cost is not None and row.kl is not None and row.kl > 0]
    figure = go.Figure()
    front = sorted((cost, row.kl) for row, cost in drawn if getattr(row, f"front_{bits}"))
    figure.add_trace(
        go.Scatter(
            x=[cost for cost, _ in front],
            y=[kl for _, kl in front],
            mode="lines",
            name="Pareto front",
            line={"color": BASELINE, "width": 2, "dash": "dot", "shape": "hv"},
            hoverinfo="skip",
        )
    )
    families = sorted({family(row.method) for row, _ in drawn}, key=_family_order)
    styles = looks((name.partition(",")[0], name) for name in families)
    for name in families:
        color, sign, _ = styles[name]
        own = [(row, cost) for row, cost in drawn if family(row.method) == name]
        marker = {"size": 11, "line": {"width": 2}, "color": color, "symbol": sign}
        figure.add_trace(_points(name, own, marker, bits))
    layout(
        figure,
        height=560,
        hovermode="closest",
        xaxis_title=f"{'bits held' if bits == 'held' else 'packed bits'} a value (fewer is better)",
        yaxis_title="mean KL, nats (less is better)",
    )
    figure.update_layout(legend={"yref": "container", "yanchor": "bottom", "y": 0, "itemsizing": "constant"})
    kls = [row.kl for row, _ in drawn if row.kl]
    wide = bool(kls) and max(kls) > 100 * min(kls)
    figure.update_yaxes(type="log", tickformat="~g", dtick=1 if wide else "D2")  # D2: at 1, 2 and 5
    return Chart(figure, _sentence(rows, drawn, bits), methods_table(rows, bits))


def _family_order(name: str) -> tuple[int, str]:
    order, base = in_order(METHODS), name.partition(",")[0]
    return (order.index(base) if base in order else len(order), name)


def _points(name: str, own: Sequence[tuple[Row, float]], marker: dict[str, Any], bits: Bits) -> go.Scatter:
    return go.Scatter(
        x=[cost for _, cost in own],
        y=[row.kl for row, _ in own],
        mode="markers",
        name=name,
        marker=marker,
        customdata=[
            (row.method, row.same_top_pct, "on the front" if getattr(row, f"front_{bits}") else "not on the front")
            for row, _ in own
        ],
        hovertemplate=(
            "<b>%{customdata[0]}</b><br>%{x:.2f} bits, KL %{y:.4g}, same top %{customdata[1]:.1f} %<br>%{customdata[2]}"
            "<extra></extra>"
        ),
    )


def _sentence(rows: Sequence[Row], drawn: Sequence[tuple[Row, float]], bits: Bits) -> str:
    if not drawn:
        return "No compressed method is measured yet."
    front = sorted((cost, row.method) for row, cost in drawn if getattr(row, f"front_{bits}"))
    left = [row.method for row in rows if row.kl == 0]
    unseen = " The full cache has a KL of 0, which a logarithmic axis cannot show." if FULL in left else ""
    names = ", ".join(f"{method} ({cost:.2f} bits)" for cost, method in front)
    return f"On the front, from the fewest bits up: {names}.{unseen}"


def methods_table(rows: Sequence[Row], bits: Bits = "held") -> pd.DataFrame:
    """One row a method, as on the page."""
    return pd.DataFrame(
        [
            (
                row.method,
                row.kl,
                row.same_top_pct,
                row.delta_ppl_pct,
                row.held,
                row.packed,
                row.smaller,
                "front" if getattr(row, f"front_{bits}") else "",
            )
            for row in rows
        ],
        columns=list(COLUMNS),
    )
