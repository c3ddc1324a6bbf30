"""Two runs side by side: their figures with the difference, and their KL curves in one chart."""

import pandas as pd
import plotly.graph_objects as go

from app.tab.runs import Run
from app.tab.verdict import measured
from app.ui.style import COMPRESSED, SECOND, Chart, layout, line
from turboquant.records.metrics import metric


def figure_table(first: Run, second: Run) -> pd.DataFrame:
    """One row a figure: its value in either run, the second minus the first, and in which of them it is better."""
    a, b = measured(first.comparison), measured(second.comparison)
    rows = []
    for name, one in a.items():
        shown, other = metric(name), b[name]
        gap = None if one is None or other is None else shown.said(other - one, sign=True)
        best = shown.best((one, other))
        rows.append((shown.heading, shown.said(one), shown.said(other), gap or "", "" if best is None else "AB"[best]))
    return pd.DataFrame(rows, columns=["figure", "A", "B", "B minus A", "better"])


def settings_apart(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """What was asked differently in the two runs: name, and value in either."""
    both = [
        {
            "model": c.model.name,
            "weights": f"{c.model.weights_said} on {c.model.device}",
            "method": c.compressed.method,
            "chat template": "yes" if c.chat else "no",
            "device": f"{c.environment.device}, {c.environment.cpu_threads} threads",
            "commit": c.environment.commit or "unknown",
            **{name.replace("_", " "): str(value) for name, value in c.settings.model_dump().items()},
        }
        for c in (first.comparison, second.comparison)
    ]
    return [(name, both[0][name], both[1][name]) for name in both[0] if both[0][name] != both[1][name]]


def kl_of_both(first: Run, second: Run) -> Chart:
    """KL(full || compressed) at every token of either run's original answer."""
    figure = go.Figure()
    curves: dict[str, list[float]] = {}
    looks = (("A", COMPRESSED, "solid", "circle"), ("B", SECOND, "dash", "diamond"))
    for run, (name, color, dash, symbol) in zip((first, second), looks, strict=True):
        tokens = run.comparison.tokens
        curves[name] = list(tokens.kl) if tokens else []
        figure.add_trace(line(name, list(range(len(curves[name]))), curves[name], color, dash=dash, symbol=symbol))
    figure.update_traces(hovertemplate=metric("kl").hover())
    layout(figure, xaxis_title="token of the original answer", yaxis_title=metric("kl").axis)
    length = max(len(curve) for curve in curves.values())
    table = pd.DataFrame(
        {
            "token": range(length),
            **{name: [*curve, *[None] * (length - len(curve))] for name, curve in curves.items()},
        }
    )
    return Chart(figure, _sentence(first, second), table)


def _sentence(first: Run, second: Run) -> str:
    known = [run.comparison.tokens.mean_kl for run in (first, second) if run.comparison.tokens]
    if len(known) < 2:
        return "KL was not measured in both runs."
    kl = metric("mean_kl")
    words = f"{kl.heading} is {kl.said(known[0])} in A and {kl.text(known[1])} in B."
    if first.comparison.original.token_ids == second.comparison.original.token_ids:
        return words + " Both read the same original answer."
    return words + " Their original answers differ, so a token of one is not the same token of the other."
