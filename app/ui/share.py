"""Taking a run along: exports, import, the link to its settings, and which run is shown."""

from collections.abc import Mapping, Sequence

import streamlit as st

from app.config import AppConfig
from app.tab import state
from app.tab.requests import BIT_CHOICES, SAME, Choices, RequestError, defaults, has_window, method_text, query
from app.tab.runs import Run, together
from app.ui import page
from app.ui.panes import LETTERS
from turboquant.methods import BitsMethod, parse_method
from turboquant.records.comparison import Comparison

ORIGINS = {"measured": "this tab", "recorded": "recorded", "imported": "imported"}


def files(run: Run, letter: str = "") -> list[page.File]:
    """The exports of one run; a `letter` tells those of two apart."""
    name, mark = (f"{letter}: ", f"-{letter}") if letter else ("", "")
    return [
        page.File(f"{name}Run as JSON", f"{mark}.json", "application/json", run.to_json),
        page.File(f"{name}Report as Markdown", f"{mark}.md", "text/markdown", run.to_markdown),
        page.File(f"{name}Tokens as CSV", f"{mark}-tokens.csv", "text/csv", run.to_csv),
        page.File(f"{name}Heads as CSV", f"{mark}-heads.csv", "text/csv", run.heads_csv),
    ]


def buttons(runs: Sequence[Run]) -> None:
    """The link to the page and the exports of what it shows."""
    page.copy_link()
    letters = LETTERS if len(runs) > 1 else ("",)
    made = [file for run, letter in zip(runs, letters, strict=False) for file in files(run, letter)]
    page.downloads(f"comparison-{runs[0].id}", made)


def label(run: Run) -> str:
    """A run in a list of runs, with where it comes from."""
    cached = ", cached" if run.cached else ""
    return f"{run.label} ({ORIGINS[run.origin]}{cached})"


def linked(key: str, runs: Mapping[str, Run], default: str | None) -> str | None:
    """The run a widget begins with: of the address where it names one, else the one picked before, else `default`.

    Run ids are not bound to the address by the widget, which would put labels there; `note_address` writes them.
    """
    asked = st.query_params.get(key)
    if asked is not None and asked != st.session_state.get(f"{key}_written"):
        if asked in runs:
            st.session_state[key] = asked
        else:
            st.info(
                "The run of this link is not kept here; runs stay in the tab that made them.",
                icon=":material/link_off:",
            )
    if st.session_state.get(key) not in runs:
        st.session_state[key] = default
    return st.session_state[key]


def note_address(key: str, picked: str | None, default: str | None) -> None:
    """Put the picked run into the address, or take it out where it is what the page shows anyway."""
    if picked is not None and picked != default:
        st.query_params[key] = picked
    elif key in st.query_params:
        del st.query_params[key]
    st.session_state[f"{key}_written"] = st.query_params.get(key)


def chooser() -> list[Run]:
    """The run to show with those asked for together with it: the newest of this tab, unless another is picked."""
    runs = state.all_runs()
    default = next(iter(runs), None)
    picked = linked(state.SHOWN, runs, default)
    if len(runs) > 1:
        picked = st.selectbox(
            "Run shown",
            list(runs),
            format_func=lambda run_id: label(runs[run_id]),
            key=state.SHOWN,
            persist_state="session",
        )
    note_address(state.SHOWN, picked, default)
    return together(runs[picked], runs.values()) if picked is not None else []


def importer() -> None:
    """Open a run that was exported elsewhere."""
    with st.expander("Open an exported run", icon=":material/upload_file:"):
        st.file_uploader("Run as JSON", type="json", key="upload", on_change=state.take_upload, max_upload_size=20)


def settings_query(c: Comparison, config: AppConfig) -> str | None:
    """The query of a link that asks for the same comparison again; None where the app's settings cannot say it."""
    start = defaults(config)
    try:
        method = parse_method(c.compressed.method)
    except ValueError:
        return None
    if not isinstance(method, BitsMethod) or (c.settings.top_p, c.settings.top_k, c.settings.stop) != (1.0, 0, ()):
        return None
    plain = method.bits in BIT_CHOICES
    window = has_window(method.name)
    choices = Choices(
        model=c.model.name,
        bits=method.bits if plain else start.bits,  # type: ignore[arg-type]
        recipe=method.name,
        key_bits=SAME if plain else str(method.key_bits),
        value_bits=SAME if plain else str(method.value_bits),
        residual=method.residual_length if window else start.residual,
        sinks=method.sink_length if window else start.sinks,
        rotation=method.seed,
        tokens=c.settings.max_new_tokens,
        seed=c.settings.seed,
        temperature=c.settings.temperature,
        weights=start.weights,
        chat=c.chat,
    )
    try:
        same = method_text(choices) == str(method)
    except RequestError:
        return None
    return query(choices, c.prompt, config) if same else None
