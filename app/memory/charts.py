"""Estimated bytes of a KV cache: against context, by part, and method by method."""

import math

import pandas as pd
import plotly.graph_objects as go

from app.compare.memory_charts import PART_WORDS, part_bar, parts
from app.memory.request import GIB, MOST_TOKENS, Measured, Plan, Row, grid, lines, rows, tokens_short, tokens_text
from app.tab.verdict import human_bytes
from app.ui.style import BASELINE, COMPRESSED, ORIGINAL, RISK, SECOND, Chart, layout
from turboquant.records.metrics import metric

_DASHES = {4: "solid", 3: "dash", 2: "dot"}
_SYMBOLS = {"full": "circle", 4: "square", 3: "diamond", 2: "triangle-up"}
_TICKS = [2**power for power in range(8, 26, 2)]
_SIZES = [2**power for power in range(10, 50, 4)]


def _style(name: str, bits: int | None) -> tuple[str, str, str]:
    """Colour, dash and marker of one line."""
    if name.startswith("Full"):
        return ORIGINAL, "solid", _SYMBOLS["full"]
    if bits in _DASHES:
        return COMPRESSED, _DASHES[bits], _SYMBOLS[bits]
    return SECOND, "longdashdot", "star"


def growth(plan: Plan, measured: list[Measured]) -> Chart:
    """KV bytes against context for the full cache and fewer bits, and where weights + KV fill the GPU."""
    contexts = grid(plan, measured)
    figure, columns, fits = go.Figure(), {"context": contexts}, []
    for name, method in lines(plan):
        color, dash, symbol = _style(name, getattr(method, "bits", None))
        held = [plan.held(method, tokens).bytes for tokens in contexts]
        columns[f"{name}: bytes"] = held
        figure.add_trace(
            go.Scatter(
                x=contexts,
                y=held,
                name=name,
                mode="lines",
                line={"color": color, "dash": dash, "width": 3 if method in (plan.method, plan.full) else 2},
                customdata=[human_bytes(size) for size in held],
                hovertemplate="%{customdata}",
            )
        )
        longest = plan.longest(method)
        fits.append((name, longest))
        if 0 < longest < contexts[-1]:
            figure.add_trace(_crossing(name, longest, plan.held(method, longest).bytes, color, symbol))
    if plan.room_bytes > 0:
        figure.add_hline(y=plan.room_bytes, line={"color": RISK, "dash": "dash", "width": 2})
        words = {"text": "weights + KV = your GPU", "showarrow": False, "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(x=0, xref="x domain", y=math.log10(plan.room_bytes), **words)
    _measured(figure, measured)
    figure.add_vline(x=plan.tokens, line={"color": BASELINE, "dash": "dot", "width": 1})
    layout(figure, height=430, xaxis_title="context, tokens a row", yaxis_title="KV cache", showlegend=True)
    figure.update_xaxes(type="log", tickvals=_TICKS, ticktext=[tokens_short(tick) for tick in _TICKS])
    figure.update_yaxes(type="log", tickvals=_SIZES, ticktext=[human_bytes(size).replace(".00", "") for size in _SIZES])
    return Chart(figure, _growth_words(plan, fits, measured), _growth_table(plan, columns, measured))


def _growth_table(plan: Plan, columns: dict[str, list[int]], measured: list[Measured]) -> pd.DataFrame:
    """The lines at every context drawn, then a row for each measured point with the estimates beside it."""
    rows = [
        {
            "context": point.tokens,
            **{f"{name}: bytes": plan.held(method, point.tokens).bytes for name, method in lines(plan)},
            "measured bytes": point.bytes,
            "measured": f"{point.method}, {point.dtype}",
        }
        for point in measured
    ]
    table = pd.concat([pd.DataFrame(columns), pd.DataFrame(rows)]) if rows else pd.DataFrame(columns)
    if rows:
        table["measured bytes"] = table["measured bytes"].astype("Int64")
    return table.sort_values("context", ignore_index=True)


def _crossing(name: str, tokens: int, size: int, color: str, symbol: str) -> go.Scatter:
    return go.Scatter(
        x=[tokens],
        y=[size],
        name=f"{name} fills the GPU",
        mode="markers",
        showlegend=False,
        marker={"color": color, "symbol": symbol, "size": 11, "line": {"color": color, "width": 1}},
        hovertemplate=f"at {tokens:,} tokens",
    )


def _measured(figure: go.Figure, measured: list[Measured]) -> None:
    """Points of runs: open symbols, where lines are estimates."""
    for full, color, symbol, words in (
        (True, ORIGINAL, "circle-open-dot", "measured, full"),
        (False, COMPRESSED, "diamond-open-dot", "measured, compressed"),
    ):
        points = [point for point in measured if (point.method == "full") == full]
        if points:
            figure.add_trace(
                go.Scatter(
                    x=[point.tokens for point in points],
                    y=[point.bytes for point in points],
                    name=words,
                    mode="markers",
                    marker={"color": color, "symbol": symbol, "size": 12, "line": {"width": 2}},
                    customdata=[
                        f"{human_bytes(point.bytes)} at {point.tokens:,} tokens, {point.method} in {point.dtype}"
                        for point in points
                    ],
                    hovertemplate="%{customdata}",
                )
            )


def _growth_words(plan: Plan, fits: list[tuple[str, int]], measured: list[Measured]) -> str:
    full, chosen = plan.held(plan.full), plan.held(plan.method if plan.refusal is None else plan.full)
    at = f"At {plan.tokens:,} tokens the full cache takes {human_bytes(full.bytes)}"
    at += f", {plan.method.name} as chosen {human_bytes(chosen.bytes)}. " if plan.refusal is None else ". "
    gpu = f"{plan.gpu_bytes / GIB:g} GB"
    if plan.room_bytes <= 0:
        at += f"The weights ({human_bytes(plan.weight_bytes)}) and the reserve do not fit in {gpu}."
    else:
        told = "; ".join(f"{name}: {tokens_text(tokens)}" for name, tokens in fits)
        at += f"Beside {human_bytes(plan.weight_bytes)} of weights, {gpu} hold this many tokens: {told}."
    if measured:
        at += f" {len(measured)} points are measured, in your runs and the recorded ones; all lines are estimates."
    return at


def by_part(plan: Plan) -> Chart:
    """What each cache is made of at the chosen context."""
    held = [(name, plan.held(method)) for name, method in lines(plan)]
    figure = go.Figure()
    unit, word = _unit(max(one.bytes for _, one in held))
    named = dict(parts(held[0][1]))
    for part in named:
        sizes = [dict(parts(one))[part] for _, one in held]
        if any(sizes):
            names, told = [name for name, _ in held], [human_bytes(size) for size in sizes]
            scaled = [size / unit for size in sizes]
            figure.add_trace(part_bar(part, names, scaled, customdata=told, hovertemplate="%{customdata}"))
    layout(
        figure,
        barmode="stack",
        hovermode="closest",
        xaxis_title=word,
        height=150 + 42 * len(held),
        legend_traceorder="normal",
    )
    figure.update_yaxes(autorange="reversed")
    table = pd.DataFrame(
        [(name, *(size for _, size in parts(one)), one.bytes, one.full_precision_bytes) for name, one in held],
        columns=[
            "cache",
            *(PART_WORDS[part] for part in named),
            "everything held",
            metric("full_precision_bytes").title,
        ],
    )
    name, shown = held[-1] if plan.refusal is not None else ("The chosen cache", plan.held(plan.method))
    largest, size = max(parts(shown), key=lambda part: part[1])
    share = f"{100 * size / shown.bytes:.0f} %" if shown.bytes else "nothing"
    alt = f"{name} takes {human_bytes(shown.bytes)} at {plan.tokens:,} tokens; {PART_WORDS[largest]} are {share} of it."
    return Chart(figure, alt, table)


def _unit(size: int) -> tuple[int, str]:
    """The largest unit that such a size fills."""
    return next(((unit, word) for unit, word in ((GIB, "GiB"), (2**20, "MiB")) if size >= unit), (1024, "KiB"))


def methods_table(plan: Plan) -> pd.DataFrame:
    """Every method at the chosen bits and context; contexts and batches without a limit are left empty."""
    shown: list[Row] = rows(plan)
    unit, word = _unit(max(row.held.bytes for row in shown))
    return pd.DataFrame(
        {
            "method": [row.method for row in shown],
            "name": [row.title for row in shown],
            f"KV cache ({word})": [row.held.bytes / unit for row in shown],
            "bits a value": [row.held.bits_per_value for row in shown],
            "longest context": pd.array(
                [None if row.longest >= MOST_TOKENS else row.longest for row in shown], "Int64"
            ),
            "largest batch": [row.rows for row in shown],
            "times smaller than full": [row.times_full for row in shown],
        }
    )
