"""Two runs side by side: their figures with the difference, and their KL curves in one chart."""

from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go

from app.tab.runs import Run
from app.tab.verdict import human_bytes, number, percent
from app.ui.style import COMPRESSED, SECOND, Chart, layout, line

_Read = Callable[[Run], float | None]
_Show = Callable[[float | None], str]
_Figure = tuple[str, _Read, _Show]


def _plain(digits: int, unit: str = "") -> _Show:
    return lambda value: number(value, digits, unit)


def _size(value: float | None) -> str:
    if value is None:
        return number(None)
    return ("-" if value < 0 else "") + human_bytes(abs(round(value)))


def _packed(read: _Read) -> _Read:
    return lambda run: read(run) if run.packed else None


def _heads(name: str) -> _Read:
    return lambda run: getattr(run.comparison.heads.packed, name) if run.comparison.heads else None


def _tokens(name: str) -> _Read:
    return lambda run: getattr(run.comparison.tokens, name) if run.comparison.tokens else None


FIGURES: tuple[_Figure, ...] = (
    ("Prompt tokens", lambda run: run.comparison.prompt_tokens, _plain(0)),
    ("Tokens of the original answer", lambda run: len(run.comparison.original.token_ids), _plain(0)),
    ("Tokens of the compressed answer", lambda run: len(run.comparison.compressed.token_ids), _plain(0)),
    ("Mean KL", _tokens("mean_kl"), _plain(4, " nats")),
    ("Same top token", _tokens("same_top_pct"), percent),
    ("Heads at risk, packed", _heads("heads_at_risk_pct"), percent),
    ("Top-1 match, packed", _heads("top1_match_pct"), percent),
    ("Top-5 match, packed", _heads("top5_match_pct"), percent),
    ("Cosine of raw scores, packed", _heads("cosine_scores"), _plain(4)),
    ("KV cache held", _packed(lambda run: run.comparison.compressed.report.bytes), _size),
    ("16-bit baseline", _packed(lambda run: run.comparison.compressed.report.full_precision_bytes), _size),
    ("Times smaller", _packed(lambda run: run.comparison.compressed.report.compression_ratio), _plain(2)),
    ("Bits per value", _packed(lambda run: run.comparison.compressed.report.bits_per_value), _plain(2)),
    ("Speed, original", lambda run: run.comparison.original.tokens_per_second, _plain(1, " tokens/s")),
    ("Speed, compressed", lambda run: run.comparison.compressed.tokens_per_second, _plain(1, " tokens/s")),
)


def figure_table(first: Run, second: Run) -> pd.DataFrame:
    """One row a figure: its value in either run, and the second minus the first where both are known."""
    rows = []
    for name, read, show in FIGURES:
        a, b = read(first), read(second)
        known = a is not None and b is not None
        rows.append((name, show(a), show(b), _signed(show, b - a) if known else ""))  # type: ignore[operator]
    return pd.DataFrame(rows, columns=["figure", "A", "B", "B minus A"])


def _signed(show: _Show, difference: float) -> str:
    return ("+" if difference > 0 else "") + show(difference)


def settings_apart(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """What was asked differently in the two runs: name, and value in either."""
    both = [
        {
            "model": c.model.name,
            "weights": f"{c.model.weights} on {c.model.device}",
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
    figure.update_traces(hovertemplate="%{y:.4f} nats")
    layout(figure, xaxis_title="token of the original answer", yaxis_title="nats")
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
    words = f"Mean KL is {known[0]:.4f} nats in A and {known[1]:.4f} in B."
    if first.comparison.original.token_ids == second.comparison.original.token_ids:
        return words + " Both read the same original answer."
    return words + " Their original answers differ, so a token of one is not the same token of the other."
