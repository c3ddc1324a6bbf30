"""Work on a page: the button that starts it, its progress, and how it ended."""

from collections.abc import Callable

import streamlit as st

from app.engine.job import Job, Request
from app.tab import state
from app.ui.panes import escape


def bar(
    label: str,
    make: Callable[[], Request],
    *,
    plan: str,
    key: str,
    disabled: str | None = None,
    shortcuts: bool = True,
) -> None:
    """The button that starts the work, the one that stops it, and what would be done (or why it cannot be).

    Args:
        label: What the button says.
        make: Builds the request from the widgets when the button is pressed; raises RequestError.
        plan: What will be done and how long it takes, in the app's own words (Markdown).
        key: Unique in the app.
        disabled: Why it cannot be done; None if it can.
        shortcuts: Whether keys do the same; of several bars on a page only one can have them.
    """
    live = state.busy()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            f":violet[**{label}**]",  # the theme's filled button has too little contrast for its shortcut
            icon=":material/play_arrow:",
            key=key,
            on_click=state.submit,
            args=(make,),
            disabled=live or disabled is not None,
            shortcut="Mod+Enter" if shortcuts else None,
        )
        st.button(
            "Stop",
            icon=":material/stop_circle:",
            key=f"{key}_stop",
            on_click=state.stop,
            disabled=not live,
            shortcut="Esc" if shortcuts else None,
        )
        if disabled is None:
            st.caption(plan, width="stretch")
        else:
            st.markdown(f":small[:orange[{disabled}]]", width="stretch")


def words(job: Job) -> str:
    """Where a live job stands, in one line."""
    view = job.view
    if view.state == "queued":
        return _queue_words(job)
    if job.cancelled:
        return "Stopping; what is there is kept"
    if view.state == "loading":
        return view.phase or f"Loading {job.request.model}"
    done = f"{len(job.results)} of {job.request.items} done" if job.request.items > 1 else ""
    return " · ".join(part for part in (done, view.phase, _left(job)) if part) or "Running"


def _queue_words(job: Job) -> str:
    if job.results and len(job.results) > len(job.cached):
        return f"Letting a shorter run go first · {len(job.results)} of {job.request.items} done"
    ahead, wait = state.engine().ahead(job), state.engine().estimate_s(job)
    about = f", about {duration(wait)}" if wait else ""
    if not ahead:
        return "Starting"
    return f"Waiting: {ahead} {'run is' if ahead == 1 else 'runs are'} ahead of you{about}. Stop leaves the queue."


def _left(job: Job) -> str:
    seconds = job.remaining_s if job.request.items > 1 else None
    return "" if seconds is None else f"about {duration(seconds)} left (estimated)"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def watch(job: Job) -> None:
    """Show how far a live job is, every second; draw the page again when it has another result, and when it ends."""
    known = state.taken(), job.view.state

    def look() -> None:
        if not job.live or (len(job.results), job.view.state) != known:
            st.rerun(scope="app")
        fraction = job.fraction if job.request.items > 1 or job.view.fraction is None else job.view.fraction
        if job.view.state == "loading" and job.view.fraction is not None:
            fraction = job.view.fraction
        st.progress(min(max(fraction, 0.0), 1.0), text=escape(words(job)))

    st.fragment(look, run_every=1.0)()


def ending(kind: type[Request], page: str | None = None) -> None:
    """Say what was wrong with the last click, and how the newest job ended if it is of this kind and did not end well.

    With `page` it must be of that page too.
    """
    if notice := state.notice():
        st.warning(escape(notice), icon=":material/info:")
    newest = state.job_of(kind)
    if newest is not None and page in (None, newest[1].page):
        ended(newest[0])


def ended(job: Job) -> None:
    """Say how a job ended if it did not end well."""
    if job.live:
        return
    kept = f"{len(job.results)} of {job.request.items} results are kept."
    if job.view.state == "failed":
        st.error(
            f"{escape(job.view.error or 'The run failed.')} {kept if job.request.items > 1 else ''}",
            icon=":material/error:",
            title="This run did not finish",
        )
    elif job.view.state == "stopped" and (said := _stopped(job, kept)):
        st.info(said, icon=":material/stop_circle:")


def _stopped(job: Job, kept: str) -> str:
    """Say how a job was stopped; nothing where the visitor stopped it and sees what there is."""
    reason = f" by {job.stop_reason}" if job.stop_reason else ""
    if job.request.items > 1:
        return f"Stopped{reason}: {kept} Start it again to go on with the rest."
    if job.request.resumes:
        return f"Stopped{reason}: what it measured is kept. Start it again to go on."
    if not job.results:
        return f"Stopped{reason} before it began; nothing was computed."
    return f"Stopped{reason}; what was there is kept." if reason else ""
