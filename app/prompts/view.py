"""The Prompts page's parts: where the prompts come from, what a run of them takes, and what came of it."""

import streamlit as st

from app.config import AppConfig
from app.engine.job import Job
from app.prompts import charts
from app.prompts.request import MAX_BYTES, SUFFIXES, PromptsRequest, example_set, prompts_request, read_file, read_typed
from app.prompts.rows import FIGURES, SIZES, PromptRow, rows, table, to_csv, to_json, to_markdown
from app.tab import state
from app.tab.requests import RequestError, method_text
from app.tab.runs import Run
from app.tab.verdict import verdict
from app.ui import columns, figures, page, work
from app.ui.panes import code, escape
from turboquant.records.metrics import metric

SOURCES = ("Examples", "Typed", "File")
_TEXT, _FILE, _READ, _JOB = "prompts_text", "prompts_file", "prompts_read", "prompts_job"


def chooser() -> tuple[tuple[str, ...], str | None]:
    """The prompts that were chosen, and if there are none, why (as Markdown)."""
    source = st.segmented_control(
        "Prompts from", SOURCES, default=SOURCES[0], required=True, key="prompts_source", bind="query-params"
    )
    prompts, wrong = {"Typed": _typed, "File": _file}.get(str(source), _examples)()
    if prompts:
        name = f"{len(prompts)} prompt{'' if len(prompts) == 1 else 's'}, as read"
        with st.expander(name, icon=":material/format_list_numbered:", key="prompts_list", on_change="rerun") as shown:
            if shown.open:
                for number, prompt in enumerate(prompts, start=1):
                    st.caption(f"Prompt {number}")
                    st.code(prompt, language=None, wrap_lines=True, height="content" if len(prompt) < 600 else 160)
    return prompts, wrong and escape(wrong)


def _examples() -> tuple[tuple[str, ...], str | None]:
    st.caption("The example prompts of the Compare page: short and long ones, a needle, code and arithmetic.")
    return example_set(), None


def _typed() -> tuple[tuple[str, ...], str | None]:
    text = st.text_area(
        "Prompts",
        key=_TEXT,
        height=180,
        max_chars=MAX_BYTES,
        placeholder="One prompt a line",
        help="One prompt a line. With blank lines between them, prompts may have several lines; with lines of three "
        "hyphens between them, blank lines as well.",
        persist_state="session",
    )
    if not text.strip():
        return (), "Write at least one prompt."
    try:
        return read_typed(text, state.config()), None
    except RequestError as error:
        return (), str(error)


def _file() -> tuple[tuple[str, ...], str | None]:
    config = state.config()
    st.file_uploader(
        "File with prompts",
        type=list(SUFFIXES),
        key=_FILE,
        on_change=_read_upload,
        max_upload_size=1,
        help=_rules(config),
    )
    name, prompts, wrong = st.session_state.get(_READ, ("", (), None))
    if name:
        st.caption(f"Read from {escape(name)}.")
    return prompts, wrong if name else "Choose a file."


def _rules(config: AppConfig) -> str:
    return (
        ".txt: one prompt a line, or blocks between blank lines or lines of three hyphens. .csv: the column named "
        "prompt, whatever the separator; without a header, one prompt a row. .jsonl: a text in quotes or an object "
        f"with a prompt on each line. At most {MAX_BYTES // 1_000_000} MB, {config.max_prompts} prompts and "
        f"{config.max_prompt_chars:,} characters each."
    )


def _read_upload() -> None:
    """Read the upload once; what was read stays when the page is left, the file does not."""
    upload = st.session_state.get(_FILE)
    if upload is None:
        st.session_state.pop(_READ, None)
        return
    try:
        read, wrong = read_file(upload.getvalue(), upload.name, state.config()), None
    except RequestError as error:
        read, wrong = (), str(error)
    st.session_state[_READ] = (upload.name, read, wrong)


def request(prompts: tuple[str, ...]) -> PromptsRequest:
    """The request of the button."""
    return prompts_request(state.choices(), prompts, state.config())


def plan(prompts: tuple[str, ...]) -> str:
    """What Run does and how long it takes, where that can be estimated."""
    choices = state.choices()
    try:
        method = method_text(choices)
    except RequestError as error:
        return f":material/info: {escape(str(error))}"
    count = f"{len(prompts)} prompt{'' if len(prompts) == 1 else 's'}"
    return (
        f"{count} · {code(method)} against the full cache · up to {choices.tokens} new tokens each · {_time(prompts)}"
    )


