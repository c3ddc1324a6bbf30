"""The bridge between Streamlit's sessions and the engine: shared resources, session keys, callbacks."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import streamlit as st

from app.config import AppConfig, load_config
from app.engine.backend import build_engine
from app.engine.engine import Engine, EngineBusyError
from app.engine.job import Job, Request
from app.tab.examples import BY_NAME
from app.tab.requests import Choices, RequestError, read_choices
from app.tab.results import Results
from app.tab.runs import Run, RunError, RunStore, import_run, recorded_runs
from turboquant.experiments.recommendation import Recommendation
from turboquant.models.fingerprint import is_current
from turboquant.models.inputs import MODEL
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.files import read_records

if TYPE_CHECKING:
    from app.session.conversation import Conversation

PROMPT, EXAMPLE, SHOWN, NOTICE = "prompt", "example_pill", "run", "notice"
RESULTS = Path(__file__).resolve().parents[2] / "results"
MAX_SEARCHED = 200
R = TypeVar("R", bound=Request)


@st.cache_resource(show_spinner=False)
def config() -> AppConfig:
    """The settings of this deployment.

    Streamlit makes environment variables of the top level of `secrets.toml`, the only way to set one on Community
    Cloud, but only when somebody asks for secrets.
    """
    st.secrets.load_if_toml_exists()
    return load_config()


@st.cache_resource(show_spinner=False)
def engine() -> Engine:
    """The one engine of the process."""
    return build_engine(config())


@st.cache_resource(show_spinner=False)
def recordings() -> list[Run]:
    """The runs that ship with the app."""
    return recorded_runs()


@st.cache_resource(show_spinner=False)
def recorded(name: str) -> list[ExperimentRecord]:
    """The measurements of an experiment that ship with the app, the failed ones left out; none where there are none."""
    return [record for record in read_records(RESULTS / f"{name}.jsonl") if record.error is None]


def recorded_benches() -> list[ExperimentRecord]:
    """The benchmarks that ship with the app."""
    return [record for path in sorted(RESULTS.glob("bench-*.jsonl")) for record in recorded(path.stem)]


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


def job_of(kind: type[R]) -> tuple[Job, R] | None:
    """The newest job of this tab with what it was asked, if it is of this kind."""
    newest = job()
    return (newest, newest.request) if newest is not None and isinstance(newest.request, kind) else None


def busy() -> bool:
    """Is a job of this tab waiting or at work?"""
    newest = job()
    return newest is not None and newest.live


def notice() -> str | None:
    """What was wrong with the last click, if anything."""
    return st.session_state.get(NOTICE)


# --- what this tab has measured


def runs() -> RunStore:
    """The runs of this tab."""
    if "runs" not in st.session_state:
        st.session_state["runs"] = RunStore(config().max_runs)
    store: RunStore = st.session_state["runs"]
    return store


def add_run(run: Run, *, show: bool = True) -> Run:
    """Keep a run in this tab, and make it the one that pages show."""
    kept = runs().add(run)
    if show:
        st.session_state[SHOWN] = kept.id
    return kept


def all_runs() -> dict[str, Run]:
    """The runs of this tab, newest first, then the recorded ones, by id."""
    return {run.id: run for run in [*runs().all(), *recordings()]}


def records() -> dict[str, ExperimentRecord]:
    """Every cell that this tab has measured, by the cell's key."""
    kept: dict[str, ExperimentRecord] = st.session_state.setdefault("records", {})
    return kept


def current_records() -> dict[str, ExperimentRecord]:
    """The cells that this tab has measured on models as they are now; the folder of one may have changed since."""
    is_so = cache(is_current)
    return {
        key: record for key, record in records().items() if is_so(record.cell.model or "", record.inputs.get(MODEL))
    }


def results() -> Results:
    """Where the results of this tab's jobs are kept; to put one there takes no look at the session's state."""
    return Results(runs(), records(), st.session_state.setdefault("recommendations", []))


def recommendation() -> tuple[Recommendation, bool] | None:
    """What this tab's newest search has found, and whether it was known from before."""
    found: list[tuple[Recommendation, bool]] = st.session_state.setdefault("recommendations", [])
    return found[-1] if found else None


def searched() -> dict[str, ExperimentRecord]:
    """What this tab's searches have measured, by the cell's key; only the worker thread may change it."""
    known: dict[str, ExperimentRecord] = st.session_state.setdefault("searched", {})
    if len(known) > MAX_SEARCHED and not busy():
        known = st.session_state["searched"] = {}
    return known


def conversation() -> "Conversation | None":
    """The conversation of this tab."""
    return st.session_state.get("conversation")


@dataclass
class _Taken:
    """What of a job is in this tab already; `show` is the run that pages have yet to be told of."""

    job: int
    items: set[int] = field(default_factory=set)
    show: str | None = None


def collect() -> None:
    """Take what the newest job has computed since the last look.

    Streamlit may end a page's run at any use of the session's state, so between taking a result and marking it as
    taken there is none.
    """
    newest = job()
    if newest is None:
        return
    taken: _Taken | None = st.session_state.get("taken")
    if taken is None or taken.job != newest.id:
        taken = st.session_state["taken"] = _Taken(newest.id)
    kept = results()
    for item in sorted(newest.results):
        if item not in taken.items:
            taken.items.add(item)
            taken.show = newest.request.keep(kept, newest, item) or taken.show
    if taken.show is not None:
        st.session_state[SHOWN] = taken.show
        taken.show = None


def taken() -> int:
    """How many results of the newest job are in this tab already."""
    known: _Taken | None = st.session_state.get("taken")
    return len(known.items) if known is not None else 0


# --- callbacks


def submit(make: Callable[[], Request]) -> None:
    """Check what was asked and hand it to the engine; what is wrong becomes the notice."""
    collect()
    try:
        engine().submit(session_id(), make())
    except (RequestError, EngineBusyError) as error:
        st.session_state[NOTICE] = str(error)
        return
    st.session_state[NOTICE] = None


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
        add_run(import_run(upload.getvalue()))
    except RunError as error:
        st.session_state[NOTICE] = str(error)
        return
    st.session_state[NOTICE] = None
