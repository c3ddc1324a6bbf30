"""A visitor's conversation with a real (tiny) model: turns, forks, stops, failures, and the model gone in between."""

import gc
import itertools
import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from app.config import AppConfig
from app.engine import backend
from app.engine.engine import Engine
from app.engine.job import Job
from app.session import charts, transcript
from app.session.conversation import MAX_TURNS, OPENINGS, Conversation, begin, turn_request
from app.tab.requests import Choices, RequestError, defaults
from tests.support.models import tiny_loaded
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import Settings
from turboquant.run.chat import Turn
from turboquant.run.compare import Event
from turboquant.run.generate import PromptError

METHOD = "turboquant:bits=2,residual_length=8,sink_length=2"
OPENING = "The lighthouse keeper wrote down the weather, as he did every day; then he lit the lamp."
ANSWER = Settings(max_new_tokens=10)
CONFIG = AppConfig(warm_up=False)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded()


def started(loaded: LoadedModel, *prompts: str) -> Conversation:
    talk = Conversation("tiny-llama", "fp32", METHOD, chat=False)
    for prompt in prompts or (OPENING,):
        ask(talk, loaded, prompt)
    return talk


def ask(talk: Conversation, loaded: Any, prompt: str, stop_after: int | None = None, **settings: Any) -> Turn:
    events = itertools.count()
    seen: list[Event] = []

    def cancelled() -> bool:
        return stop_after is not None and next(events) >= stop_after

    return talk.ask(loaded, prompt, ANSWER.model_copy(update=settings), seen.append, cancelled)


def test_three_turns_grow_both_caches_and_measure_each(loaded: LoadedModel) -> None:
    talk = started(loaded, OPENING, "And then?", "What did he see?")
    assert [turn.index for turn in talk.turns] == [0, 1, 2]
    assert all(turn.comparison.tokens and turn.comparison.heads for turn in talk.turns)
    last = talk.turns[-1].comparison
    assert talk.held_bytes == (last.original.report.bytes, last.compressed.report.bytes)
    assert talk.held_bytes[1] < talk.held_bytes[0]
    assert talk.turns[2].original.reused_tokens > talk.turns[1].original.reused_tokens > 0


def test_a_fork_makes_the_histories_one_again_and_is_forgotten_after_the_next_turn(loaded: LoadedModel) -> None:
    talk = started(loaded, OPENING, "And then?")
    assert talk.parted
    assert not talk.turns[1].same_history
    talk.fork("compressed")
    assert talk.forked == "compressed"
    assert not talk.parted
    turn = ask(talk, loaded, "Why?")
    assert turn.same_history
    assert talk.forked is None
    assert talk.forks == {2: "compressed"}
    assert "went on with the compressed answer" in transcript.turn_words(turn, talk.forks[2])


def test_a_refused_turn_keeps_the_fork_and_the_conversation(loaded: LoadedModel) -> None:
    talk = started(loaded)
    talk.fork("original")
    held = talk.held_bytes
    with pytest.raises(PromptError, match="512"):
        ask(talk, loaded, "x" * 600)
    assert talk.forked == "original"
    assert talk.held_bytes == held
    assert ask(talk, loaded, "And then?").same_history


def test_a_first_turn_that_is_refused_leaves_a_usable_conversation(loaded: LoadedModel) -> None:
    talk = Conversation("tiny-llama", "fp32", METHOD, chat=False)
    with pytest.raises(PromptError):
        ask(talk, loaded, "x" * 600)
    assert talk.turns == ()
    assert ask(talk, loaded, OPENING).kept


