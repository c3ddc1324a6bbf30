"""A finished comparison on the page: verdict, answers, figures, charts; of one compressed setting or of two."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import streamlit as st

from app.compare import memory_charts as memory
from app.compare import token_charts as tokens
from app.compare.tokens_view import strip
from app.heads import charts as heads
from app.tab import state
from app.tab.examples import LONG_EXAMPLE
from app.tab.runs import Run
from app.tab.verdict import cache_size, human_bytes, measured, verdict
from app.ui import definitions, diff, figures, page, panes, share
from app.ui.panes import LETTERS, code, escape
from app.ui.style import COMPRESSED, SECOND, Chart
from turboquant.records.faults import UNMEASURED
from turboquant.records.metrics import metric

VIEWS = ("side by side", "diff", "focus")


def render(runs: Sequence[Run]) -> None:
    """Draw one comparison, or two that share their original answer."""
    c = runs[0].comparison
    _header(runs)
    with st.expander(f"Prompt of this run · {c.prompt_tokens:,} tokens", icon=":material/notes:"):
        st.text(c.prompt)
    for letter, run in _named(runs):
        st.subheader(f"{letter}: {escape(verdict(run.comparison))}" if letter else escape(verdict(c)), anchor=False)
    _answers(runs)
    for letter, run in _named(runs):
        if letter:
            st.markdown(_title(letter, run))
        if not run.packed:
            _nothing_packed(run, letter)
            continue
        for note in run.comparison.notes:
            st.info(escape(note), icon=":material/info:")
        _metrics(run, letter)
    if packed := [pair for pair in _named(runs) if pair[1].packed]:
        _inside(packed)


def _named(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """The runs with their letters; a single one needs none."""
    return list(zip(LETTERS if len(runs) > 1 else ("",), runs, strict=False))


def _title(letter: str, run: Run) -> str:
    colour = "violet" if letter == LETTERS[0] else "green"
    return f"**:{colour}[{letter}]** · {code(run.comparison.compressed.method)}"


def _header(runs: Sequence[Run]) -> None:
    run = runs[0]
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    with left.container(horizontal=True, vertical_alignment="center"):
        page.tag("cached" if run.cached else run.origin)
        st.caption(escape(_origin(runs)), width="content")
    with right.container(horizontal=True, horizontal_alignment="right", vertical_alignment="center"):
        share.buttons(runs)


def _origin(runs: Sequence[Run]) -> str:
    run = runs[0]
    env, c = run.comparison.environment, run.comparison
    threads = f"{env.cpu_threads} thread{'' if env.cpu_threads == 1 else 's'}"
    where = f"{env.created[:10]}, {env.device}, {threads}, commit {env.commit or 'unknown'}"
    more = ""
    if run.origin == "recorded":
        more = ". Every number below is from that run; press Compare to measure your own."
    elif run.cached:
        more = ". Measured before for the same settings and prompt, and shown again: nothing was computed this time."
    return f"{where}, {c.model.name}, {' and '.join(other.comparison.compressed.method for other in runs)}{more}"


def _answers(runs: Sequence[Run]) -> None:
    view = st.segmented_control(
        "Answers",
        VIEWS,
        default=VIEWS[0],
        required=True,
        key="view",
        bind="query-params",
        label_visibility="collapsed",
        help="Side by side; word by word, what is left out and added; or one answer at a time.",
    )
    {"diff": diff.draw, "focus": panes.one_answer}.get(str(view), panes.answers)(runs)


def _nothing_packed(run: Run, letter: str) -> None:
    """No quality or memory figure is shown; the note says why, and two buttons fix the cause."""
    notes = run.comparison.notes or ["No token was packed, so no quality or memory figure would mean anything."]
    st.info(escape(" ".join(notes)), icon=":material/compress:", title="Nothing was packed")
    st.caption("The first and the most recent tokens stay exact by design. Use a longer prompt, or keep fewer of them:")
    with st.container(horizontal=True):
        st.button(
            "Use the long example",
            on_click=state.use,
            kwargs={"example": LONG_EXAMPLE},
            icon=":material/article:",
            key=f"fix_long{letter}",
        )
        st.button(
            "Keep no token exact",
            on_click=state.use,
            kwargs={"residual": 0, "sinks": 0},
            icon=":material/compress:",
            key=f"fix_window{letter}",
        )


def _metrics(run: Run, letter: str) -> None:
    c = run.comparison
    report, found = c.compressed.report, measured(c)
    larger = report.bytes > report.full_precision_bytes
    ratio = _card("compression_ratio", found, f"{metric('payload_ratio').said(report.payload_ratio)} payload")
    if larger:
        ratio = ("Larger than 16 bit", human_bytes(report.bytes - report.full_precision_bytes), *ratio[2:])
    cards = [
        _card("bytes", found, f"{human_bytes(report.full_precision_bytes)} at 16 bit"),
        ratio,
        _card("bits_per_value", found, "16 uncompressed"),
        *(
            _card(name, found, f"{metric(name).said(found[f'original_{name}'])} full")
            for name in ("tokens_per_second", "time_to_first_token_ms")
        ),
    ]
    _row(cards, f"memory{letter}")
    if larger:
        st.caption(escape(f"The compressed cache is {cache_size(report)}."))
    _quality(run, letter)


Card = tuple[str, str, str, str]
"""Heading, value, what stands below it, and what it means."""


def _card(name: str, found: Mapping[str, float | None], below: str = "", *, of: str = "", other: str = "") -> Card:
    """A figure, with the same one of another part of the run below it."""
    shown, value = metric(name), found[f"{of}{name}"]
    if other:
        below = f"{shown.said(found[f'{other}_{name}'])} {other}"
    return shown.heading, shown.said(value), below, shown.help


def _quality(run: Run, letter: str) -> None:
    c, found = run.comparison, measured(run.comparison)
    if c.heads is None and c.tokens is None:
        if UNMEASURED not in c.notes:  # which stands above
            st.caption("Quality was not measured: the run was stopped before its measurement.")
        return
    cards: list[Card] = []
    if c.heads:
        names = ("heads_at_risk_pct", "top1_match_pct", "top5_match_pct", "cosine_scores")
        cards += [_card(name, found, of="packed_", other="served") for name in names]
    if c.tokens:
        heading, value, _, help = _card("mean_kl", found)
        same = metric("same_top_pct")
        cards.append((heading, value, f"{same.said(c.tokens.same_top_pct)} {same.column}", f"{help} {same.help}"))
    _row(cards, f"quality{letter}")
    if c.heads:
        packed, served = (
            metric("cosine_weights").said(found[f"{part}_cosine_weights"]) for part in ("packed", "served")
        )
        st.caption(
            f"Large figures of attention: packed positions only; small ones: as served. "
            f"{metric('cosine_weights').heading}: {packed} packed, {served} served.",
            help=definitions.PACKED,
        )


def _row(cards: Sequence[Card], key: str) -> None:
    with st.container(horizontal=True, key=f"row_{key}"):
        for label, value, below, text in cards:
            st.metric(label, value, below, delta_color="off", delta_arrow="off", help=text, border=True, width=168)


def _inside(pairs: Sequence[tuple[str, Run]]) -> None:
    """Tokens and charts of one setting; with two, a switch picks it."""
    letter, run = pairs[0]
    if letter:
        by_letter = dict(pairs)
        picked = st.segmented_control(
            "Tokens and charts of",
            list(by_letter),
            format_func=lambda name: f"{name} · {by_letter[name].comparison.compressed.method}",
            default=letter,
            required=True,
            key="compare_setting",
            help="Which compressed setting the marks and charts below belong to.",
        )
        letter = str(picked) if picked in by_letter else letter
        run = by_letter[letter]
    if run.comparison.original.token_texts:
        strip(run)
    _charts(run, second=letter == LETTERS[1])
    if run.comparison.heads:
        st.page_link(
            page.PAGES / "heads.py",
            label="See which heads are at risk in this run, and why",
            icon=":material/grid_on:",
            query_params={"heads_run": run.id},
        )


Shown = tuple[str, Chart, str, str | None]
"""A chart with its title, its key on the page and its definition."""


def _charts(run: Run, *, second: bool) -> None:
    shown = _recorded(run.id, run) if run.origin == "recorded" else _latest(run)
    for start in range(0, len(shown), 2):
        for column, (title, chart, key, words) in zip(
            st.columns(2, gap="medium"), shown[start : start + 2], strict=True
        ):
            with column:
                figures.show(title, _in_second(chart) if second else chart, key, help=words)


@st.cache_resource(show_spinner=False)
def _recorded(run_id: str, _run: Run) -> list[Shown]:
    """The charts of a recorded run, which every visitor sees first: making them is most of the work of the page."""
    del run_id
    return _made(_run)


def _latest(run: Run) -> list[Shown]:
    """The charts of this tab's run; they are made again only when another run is shown."""
    kept: tuple[Run, list[Shown]] | None = st.session_state.get("charts")
    if kept is None or kept[0] is not run:
        kept = st.session_state["charts"] = (run, _made(run))
    return kept[1]


