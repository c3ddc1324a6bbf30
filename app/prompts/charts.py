"""Damage over a set of prompts."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from app.prompts.rows import PromptRow
from app.ui.style import COMPRESSED, Chart, layout
from turboquant.records.metrics import metric


def kl_per_prompt(found: Sequence[PromptRow]) -> Chart:
    """The mean KL of each measured prompt, the highest first; hatched bars are those whose answers differ."""
    known = [row for row in found if row.mean_kl is not None]
    labels = [f"{row.number}" for row in known]
    figure = go.Figure()
    for identical, name, shape in ((False, "answers differ", "/"), (True, "answers identical", "")):
        chosen = [(label, row) for label, row in zip(labels, known, strict=True) if row.identical is identical]
        figure.add_trace(
            go.Bar(
                x=[label for label, _ in chosen],
                y=[row.mean_kl for _, row in chosen],
                name=name,
                marker={
                    "color": COMPRESSED,
                    "pattern": {
                        "shape": shape,
                        "size": 7,
                        "fillmode": "overlay",
                        "fgcolor": "#ffffff",
                        "solidity": 0.2,
                    },
                },
                hovertemplate=metric("mean_kl").hover(),
            )
        )
    layout(figure, xaxis_title="prompt, the most damaged first", yaxis_title=metric("mean_kl").axis)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=labels)
    table = pd.DataFrame(
        {
            "prompt": [row.number for row in known],
            "text": [row.start for row in known],
            metric("mean_kl").spelled: [row.mean_kl for row in known],
            "identical": [row.identical for row in known],
        }
    )
    return Chart(figure, _sentence(known), table)


def _sentence(known: Sequence[PromptRow]) -> str:
    if not known:
        return "No prompt of this set has a KL yet."
    values = [row.mean_kl or 0.0 for row in known]
    same = sum(row.identical is True for row in known)
    prompts = "prompt" if len(known) == 1 else "prompts"
    kl = metric("mean_kl")
    return (
        f"Over {len(known)} {prompts} the {kl.title} goes from {kl.text(min(values))} to {kl.said(max(values))}, "
        f"highest for prompt {known[0].number}; {same} of {len(known)} have identical answers."
    )