def test_a_turn_that_breaks_in_the_middle_leaves_no_trace(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, twin = started(loaded), started(loaded)
    calls = itertools.count()

    def broken(event: Event) -> None:
        if next(calls) == 5:
            raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        talk.ask(loaded, "This one fails.", ANSWER, broken, lambda: False)
    assert len(talk.turns) == 1
    assert talk.held_bytes[0] == 0
    turn = ask(talk, loaded, "And then?")
    assert turn.original.rebuilt
    assert turn.compressed.rebuilt
    assert "cache rebuilt" in transcript.context_words(turn.original)
    assert turn.original.tokens == ask(twin, loaded, "And then?").original.tokens


def test_stop_keeps_the_partial_answer_and_the_next_turn_goes_on_from_it(loaded: LoadedModel) -> None:
    talk = started(loaded)
    turn = ask(talk, loaded, "And then?", stop_after=16, max_new_tokens=200)
    assert turn.kept
    assert turn.comparison.original.finish == "cancelled"
    assert 0 < len(turn.comparison.original.token_ids) < 200
    assert "stopped" in transcript.answer_words(turn, "original")
    assert ask(talk, loaded, "Why?").original.reused_tokens > 0


def test_a_turn_stopped_before_both_sides_had_begun_is_undone_and_the_fork_stands(loaded: LoadedModel) -> None:
    talk = started(loaded)
    talk.fork("original")
    turn = ask(talk, loaded, "And then?", stop_after=0)
    assert not turn.kept
    assert len(talk.turns) == 1
    assert talk.forked == "original"


def test_the_model_may_go_and_come_back_between_turns() -> None:
    talk, whole = started(tiny_loaded()), started(tiny_loaded())
    model = tiny_loaded()
    ask(talk, model, "And then?")
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None, "the conversation keeps the model alive"
    turn, straight = ask(talk, tiny_loaded(), "Why?"), None
    for prompt in ("And then?", "Why?"):
        straight = ask(whole, tiny_loaded(), prompt)
    assert straight is not None
    assert not turn.original.rebuilt
    assert turn.comparison.original.token_ids == straight.comparison.original.token_ids
    assert turn.comparison.compressed.token_ids == straight.comparison.compressed.token_ids


def test_another_model_is_refused_with_the_way_out(loaded: LoadedModel) -> None:
    talk = started(loaded)
    with pytest.raises(PromptError, match=r"tiny-llama.*Start a new conversation"):
        ask(talk, tiny_loaded("qwen3"), "And then?")
    assert ask(talk, loaded, "And then?").kept


def test_close_frees_the_caches(loaded: LoadedModel) -> None:
    talk = started(loaded)
    assert talk._session is not None
    cache = weakref.ref(talk._session.cache("original"))
    talk.close()
    gc.collect()
    assert cache() is None
    assert (talk.turns, talk.held_bytes, talk.forks) == ((), (0, 0), {})


# --- through the engine: another model is loaded between two turns


@pytest.fixture
def tiny_engine() -> Iterator[Engine]:
    engine = Engine(
        lambda name, weights, progress: tiny_loaded(name), backend.run, is_expected=backend.is_expected, max_queue=3
    )
    yield engine
    engine.close()


def test_caches_survive_a_switch_of_the_resident_model(tiny_engine: Engine) -> None:
    talk = Conversation("llama", "auto", METHOD, chat=False)
    other = Conversation("qwen3", "auto", METHOD, chat=False)
    choices = Choices(tokens=8)

    def turn(which: Conversation, prompt: str) -> Job:
        job = tiny_engine.submit("tab", turn_request(which, prompt, choices, CONFIG))
        assert job.wait(60)
        return job

    for which, prompt in ((talk, OPENING), (other, OPENING), (talk, "And then?")):
        job = turn(which, prompt)
        assert job.view.error is None
    assert tiny_engine.status().model == "llama"
    assert len(talk.turns) == 2
    assert not talk.turns[1].original.rebuilt
    assert turn(talk, "x" * 700).view.error is not None
    assert turn(talk, "Why?").results[0].kept


# --- requests


def test_requests_are_checked_on_the_server(loaded: LoadedModel) -> None:
    choices = defaults(CONFIG)
    talk = begin(choices, CONFIG)
    assert talk.fixed == ("smollm2-135m", "auto", "turboquant:bits=4", True)
    assert turn_request(talk, "hello", choices, CONFIG).settings.max_new_tokens == choices.tokens
    with pytest.raises(RequestError, match="Type a prompt"):
        turn_request(talk, "  ", choices, CONFIG)
    with pytest.raises(RequestError, match="characters"):
        turn_request(talk, "x" * 30_000, choices, CONFIG)
    with pytest.raises(RequestError, match="Max new tokens"):
        turn_request(talk, "hello", Choices(tokens=100_000), CONFIG)
    with pytest.raises(RequestError, match="Weights"):
        begin(Choices(weights="1bit"), CONFIG)
    talk.turns = started(loaded).turns * MAX_TURNS
    with pytest.raises(RequestError, match=f"at most {MAX_TURNS} turns"):
        turn_request(talk, "one more", choices, CONFIG)


def test_openings_are_long_enough_to_be_packed_by_the_second_turn() -> None:
    """The default method packs beyond 69 tokens, and a token of such a text has fewer than six characters."""
    assert all(len(opening.prompt) > 69 * 6 for opening in OPENINGS.values())


# --- exports and charts


def test_the_transcript_holds_every_turn_in_three_formats(loaded: LoadedModel) -> None:
    talk = started(loaded, OPENING, "And then?")
    talk.fork("original")
    ask(talk, loaded, "=1+1 ```")
    content = json.loads(transcript.to_json(talk))
    assert [Turn.model_validate(turn) for turn in content["turns"]] == list(talk.turns)
    assert content["forks"] == {"3": "original"}
    assert content["method"] == METHOD
    text = transcript.to_markdown(talk)
    assert text.count("## Turn") == 3
    assert "````text\n=1+1 ```\n````" in text
    assert talk.turns[1].comparison.compressed.text in text
    lines = transcript.to_csv(talk)
    assert "'=1+1" in lines
    assert lines.startswith(
        'turn,same history,continued with,first difference at token,mean KL in nats,"same top token, percent",'
        '"heads at risk, percent",tokens packed,original bytes,compressed bytes,16-bit baseline bytes,'
    )


def test_charts_tell_drift_from_different_histories(loaded: LoadedModel) -> None:
    talk = started(loaded, OPENING, "And then?")
    assert not talk.turns[1].same_history
    same = charts.agreement(talk.turns)
    assert "Not compared, because the histories differ: turn 2." in same.alt
    assert same.table["then"].tolist()[1] == "different histories"
    assert same.table["identical tokens"].isna().tolist() == [False, True]
    grown = charts.growth(talk.turns)
    assert grown.table["compressed bytes"].tolist() == [t.comparison.compressed.report.bytes for t in talk.turns]
    drift = talk.turns[1].comparison.tokens
    assert drift is not None
    assert charts.kl(talk.turns).alt.startswith(f"Mean KL is {drift.mean_kl:.4f} nats in turn 2")
    assert charts.shares(talk.turns).table["heads at risk, percent"].notna().all()
    assert "different conversations" in transcript.turn_words(talk.turns[1])


def test_nothing_packed_says_from_where_on_and_draws_no_drift(loaded: LoadedModel) -> None:
    talk = Conversation("tiny-llama", "fp32", "turboquant:bits=4", chat=False)
    turn = ask(talk, loaded, "Hello.")
    assert "packing starts at" in transcript.turn_words(turn)
    assert "Nothing was packed" not in transcript.turn_words(turn)
    assert charts.kl(talk.turns).alt.startswith("Not measured in any turn yet")
    assert charts.shares(talk.turns).alt.startswith("Not measured in any turn yet")
