"""The answers word by word: what the compressed one leaves out of the original and what it adds."""

import difflib
import re
from collections.abc import Sequence
from typing import Literal

import streamlit as st

from app.tab.runs import Run
from app.ui.panes import LETTERS, SIDES, escape, heading

Change = Literal["same", "removed", "added"]
MAX_WORDS = 2000
_WORD = re.compile(r"\s+|[^\s]+")


def changes(original: str, other: str) -> list[tuple[Change, str]]:
    """The steps from one text to the other, word by word, of the first `MAX_WORDS` words.

    All that is not "added" makes the original, all that is not "removed" the other.
    """
    left, right = (_WORD.findall(text)[: 2 * MAX_WORDS] for text in (original, other))
    found: list[tuple[Change, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append(("same", "".join(left[a:b])))
            continue
        if b > a:
            found.append(("removed", "".join(left[a:b])))
        if d > c:
            found.append(("added", "".join(right[c:d])))
    return found


def marked(steps: Sequence[tuple[Change, str]]) -> str:
    """Markdown in which removed words stand in [- -] and added ones in {+ +}; signs as well as colours."""
    pieces = []
    for kind, text in steps:
        if kind == "same":
            pieces.append(_lines(text))
        else:
            colour, begin, end = ("orange", "[-", "-]") if kind == "removed" else ("blue", "{+", "+}")
            inside = escape(f"{begin}{_one_line(text)}{end}")
            pieces.append(f":{colour}-background[{inside}]" + ("\u200b  \n" if text.endswith("\n") else " "))
    return "".join(pieces)


def _one_line(text: str) -> str:
    return re.sub(r"[ \t]+", " ", text.replace("\r", "").replace("\n", "↵")).strip(" ") or "␣"


def _lines(text: str) -> str:
    """Text whose line breaks and indents survive in Markdown; a line of its own is never empty, so no block begins."""
    lines = text.replace("\r", "").expandtabs(4).split("\n")
    return "\u200b  \n".join(escape(line).replace("  ", "\u00a0 ") for line in lines)


def draw(runs: Sequence[Run]) -> None:
    """The original against each compressed answer."""
    original = runs[0].comparison.original.text
    for index, (column, run) in enumerate(zip(st.columns(len(runs)), runs, strict=True)):
        answer = run.comparison.compressed
        with column:
            st.markdown(heading(SIDES[index + 1], answer.method, lettered=len(runs) > 1))
            steps = changes(original, answer.text)
            with st.container(border=True):
                st.markdown(marked(steps) or "(no text)")
            st.caption(
                _legend(steps, LETTERS[index] if len(runs) > 1 else "the compressed answer", original, answer.text)
            )


def _legend(steps: Sequence[tuple[Change, str]], name: str, original: str, other: str) -> str:
    if all(kind == "same" for kind, _ in steps):
        return f"The original and {name} have the same words."
    gone, new = (sum(len(text.split()) for kind, text in steps if kind == what) for what in ("removed", "added"))
    longest = max(len(_WORD.findall(text)) for text in (original, other))
    cut = f" Only the first {MAX_WORDS:,} words are compared." if longest > 2 * MAX_WORDS else ""
    signs = ":orange-background[&#91;&#45;only in the original&#45;&#93;] :blue-background[&#123;&#43;only in " + name
    return f"{signs}&#43;&#125;] · {gone:,} words out, {new:,} in.{cut}"
