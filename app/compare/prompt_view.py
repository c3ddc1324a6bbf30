"""The prompt box with its examples and its two buttons."""

import streamlit as st

from app.compare.request import CompareRequest, compare_request
from app.tab import state
from app.tab.examples import BY_NAME, EXAMPLES
from app.tab.requests import RequestError, method_texts, prompt_query
from app.ui.panes import escape


def render() -> None:
    """Draw the examples and the form."""
    st.pills(
        "Examples",
        [example.name for example in EXAMPLES],
        format_func=lambda name: BY_NAME[name].label,
        key=state.EXAMPLE,
        on_change=state.pick_example,
    )
    job = state.job()
    live = job is not None and job.live
    other = job.request.title if job is not None and live and state.job_of(CompareRequest) is None else None
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
                ":violet[**Compare**]",
                icon=":material/compare:",
                shortcut="Mod+Enter",
                on_click=submit,
                disabled=live,
                key="compare",
            )
            st.form_submit_button(
                "Stop",
                icon=":material/stop_circle:",
                shortcut="Esc",
                on_click=state.stop,
                disabled=not live or other is not None,
                key="stop",
            )
            st.caption(_plan() if other is None else _other(other), width="stretch")


def submit() -> None:
    """Compare what stands in the prompt box, and put it into the address."""
    prompt = st.session_state.get(state.PROMPT, "")
    state.submit(lambda: compare_request(state.choices(), prompt, state.config()))
    if state.notice():
        return
    link = prompt_query(prompt)
    for key in ("prompt", "example"):
        if key in link:
            st.query_params[key] = link[key]
        elif key in st.query_params:
            del st.query_params[key]


def _other(title: str) -> str:
    return f":material/info: {title} is at work in this tab; stop it in the sidebar or wait for it to end."


def _plan() -> str:
    """What Compare will run."""
    choices = state.choices()
    sampling = "greedy" if choices.temperature == 0 else f"temperature {choices.temperature:g}, seed {choices.seed}"
    try:
        methods = method_texts(choices)
    except RequestError as error:
        return f":material/info: {escape(str(error))}"
    named = " and ".join(f"`{method}`" for method in methods)
    return f"{named} against the full cache · up to {choices.tokens} new tokens each · {sampling}"
