"""Maps of lengths and depths: how often a needle is found, and what compression changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from app.needle.request import Place, Share, Total
from app.ui.style import BASELINE, ORIGINAL, RISK, Chart, layout
from turboquant.records.metrics import metric

WAITING, FAILED = "not yet", "failed"
_FOUND = [[0.0, "#33164f"], [0.25, "#8e2f5c"], [0.5, RISK], [0.75, "#f0c27b"], [1.0, "#eef1f6"]]
_CHANGE = [[0.0, "#8e2f5c"], [0.25, RISK], [0.5, "#eef1f6"], [0.75, "#9cc3ea"], [1.0, ORIGINAL]]
Spot = tuple[int, float]
_FOUND_PCT = metric("success_pct")


def _axes(places: Sequence[Place], planned: Sequence[Spot]) -> tuple[list[int], list[float]]:
    spots = [*planned, *((place.context, place.depth) for place in places)]
    return sorted({context for context, _ in spots}), sorted({depth for _, depth in spots})


@dataclass(frozen=True)
class _Scale:
    """The colours of a map: from the least to the greatest value."""

    low: float
    high: float
    colors: list[list[object]]

    def ink(self, value: float) -> str:
        """Black or white, whichever stands out more from the value's colour (WCAG)."""
        (color,) = sample_colorscale(self.colors, [(value - self.low) / (self.high - self.low)], colortype="tuple")
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        return "#000000" if (light + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def _map(
    values: Mapping[Spot, float],
    texts: Mapping[Spot, str],
    words: Mapping[Spot, str],
    axes: tuple[list[int], list[float]],
    scale: _Scale,
) -> go.Figure:
    """A cell a length and depth; a place without a value says in words why."""
    contexts, depths = axes
    grid = [[(context, depth) for context in contexts] for depth in depths]
    x, y = [f"{context:,}" for context in contexts], [f"{depth:g}" for depth in depths]
    figure = go.Figure(
        go.Heatmap(
            x=x,
            y=y,
            z=[[values.get(spot) for spot in row] for row in grid],
            customdata=[[words.get(spot, "") for spot in row] for row in grid],
            hovertemplate="%{x} tokens, depth %{y}: %{customdata}<extra></extra>",
            hoverongaps=False,
            xgap=2,
            ygap=2,
            showscale=False,
            zmin=scale.low,
            zmax=scale.high,
            colorscale=scale.colors,
        )
    )
    spots = [spot for row in grid for spot in row]
    figure.add_trace(
        go.Scatter(
            x=[f"{context:,}" for context, _ in spots],
            y=[f"{depth:g}" for _, depth in spots],
            text=[texts.get(spot, WAITING) for spot in spots],
            mode="text",
            textfont={
                "color": [scale.ink(values[spot]) if spot in values else BASELINE for spot in spots],
                "size": 13,
            },
            cliponaxis=False,
            showlegend=False,
            hoverinfo="skip",
        )
    )
    layout(
        figure,
        height=110 + 54 * max(len(depths), 2),
        hovermode="closest",
        xaxis_title="tokens of the prompt",
        yaxis_title="depth (0: start)",
    )
    figure.update_layout(margin={"t": 8})
    ends = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(type="category", categoryarray=x, range=[-0.5, len(x) - 0.5], **ends)
    figure.update_yaxes(type="category", categoryarray=y, range=[len(y) - 0.5, -0.5], **ends)
    return figure


def found_map(
    places: Sequence[Place], name: str, share: Callable[[Place], Share | None], planned: Sequence[Spot] = ()
) -> Chart:
    """How often the needle was found at each place, in percent with its interval.

    Args:
        places: Of one method.
        name: Of the cache that answered.
        share: Which share of a place is meant: the cache's own or the full cache's.
        planned: Places (tokens, depth) that belong on the map even where nothing is known of them yet.
    """
    known = {(place.context, place.depth): (place, found) for place in places if (found := share(place))}
    values = {spot: found.pct for spot, (_, found) in known.items()}
    texts = {(place.context, place.depth): FAILED for place in places if place.error}
    texts |= {spot: f"<b>{_FOUND_PCT.said(found.pct)}</b><br>{_range(found)}" for spot, (_, found) in known.items()}
    words = {
        spot: f"found {_FOUND_PCT.said(found.pct)} of {place.repetitions}, interval {_range(found)} %"
        for spot, (place, found) in known.items()
    }
    figure = _map(values, texts, words, _axes(places, planned), _Scale(0, 100, _FOUND))
    table = pd.DataFrame(
        [
            (place.context, place.depth, place.repetitions, found.pct, found.low, found.high)
            for place, found in known.values()
        ],
        columns=["tokens", "depth", "asked", _FOUND_PCT.spelled, "interval from", "interval to"],
    )
    return Chart(figure, _found_sentence(list(known.values()), name), table)


def _range(share: Share) -> str:
    return f"{_FOUND_PCT.text(share.low)} to {_FOUND_PCT.text(share.high)}"


def _found_sentence(known: Sequence[tuple[Place, Share]], name: str) -> str:
    if not known:
        return f"Nothing is measured yet with {name}."
    asked = sum(place.repetitions for place, _ in known)
    hits = sum(round(share.pct / 100 * place.repetitions) for place, share in known)
    said = f"With {name} the model finds {hits} of {asked} needles"
    if hits == asked:
        return f"{said}."
    place, worst = max(known, key=lambda one: _FOUND_PCT.loss(one[1].pct))
    return f"{said}; fewest at {place.context:,} tokens, depth {place.depth:g}: {_FOUND_PCT.said(worst.pct)}."


def change_map(places: Sequence[Place], method: str, planned: Sequence[Spot] = ()) -> Chart:
    """A method's share less the full cache's at each place, in percentage points."""
    known = {(p.context, p.depth): (p, p.own, p.full) for p in places if p.own and p.full}
    values = {spot: own.pct - full.pct for spot, (_, own, full) in known.items()}
    texts = {(place.context, place.depth): FAILED for place in places if place.error}
    texts |= {spot: f"<b>{_FOUND_PCT.text(value, sign=True)}</b>" if value else "0" for spot, value in values.items()}
    words = {
        spot: f"{_FOUND_PCT.said(own.pct)} compressed, {_FOUND_PCT.said(full.pct)} full cache"
        for spot, (_, own, full) in known.items()
    }
    figure = _map(values, texts, words, _axes(places, planned), _Scale(-100, 100, _CHANGE))
    table = pd.DataFrame(
        [(p.context, p.depth, full.pct, own.pct, own.pct - full.pct) for p, own, full in known.values()],
        columns=["tokens", "depth", "full cache, percent", "compressed, percent", "difference, points"],
    )
    return Chart(figure, _change_sentence(values, method), table)


def _change_sentence(values: Mapping[Spot, float], method: str) -> str:
    if not values:
        return f"Nothing is measured yet with {method}."
    best = [_FOUND_PCT.best((change, 0.0)) for change in values.values()]
    better, worse = best.count(0), best.count(1)
    if not worse and not better:
        return f"{method} finds as many needles as the full cache at every measured place ({len(values)})."
    more = f", more at {better}" if better else ""
    spot, least = max(values.items(), key=lambda one: _FOUND_PCT.loss(one[1]))
    where = (
        f"; the largest loss is {_FOUND_PCT.text(-least)} points at {spot[0]:,} tokens, depth {spot[1]:g}"
        if worse
        else ""
    )
    return f"{method} finds fewer needles than the full cache at {worse} of {len(values)} places{more}{where}."


def totals_table(totals: Sequence[Total]) -> pd.DataFrame:
    """One row a cache over all places."""
    return pd.DataFrame(
        [
            (
                t.method,
                f"{t.found} of {t.asked}",
                t.share.pct,
                _range(t.share),
                "" if t.bits is None else metric("bits_per_value").text(t.bits),
            )
            for t in totals
        ],
        columns=["cache", _FOUND_PCT.title, "percent", "interval", metric("bits_per_value").column],
    )


def places_table(places: Sequence[Place]) -> pd.DataFrame:
    """Every figure of every place, for export."""
    rows = [
        {
            "method": place.method,
            "tokens": place.context,
            "depth": place.depth,
            "asked": place.repetitions,
            **_columns("found", place.own),
            **_columns("found_full", place.full),
            "bits_held": place.bits,
            "error": place.error,
        }
        for place in places
    ]
    return pd.DataFrame(rows)


def _columns(name: str, share: Share | None) -> dict[str, float | None]:
    if share is None:
        return {f"{name}_pct": None, f"{name}_low_pct": None, f"{name}_high_pct": None}
    return {f"{name}_pct": share.pct, f"{name}_low_pct": share.low, f"{name}_high_pct": share.high}
