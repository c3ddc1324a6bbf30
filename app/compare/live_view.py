"""A comparison at work: waiting, loading, streaming, and how it ended."""

from collections.abc import Sequence

import streamlit as st

from app.compare.request import CompareRequest
from app.engine.job import Job, View
from app.tab import state
from app.ui import work
from app.ui.panes import SIDES, Side, escape, frame, live_line


def newest() -> Job | None:
    """The newest job of this tab, if it is a comparison."""
    found = state.job_of(CompareRequest)
    return found and found[0]


def stream(job: Job, methods: Sequence[str]) -> None:
    """Draw a live job until it ends. A click anywhere interrupts the drawing, not the job.

    `methods` are those of the compressed answers, in the order of the job's sides.
    """
    line = st.empty()
    texts, captions = [], []
    for column, (side, method) in zip(st.columns(1 + len(methods)), _sides(methods), strict=True):
        with column:
            texts.append(frame(side, method, lettered=len(methods) > 1).empty())
            captions.append(st.empty())
    drawn: dict[object, object] = {}
    for _ in job.stream():
        view = job.view
        if (words := _words(job, view)) != drawn.get("line"):
            drawn["line"] = words
            _status_line(line, words, view.fraction)
        for index, part in enumerate(view.sides):
            if part != drawn.get(index):
                drawn[index] = part
                texts[index].text(part.text)
                captions[index].caption(live_line(part.tokens, part.cache_bytes))


def _sides(methods: Sequence[str]) -> list[tuple[Side, str]]:
    return list(zip(SIDES, ("full", *methods), strict=False))


def _words(job: Job, view: View) -> str:
    answering = view.state == "running" and view.sides and view.sides[0].tokens and view.fraction is None
    if answering and not job.cancelled:
        sides = "Both sides" if len(view.sides) == 2 else f"All {len(view.sides)} sides"
        return f"{sides} answer, token by token in turn"
    return work.words(job)


def _status_line(slot: "st.delta_generator.DeltaGenerator", words: str, fraction: float | None) -> None:
    if fraction is None:
        slot.markdown(f":gray[{escape(words)}]")
    else:
        slot.progress(min(max(fraction, 0.0), 1.0), text=escape(words))


def ending(job: Job | None, methods: Sequence[str]) -> None:
    """Say how the newest comparison ended when its result does not say it; what a failed one had written is shown."""
    work.ending(CompareRequest)
    if job is None or job.live or job.view.state != "failed" or not any(side.text for side in job.view.sides):
        return
    st.caption("What was computed until then:")
    for column, (side, method), part in zip(st.columns(1 + len(methods)), _sides(methods), job.view.sides, strict=True):
        with column:
            frame(side, method, text=part.text, lettered=len(methods) > 1).text(part.text)
