"""Taking a run along: link, exports, import, and the list of this tab's runs."""

import streamlit as st

from app import state
from app.requests import query
from app.runs import Run


def buttons(run: Run) -> None:
    """The link and the exports of one run."""
    with st.popover("Link", icon=":material/link:", key="share_link"):
        st.caption("Opens the settings and the prompt of this page now; copy it with the button at its right.")
        st.code(link(), language=None, wrap_lines=True)
        if "prompt=" not in link() and "example=" not in link() and st.session_state.get(state.PROMPT):
            st.caption("The prompt is too long for an address; export the run instead.")
    with st.popover("Export", icon=":material/download:", key="share_export"):
        name = f"comparison-{run.id}"
        for label, suffix, mime, make in (
            ("Run as JSON", ".json", "application/json", run.to_json),
            ("Report as Markdown", ".md", "text/markdown", run.to_markdown),
            ("Tokens as CSV", "-tokens.csv", "text/csv", run.to_csv),
            ("Heads as CSV", "-heads.csv", "text/csv", run.heads_csv),
        ):
            st.download_button(
                label, make, name + suffix, mime, on_click="ignore", key=f"export{suffix}", width="stretch"
            )


def link() -> str:
    """The address that opens this page with the settings and the prompt of now."""
    text = query(state.choices(), str(st.session_state.get(state.PROMPT, "")), state.config())
    return f"{(st.context.url or '').split('?')[0]}?{text}" if text else (st.context.url or "").split("?")[0]


def chooser() -> Run | None:
    """The run to show: the newest one of this tab or the first recorded one, unless another is picked."""
    runs = state.all_runs()
    if st.session_state.get(state.SHOWN) not in runs:
        st.session_state[state.SHOWN] = next(iter(runs), None)
    if not runs:
        return None
    if len(runs) == 1:
        return next(iter(runs.values()))
    words = {"measured": "this tab", "recorded": "recorded", "imported": "imported"}
    picked = st.selectbox(
        "Run shown",
        list(runs),
        format_func=lambda run_id: f"{runs[run_id].label} ({words[runs[run_id].origin]})",
        key=state.SHOWN,
        persist_state="session",
    )
    return runs.get(picked)


def importer() -> None:
    """Open a run that was exported elsewhere."""
    with st.expander("Open an exported run", icon=":material/upload_file:"):
        st.file_uploader("Run as JSON", type="json", key="upload", on_change=state.take_upload, max_upload_size=20)
