"""The prompt box with its examples and its two buttons."""

import streamlit as st

from app import state
from app.examples import BY_NAME, EXAMPLES
from app.requests import RequestError, method_text


def render() -> None:
    """Draw the examples and the form."""
    st.pills(
        "Examples",
        [example.name for example in EXAMPLES],
        format_func=lambda name: BY_NAME[name].label,
        key=state.EXAMPLE,
        on_change=state.pick_example,
    )
    live = (job := state.job()) is not None and job.live
    with st.form("ask", border=False, enter_to_submit=False):
        st.text_area(
            "Prompt",
            key=state.PROMPT,
            height=120,
            max_chars=state.config().max_prompt_chars,
            placeholder="Ask anything, or pick an example above",
            persist_state="session",
        )
        with st.container(horizontal=True, vertical_alignment="center"):
            st.form_submit_button(
                "Compare",
                type="primary",
                icon=":material/compare:",
                shortcut="Mod+Enter",
                on_click=state.submit,
                disabled=live,
                key="compare",
            )
            st.form_submit_button(
                "Stop",
                icon=":material/stop_circle:",
                shortcut="Esc",
                on_click=state.stop,
                disabled=not live,
                key="stop",
            )
            st.caption(_plan(), width="stretch")


def _plan() -> str:
    """What Compare will run."""
    choices = state.choices()
    sampling = "greedy" if choices.temperature == 0 else f"temperature {choices.temperature:g}, seed {choices.seed}"
    try:
        method = method_text(choices)
    except RequestError as error:
        return f":orange[{error}]"
    return f"`{method}` against the full cache · up to {choices.tokens} new tokens each · {sampling}"
