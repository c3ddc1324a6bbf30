"""Why one head is at risk: its attention over tokens and its scores, under full and under compressed keys."""

import html
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from app.heads.charts import Part, diagonal
from app.ui.style import BASELINE, COMPRESSED, ORIGINAL, RISK, Chart, layout
from turboquant.records.heads import AttentionDetail

_LONGEST = 24
_LABELLED = 4
_TALL = 0.1
_EDGE = 0.06
_SHADE = "rgba(122, 132, 148, 0.16)"


def shown(text: str) -> str:
    """A token's text in quotes, in one line and not too long."""
    line = text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")
    line = line if line.strip() else line.replace(" ", "␣")
    return f"“{line if len(line) <= _LONGEST else line[: _LONGEST - 1] + '…'}”"


def _label(text: str) -> str:
    """The same for a figure, whose texts may hold markup."""
    return html.escape(shown(text), quote=False)


@dataclass(frozen=True)
class Look:
    """One query of one head: what it attends to under full and under compressed keys.

    Attributes:
        texts: Tokens that the query sees, the last is its own.
        places: Positions of the tokens looked at: all of them as served, or the packed ones.
        full: Their scaled scores under full keys.
        compressed: Their scaled scores under compressed keys.
        sinks: Exact tokens at the beginning.
        packed: Packed tokens behind them.
    """

    texts: list[str]
    places: np.ndarray
    full: np.ndarray
    compressed: np.ndarray
    sinks: int
    packed: int

    @property
    def query(self) -> int:
        """The position of the query."""
        return len(self.texts) - 1

    @property
    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Softmax of the scores over the tokens looked at, full and compressed."""
        return _softmax(self.full), _softmax(self.compressed)

    @property
    def tops(self) -> tuple[int, int]:
        """Which of the tokens looked at comes first under full and under compressed keys (the earlier of equals)."""
        return int(self.full.argmax()), int(self.compressed.argmax())

    def named(self, index: int) -> str:
        """The text and the position of one of the tokens looked at."""
        place = int(self.places[index])
        return f"{shown(self.texts[place])} (position {place})"

    def held(self, place: int) -> str:
        """How the cache holds the token at a position."""
        if self.sinks <= place < self.sinks + self.packed:
            return "packed"
        return "sink" if place < self.sinks else "exact window"


def _softmax(scores: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).any():
        return np.zeros_like(scores)
    raised = np.exp(scores - scores.max())
    return np.asarray(raised / raised.sum())


def look(detail: AttentionDetail, head: int, place: int, part: Part) -> Look:
    """One of the kept heads at one of the kept positions, over packed tokens or over all that attention is served."""
    kept, sinks, packed = detail.heads[head], detail.sinks, detail.packed[place]
    seen = detail.positions[place] + 1
    places = np.arange(sinks, sinks + packed) if part == "packed" else np.arange(seen)
    full, compressed = (
        np.nan_to_num(np.array(side[place], dtype=float)[places], nan=-np.inf) for side in (kept.full, kept.compressed)
    )
    return Look(detail.tokens[:seen], places, full, compressed, sinks, packed)


def flips(detail: AttentionDetail, head: int, part: Part) -> list[bool]:
    """At which of the kept positions the head's most attended token changes."""
    looks = [look(detail, head, place, part) for place in range(len(detail.positions))]
    return [one.tops[0] != one.tops[1] for one in looks]


def why(one: Look) -> str:
    """In plain words: does the head change its most attended token here, and what decides it."""
    first, second = one.tops
    if len(one.places) < 2:
        return "Only one token can be attended to here, so nothing can change."
    if first == second:
        others = np.where(np.arange(len(one.full)) == first, -np.inf, one.full)
        rival = int(others.argmax())
    else:
        rival = second
    margin = one.full[first] - one.full[rival]
    moved = margin - (one.compressed[first] - one.compressed[rival])
    lead = f"Under full keys {one.named(first)} leads {one.named(rival)} by {_figure(margin)}"
    if first != second:
        return (
            f"{lead}. Compression moves the two {_figure(moved)} against each other, more than that margin, so under "
            f"compressed keys {one.named(second)} comes first: the head flips here."
        )
    if moved <= 0:
        return f"{lead}, its nearest rival. Compression widens that lead by {_figure(-moved)}: the head does not flip."
    return (
        f"{lead}, its nearest rival. Compression moves the two {_figure(moved)} against each other, which is less: "
        "the head does not flip here."
    )


