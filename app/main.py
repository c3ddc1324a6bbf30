"""The router: page settings, sidebar, navigation. Runs at every interaction, so it stays cheap."""

import sys
from pathlib import Path

import streamlit as st
from streamlit.navigation.page import Page

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from app.navigation import DEFAULT, ENTRIES, Entry  # noqa: E402
from app.tab import state  # noqa: E402
from app.ui import sidebar  # noqa: E402

st.set_page_config(page_icon=str(ROOT / "assets" / "favicon.svg"), layout="wide")
st.logo(str(ROOT / "assets" / "logo.svg"), size="large", icon_image=str(ROOT / "assets" / "favicon.svg"))


def page_of(entry: Entry, *, default: bool = False, hidden: bool = False) -> Page:
    """A page of the navigation."""
    return st.Page(
        entry.path,
        title=entry.title,
        icon=f":material/{entry.icon}:",
        url_path="start" if default else entry.name,
        default=default,
        visibility="hidden" if hidden else "visible",
    )


pages = {entry: page_of(entry, default=entry is DEFAULT) for entry in ENTRIES if entry.path.exists()}
# Streamlit gives the default page the bare address only; the hidden one makes /compare work too.
page = st.navigation([*pages.values(), page_of(DEFAULT, hidden=True)], position="hidden")
st.set_page_config(page_title=f"{page.title} · TurboQuant Lab")
state.attend()
state.collect()
sidebar.render(pages, settings=any(entry.title == page.title and entry.uses_settings for entry in ENTRIES))
page.run()
