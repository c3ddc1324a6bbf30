"""A conversation turn by turn: what both caches hold, and how far the compressed one drifts."""

from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from app.tab.verdict import human_bytes
from app.ui.style import BASELINE, COMPRESSED, ORIGINAL, RISK, Chart, layout, line
from turboquant.records.metrics import metric

if TYPE_CHECKING:
    from turboquant.run.chat import Turn

_UNIT = 2**20
BASELINE_16 = metric("full_precision_bytes").title


def growth(turns: "tuple[Turn, ...]") -> Chart:
    """KV bytes at the end of each turn: both caches as held, and the compressed side's tokens at 16 bit."""
    x = _numbers(turns)
    original = [turn.comparison.original.report.bytes for turn in turns]
    compressed = [turn.comparison.compressed.report.bytes for turn in turns]
    baseline = [turn.comparison.compressed.report.full_precision_bytes for turn in turns]
    figure = go.Figure()
    for name, values, color, dash, symbol in (
        ("Original, as held", original, ORIGINAL, "solid", "circle"),
        (BASELINE_16, baseline, BASELINE, "dot", "square"),
        ("Compressed, as held", compressed, COMPRESSED, "dash", "diamond"),
    ):
        figure.add_trace(line(name, x, [value / _UNIT for value in values], color, dash=dash, symbol=symbol))
    figure.update_traces(hovertemplate="%{y:.3f} MiB")
    _turns(layout(figure, xaxis_title="turn", yaxis_title="MiB", yaxis_rangemode="tozero"))
    last = turns[-1].comparison
    alt = (
        f"After turn {x[-1]} the compressed cache holds {human_bytes(compressed[-1])}; its tokens take "
        f"{human_bytes(baseline[-1])} at 16 bit. The original holds {human_bytes(original[-1])} in {last.model.dtype}."
    )
    table = {"turn": x, "original bytes": original, "compressed bytes": compressed, f"{BASELINE_16} bytes": baseline}
    return Chart(figure, alt, pd.DataFrame(table))


def kl(turns: "tuple[Turn, ...]") -> Chart:
    """Mean KL of each turn's original answer, read through both caches."""
    x = _numbers(turns)
    values = [turn.comparison.tokens.mean_kl if turn.comparison.tokens else None for turn in turns]
    shown = metric("mean_kl")
    figure = go.Figure(line(f"{shown.title}(full ‖ compressed)", x, values, COMPRESSED, dash="dash", symbol="diamond"))
    figure.update_traces(hovertemplate=shown.hover())
    _turns(layout(figure, xaxis_title="turn", yaxis_title=shown.axis, yaxis_rangemode="tozero"))
    known = [(value, number) for value, number in zip(values, x, strict=True) if value is not None]
    alt = "Not measured in any turn yet: nothing was packed, or the turns were stopped."
    if known:
        most = max(known)
        last, turn = known[-1]
        alt = (
            f"{shown.heading} is {shown.said(last)} in turn {turn}; "
            f"the largest is {shown.text(most[0])} in turn {most[1]}."
        )
    return Chart(figure, alt, pd.DataFrame({"turn": x, shown.spelled: _floats(values)}))


def shares(turns: "tuple[Turn, ...]") -> Chart:
    """Heads at risk, and tokens at which another one becomes the most likely, turn by turn; lower is better."""
    x = _numbers(turns)
    top = [100 - turn.comparison.tokens.same_top_pct if turn.comparison.tokens else None for turn in turns]
    risk = [turn.comparison.heads.packed.heads_at_risk_pct if turn.comparison.heads else None for turn in turns]
    figure = go.Figure()
    at_risk = metric("heads_at_risk_pct")
    figure.add_trace(line(at_risk.title, x, risk, RISK, dash="dash", symbol="x"))
    figure.add_trace(line("another top token", x, top, COMPRESSED, symbol="diamond"))
    figure.update_traces(hovertemplate=at_risk.hover())
    _turns(layout(figure, xaxis_title="turn", yaxis_title="% (lower is better)", yaxis_rangemode="tozero"))
    known = [i for i in range(len(x)) if top[i] is not None or risk[i] is not None]
    alt = "Not measured in any turn yet: nothing was packed, or the turns were stopped."
    if known:
        i = known[-1]
        alt = (
            f"In turn {x[i]}: {at_risk.title} {at_risk.said(risk[i])}; tokens at which another one becomes the most "
            f"likely {at_risk.said(top[i])}."
        )
    table = {"turn": x, at_risk.spelled: _floats(risk), "another top token, percent": _floats(top)}
    return Chart(figure, alt, pd.DataFrame(table))


def agreement(turns: "tuple[Turn, ...]") -> Chart:
    """How many tokens both answers share from their start, where both answered the same conversation."""
    x = _numbers(turns)
    found = [_shared(turn) for turn in turns]
    shared, words = [count for count, _ in found], [word for _, word in found]
    figure = go.Figure()
    for name, color, shape in (("then they part", RISK, "/"), ("to the end", COMPRESSED, "")):
        values = [count if word == name else None for count, word in found]
        pattern = {"shape": shape, "size": 7, "fillmode": "overlay", "fgcolor": "#ffffff", "solidity": 0.2}
        bar = go.Bar(x=x, y=values, name=f"identical, {name}", marker={"color": color, "pattern": pattern})
        figure.add_trace(bar.update(text=values, textposition="outside", hovertemplate="%{y} tokens"))
    _turns(layout(figure, xaxis_title="turn", yaxis_title="tokens", barmode="stack", yaxis_rangemode="tozero"))
    same = [i for i in range(len(x)) if shared[i] is not None]
    if not same:
        alt = "In no turn did both sides answer the same conversation to be compared."
    else:
        i = same[-1]
        alt = f"In turn {x[i]} both answers share {shared[i]:,} tokens from the start, {words[i]}."
    if left := [str(x[i]) for i in range(len(x)) if words[i] == "different histories"]:
        alt += f" Not compared, because the histories differ: turn {', '.join(left)}."
    table = {"turn": x, "identical tokens": pd.array(shared, dtype="Int64"), "then": words}
    return Chart(figure, alt, pd.DataFrame(table))


def _shared(turn: "Turn") -> tuple[int | None, str]:
    c = turn.comparison
    if not turn.same_history:
        return None, "different histories"
    if c.divergence:
        return c.divergence.index, "then they part"
    return min(len(c.original.token_ids), len(c.compressed.token_ids)), "to the end"


def _numbers(turns: "tuple[Turn, ...]") -> list[int]:
    return [turn.index + 1 for turn in turns]


def _floats(values: list[float | None]) -> Any:
    return pd.array(values, dtype="Float64")


def _turns(figure: go.Figure) -> None:
    figure.update_xaxes(dtick=1 if len(figure.data[0].x) <= 12 else None, tickformat="d")
