"""The Session page's building blocks: turns as two columns of messages, the turn now being answered, forks, figures."""

import streamlit as st

from app.engine.job import Job
from app.session import charts, transcript
from app.session.conversation import OPENINGS, SIDES, Conversation, SideName, TurnRequest, begin, turn_request
from app.tab import state
from app.tab.requests import RequestError
from app.tab.runs import Run
from app.tab.verdict import human_bytes
from app.ui import definitions, figures, work
from app.ui.page import PAGES, File, copy_link, downloads, tag
from app.ui.panes import escape
from turboquant.records.metrics import metric

KEY, UNSENT = "conversation", "chat_unsent"
_LONG = 900
_FORKS = {"original": "Go on with the original's answer", "compressed": "Go on with the compressed answer"}
_AVATARS = {"original": ":material/database:", "compressed": ":material/compress:"}


def current() -> Conversation:
    """The conversation of this tab; one without turns follows the sidebar when the first message is sent."""
    talk = state.conversation()
    return talk if talk is not None else Conversation("", "", "", True)


def turn_job() -> Job | None:
    """The newest job of this tab if it is a turn of the conversation shown."""
    newest = state.job_of(TurnRequest)
    return newest[0] if newest and newest[1].conversation is state.conversation() else None


def _heading(side: SideName, method: str) -> str:
    if side == "original":
        return "**:blue[Original]** · full KV cache"
    return f"**:violet[Compressed]** · `{method}`"


def _busy() -> bool:
    return (job := turn_job()) is not None and job.live


# --- callbacks


def send(prompt: str) -> None:
    """Ask for the next turn; a message that is refused is kept to be sent again."""

    def make() -> TurnRequest:
        talk = state.conversation()
        if talk is None or not talk.turns:
            talk = begin(state.choices(), state.config())
        request = turn_request(talk, prompt, state.choices(), state.config())
        if not state.busy():
            st.session_state[KEY] = talk
        return request

    state.submit(make)
    st.session_state[UNSENT] = prompt if state.notice() else None


def send_typed() -> None:
    """Send what stands in the message box."""
    send(str(st.session_state.get("chat_message") or ""))


def start_anew() -> None:
    """Forget the conversation and free its caches."""
    talk = state.conversation()
    if talk is not None and not _busy():
        talk.close()
        st.session_state.pop(KEY, None)
        st.session_state[UNSENT] = None


def fork(side: SideName) -> None:
    """Go on with one side's answers in both caches."""
    talk = state.conversation()
    if talk is not None and not _busy():
        talk.fork(side)


def open_run(talk: Conversation, index: int, run_id: str) -> None:
    """Keep a turn's comparison as a run of this tab."""
    state.add_run(Run(id=run_id, group=f"chat-{talk.id}", comparison=talk.turns[index].comparison), show=False)


# --- the conversation


