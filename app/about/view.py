"""The About page's lists and tables."""

from collections.abc import Mapping

import streamlit as st

from app.about import facts as about
from app.tab import state
from app.ui import page
from app.ui.panes import escape


def tags() -> None:
    """Every tag as it looks on the pages, and what it means."""
    for kind, (_, _, _, meaning) in page.TAGS.items():
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            page.tag(kind)
            st.markdown(meaning)


def definitions() -> None:
    """The figures of one page, or of all: name, meaning, where shown."""
    table = about.defined()
    everything = "All pages"
    pages = [*dict.fromkeys(table["shown on"]), everything]
    chosen = st.selectbox("Figures of", pages, key="about_page", bind="query-params", width=240)
    shown = table if chosen not in pages[:-1] else table[table["shown on"] == chosen]
    st.table(shown, border="horizontal", hide_index=True, alt="What each figure means and where it is shown")


def not_shown() -> None:
    """What the app's numbers do not say."""
    st.markdown("\n".join(f"- **{title}** {text}" for title, text in about.NOT_SHOWN))


def shortcuts() -> None:
    """Keyboard shortcuts."""
    st.markdown("\n".join(f"- `{keys}`: {what}" for keys, what in about.SHORTCUTS))


def surroundings() -> None:
    """Versions and hardware."""
    _facts("part", about.surroundings())


def limits() -> None:
    """What this deployment allows."""
    _facts("limit", about.limits(state.config(), int(st.get_option("server.maxUploadSize"))))


def privacy() -> None:
    """What is kept where, and for how long."""
    words = about.privacy(state.config(), int(st.get_option("server.disconnectedSessionTTL")))
    st.markdown("\n".join(f"- {text}" for text in words))


def credits() -> None:
    """The papers that this app builds on, and what of each is used."""
    for credit in about.CREDITS:
        st.markdown(
            f"**{credit.name}** · {credit.authors}: *{credit.title}*, {credit.year}, "
            f"[arXiv:{credit.arxiv}]({credit.link})  \n{credit.used}"
        )


def licences() -> None:
    """Licences of this project, its model and its main libraries."""
    shown = about.licences().map(escape)  # what other packages wrote about themselves
    st.table(shown, border="horizontal", hide_index=True, alt="Licences of this project, its model and libraries")


def _facts(what: str, facts: Mapping[str, str]) -> None:
    """Names and values; a value may hold a name that somebody chose, so it is shown literally."""
    rows = [{what: name, "value": escape(value)} for name, value in facts.items()]
    st.table(rows, border="horizontal", hide_index=True, alt=f"Every {what} and its value")