def _figure(value: float) -> str:
    return f"{value:.3g}"


def top_tokens(one: Look, count: int = 8) -> pd.DataFrame:
    """The most attended tokens under either side's keys, the highest weight under full keys first."""
    table = _tokens(one)
    best = (table["rank, full"] <= count) | (table["rank, compressed"] <= count)
    return table[best].drop(columns=["score, full", "score, compressed"]).reset_index(drop=True)


def _tokens(one: Look) -> pd.DataFrame:
    weights = one.weights
    table = pd.DataFrame(
        {
            "token": [shown(one.texts[place]) for place in one.places],
            "position": one.places,
            "held as": [one.held(int(place)) for place in one.places],
            "rank, full": _ranks(one.full),
            "rank, compressed": _ranks(one.compressed),
            "weight, full": weights[0],
            "weight, compressed": weights[1],
            "score, full": one.full,
            "score, compressed": one.compressed,
        }
    )
    return table.sort_values("rank, full", ignore_index=True)


def _ranks(scores: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(scores), dtype=int)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def attention(one: Look) -> Chart:
    """Attention weights over tokens: upwards under full keys, downwards under compressed ones."""
    full, compressed = one.weights
    texts = [_label(one.texts[place]) for place in one.places]
    figure = go.Figure()
    for name, weights, sign, color in (
        ("full keys, upwards", full, 1, ORIGINAL),
        ("compressed keys, downwards", compressed, -1, COMPRESSED),
    ):
        figure.add_trace(
            go.Bar(
                x=one.places,
                y=sign * weights,
                name=name,
                customdata=weights,
                text=texts,
                textposition="none",
                marker={"color": color, "line": {"width": 0}},
                width=max(1.0, len(one.places) / 250),
                hovertemplate="%{text} at %{x}: %{customdata:.4f}",
            )
        )
        figure.add_trace(_names(one, texts, weights, sign))
    _shade_exact(figure, one)
    layout(figure, height=340, barmode="overlay", xaxis_title="position of the token", yaxis_title="attention weight")
    top = 1.25 * max(full.max(initial=0), compressed.max(initial=0), 1e-9)
    step = _nice(top / 2)
    marks = [step * i for i in range(-4, 5) if abs(step * i) <= top]
    figure.update_yaxes(range=[-top, top], tickvals=marks, ticktext=[f"{abs(mark):.3g}" for mark in marks])
    figure.update_xaxes(range=[one.places[0] - 1, one.places[-1] + 1] if len(one.places) else None)
    return Chart(figure, _attention_sentence(one), _tokens(one))


def _nice(value: float) -> float:
    """The largest of 1, 2 or 5 times a power of ten that is not above a value."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(factor * power for factor in (1, 2, 5) if factor * power <= value))


def _names(one: Look, texts: list[str], weights: np.ndarray, sign: int) -> go.Scatter:
    """The texts of the highest bars, where they have room."""
    room = max(1.0, len(one.places) / 12)
    named: list[int] = []
    for index in np.argsort(-weights, kind="stable")[: 3 * _LABELLED]:
        tall = weights[index] > _TALL * weights.max()
        if tall and len(named) < _LABELLED and all(abs(int(index) - other) > room for other in named):
            named.append(int(index))
    return go.Scatter(
        x=one.places[named],
        y=sign * weights[named],
        text=[texts[index] for index in named],
        mode="text",
        textposition=[f"{'top' if sign > 0 else 'bottom'} {_side(index, len(one.places))}" for index in named],
        hoverinfo="skip",
        showlegend=False,
    )


def _side(index: int, count: int) -> str:
    """Where a text stands so that the figure's edge does not cut it."""
    return "right" if index < _EDGE * count else "left" if index > (1 - _EDGE) * count else "center"