def _time(prompts: tuple[str, ...]) -> str:
    choices, job = state.choices(), last()
    if job is not None and not job.live and job.request.model == choices.model and job.running_s > 0:
        measured = len(job.results) - len(job.cached)
        if measured > 0:
            return f"about {work.duration(len(prompts) * job.running_s / measured)} (estimated from the last set)"
    for run in state.runs().all():
        c = run.comparison
        speeds = (c.original.tokens_per_second, c.compressed.tokens_per_second)
        if run.origin == "measured" and c.model.name == choices.model and all(speeds):
            seconds = len(prompts) * choices.tokens * sum(1 / speed for speed in speeds if speed)
            about = work.duration(seconds)
            return f"at most about {about} for the answers (estimated from a run of this tab), then measuring"
    return "time unknown until a first run with this model"


def last() -> Job | None:
    """The newest set of this tab, also when other work came after it."""
    if newest := state.job_of(PromptsRequest):
        st.session_state[_JOB] = newest[0]
    return st.session_state.get(_JOB)


def ending() -> None:
    """Say what was wrong with the last click, and how the newest set ended if not well."""
    work.ending(PromptsRequest)


def kept(job: Job) -> list[Run]:
    """The runs of that set which this tab still has."""
    return [run for run in state.runs().all() if run.group == f"set-{job.id}"]


def results(job: Job) -> None:
    """What the set has given so far: chart, table, the chosen row, exports."""
    found = rows(job, kept(job))
    measured = [row for row in found if row.mean_kl is not None]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Prompts by damage", anchor=False, width="content")
        if job.results:
            page.tag("cached" if len(job.cached) == len(job.results) else "measured")
        st.caption(f"{escape(job.request.model)}, {code(*job.request.methods)}", width="content")
        files = [
            page.File("Table as CSV", ".csv", "text/csv", lambda: to_csv(found)),
            page.File("All runs as JSON", ".json", "application/json", lambda: to_json(found)),
            page.File("Report as Markdown", ".md", "text/markdown", lambda: to_markdown(found)),
        ]
        page.downloads(f"prompts-{job.id}", files, disabled=not any(row.run for row in found))
    st.caption(
        f"Sorted by {metric('mean_kl').title}. "
        "Rows without a figure come last and say why; “nothing packed” means that the text is so "
        "short that all of it stays exact."
    )
    _table(job, found)
    if measured:
        kl = metric("mean_kl")
        figures.show(f"{kl.heading}, prompt by prompt", charts.kl_per_prompt(found), "prompts_kl", help=kl.help)


def _table(job: Job, found: list[PromptRow]) -> None:
    number = st.column_config.NumberColumn
    chosen = st.dataframe(
        table(found),
        hide_index=True,
        key=f"prompts_table_{job.id}_{len(job.results)}",
        on_select="rerun",
        selection_mode="single-row",
        placeholder="-",
        column_config={
            "nr": number("nr", width="small", help="Place in the set"),
            "prompt": st.column_config.TextColumn(width="medium"),
            "first difference": number(format="%d", help="Token of the answer where the two first differ, from 0"),
            **columns.figures("mean_kl", *FIGURES, *SIZES, "prompt_tokens"),
            metric("answer_tokens").column: number(format="%d", help="Of the original answer"),
        },
        alt="One row a prompt, the most damaged first; choosing a row offers to open its run.",
    )
    picked = [row for row in chosen["selection"]["rows"] if row < len(found)]
    if not picked:
        st.caption("Choose a row to open its run.")
        return
    _open(found[picked[0]])


def _open(row: PromptRow) -> None:
    if row.run is None:
        st.info(f"Prompt {row.number} has no run: {row.reason}.", icon=":material/info:")
        return
    with st.container(border=True):
        st.markdown(f"**Prompt {row.number}: {escape(verdict(row.run.comparison))}**")
        with st.container(horizontal=True):
            st.page_link(
                page.PAGES / "compare.py",
                label="Open in Compare",
                icon=":material/compare:",
                query_params={state.SHOWN: row.run.id},
            )
            if row.run.comparison.heads:
                st.page_link(
                    page.PAGES / "heads.py",
                    label="Open in Heads",
                    icon=":material/grid_on:",
                    query_params={"heads_run": row.run.id},
                )