def settings(talk: Conversation) -> None:
    """What the conversation is held with, what it holds in memory, and how to take it along or leave it."""
    template = "chat template" if talk.chat else "plain text"
    st.markdown(
        f"Held with **{escape(talk.model)}** · weights {escape(talk.weights)} · `{talk.method}` · {template}. "
        "These are fixed by the first message; length, temperature and seed of each answer follow the sidebar."
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        tag("measured")
        st.button(
            "New conversation",
            icon=":material/add_comment:",
            key="chat_new",
            on_click=start_anew,
            disabled=_busy(),
            help="Forgets this conversation and frees its caches. Export it first if you want to keep it.",
        )
        copy_link()
        downloads(
            f"conversation-{talk.id}",
            [
                File("Transcript as JSON", ".json", "application/json", lambda: transcript.to_json(talk)),
                File("Transcript as Markdown", ".md", "text/markdown", lambda: transcript.to_markdown(talk)),
                File("Turns as CSV", ".csv", "text/csv", lambda: transcript.to_csv(talk)),
            ],
        )
    st.caption(f"{transcript.memory_words(talk)} The link carries the settings only; exports carry the conversation.")
    _other_settings(talk)


def _other_settings(talk: Conversation) -> None:
    try:
        wanted = begin(state.choices(), state.config())
    except RequestError as error:
        st.warning(escape(str(error)), icon=":material/info:")
        return
    if wanted.fixed == talk.fixed:
        return
    names = ("the model", "the weights", "the method", "the chat template")
    changed = [name for name, old, new in zip(names, talk.fixed, wanted.fixed, strict=True) if old != new]
    st.info(
        f"The sidebar now asks for other settings ({', '.join(changed)}). They take a new conversation; this one goes "
        "on with its own.",
        icon=":material/info:",
    )
    st.button(
        "New conversation with the sidebar's settings",
        icon=":material/add_comment:",
        key="chat_new_settings",
        on_click=start_anew,
        disabled=_busy(),
    )


def openings() -> None:
    """Where nothing has been said yet: three first messages."""
    st.info("Nothing has been said yet. Type a message below, or begin with one of these.", icon=":material/info:")
    name = st.pills("Openings", list(OPENINGS), key="chat_opening", bind="query-params")
    if name not in OPENINGS:
        return
    with st.container(border=True):
        st.text(OPENINGS[name].prompt)
    st.caption("A second message that goes on well from it:")
    st.text(OPENINGS[name].then)
    st.button(
        "Send this opening",
        icon=":material/send:",
        key="chat_send_opening",
        on_click=send,
        args=(OPENINGS[name].prompt,),
        disabled=state.busy(),
    )


def _message(text: str) -> None:
    with st.chat_message("user", avatar=":material/person:"):
        if len(text) > _LONG:
            with st.expander(f"A message of {len(text):,} characters"):
                st.text(text)
        else:
            st.text(text)


def history(talk: Conversation) -> None:
    """Every answered turn: the message, both answers, and what the caches did."""
    for turn in talk.turns:
        number = turn.index + 1
        st.markdown(f"**Turn {number}**")
        _message(turn.comparison.prompt)
        for column, side in zip(st.columns(2), SIDES, strict=True):
            with column, st.chat_message(side, avatar=_AVATARS[side]):
                st.markdown(_heading(side, talk.method))
                st.text(getattr(turn.comparison, side).text or "(no text)")
                st.caption(escape(transcript.answer_words(turn, side)))
                st.caption(escape(f"Before it: {transcript.context_words(getattr(turn, side))}."))
        _about(talk, number - 1)


def _about(talk: Conversation, index: int) -> None:
    turn = talk.turns[index]
    words = transcript.turn_words(turn, talk.forks.get(index))
    st.caption(escape(words))
    run_id = f"{talk.id}-turn-{index + 1}"
    if state.runs().get(run_id) is None:
        st.button(
            f"Open turn {index + 1} as a run",
            icon=":material/open_in_new:",
            key=f"chat_open_{index}",
            type="tertiary",
            on_click=open_run,
            args=(talk, index, run_id),
            help="Keeps this turn's comparison as a run, to be opened on other pages with its heads, tokens and bytes.",
        )
        return
    with st.container(horizontal=True):
        for name, icon, key in (("compare", "compare", state.SHOWN), ("heads", "grid_on", "heads_run")):
            if name == "compare" or turn.comparison.heads:
                st.page_link(
                    PAGES / f"{name}.py",
                    label=f"Turn {index + 1} in {name.capitalize()}",
                    icon=f":material/{icon}:",
                    query_params={key: run_id},
                )


def ending(talk: Conversation) -> None:
    """How the last message fared, if it was not answered; it can be sent again."""
    if notice := state.notice():
        st.warning(escape(notice), icon=":material/info:")
    unsent = st.session_state.get(UNSENT)
    job = turn_job()
    if job is not None and not job.live and not unsent:
        unsent = _unanswered(job)
    if not unsent:
        return
    st.caption(f"{'The conversation is as it was before. ' if talk.turns else ''}Your message is kept:")
    _message(unsent)
    st.button(
        "Send it again",
        icon=":material/refresh:",
        key="chat_again",
        on_click=send,
        args=(unsent,),
        disabled=state.busy(),
    )


def _unanswered(job: Job) -> str | None:
    """Say why a turn was not answered, and return its message; None if it was."""
    prompt = str(getattr(job.request, "prompt", ""))
    turn = job.results.get(0)
    if job.view.state == "failed":
        words = escape(job.view.error or "The run failed.")
        st.warning(f"This message was not answered. {words}", icon=":material/warning:")
        return prompt
    if turn is None or not turn.kept:
        reason = f" by {escape(job.stop_reason)}" if job.stop_reason else ""
        st.info(f"Stopped{reason} before both sides had answered; this turn is undone.", icon=":material/stop_circle:")
        return prompt
    if job.stop_reason:
        st.info(f"Stopped by {escape(job.stop_reason)}; what was there is kept.", icon=":material/stop_circle:")
    return None


def forks(talk: Conversation) -> None:
    """Go on with one side's answers in both caches."""
    if talk.forked:
        st.info(
            f"The next message continues the {talk.forked} answer in both caches; the other cache follows then.",
            icon=":material/fork_right:",
        )
        return
    parted = talk.parted
    with st.container(horizontal=True, vertical_alignment="center"):
        for side in SIDES:
            st.button(
                _FORKS[side],
                icon=":material/fork_right:",
                key=f"chat_fork_{side}",
                on_click=fork,
                args=(side,),
                disabled=not parted or _busy(),
                help="Both sides take this side's conversation as theirs from the next message on. It stays so.",
            )
        words = (
            "The answers have parted, so each side goes on with its own conversation unless you pick one for both."
            if parted
            else "Both sides hold the same conversation, so there is nothing to choose."
        )
        st.caption(words, width="stretch")


def figures_of(talk: Conversation) -> None:
    """What both caches hold and how far the compressed one drifts, turn by turn."""
    st.subheader("Turn by turn", anchor=False)
    turns = talk.turns
    left, right = st.columns(2, gap="medium")
    with left:
        figures.show(
            "KV cache at the end of each turn", charts.growth(turns), "chat_growth", help=definitions.TURN_BYTES
        )
        figures.show(
            f"{metric('heads_at_risk_pct').heading} and changed tokens",
            charts.shares(turns),
            "chat_shares",
            help=metric("heads_at_risk_pct").help,
        )
    with right:
        figures.show(f"Drift: {metric('mean_kl').title}", charts.kl(turns), "chat_kl", help=definitions.TURN_KL)
        figures.show("How long both say the same", charts.agreement(turns), "chat_same", help=definitions.TURN_SAME)
    table = st.expander("All figures of all turns", icon=":material/table_rows:", key="chat_table", on_change="rerun")
    if table.open:
        table.dataframe(transcript.rows(talk), hide_index=True, alt="One row a turn with every figure of it.")


# --- the turn now being answered


def stream(job: Job) -> None:
    """Draw a live turn until it ends. A click anywhere interrupts the drawing, not the turn."""
    st.markdown(f"**Turn {len(current().turns) + 1}**")
    _message(str(getattr(job.request, "prompt", "")))
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Stop",
            icon=":material/stop_circle:",
            key="chat_stop",
            on_click=state.stop,
            shortcut="Esc",
            help="Keeps what both sides have said so far.",
        )
        line = st.empty()
    texts, captions = [], []
    for column, side in zip(st.columns(2), SIDES, strict=True):
        with column, st.chat_message(side, avatar=_AVATARS[side]):
            st.markdown(_heading(side, current().method))
            texts.append(st.empty())
            captions.append(st.empty())
    drawn: dict[object, object] = {}
    for _ in job.stream():
        view = job.view
        words = work.words(job)
        if view.state == "running" and view.fraction is None and any(part.tokens for part in view.sides):
            words = "Stopping; what is there is kept" if job.cancelled else "Both sides answer, token by token in turn"
        if words != drawn.get("line"):
            drawn["line"] = words
            line.caption(escape(words))
        for index, part in enumerate(view.sides[:2]):
            if part != drawn.get(index):
                drawn[index] = part
                texts[index].text(part.text or "…")
                held = f"{transcript.tokens(part.tokens)} · {human_bytes(part.cache_bytes)} held"
                captions[index].caption(held if part.tokens else "reading")
