"""The answers side by side, or one at a time. Model text is drawn raw, never as Markdown or HTML."""

import re
from collections.abc import Sequence
from typing import Literal

import streamlit as st

from app.tab.runs import Run
from app.tab.verdict import human_bytes, provenance

Side = Literal["original", "compressed", "second"]
SIDES: tuple[Side, Side, Side] = ("original", "compressed", "second")
LETTERS = ("A", "B")
_HEIGHT = 300


def heading(side: Side, method: str, *, lettered: bool = False) -> str:
    """A pane's title: its colour and its words both say which side it is. `lettered`: there is an A and a B."""
    if side == "original":
        return "**:blue[:material/database: Original]** · full KV cache"
    name = f"Compressed {LETTERS[SIDES.index(side) - 1]}" if lettered else "Compressed"
    colour = "violet" if side == "compressed" else "green"
    return f"**:{colour}[:material/compress: {name}]** · {code(method)}"


def code(text: str) -> str:
    """Text as a code span that it cannot close."""
    return f"`{' '.join(text.replace('`', chr(39)).split()) or ' '}`"


def frame(
    side: Side, method: str, *, text: str | None = None, lettered: bool = False
) -> "st.delta_generator.DeltaGenerator":
    """Draw a pane's title and return the box for its text; without a `text` yet, the box follows its end.

    A finished text stands at full length: a box that scrolls could not be reached by the keyboard.
    """
    st.markdown(heading(side, method, lettered=lettered))
    return st.container(border=True, height=_HEIGHT if text is None else "content", autoscroll=text is None)


def answers(runs: Sequence[Run]) -> None:
    """The original answer and each compressed one, with their provenance. All runs share the original answer."""
    texts = [runs[0].comparison.original.text, *(run.comparison.compressed.text for run in runs)]
    for index, column in enumerate(st.columns(1 + len(runs))):
        with column:
            _pane(runs, index, max(texts, key=len))


def one_answer(runs: Sequence[Run]) -> None:
    """One answer over the whole width, with a switch between them."""
    names = ["Original", *(["Compressed"] if len(runs) == 1 else LETTERS[: len(runs)])]
    picked = st.segmented_control(
        "Answer shown", names, default=names[0], required=True, key="compare_pane", bind="query-params"
    )
    index = names.index(str(picked)) if picked in names else 0
    c = runs[max(index - 1, 0)].comparison
    _pane(runs, index, c.compressed.text if index else c.original.text)


def _pane(runs: Sequence[Run], index: int, longest: str) -> None:
    c = runs[max(index - 1, 0)].comparison
    result = c.compressed if index else c.original
    box = frame(SIDES[index], c.compressed.method, text=longest, lettered=len(runs) > 1)
    box.text(result.text or "(no text)")
    st.caption(escape(provenance(c, "compressed" if index else "original")))


def live_line(tokens: int, held: int) -> str:
    """How far a streaming answer is."""
    return f"{tokens:,} tokens · {human_bytes(held)} held" if tokens else "reading the prompt"


_MARKS = str.maketrans({mark: f"&#{ord(mark)};" for mark in "\\`*_{}[]()<>#+-=~|$:&!^@."})
# Where Streamlit would put an emoji, an arrow or a link even so, a zero-width space keeps the marks apart.
_REPLACED = re.compile(r"(:)(?=[\w+\-/]+:)|([-<=>~])(?=[-<=>])|(https?:)(?=//)|(www)(?=\.)|(@)")


def escape(text: str) -> str:
    """Text that Streamlit's Markdown shows literally: marks become character references."""
    return _REPLACED.sub(lambda found: f"{found[0]}\u200b", text).translate(_MARKS)
