"""The Methods page's search for the smallest cache within limits."""

from typing import Final

import streamlit as st

from app.engine.library import import_library
from app.methods import view as methods
from app.methods.request import compare_settings
from app.recommend import charts
from app.recommend import request as measure
from app.recommend.request import RecommendRequest
from app.tab import state
from app.tab.requests import RequestError
from app.ui import columns, definitions, page, work
from app.ui.panes import escape
from turboquant.experiments.recommendation import Recommendation
from turboquant.records.metrics import metric

_URL: Final = "query-params"
_START = measure.RecommendChoices()


def section() -> None:
    """Limits, the button, and what was found."""
    st.subheader("Recommend a setting", anchor=False, help=definitions.RECOMMENDED)
    st.markdown(
        "How few bits will do for you? Say how far predictions may move. The search tries recipes, bits of keys and "
        "values and bits of single layers on the first half of a text, and the smallest cache that stays within the "
        "limits must do so on the second half as well."
    )
    _controls()
    plan, refusal = "", None
    try:
        plan = escape(measure.describe(_request()))
    except RequestError as error:
        refusal = escape(str(error))
    work.bar(
        "Recommend",
        _request,
        plan=plan,
        key="recommend_run",
        disabled=refusal,
        shortcuts=own_text(),
    )
    if newest := state.job_of(RecommendRequest):
        job, _ = newest
        if job.live:
            work.watch(job)
            return
        work.ended(job)
        if job.view.state == "failed":
            return
    if (found := state.recommendation()) is not None:
        _show(*found)


def own_text() -> bool:
    """Is a text typed here? Then Ctrl + Enter in its box starts the search, and no other work on the page."""
    return bool(st.session_state.get("recommend_own"))


def _controls() -> None:
    left, right = st.columns(2, gap="medium")
    left.selectbox(
        f"{metric('kl_mean').title} at most ({metric('kl_mean').unit})",
        measure.LIMITS,
        index=measure.LIMITS.index(_START.kl),
        key="recommend_kl",
        bind=_URL,
        help=metric("kl_mean").help,
    )
    right.number_input(
        f"{metric('same_top_pct').heading} at least (percent)",
        0,
        100,
        _START.same,
        key="recommend_same",
        bind=_URL,
        help=metric("same_top_pct").help,
    )
    own = st.toggle(
        "Text of my own",
        key="recommend_own",
        bind=_URL,
        help="Otherwise the texts chosen above are read. The context above is the length of what is read at once.",
    )
    if own:
        st.text_area(
            "Text",
            height=160,
            max_chars=state.config().max_prompt_chars,
            key="recommend_text",
            persist_state="session",
            placeholder="Paste a text of the kind that your model reads: a page or more",
            help="It is read for this tab alone, and is no part of the copied link.",
        )


def _request() -> RecommendRequest:
    import_library()
    chosen = measure.said({str(key): value for key, value in st.session_state.items()})
    asked = methods.MEASUREMENT.said()
    return measure.request(chosen, asked, state.choices(), state.config(), state.searched())


def _show(found: Recommendation, cached: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        page.tag("cached" if cached else "measured")
        page.downloads("recommendation", [page.File("As JSON", ".json", "application/json", found.model_dump_json)])
    if found.method is None:
        st.warning(escape(found.sentence), icon=":material/block:")
    else:
        st.markdown(escape(found.sentence))
        if found.caution:
            st.caption(found.caution)
        st.code(found.method, language=None, wrap_lines=True)
        _use(found.method)
        _memory(found)
    _evidence(found)


def _use(method: str) -> None:
    # A link's parameters would not reach the sidebar's widgets, which are on this page already.
    if st.button(
        "Use it in Compare",
        icon=":material/compare:",
        key="recommend_use",
        on_click=state.use,
        kwargs=compare_settings(method, state.choices()),
    ):
        st.switch_page(page.PAGES / "compare.py", query_params={})  # bound parameters cannot be cleared otherwise


def _memory(found: Recommendation) -> None:
    st.markdown("**What it holds**")
    number = st.column_config.NumberColumn
    st.dataframe(
        charts.memory(found),
        hide_index=True,
        key="recommend_memory",
        alt="Bytes of the recommended cache and of a full one at several contexts.",
        column_config={
            "tokens": number(format="localized"),
            **columns.figures(*charts.MEMORY),
        },
    )


def _evidence(found: Recommendation) -> None:
    st.markdown("**Evidence**", help=definitions.HELD_OUT)
    st.dataframe(
        charts.evidence(found),
        hide_index=True,
        key="recommend_evidence",
        alt="Every method that was measured, with its KL, the interval, agreement and bits.",
        column_config={
            **columns.figures(*charts.EVIDENCE),
        },
    )
    st.caption(
        f"Sizes are estimated at {found.tokens:,} tokens. "
        f"{found.measured} of {found.candidates} methods were measured, the others need not be: they are larger than "
        "one that passes, or have no more bits than one that fails. " + escape(measure.source(found))
    )
