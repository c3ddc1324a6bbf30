"""The bridge between Streamlit's sessions and the engine: shared resources, session keys, callbacks."""

import uuid
from typing import Any

import streamlit as st

from app.backend import build_engine
from app.config import AppConfig, load_config
from app.engine import Engine, EngineBusyError
from app.examples import BY_NAME
from app.jobs import Job
from app.requests import Choices, RequestError, build_request, prompt_query, read_choices
from app.runs import Run, RunError, RunStore, import_run, recorded_runs

PROMPT, EXAMPLE, SHOWN, NOTICE = "prompt", "example_pill", "shown_run", "notice"


@st.cache_resource(show_spinner=False)
def config() -> AppConfig:
    """The settings of this deployment."""
    return load_config()


@st.cache_resource(show_spinner=False)
def engine() -> Engine:
    """The one engine of the process."""
    return build_engine(config())


@st.cache_resource(show_spinner=False)
def recordings() -> list[Run]:
    """The runs that ship with the app."""
    return recorded_runs()


def session_id() -> str:
    """The identity of this browser tab; it survives a short loss of the connection."""
    return str(st.session_state.setdefault("session_id", uuid.uuid4().hex))


def _leave(session: str) -> None:
    engine().disconnect(session)


@st.cache_resource(show_spinner=False, scope="session", on_release=_leave)
def _presence(session: str) -> str:
    engine().connect(session)
    return session


def attend() -> None:
    """Tell the engine that this tab is open; when it closes, its run is cancelled after the grace period."""
    _presence(session_id())
    if PROMPT not in st.session_state:
        linked = BY_NAME.get(st.query_params.get("example", ""))
        text = linked.prompt if linked else st.query_params.get("prompt", "")
        st.session_state[PROMPT] = text[: config().max_prompt_chars]


def choices() -> Choices:
    """The sidebar's settings now."""
    return read_choices({str(key): value for key, value in st.session_state.items()}, config())


def job() -> Job | None:
    """The newest job of this tab."""
    return engine().job(session_id())


def runs() -> RunStore:
    """The runs of this tab."""
    if "runs" not in st.session_state:
        st.session_state["runs"] = RunStore(config().max_runs)
    store: RunStore = st.session_state["runs"]
    return store


def all_runs() -> dict[str, Run]:
    """The runs of this tab, newest first, then the recorded ones, by id."""
    return {run.id: run for run in [*runs().all(), *recordings()]}


def collect() -> None:
    """Keep the result of the newest job, once, and show it."""
    newest = job()
    if newest is None or newest.live or newest.result is None or st.session_state.get("collected") == newest.id:
        return
    st.session_state["collected"] = newest.id
    st.session_state[SHOWN] = runs().add(Run(comparison=newest.result)).id


# --- callbacks


def submit() -> None:
    """Check the form and hand it to the engine; what is wrong becomes the notice above the results."""
    prompt = st.session_state.get(PROMPT, "")
    try:
        engine().submit(session_id(), build_request(choices(), prompt, config()))
    except (RequestError, EngineBusyError) as error:
        st.session_state[NOTICE] = str(error)
        return
    st.session_state[NOTICE] = None
    link = prompt_query(prompt)
    for key in ("prompt", "example"):
        if key in link:
            st.query_params[key] = link[key]
        elif key in st.query_params:
            del st.query_params[key]


def stop() -> None:
    """Stop the live job of this tab, if there is one."""
    live = job()
    if live is not None and live.live:
        engine().cancel(live)


def pick_example() -> None:
    """Put the picked example into the prompt box; the pill is free again for the next click."""
    example = BY_NAME.get(st.session_state.get(EXAMPLE) or "")
    st.session_state[EXAMPLE] = None
    if example is not None:
        st.session_state[PROMPT] = example.prompt
        st.session_state[NOTICE] = None


def use(**values: Any) -> None:
    """Set widgets from a button that fixes something; `example` fills the prompt box."""
    for key, value in values.items():
        if key == "example":
            st.session_state[PROMPT] = BY_NAME[value].prompt
        else:
            st.session_state[key] = value


def take_upload() -> None:
    """Import the uploaded run and show it, or say why not."""
    upload = st.session_state.get("upload")
    if upload is None:
        return
    try:
        run = runs().add(import_run(upload.getvalue()))
    except RunError as error:
        st.session_state[NOTICE] = str(error)
        return
    st.session_state[NOTICE], st.session_state[SHOWN] = None, run.id