def _made(run: Run) -> list[Shown]:
    c = run.comparison
    shown: list[Shown] = []
    if c.tokens and c.tokens.kl:
        shown += [
            ("KL per token", tokens.kl_per_token(c), "kl", metric("mean_kl").help),
            ("Probability of the chosen token", tokens.probabilities(c), "probability", None),
        ]
    at_risk, held = metric("heads_at_risk_pct"), metric("bytes").help
    if c.heads and c.heads.layer_indices:
        shown += [
            (f"{at_risk.heading}, step by step", heads.risk_per_step(c), "risk_steps", at_risk.help),
            ("Risk map: layer by query head", heads.risk_map(c), "risk_map", definitions.RISK_MAP),
        ]
    return [
        *shown,
        ("KV bytes over time", memory.bytes_per_step(c), "bytes_steps", held),
        ("What the bytes are", memory.bytes_by_part(c), "bytes_parts", held),
    ]


def _in_second(chart: Chart) -> Chart:
    """The chart with the second setting's colour where the first one's is."""
    figure = type(chart.figure)(chart.figure)
    for trace in figure.data:
        for part in ("line", "marker"):
            if getattr(getattr(trace, part, None), "color", None) == COMPRESSED:
                trace[part].color = SECOND
    return replace(chart, figure=figure)
