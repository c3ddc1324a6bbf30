"""What every page has: its head, tags of numbers, the link to itself, exports, and words where there is nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlencode

import streamlit as st

from app.navigation import FOLDER
from app.tab import state
from app.tab.requests import query

Tag = Literal["measured", "estimated", "recorded", "imported", "cached"]
TAGS: dict[Tag, tuple[str, str, str, str]] = {
    "measured": ("Measured here", ":material/straighten:", "blue", "Measured on this machine, in this tab."),
    "estimated": (
        "Estimated",
        ":material/calculate:",
        "orange",
        "Computed from sizes or earlier timings.",
    ),
    "recorded": (
        "Recorded",
        ":material/history:",
        "gray",
        "Measured earlier and shipped with the app, with its date, hardware and commit.",
    ),
    "imported": ("Imported", ":material/upload_file:", "orange", "Read from a file; not measured here."),
    "cached": (
        "Cached",
        ":material/cached:",
        "gray",
        "Measured on this machine before, for the same settings and model files; not measured again.",
    ),
}

PAGES = FOLDER


def header(title: str, sentence: str) -> None:
    """The page's title and the one sentence that says what it is for. Both are the app's own words (Markdown)."""
    st.title(title, anchor=False)
    st.markdown(sentence)


def tag(kind: Tag, words: str = "") -> None:
    """Say where the numbers near it come from. `words` are the app's own (escape what is not)."""
    label, icon, color, meaning = TAGS[kind]
    text = f"{label}: {words}" if words else label
    st.badge(text, icon=icon, color=color, help=meaning)  # type: ignore[arg-type]


def address(params: Mapping[str, object] | None = None) -> str:
    """The address that opens this page with its settings, those of the sidebar and the prompt included.

    `params` are the page's own; without them, those of the address bar are taken.
    """
    base = (st.context.url or "").split("?")[0]
    own = {key: st.query_params.get_all(key) for key in st.query_params} if params is None else _text(params)
    settings = dict(pair.split("=", 1) for pair in _settings().split("&") if pair)
    rest = urlencode({key: value for key, value in own.items() if key not in settings}, doseq=True)
    text = "&".join([*(f"{key}={value}" for key, value in settings.items()), *([rest] if rest else [])])
    return f"{base}?{text}" if text else base


def _settings() -> str:
    return query(state.choices(), str(st.session_state.get(state.PROMPT, "")), state.config())


def _text(params: Mapping[str, object]) -> dict[str, list[str]]:
    lists = {key: value if isinstance(value, list | tuple) else [value] for key, value in params.items()}
    return {key: [str(one).lower() if isinstance(one, bool) else str(one) for one in lists[key]] for key in lists}


def copy_link(params: Mapping[str, object] | None = None) -> None:
    """The address of the page as it stands, ready to be copied."""
    with st.popover("Copy link", icon=":material/link:", key="copy_link"):
        st.caption("Opens this page as it stands; copy it with the button at its right.")
        link = address(params)
        st.code(link, language=None, wrap_lines=True)
        if "prompt=" not in link and "example=" not in link and st.session_state.get(state.PROMPT):
            st.caption("The prompt is too long for an address; export the run instead.")


@dataclass(frozen=True)
class File:
    """Something to download; `make` is called when it is asked for, on another thread, without Streamlit."""

    label: str
    suffix: str
    mime: str
    make: Callable[[], str | bytes]


def downloads(name: str, files: Sequence[File], *, label: str = "Export", disabled: bool = False) -> None:
    """The exports of a page behind one button."""
    with st.popover(label, icon=":material/download:", key=f"export_{name}", disabled=disabled):
        for file in files:
            st.download_button(
                file.label,
                file.make,
                name + file.suffix,
                file.mime,
                on_click="ignore",
                key=f"export_{name}{file.suffix}",
                width="stretch",
            )


def empty(words: str, page: str | None = None, label: str | None = None) -> None:
    """Say that there is nothing yet and where to get it: `page` is the file name of a page without .py."""
    st.info(words, icon=":material/info:")
    if page is not None:
        st.page_link(FOLDER / f"{page}.py", label=label or page.capitalize(), icon=":material/arrow_forward:")
