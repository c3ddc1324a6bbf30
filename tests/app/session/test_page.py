"""The Session page with a real tiny model behind the queue, and with a stand-in that fails or waits on demand."""

import html
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from app.engine import backend
from app.engine.engine import Engine
from app.engine.job import Job
from app.session.conversation import OPENINGS, Conversation
from app.tab import state
from tests.support.bench import MAIN, until
from tests.support.models import tiny_loaded

PAGE = "../pages/session.py"
OPENING = "The lighthouse keeper wrote down the weather, as he did every day; then he lit the lamp."
LINK = {"bits": "2", "residual": "8", "sinks": "2", "tokens": "8", "chat": "false"}


@dataclass
class Tiny:
    """The app's own runner on a tiny model; `error` makes it fail, `hold` makes it wait before each token."""

    error: BaseException | None = None
    hold: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        if self.error is not None:
            raise self.error
        publish = job.publish

        def slowly(event: Any) -> None:
            publish(event)
            if event.kind == "token" and event.side == "compressed" and event.tokens >= 2:
                self.started.set()
                self.hold.wait(20)

        job.publish = slowly  # type: ignore[method-assign]
        backend.run(loaded, job, cancelled, yielding)


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    tiny = Tiny()
    tiny.hold.set()
    yield tiny
    tiny.hold.set()


@pytest.fixture
def chat(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppTest]:
    """The page from a cold deep link."""
    st.cache_resource.clear()
    engine = Engine(
        lambda name, weights, progress: tiny_loaded(), tiny.run, is_expected=backend.is_expected, max_queue=3
    )
    monkeypatch.setattr(state, "engine", lambda: engine)
    monkeypatch.setattr(state, "recordings", lambda: [])
    page = AppTest.from_file(MAIN, default_timeout=60)
    for name, value in LINK.items():
        page.query_params[name] = value
    page.switch_page(PAGE).run()
    assert not page.exception
    yield page
    engine.close()
    st.cache_resource.clear()


def said(page: AppTest) -> str:
    parts = [*page.markdown, *page.caption, *page.info, *page.warning, *page.error, *page.text]
    return html.unescape("\n".join(str(part.value) for part in parts)).replace("\u200b", "")


def say(page: AppTest, message: str) -> AppTest:
    page.chat_input(key="chat_message").set_value(message).run()
    page.run()
    assert not page.exception
    return page


def talk(page: AppTest) -> Conversation:
    found: Conversation = page.session_state["conversation"]
    return found


def button(page: AppTest, key: str) -> Any:
    return page.button(key=key)


def test_an_empty_page_offers_openings_that_a_link_can_name(chat: AppTest) -> None:
    assert chat.title[0].value == "A conversation in two caches"
    assert "Nothing has been said yet" in said(chat)
    name = next(iter(OPENINGS))
    chat.button_group(key="chat_opening").set_value(name).run()
    assert OPENINGS[name].prompt in [text.value for text in chat.text]
    assert not button(chat, "chat_send_opening").disabled


def test_the_chosen_opening_stands_in_the_address(chat: AppTest) -> None:
    name = list(OPENINGS)[1]
    cold = AppTest.from_file(MAIN, default_timeout=60)
    cold.query_params["chat_opening"] = name
    cold.switch_page(PAGE).run()
    assert OPENINGS[name].prompt in [text.value for text in cold.text]


def test_turns_appear_with_both_answers_their_caches_and_charts(chat: AppTest) -> None:
    say(chat, OPENING)
    say(chat, "And then?")
    first, second = talk(chat).turns
    texts = [text.value for text in chat.text]
    for turn in (first, second):
        c = turn.comparison
        assert {c.prompt, c.original.text, c.compressed.text} <= set(texts)
    words = said(chat)
    assert "`turboquant:bits=2,residual_length=8,sink_length=2`" in words
    assert (
        f"{second.original.reused_tokens:,} tokens reused from the cache, {second.original.fed_tokens:,} read" in words
    )
    assert "This conversation keeps both caches in memory" in words
    assert len(chat.get("plotly_chart")) == 4
    assert len(chat.get("download_button")) == 3
    assert len(chat.chat_message) == 6


def test_a_fork_shows_its_state_until_the_next_turn(chat: AppTest) -> None:
    say(chat, OPENING)
    assert talk(chat).parted
    button(chat, "chat_fork_original").click().run()
    assert "The next message continues the original answer in both caches" in said(chat)
    say(chat, "And then?")
    assert talk(chat).turns[1].same_history
    words = said(chat)
    assert "Both sides went on with the original answer" in words
    assert "The next message continues" not in words


