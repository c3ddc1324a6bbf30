"""Runs: what this tab has measured or imported; compare two, take them along, delete them."""

import streamlit as st

from app.runs import view as run_list
from app.tab import state
from app.ui import page, share
from app.ui.panes import escape

page.header(
    "Runs of this tab",
    "Every comparison you made here, next to the recorded ones. Open one, put two side by side, or take them with you.",
)
st.caption(
    "Nothing of it is stored on the server beyond this tab: when the tab is closed or reloaded, its runs are gone. "
    "Export what you want to keep."
)
if notice := state.notice():
    st.warning(escape(notice), icon=":material/info:")
share.importer()
runs = state.all_runs()
if not runs:
    page.empty("No run yet. Compare a prompt, or import a run.", "compare", "Compare a prompt")
    st.stop()
chosen = run_list.history(runs)
if chosen is None:
    st.caption("Choose a row to open, pin, export, share or delete that run.")
else:
    run_list.actions(chosen)
run_list.keep_or_clear()

st.subheader("Two runs side by side", anchor=False)
pinned = run_list.pins(runs)
if pinned is not None:
    run_list.side_by_side(*pinned)
page.copy_link()
