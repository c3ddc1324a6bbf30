"""The token strip: one answer token by token, with the first difference and the doubtful tokens marked."""

import streamlit as st

from app.tab.runs import Run
from app.ui import definitions
from app.ui.panes import escape

_SHOWN = 400


def strip(run: Run) -> None:
    """Draw the original answer's tokens; marks are signs as well as colours."""
    c = run.comparison
    st.markdown("**Tokens of the original answer**", help=definitions.STRIP)
    texts = c.original.token_texts[:_SHOWN]
    doubtful = {i for i, same in enumerate(c.tokens.same_top) if not same} if c.tokens else set()
    first = c.divergence.index if c.divergence else None
    pieces = [_piece(text, i == first, i in doubtful) for i, text in enumerate(texts)]
    if first is not None and first == len(c.original.token_texts):
        pieces.append(":orange-background[→ the answer ends here ←]")
    with st.container(border=True):
        st.markdown("".join(pieces) or "(no tokens)")
    st.caption(_legend(run, len(doubtful)))


def _piece(text: str, is_first: bool, is_doubtful: bool) -> str:
    shown = _visible(text)
    if is_first:
        return f" :orange-background[→\u00a0{shown.strip()}\u00a0←] "
    if is_doubtful:
        return f":violet-background[⟨{shown}⟩]"
    return shown


def _visible(text: str) -> str:
    """A token's text with spaces that survive and line breaks that show."""
    return (
        escape(text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")).replace("  ", " \u00a0").replace("↵", "↵ ")
    )


def _legend(run: Run, doubtful: int) -> str:
    c = run.comparison
    count = len(c.original.token_texts)
    more = f" The first {_SHOWN:,} of {count:,} tokens." if count > _SHOWN else ""
    parts = []
    if c.divergence is not None:
        parts.append(":orange-background[→ first difference ←]")
    if c.tokens is not None:
        parts.append(
            f":violet-background[⟨another token most likely⟩] at {doubtful} of {len(c.tokens.same_top)} tokens"
        )
    return " · ".join(parts) + more