def test_parted_histories_are_said_and_not_compared(chat: AppTest) -> None:
    say(chat, OPENING)
    say(chat, "And then?")
    assert not talk(chat).turns[1].same_history
    assert "The sides answered different conversations" in said(chat)


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError()])
def test_a_failed_turn_says_so_keeps_the_message_and_the_next_one_works(
    chat: AppTest, tiny: Tiny, error: BaseException
) -> None:
    tiny.error = error
    say(chat, OPENING)
    assert "This message was not answered." in chat.warning[0].value
    assert OPENING in [text.value for text in chat.text]
    tiny.error = None
    button(chat, "chat_again").click().run()
    chat.run()
    assert len(talk(chat).turns) == 1
    assert not chat.warning


def test_a_conversation_too_long_for_the_model_is_a_warning_and_loses_nothing(chat: AppTest) -> None:
    say(chat, OPENING)
    say(chat, "y" * 600)
    assert "512" in chat.warning[0].value
    assert "y" * 600 in [text.value for text in chat.text]
    say(chat, "And then?")
    assert len(talk(chat).turns) == 2
    assert not chat.warning


def test_a_refused_message_is_kept(chat: AppTest) -> None:
    say(chat, "   ")
    assert "Type a prompt" in chat.warning[0].value
    assert "conversation" not in chat.session_state


def test_stop_keeps_the_partial_answers(chat: AppTest, tiny: Tiny) -> None:
    say(chat, OPENING)
    tiny.hold.clear()
    engine, session = state.engine(), chat.session_state["session_id"]

    def stop() -> None:
        tiny.started.wait(20)
        engine.cancel(engine.job(session))  # what the Stop button's callback does
        tiny.hold.set()

    tiny.started.clear()
    stopper = threading.Thread(target=stop)
    stopper.start()
    say(chat, "And then?")
    stopper.join()
    last = talk(chat).turns[1].comparison
    assert last.original.finish == "cancelled"
    assert last.original.text in [text.value for text in chat.text]
    assert "stopped" in said(chat)


def test_other_settings_take_a_new_conversation_which_frees_the_old_one(chat: AppTest) -> None:
    say(chat, OPENING)
    old = talk(chat)
    chat.sidebar.number_input(key="seed").set_value(3).run()
    assert "other settings" not in said(chat)
    chat.sidebar.number_input(key="residual").set_value(16).run()
    assert "other settings (the method)" in said(chat)
    say(chat, "And then?")
    assert talk(chat) is old
    button(chat, "chat_new_settings").click().run()
    assert old.held_bytes == (0, 0)
    assert "Nothing has been said yet" in said(chat)
    say(chat, OPENING)
    assert "residual_length=16" in talk(chat).method


def test_a_turn_opens_as_a_run(chat: AppTest) -> None:
    say(chat, OPENING)
    kept = talk(chat).turns[0].comparison
    button(chat, "chat_open_0").click().run()
    assert not chat.exception
    assert [run.comparison for run in chat.session_state["runs"].all()] == [kept]
    labels = [link.proto.label for link in chat.get("page_link")]
    assert {"Turn 1 in Compare", "Turn 1 in Heads"} <= set(labels)


def test_what_models_and_people_write_is_never_markup(chat: AppTest) -> None:
    nasty = "<script>alert(1)</script> :tada: [a](http://b) $y$"
    say(chat, nasty)
    assert nasty in [text.value for text in chat.text]
    for element in [*chat.markdown, *chat.caption, *chat.info]:
        assert "<script" not in str(element.value)
        assert "](http" not in str(element.value)


def test_a_message_sent_while_other_work_of_the_tab_runs_is_kept(chat: AppTest, tiny: Tiny) -> None:
    say(chat, OPENING)
    tiny.hold.clear()
    tiny.started.clear()
    engine, mine = state.engine(), talk(chat)
    other = Conversation("tiny", "auto", mine.method, chat=False)
    session = chat.session_state["session_id"]
    asked: Any = engine.job(session)
    job = engine.submit(session, replace(asked.request, conversation=other))
    until(tiny.started.is_set)
    say(chat, "And then?")
    assert "already at work in this tab" in chat.warning[0].value
    assert "And then?" in [text.value for text in chat.text]
    assert button(chat, "chat_again").disabled
    tiny.hold.set()
    assert job.wait(20)
    chat.run()
    button(chat, "chat_again").click().run()
    chat.run()
    assert [turn.comparison.prompt for turn in talk(chat).turns] == [OPENING, "And then?"]
    assert talk(chat) is mine
