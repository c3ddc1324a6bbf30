"""The sidebar: what to compare, all of it in the address, and what the engine is doing."""

from collections.abc import Mapping
from itertools import groupby
from typing import Final

import streamlit as st
from streamlit.navigation.page import Page

from app.config import WEIGHTS
from app.engine.contract import EngineStatus
from app.navigation import FOLDER, Entry
from app.tab import state
from app.tab.requests import (
    BIT_CHOICES,
    EACH_BITS,
    MAX_EXACT,
    SECOND_CHOICES,
    Choices,
    defaults,
    has_window,
    recipes,
    selectable_models,
)
from app.ui.panes import escape
from app.ui.work import words
from turboquant.methods import METHODS
from turboquant.models.registry import MODELS

_URL: Final = "query-params"


def render(pages: Mapping[Entry, Page], *, settings: bool) -> None:
    """Draw the sidebar; the settings of runs stand on the pages that use them."""
    with st.sidebar:
        _navigation(pages)
        if settings:
            _settings()
        _status()


def _navigation(pages: Mapping[Entry, Page]) -> None:
    """The links to the pages. Streamlit's own list of sections is no valid list to a screen reader."""
    with st.container(gap="xxsmall"):
        for section, entries in groupby(pages, key=lambda entry: entry.section):
            if section:
                st.caption(section)
            for entry in entries:
                st.page_link(pages[entry], label=entry.title, icon=f":material/{entry.icon}:")


def _settings() -> None:
    config = state.config()
    start = defaults(config)
    _model(start)
    st.segmented_control(
        "Bits",
        BIT_CHOICES,
        default=start.bits,
        required=True,
        key="bits",
        bind=_URL,
        help="Bits of one key or value code in the compressed cache. Fewer bits save more and change more.",
    )
    st.selectbox(
        "Second setting",
        SECOND_CHOICES,
        key="second",
        bind=_URL,
        index=None,
        accept_new_options=True,
        placeholder="none",
        help="Another method beside the first, such as turboquant:bits=3; pick one or type one. Compare, Needle and "
        "Benchmarks use it.",
    )
    _sampling(start, config.max_new_tokens)
    with st.expander("Advanced", icon=":material/tune:"):
        _advanced(start)


def _model(start: Choices) -> None:
    config = state.config()
    st.selectbox(
        "Model",
        selectable_models(config),
        key="model",
        bind=_URL,
        accept_new_options=config.allow_any_model,
        placeholder="Pick a model",
        disabled=config.lock_model,
        help="Type to search the names" + (", or type a hub id (org/name)." if config.allow_any_model else "."),
    )
    spec = MODELS.get(str(st.session_state.get("model")))
    if spec is not None:
        size = f"{spec.parameters * 1000:.0f} million" if spec.parameters < 1 else f"{spec.parameters:g} billion"
        gated = ", to be accepted on its page" if spec.gated else ""
        st.caption(f"{size} parameters. {spec.note.rstrip('.')}. Licence: {spec.licence}{gated}.")


def _sampling(start: Choices, most: int) -> None:
    left, right = st.columns(2)
    left.number_input(
        "Max new tokens",
        1,
        most,
        start.tokens,
        16,
        key="tokens",
        bind=_URL,
        help="Each answer ends here at the latest.",
    )
    right.number_input(
        "Seed",
        0,
        2**31 - 1,
        start.seed,
        1,
        key="seed",
        bind=_URL,
        help="Of the sampling. Both answers use the same seed, each with its own generator.",
    )
    st.slider(
        "Temperature",
        0.0,
        2.0,
        start.temperature,
        0.1,
        key="temperature",
        bind=_URL,
        help="0 always takes the most likely token, so any difference between the answers comes from the cache.",
    )


def _advanced(start: Choices) -> None:
    st.selectbox("Recipe", recipes(), key="recipe", bind=_URL, help="How the cache is compressed.")
    recipe = str(st.session_state.get("recipe", start.recipe))
    if recipe in METHODS:
        st.caption(f"**{METHODS[recipe].title}.** {METHODS[recipe].summary} ({METHODS[recipe].reference})")
    left, right = st.columns(2)
    left.selectbox("Key bits", EACH_BITS, key="key_bits", bind=_URL, help="Bits of a key code; same: as Bits above.")
    right.selectbox(
        "Value bits", EACH_BITS, key="value_bits", bind=_URL, help="Bits of a value code; same: as Bits above."
    )
    fixed = not has_window(recipe)
    left.number_input(
        "Residual",
        0,
        MAX_EXACT,
        start.residual,
        16,
        key="residual",
        bind=_URL,
        disabled=fixed,
        help="The most recent tokens that stay exact. This recipe keeps none."
        if fixed
        else "The most recent tokens that stay exact.",
    )
    right.number_input(
        "Sinks",
        0,
        MAX_EXACT,
        start.sinks,
        1,
        key="sinks",
        bind=_URL,
        disabled=fixed,
        help="The first tokens that stay exact.",
    )
    left.number_input(
        "Rotation seed", 0, 2**31 - 1, start.rotation, 1, key="rotation", bind=_URL, help="Of the random rotation."
    )
    right.selectbox(
        "Weights",
        WEIGHTS,
        index=WEIGHTS.index(start.weights),
        key="weights",
        bind=_URL,
        help="How the model's weights are loaded. What was really loaded stands under each answer.",
    )
    st.toggle("Chat template", start.chat, key="chat", bind=_URL, help="Wrap the prompt as the model's chat turn.")


def _status() -> None:
    """One line about the engine or about this tab's work; it refreshes itself while that changes."""
    job = state.job()
    if job is not None and job.live:
        st.fragment(_work_line, run_every=1.0)()
        st.button("Stop this run", key="sidebar_stop", icon=":material/stop_circle:", on_click=state.stop)
        return
    waiting = state.engine().status().state in ("loading", "empty")
    st.fragment(_engine_line, run_every=1.0 if waiting else None)()


def _work_line() -> None:
    job = state.job()
    if job is None or not job.live:
        st.rerun(scope="app")
    st.page_link(
        FOLDER / f"{job.request.page}.py", label=f"{job.request.title} is at work", icon=":material/play_circle:"
    )
    st.caption(escape(words(job)))


def _engine_line() -> None:
    status = state.engine().status()
    if status.state == "loading":
        st.progress(min(max(status.fraction or 0.0, 0.0), 1.0), text=status.text or f"Loading {status.model}")
    else:
        st.caption(engine_words(status))


def engine_words(status: EngineStatus) -> str:
    """The engine's state in one line."""
    waiting = f" · {status.waiting} waiting" if status.waiting else ""
    if status.state == "empty":
        return f":material/radio_button_unchecked: No model is loaded yet{waiting}"
    words = {"ready": ":material/check_circle: Ready", "running": ":material/play_circle: Running"}[status.state]
    return " · ".join([words, *(str(part) for part in (status.model, status.weights, status.device) if part)]) + waiting
