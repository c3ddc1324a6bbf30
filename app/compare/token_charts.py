"""Next-token distributions along the original answer, read through both caches."""

import pandas as pd
import plotly.graph_objects as go

from app.ui.style import COMPRESSED, ORIGINAL, RISK, Chart, layout, line
from turboquant.records.comparison import Comparison
from turboquant.records.metrics import metric


def tokens_table(c: Comparison) -> pd.DataFrame:
    """One row a token of the original answer, with what teacher forcing through the compressed cache gives."""
    assert c.tokens is not None
    t, count = c.tokens, len(c.tokens.kl)
    return pd.DataFrame(
        {
            "token": list(range(count)),
            "text": c.original.token_texts[:count],
            metric("kl").spelled: t.kl,
            metric("same_top_pct").title: t.same_top,
            "probability, full": t.probability_full,
            "probability, compressed": t.probability_compressed,
        }
    )


def kl_per_token(c: Comparison) -> Chart:
    """KL(full || compressed) at every token; crosses where the most likely token changes."""
    assert c.tokens is not None
    t = c.tokens
    x = list(range(len(t.kl)))
    figure = go.Figure()
    figure.add_trace(
        go.Bar(
            x=x, y=t.kl, name="KL(full ‖ compressed)", marker={"color": COMPRESSED}, hovertemplate=metric("kl").hover()
        )
    )
    changed = [i for i in x if not t.same_top[i]]
    figure.add_trace(
        go.Scatter(
            x=changed,
            y=[t.kl[i] for i in changed],
            mode="markers",
            name="another token is most likely",
            marker={"symbol": "x", "size": 9, "color": RISK},
            hovertemplate="another top token",
        )
    )
    layout(figure, xaxis_title="token of the original answer", yaxis_title=metric("kl").axis)
    kl = metric("mean_kl")
    alt = f"{kl.heading} is {kl.said(t.mean_kl)}; the most likely token changes at {len(changed)} of {len(x)} tokens."
    return Chart(figure, alt, tokens_table(c))


def probabilities(c: Comparison) -> Chart:
    """The probability each cache gives to the token that the original answer chose."""
    assert c.tokens is not None
    t = c.tokens
    x = list(range(len(t.kl)))
    figure = go.Figure()
    figure.add_trace(line("full cache", x, t.probability_full, ORIGINAL))
    figure.add_trace(line("compressed cache", x, t.probability_compressed, COMPRESSED, dash="dash"))
    figure.update_traces(hovertemplate="%{y:.3f}")
    layout(figure, xaxis_title="token of the original answer", yaxis_title="probability")
    figure.update_yaxes(range=[0, 1.02])
    gaps = [full - other for full, other in zip(t.probability_full, t.probability_compressed, strict=True)]
    if not gaps:
        return Chart(figure, "The original answer has no token.", tokens_table(c))
    where = max(x, key=lambda i: abs(gaps[i]))
    alt = (
        f"The largest change is at token {where}: the chosen token's probability goes from "
        f"{t.probability_full[where]:.3f} to {t.probability_compressed[where]:.3f}."
    )
    return Chart(figure, alt, tokens_table(c))
