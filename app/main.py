"""The router: page settings, sidebar, navigation. Runs at every interaction, so it stays cheap."""

import sys
from pathlib import Path

import streamlit as st

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from app import state  # noqa: E402
from app.components import sidebar  # noqa: E402

st.set_page_config(page_title="TurboQuant Lab", page_icon=str(ROOT / "assets" / "favicon.svg"), layout="wide")
st.logo(str(ROOT / "assets" / "logo.svg"), size="large", icon_image=str(ROOT / "assets" / "favicon.svg"))
COMPARE = ROOT / "pages" / "compare.py"
HELP = "One prompt answered twice: with the full KV cache and with a compressed one."
page = st.navigation(
    [
        st.Page(COMPARE, title="Compare", icon=":material/compare:", url_path="start", default=True, help=HELP),
        # Streamlit gives the default page the bare address only; this one makes /compare work too.
        st.Page(COMPARE, title="Compare", icon=":material/compare:", url_path="compare", visibility="hidden"),
    ]
)
state.attend()
sidebar.render()
page.run()
