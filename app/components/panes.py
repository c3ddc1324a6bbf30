"""The two answers side by side. Model text is drawn raw, never as Markdown or HTML."""

import re
from typing import Literal

import streamlit as st

from app.runs import Run
from app.verdict import human_bytes, provenance

Side = Literal["original", "compressed"]
SIDES: tuple[Side, Side] = ("original", "compressed")
_HEIGHT = 300
_SHORT = 900


def heading(side: Side, method: str) -> str:
    """A pane's title: its colour and its words both say which side it is."""
    if side == "original":
        return "**:blue[:material/database: Original]** · full KV cache"
    return f"**:violet[:material/compress: Compressed]** · `{method}`"


def frame(side: Side, method: str, *, text: str | None = None) -> "st.delta_generator.DeltaGenerator":
    """Draw a pane's title and return the box for its text; without a `text` yet, the box follows its end."""
    st.markdown(heading(side, method))
    short = text is not None and len(text) < _SHORT
    return st.container(border=True, height="content" if short else _HEIGHT, autoscroll=text is None)


def answers(run: Run) -> None:
    """Both finished answers with their provenance."""
    c = run.comparison
    longer = max(c.original.text, c.compressed.text, key=len)
    for column, side in zip(st.columns(2), SIDES, strict=True):
        result = getattr(c, side)
        with column:
            frame(side, c.compressed.method, text=longer).text(result.text or "(no text)")
            st.caption(escape(provenance(c, side)))


def live_line(tokens: int, held: int) -> str:
    """How far a streaming answer is."""
    return f"{tokens:,} tokens · {human_bytes(held)} held" if tokens else "reading the prompt"


_MARKS = str.maketrans({mark: f"&#{ord(mark)};" for mark in "\\`*_{}[]()<>#+-=~|$:&!^@."})
# Where Streamlit would put an emoji, an arrow or a link even so, a zero-width space keeps the marks apart.
_REPLACED = re.compile(r"(:)(?=[\w+\-/]+:)|([-<=>~])(?=[-<=>])|(https?:)(?=//)|(www)(?=\.)|(@)")


def escape(text: str) -> str:
    """Text that Streamlit's Markdown shows literally: marks become character references."""
    return _REPLACED.sub(lambda found: f"{found[0]}\u200b", text).translate(_MARKS)
