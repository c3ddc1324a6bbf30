"""The Heads page's parts: which run, which head, the map with its table, and one head in detail."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from app.heads import attention_charts as attention
from app.heads import charts as heads
from app.heads.attention_charts import Look
from app.heads.charts import METRICS, Part
from app.tab.runs import Run
from app.ui import columns, definitions, figures
from app.ui.panes import escape
from app.ui.share import label, linked, note_address

RUN, PART, METRIC, HEAD, POSITION = "heads_run", "heads_part", "heads_metric", "heads_head", "heads_position"
_TABLE = "heads_table_version"
_PARTS: dict[str, Part] = {"Packed only": "packed", "As served": "served"}
Head = tuple[int, int]


def chooser(runs: Mapping[str, Run]) -> Run | None:
    """The run to look at: of the address, else the picked one, else the first recorded one with heads."""
    if not runs:
        return None
    default = next(
        (run.id for run in runs.values() if run.origin == "recorded" and run.comparison.heads), next(iter(runs))
    )
    linked(RUN, runs, default)
    picked = st.selectbox(
        "Run",
        list(runs),
        format_func=lambda run_id: label(runs[run_id]),
        key=RUN,
        persist_state="session",
        on_change=lambda: _begin_with_worst(runs),
    )
    note_address(RUN, picked, default)
    return runs.get(str(picked))


def _begin_with_worst(runs: Mapping[str, Run]) -> None:
    """Another run has other worst heads."""
    run = runs[st.session_state[RUN]]
    if run.comparison.heads and (worst := _worst_first(run)):
        st.session_state[HEAD] = _name(worst[0])
    _clear_table()


def controls(run: Run) -> tuple[Part, str, Head]:
    """Which tokens count, which metric, and which head is looked at."""
    assert run.comparison.heads is not None
    named = {_name(head): head for head in _worst_first(run)}
    first, second, third = st.columns([2, 2, 3], vertical_alignment="bottom")
    part = first.segmented_control(
        "Tokens that count",
        list(_PARTS),
        default="Packed only",
        required=True,
        key=PART,
        bind="query-params",
        help=definitions.PACKED,
    )
    titles = {one.figure.heading: name for name, one in METRICS.items()}
    metric = second.selectbox("Metric of the map", list(titles), key=METRIC, bind="query-params", help=_meanings())
    head = third.selectbox(
        "Head",
        list(named),
        key=HEAD,
        bind="query-params",
        on_change=_clear_table,
        help="The worst head first. Type a number to search, or pick a row of the table.",
    )
    return _PARTS[str(part)], titles[str(metric)], named[str(head)]


def _meanings() -> str:
    return " ".join(f"{one.figure.heading}: {one.figure.help}" for one in METRICS.values())


def _name(head: Head) -> str:
    return f"Layer {head[0]}, head {head[1]}"


def _worst_first(run: Run) -> list[Head]:
    assert run.comparison.heads is not None
    table = heads.ranked(run.comparison.heads, "packed", "top1")
    return list(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))


def _clear_table() -> None:
    """A head picked elsewhere leaves no row of the table marked."""
    st.session_state[_TABLE] = st.session_state.get(_TABLE, 0) + 1


def overview(run: Run, part: Part, metric: str, chosen: Head) -> None:
    """The map of all heads, and the table whose rows choose the head."""
    c = run.comparison
    assert c.heads is not None
    left, right = st.columns([3, 2], gap="medium")
    with left:
        title = f"{METRICS[metric].figure.heading}, layer by query head"
        figures.show(title, heads.head_map(c, part, metric, chosen), "head_map", help=definitions.RISK_MAP)
    with right:
        _worst_table(run, part, metric)


def _worst_table(run: Run, part: Part, metric: str) -> None:
    c = run.comparison
    assert c.heads is not None
    table = heads.ranked(c.heads, part, metric)
    kept = {(head.layer, head.head) for head in c.attention.heads} if c.attention else set()
    pairs = list(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))
    table.insert(2, "detail", ["yes" if pair in kept else "" for pair in pairs])
    st.markdown(
        "**Worst heads**", help="Choose a row to see that head below. Scores are kept for the rows with detail."
    )
    first = METRICS[metric].column
    key = f"heads_table_{st.session_state.get(_TABLE, 0)}"
    st.dataframe(
        table,
        hide_index=True,
        height=330,
        key=key,
        on_select=lambda: _take_row(key, pairs),
        selection_mode="single-row",
        column_order=["layer", "head", first, "detail", *(name for name in table.columns[3:] if name != first)],
        column_config={
            "layer": st.column_config.NumberColumn(width="small"),
            "head": st.column_config.NumberColumn(width="small"),
            "detail": st.column_config.TextColumn("detail", help="Scores of this head are kept", width="small"),
            **{one.column: _bar(one) for one in METRICS.values() if one.miss},
            **columns.figures("cosine_scores", "cosine_weights"),
        },
        alt="All heads, the worst by the chosen metric first; choosing a row shows that head below.",
    )


def _bar(one: heads.Shown) -> Any:
    return st.column_config.ProgressColumn(
        one.column, help=one.figure.help, format="%.1f %%", min_value=0, max_value=100
    )


def _take_row(key: str, pairs: list[Head]) -> None:
    rows = st.session_state[key]["selection"]["rows"]
    if rows and rows[0] < len(pairs):
        st.session_state[HEAD] = _name(pairs[rows[0]])


def missing_detail(run: Run, chosen: Head) -> str | None:
    """In words, why nothing can be said of this head in detail; None where it can."""
    detail = run.comparison.attention
    if detail is None:
        return (
            "This run keeps no scores of its heads, so the map and the table are all there is. Runs of the Compare "
            "page and the recorded example keep them; sets of prompts and older files do not."
        )
    if not detail.heads or not detail.positions:
        return "This run keeps no scores of its heads: its text is too long for them."
    if all((head.layer, head.head) != chosen for head in detail.heads):
        names = "; ".join(_name((head.layer, head.head)).lower() for head in detail.heads)
        return f"Scores are kept for the worst heads only. Choose one of them to see its attention: {names}."
    return None


def position(run: Run, chosen: Head, part: Part) -> Look:
    """The slider over the kept query positions, and what the head does at the chosen one."""
    detail = run.comparison.attention
    assert detail is not None
    index = next(i for i, head in enumerate(detail.heads) if (head.layer, head.head) == chosen)
    flips = attention.flips(detail, index, part)
    names = [str(place) for place in detail.positions]
    place = flips.index(True) if any(flips) else len(flips) - 1
    if len(names) > 1:
        picked = st.select_slider(
            "Position of the query",
            names,
            value=names[place],
            key=POSITION,
            bind="query-params",
            help=definitions.QUERY_POSITION,
        )
        place = names.index(str(picked))
    one = attention.look(detail, index, place, part)
    where = "the prompt's last token" if one.query < run.comparison.prompt_tokens else "a token of the answer"
    st.caption(
        f"The query is {escape(attention.shown(one.texts[-1]))} at position {one.query}, {where}. "
        f"The head flips at {sum(flips)} of the {len(flips)} kept positions"
        + (f": {', '.join(name for name, flip in zip(names, flips, strict=True) if flip)}." if any(flips) else ".")
    )
    return one


def tokens_table(one: Look) -> None:
    """The most attended tokens on either side, with their ranks on both."""
    table: pd.DataFrame = attention.top_tokens(one)
    st.markdown("**Most attended tokens**", help=definitions.ATTENTION)
    st.dataframe(
        table,
        hide_index=True,
        height=380,
        key="heads_tokens",
        column_config={
            "position": st.column_config.NumberColumn(width="small"),
            "rank, full": st.column_config.NumberColumn(width="small"),
            "rank, compressed": st.column_config.NumberColumn(width="small"),
            "weight, full": st.column_config.NumberColumn(format="%.4f"),
            "weight, compressed": st.column_config.NumberColumn(format="%.4f"),
        },
        alt=f"The {len(table)} tokens with the highest attention weights of either side, and their ranks on both.",
    )
