"""The Runs page's parts: the history, what can be done with a run, and two runs side by side."""

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from app.runs import charts
from app.tab import state
from app.tab.runs import Run, zipped
from app.tab.verdict import columns as figures_of
from app.tab.verdict import provenance, verdict
from app.ui import columns, figures, page, share
from app.ui.panes import code, escape
from turboquant.records.metrics import metric

A, B, CHOSEN = "runs_a", "runs_b", "runs_chosen"
_VERSION = "runs_table_version"
_LISTED = ("mean_kl", "heads_at_risk_pct", "bytes")


def history(runs: Mapping[str, Run]) -> Run | None:
    """The table of all runs; returns the chosen one."""
    listed = list(runs.values())
    chosen = st.dataframe(
        pd.DataFrame([_line(run) for run in listed]),
        hide_index=True,
        key=f"runs_table_{len(listed)}_{st.session_state.get(_VERSION, 0)}",
        on_select="rerun",
        selection_mode="single-row",
        placeholder="-",
        column_config={
            "when": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm", help="UTC"),
            "prompt": st.column_config.TextColumn(width="medium"),
            "verdict": st.column_config.TextColumn(width="medium"),
            **columns.figures(*_LISTED),
        },
        alt="All runs, the newest of this tab first, then the recorded ones; choosing a row offers what can be done.",
    )
    picked = [row for row in chosen["selection"]["rows"] if row < len(listed)]
    return listed[picked[0]] if picked else None


def _line(run: Run) -> dict[str, object]:
    c = run.comparison
    return {
        "from": share.ORIGINS[run.origin] + (", cached" if run.cached else ""),
        "when": pd.to_datetime(c.environment.created, errors="coerce", utc=True),
        "prompt": " ".join(c.prompt.split())[:80],
        "model": c.model.name,
        "method": c.compressed.method,
        "verdict": verdict(c),
        **figures_of(c, _LISTED),
    }


def actions(run: Run) -> None:
    """What can be done with one run."""
    with st.container(border=True, key="runs_actions"):
        st.markdown(f"**{escape(verdict(run.comparison))}** {escape(share.label(run))}")
        with st.container(horizontal=True, vertical_alignment="center"):
            open_in("compare", "Open in Compare", "compare", state.SHOWN, run)
            if run.comparison.heads:
                open_in("heads", "Open in Heads", "grid_on", "heads_run", run)
            st.button("Pin as A", key="runs_pin_a", icon=":material/keep:", on_click=_pin, args=(A, run.id))
            st.button("Pin as B", key="runs_pin_b", icon=":material/keep:", on_click=_pin, args=(B, run.id))
            page.downloads(f"comparison-{run.id}", share.files(run))
            _link(run)
            if state.runs().get(run.id):
                with st.popover("Delete", icon=":material/delete:", key="runs_delete"):
                    st.markdown("Delete this run? It cannot be brought back.")
                    st.button("Delete it", key="runs_delete_one", on_click=_delete, args=([run.id],))


def open_in(name: str, label: str, icon: str, key: str, run: Run) -> None:
    """A link that opens the run on another page."""
    st.page_link(page.PAGES / f"{name}.py", label=label, icon=f":material/{icon}:", query_params={key: run.id})


def _pin(key: str, run_id: str) -> None:
    st.session_state[key] = run_id


def _delete(ids: Sequence[str]) -> None:
    for run_id in ids:
        state.runs().remove(run_id)
    st.session_state[_VERSION] = st.session_state.get(_VERSION, 0) + 1


def _link(run: Run) -> None:
    """A link that asks for the same comparison; the results themselves do not fit into an address."""
    with st.popover("Share link", icon=":material/link:", key="runs_link"):
        query = share.settings_query(run.comparison, state.config())
        if query is None:
            st.caption("The method or the sampling of this run cannot be set on the pages; export the run instead.")
            return
        st.caption("Opens Compare with the settings and the prompt of this run, to measure it again.")
        base = (st.context.url or "").split("?")[0].removesuffix("/runs")
        st.code(f"{base}/compare?{query}", language=None, wrap_lines=True)
        if run.comparison.prompt and "prompt=" not in query and "example=" not in query:
            st.caption("The prompt is too long for an address, so the link holds the settings only; export the run.")


def keep_or_clear() -> None:
    """All own runs as one file, and deleting them all."""
    own = state.runs().all()
    with st.container(horizontal=True):
        st.download_button(
            f"All {len(own)} own runs as a zip of JSON" if len(own) != 1 else "The one own run as a zip of JSON",
            lambda: zipped(own),
            "comparisons.zip",
            "application/zip",
            on_click="ignore",
            key="runs_zip",
            icon=":material/folder_zip:",
            disabled=not own,
        )
        with st.popover("Delete all own runs", icon=":material/delete_sweep:", key="runs_clear", disabled=not own):
            st.markdown("Delete all runs of this tab? They cannot be brought back. Recorded runs stay.")
            st.button("Delete them all", key="runs_delete_all", on_click=_delete, args=([r.id for r in own],))


def pins(runs: Mapping[str, Run]) -> tuple[Run, Run] | None:
    """The two pinned runs, both in the address; None while there are not two."""
    if len(runs) < 2:
        st.caption("Two runs can be compared here once there are two.")
        return None
    picked: list[Run] = []
    for key, name, column, default in zip((A, B), "AB", st.columns(2), list(runs)[:2], strict=True):
        with column:
            share.linked(key, runs, default)
            run_id = st.selectbox(
                f"Run {name}",
                list(runs),
                format_func=lambda one: share.label(runs[one]),
                key=key,
                persist_state="session",
            )
            share.note_address(key, run_id, default)
            picked.append(runs[str(run_id)])
    return picked[0], picked[1]


def side_by_side(first: Run, second: Run) -> None:
    """Texts, figures and KL curves of two runs."""
    if first.id == second.id:
        st.info("A and B are the same run; pick another one for either.", icon=":material/info:")
        return
    other = "" if first.comparison.prompt == second.comparison.prompt else " Their prompts differ."
    apart = charts.settings_apart(first, second)
    if apart:
        words = "; ".join(f"{name}: {code(a)} in A, {code(b)} in B" for name, a, b in apart)
        st.markdown(f"**Asked differently:** {words}.{other}")
    else:
        st.markdown(f"Both runs were asked with the same settings.{other}")
    for column, (name, run) in zip(st.columns(2), (("A", first), ("B", second)), strict=True):
        with column:
            _texts(name, run)
    table = charts.figure_table(first, second)
    st.markdown("**Figures**", help="Quality and memory figures need packed tokens; a run without them has none.")
    st.dataframe(
        table, hide_index=True, alt="Figures of both runs, their difference, B minus A, and in which run each is better"
    )
    if first.comparison.tokens or second.comparison.tokens:
        figures.show("KL per token", charts.kl_of_both(first, second), "runs_kl", help=metric("mean_kl").help)


def _texts(name: str, run: Run) -> None:
    c = run.comparison
    colour = "violet" if name == "A" else "green"
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"**:{colour}[{name}]** · {code(c.compressed.method)}", width="content")
        page.tag("cached" if run.cached else run.origin)
    st.markdown(f"**{escape(verdict(c))}**")
    for title, text in (
        ("Prompt", c.prompt),
        ("Original answer", c.original.text),
        ("Compressed answer", c.compressed.text),
    ):
        st.caption(title)
        st.container(border=True).text(text or "(no text)")
    st.caption(escape(provenance(c, "compressed")))