def _shade_exact(figure: go.Figure, one: Look) -> None:
    """Grey behind the exact tokens, where they are shown."""
    if len(one.places) == one.packed:
        return
    end = one.sinks + one.packed
    if one.sinks:
        figure.add_vrect(x0=-0.5, x1=one.sinks - 0.5, fillcolor=_SHADE, line_width=0, layer="below")
    figure.add_vrect(
        x0=end - 0.5,
        x1=one.query + 0.5,
        fillcolor=_SHADE,
        line_width=0,
        layer="below",
        annotation_text="exact window",
        annotation_position="bottom right",
        annotation_font_size=11,
    )


def _attention_sentence(one: Look) -> str:
    first, second = one.tops
    full, compressed = one.weights
    start = f"The query at position {one.query}, {shown(one.texts[-1])}, attends most to {one.named(first)}"
    if first == second:
        words = f"under both: weight {full[first]:.3f} under full keys, {compressed[first]:.3f} under compressed ones."
    else:
        words = (
            f"under full keys (weight {full[first]:.3f}) and to {one.named(second)} under compressed ones "
            f"({compressed[second]:.3f})."
        )
    exact = len(one.places) - one.packed
    if not exact:
        return f"{start} {words} Only the {one.packed:,} packed tokens are counted."
    recent = exact - one.sinks
    counts = f"{one.packed:,} tokens are packed; {one.sinks} sinks and {recent:,} recent ones, in grey, are exact."
    return f"{start} {words} {counts}"


def scores(one: Look) -> Chart:
    """One point a token: its score under full keys and under compressed keys; on the diagonal nothing changed."""
    packed = np.array([one.held(int(place)) == "packed" for place in one.places], dtype=bool)
    texts = np.array([_label(one.texts[place]) for place in one.places], dtype=object)
    figure = go.Figure()
    for name, chosen, marker in (
        ("packed token", packed, {"symbol": "circle", "size": 5, "color": COMPRESSED, "opacity": 0.6}),
        ("exact token", ~packed, {"symbol": "x", "size": 6, "color": BASELINE}),
    ):
        if chosen.any():
            figure.add_trace(
                go.Scattergl(
                    x=one.full[chosen],
                    y=one.compressed[chosen],
                    text=texts[chosen],
                    mode="markers",
                    name=name,
                    marker=marker,
                    hovertemplate="%{text}: %{x:.3f} full, %{y:.3f} compressed<extra></extra>",
                )
            )
    for name, index, symbol, color, where in (
        ("first under full keys", one.tops[0], "diamond", ORIGINAL, "bottom center"),
        ("first under compressed keys", one.tops[1], "square-open", RISK, "top center"),
    ):
        figure.add_trace(
            go.Scatter(
                x=[one.full[index]],
                y=[one.compressed[index]],
                text=[texts[index]],
                mode="markers+text",
                textposition=where,
                name=name,
                marker={"symbol": symbol, "size": 11, "color": color, "line": {"width": 2}},
                hoverinfo="skip",
            )
        )
    finite = np.concatenate([side[np.isfinite(side)] for side in (one.full, one.compressed)])
    ends = [float(finite.min()), float(finite.max())] if len(finite) else [0.0, 1.0]
    figure.add_trace(diagonal(ends, "no change"))
    layout(
        figure,
        height=380,
        hovermode="closest",
        xaxis_title="score under full keys",
        yaxis_title="score under compressed keys",
    )
    error = one.compressed[packed] - one.full[packed]
    spread = float(np.sqrt(np.mean(error[np.isfinite(error)] ** 2))) if np.isfinite(error).any() else 0.0
    alt = (
        f"Compression moves the scores of the {int(packed.sum()):,} packed tokens by {_figure(spread)} (root mean "
        f"square); under full keys the best stands {_figure(_lead(one.full))} above the second best."
    )
    return Chart(figure, alt, _tokens(one))


def _lead(scores: np.ndarray) -> float:
    best = np.sort(scores[np.isfinite(scores)])[-2:]
    return float(best[-1] - best[0]) if len(best) == 2 else 0.0
