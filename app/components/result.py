"""A finished run on the page: verdict, answers, figures, charts."""

import streamlit as st

from app import definitions, state
from app.charts import heads, memory, tokens
from app.components import figures, panes, share
from app.components.panes import escape
from app.components.tokens import strip
from app.examples import LONG_EXAMPLE
from app.runs import Run
from app.verdict import cosine, human_bytes, number, percent, verdict

_BADGES = {
    "measured": ("Measured on this machine", ":material/straighten:", "blue"),
    "recorded": ("Recorded", ":material/history:", "gray"),
    "imported": ("Imported", ":material/upload_file:", "orange"),
}


def render(run: Run) -> None:
    """Draw the whole run."""
    c = run.comparison
    _header(run)
    with st.expander(f"Prompt of this run · {c.prompt_tokens:,} tokens", icon=":material/notes:"):
        st.text(c.prompt)
    st.subheader(escape(verdict(c)), anchor=False)
    panes.answers(run)
    if not run.packed:
        _nothing_packed(run)
        return
    for note in c.notes:
        st.info(escape(note), icon=":material/info:")
    _metrics(run)
    if c.original.token_texts:
        strip(run)
    _charts(run)


def _header(run: Run) -> None:
    words, icon, color = _BADGES[run.origin]
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    with left.container(horizontal=True, vertical_alignment="center"):
        st.badge(words, icon=icon, color=color)  # type: ignore[arg-type]
        st.caption(escape(_origin(run)), width="content")
    with right.container(horizontal=True, horizontal_alignment="right"):
        share.buttons(run)


def _origin(run: Run) -> str:
    env, c = run.comparison.environment, run.comparison
    threads = f"{env.cpu_threads} thread{'' if env.cpu_threads == 1 else 's'}"
    where = f"{env.created[:10]}, {env.device}, {threads}, commit {env.commit or 'unknown'}"
    more = ". Every number below is from that run; press Compare to measure your own."
    return f"{where}, {c.model.name}, {c.compressed.method}" + (more if run.origin == "recorded" else "")


def _nothing_packed(run: Run) -> None:
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
            key="fix_long",
        )
        st.button(
            "Keep no token exact",
            on_click=state.use,
            kwargs={"residual": 0, "sinks": 0},
            icon=":material/compress:",
            key="fix_window",
        )


def _metrics(run: Run) -> None:
    c = run.comparison
    report = c.compressed.report
    cards: list[tuple[str, str, str | None, str]] = [
        (
            "KV cache held",
            human_bytes(report.bytes),
            f"{human_bytes(report.full_precision_bytes)} at 16 bit",
            definitions.KV_BYTES,
        ),
        (
            "Smaller than 16 bit",
            number(report.compression_ratio, 2, "x"),
            f"{number(report.payload_ratio, 2, 'x')} payload",
            definitions.RATIO,
        ),
        ("Bits per value", number(report.bits_per_value, 2), "16 uncompressed", definitions.BITS_PER_VALUE),
        (
            "Speed",
            number(c.compressed.tokens_per_second, 1, " tok/s"),
            number(c.original.tokens_per_second, 1, " tok/s original"),
            definitions.SPEED,
        ),
    ]
    first = c.compressed.time_to_first_token_ms
    other = c.original.time_to_first_token_ms
    cards.append(
        ("First token after", number(first, 0, " ms"), number(other, 0, " ms original"), definitions.FIRST_TOKEN)
    )
    _row(cards, "memory")
    if report.bytes >= report.full_precision_bytes:
        st.caption(
            "The compressed cache is not smaller than 16 bit here: in so short a text the exact tokens, the spare "
            "capacity and the shared tables outweigh what packing saves."
        )
    _quality(run)


def _quality(run: Run) -> None:
    c = run.comparison
    if c.heads is None and c.tokens is None:
        st.caption("Quality was not measured: the run was stopped before its measurement.")
        return
    cards: list[tuple[str, str, str | None, str]] = []
    if c.heads:
        packed, served = c.heads.packed, c.heads.served
        for label, field, shown, text in (
            ("Heads at risk", "heads_at_risk_pct", percent, definitions.AT_RISK),
            ("Top-1 match", "top1_match_pct", percent, definitions.TOP1),
            ("Top-5 match", "top5_match_pct", percent, definitions.TOP5),
            ("Cosine of scores", "cosine_scores", cosine, definitions.COSINE),
        ):
            cards.append((label, shown(getattr(packed, field)), f"{shown(getattr(served, field))} served", text))
    if c.tokens:
        cards.append(
            (
                "Mean KL",
                number(c.tokens.mean_kl, 4, " nats"),
                f"{percent(c.tokens.same_top_pct)} same top",
                f"{definitions.KL} {definitions.SAME_TOP}",
            )
        )
    _row(cards, "quality")
    if c.heads:
        st.caption(
            f"Large figures of attention: packed positions only; small ones: as served. Cosine of softmax weights: "
            f"{number(c.heads.packed.cosine_weights, 4)} packed, {number(c.heads.served.cosine_weights, 4)} served.",
            help=definitions.PACKED,
        )


def _row(cards: list[tuple[str, str, str | None, str]], key: str) -> None:
    with st.container(horizontal=True, key=f"row_{key}"):
        for label, value, below, text in cards:
            st.metric(label, value, below, delta_color="off", delta_arrow="off", help=text, border=True, width=168)


def _charts(run: Run) -> None:
    c = run.comparison
    if c.tokens and c.tokens.kl:
        left, right = st.columns(2, gap="medium")
        with left:
            figures.show("KL per token", tokens.kl_per_token(c), "kl", help=definitions.KL)
        with right:
            figures.show("Probability of the chosen token", tokens.probabilities(c), "probability")
    if c.heads and c.heads.layer_indices:
        left, right = st.columns(2, gap="medium")
        with left:
            figures.show("Heads at risk, step by step", heads.risk_per_step(c), "risk_steps", help=definitions.AT_RISK)
        with right:
            figures.show("Risk map: layer by query head", heads.risk_map(c), "risk_map", help=definitions.RISK_MAP)
    left, right = st.columns(2, gap="medium")
    with left:
        figures.show("KV bytes over time", memory.bytes_per_step(c), "bytes_steps", help=definitions.KV_BYTES)
    with right:
        figures.show("What the bytes are", memory.bytes_by_part(c), "bytes_parts", help=definitions.KV_BYTES)
