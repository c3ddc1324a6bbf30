"""A job on the page: waiting, loading, streaming, and how it ended."""

import streamlit as st

from app import state
from app.components.panes import SIDES, frame, live_line
from app.jobs import Job, View


def stream(job: Job) -> None:
    """Draw a live job until it ends. A click anywhere interrupts the drawing, not the job."""
    line = st.empty()
    texts, captions = {}, {}
    for column, side in zip(st.columns(2), SIDES, strict=True):
        with column:
            texts[side] = frame(side, job.request.method).empty()
            captions[side] = st.empty()
    drawn: dict[str, object] = {}
    for _ in job.stream():
        view = job.view
        if (words := _words(job, view)) != drawn.get("line"):
            drawn["line"] = words
            _status_line(line, words, view.fraction)
        for side in SIDES:
            part = getattr(view, side)
            if part != drawn.get(side):
                drawn[side] = part
                texts[side].text(part.text)
                captions[side].caption(live_line(part.tokens, part.cache_bytes))


def _words(job: Job, view: View) -> str:
    if view.state == "queued":
        ahead = state.engine().ahead(job)
        wait = state.engine().estimate_s(job)
        about = f", about {wait:.0f} s" if wait else ""
        if not ahead:
            return "Starting"
        return f"Waiting: {ahead} {'run is' if ahead == 1 else 'runs are'} ahead of you{about}. Stop leaves the queue."
    if job.cancelled:
        return "Stopping; what is there is kept"
    if view.original.tokens and view.fraction is None:
        return "Both sides answer, token by token in turn"
    return view.phase or "Running"


def _status_line(slot: "st.delta_generator.DeltaGenerator", words: str, fraction: float | None) -> None:
    if fraction is None:
        slot.markdown(f":gray[{words}]")
    else:
        slot.progress(min(max(fraction, 0.0), 1.0), text=words)


def ending(job: Job | None) -> None:
    """Say how the newest job ended when its result does not say it."""
    if notice := st.session_state.get(state.NOTICE):
        st.warning(notice, icon=":material/info:")
    if job is None or job.live or job.result is not None:
        return
    view = job.view
    if view.state == "stopped":
        st.info("Stopped before it began; nothing was computed.", icon=":material/stop_circle:")
    elif view.state == "failed":
        st.error(view.error or "The run failed.", icon=":material/error:", title="This comparison did not finish")
        if view.original.text or view.compressed.text:
            st.caption("What was computed until then:")
            for column, side in zip(st.columns(2), SIDES, strict=True):
                with column:
                    frame(side, job.request.method).text(getattr(view, side).text)
