"""Conversations with two caches: what is fed, what is kept, what a stop leaves, what the figures are figures of."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import Lossless, tiny_loaded
from turboquant.cache.build import build_cache, cache_report, layer_states
from turboquant.methods import METHODS, parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import Settings
from turboquant.run.chat import Session
from turboquant.run.generate import PromptError
from turboquant.run.metrics import token_agreement

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
REWRITING = TEMPLATE.replace("<{{ m['role'][0] }}>", "<{{ m['role'][0] }}>{{ '~' if m['role'] == 'assistant' }}")
METHOD = parse_method("turboquant:bits=2,residual_length=8,sink_length=2")
OPENING = "The lighthouse keeper wrote down the weather, as he did every day; then he lit the lamp."
PROMPTS = (OPENING, "And then?", "What did he see in the morning?")
ANSWER = Settings(max_new_tokens=12)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded(chat_template=TEMPLATE)


def rendered(loaded: LoadedModel, messages) -> list[int]:
    tokenizer: Any = loaded.tokenizer
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def assert_cache_is_a_replay(session: Session) -> None:
    """Each cache holds what feeding its tokens, in the pieces in which they went in, gives.

    Calls of other shapes round differently: exact states agree to rounding, but a code next to a boundary may flip, and
    every later token follows. Another token or order would differ by as much as the states themselves.
    """
    model = session.loaded.model
    for side, method in (("original", METHODS["full"]()), ("compressed", session.method)):
        replay = build_cache(model.config, method)
        for piece in session._sides[side].pieces:
            model(torch.tensor([piece]), past_key_values=replay)
        held = len(session.held_tokens(side))
        for index in range(len(replay.layers)):
            for one, other in zip(layer_states(session.cache(side), index), layer_states(replay, index), strict=True):
                assert one.shape[2] == held
                assert (one - other).norm() <= (1e-4 if side == "original" else 0.1) * other.norm()


def test_a_second_turn_feeds_only_what_is_new(loaded) -> None:
    session = Session(loaded, METHOD)
    first, second, third = (session.ask(prompt, ANSWER) for prompt in PROMPTS)
    assert (first.original.reused_tokens, first.original.rebuilt) == (0, False)
    for before, turn in itertools.pairwise((first, second, third)):
        for side in ("original", "compressed"):
            context = getattr(turn, side)
            said = len(getattr(before.comparison, side).token_ids)
            assert context.cropped_tokens == 0
            assert not context.rebuilt
            assert context.reused_tokens in (getattr(before, side).tokens + said - 1,) * 2
            assert context.fed_tokens < 60
    whole = rendered(loaded, session.messages("original")[:-1])
    assert third.original.tokens == len(whole) == third.comparison.prompt_tokens
    assert session.held_tokens("original")[: len(whole)] == whole
    assert_cache_is_a_replay(session)


def test_the_original_side_answers_as_if_the_conversation_were_one_prompt(loaded) -> None:
    session = Session(loaded, METHOD)
    for prompt in PROMPTS:
        turn = session.ask(prompt, ANSWER)
    ids = torch.tensor([rendered(loaded, session.messages("original")[:-1])])
    mask = torch.ones_like(ids)
    whole = loaded.model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert turn.comparison.original.token_ids == whole[0, ids.shape[1] :].tolist()


def test_a_lossless_cache_says_the_same_in_every_turn(loaded) -> None:
    session = Session(loaded, Lossless())
    for prompt in PROMPTS:
        turn = session.ask(prompt, ANSWER)
        assert turn.same_history
        assert turn.comparison.divergence is None
        assert turn.comparison.original.token_ids == turn.comparison.compressed.token_ids
    assert turn.comparison.compressed.report.compressed_tokens > 50
    assert turn.comparison.tokens.mean_kl < 1e-6
    assert turn.comparison.heads.served.top1_match_pct == 100


def test_figures_of_a_turn_are_those_of_the_cache_as_it_grew(loaded) -> None:
    """KL against token-by-token feeding of the pieces, apart from the code under test."""
    session = Session(loaded, METHOD)
    session.ask(PROMPTS[0], ANSWER)
    before = [list(piece) for piece in session._sides["original"].pieces]
    turn = session.ask(PROMPTS[1], ANSWER)
    answer = turn.comparison.original.token_ids
    caches = [build_cache(loaded.model.config, m) for m in (METHODS["full"](), METHOD)]
    calls = [before[0], *([token] for piece in before[1:] for token in piece)]
    calls += [rendered(loaded, session.messages("original")[:-1])[sum(map(len, calls)) :], *([t] for t in answer[:-1])]
    logits = [[loaded.model(torch.tensor([c]), past_key_values=cache).logits[0, -1] for c in calls] for cache in caches]
    full, compressed = (torch.stack(side[-len(answer) :]) for side in logits)
    expected = token_agreement(full, compressed, torch.tensor(answer))["kl"]
    assert float(expected.mean()) > 1e-4
    assert torch.allclose(torch.tensor(turn.comparison.tokens.kl), expected, rtol=1e-2, atol=1e-5)
    layer = caches[1].layers[0]
    assert turn.comparison.heads.packed_tokens[-1] == layer.packed_length


def test_heads_of_a_later_turn_see_the_codes_of_the_first(loaded) -> None:
    """The keys' mean is that of the first call ever packed; one call over the whole conversation has another."""
    from turboquant.run.compare import compare

    method = parse_method("turboquant-paper:bits=2,center=true,qjl=none,residual_length=8")
    session = Session(loaded, method)
    session.ask(PROMPTS[0], ANSWER)
    turn = session.ask(PROMPTS[1], ANSWER)
    flat = loaded.tokenizer.decode(rendered(loaded, session.messages("original")[:-1]))
    whole = compare(loaded, flat, method, ANSWER, chat=False)
    assert whole.original.token_ids == turn.comparison.original.token_ids
    assert whole.heads.packed_tokens == turn.comparison.heads.packed_tokens
    assert whole.heads.packed.cosine_scores != turn.comparison.heads.packed.cosine_scores


def test_histories_part_and_a_fork_joins_them(loaded) -> None:
    session = Session(loaded, parse_method("turboquant:bits=1,residual_length=0,sink_length=0,center=false"))
    first = session.ask(PROMPTS[0], Settings(max_new_tokens=24))
    assert first.comparison.divergence is not None
    second = session.ask(PROMPTS[1], ANSWER)
    assert not second.same_history
    assert second.comparison.divergence is None
    assert "different conversations" in second.comparison.notes[-1]
    session.fork("compressed")
    assert session.messages("original") == session.messages("compressed")
    third = session.ask(PROMPTS[2], ANSWER)
    assert third.same_history
    assert third.original.cropped_tokens > 0
    assert not third.original.rebuilt
    assert third.compressed.cropped_tokens == 0
    assert session.messages("original")[:-1] == session.messages("compressed")[:-1]
    assert_cache_is_a_replay(session)


def test_forking_to_the_original_rebuilds_a_cache_whose_packed_tokens_differ(loaded) -> None:
    session = Session(loaded, parse_method("turboquant:bits=1,residual_length=8,sink_length=2"))
    turn = session.ask(PROMPTS[0] * 2, Settings(max_new_tokens=90))
    assert turn.comparison.divergence is not None
    session.fork("original")
    turn = session.ask(PROMPTS[1], ANSWER)
    assert turn.same_history
    assert turn.compressed.rebuilt
    assert turn.compressed.fed_tokens == turn.original.tokens
    assert not turn.original.rebuilt
    assert_cache_is_a_replay(session)


def test_a_template_that_rewrites_the_past_is_followed() -> None:
    loaded = tiny_loaded(chat_template=REWRITING)
    session = Session(loaded, METHOD)
    session.ask(PROMPTS[0], ANSWER)
    turn = session.ask(PROMPTS[1], ANSWER)
    whole = rendered(loaded, session.messages("original")[:-1])
    assert turn.original.tokens == len(whole)
    assert turn.original.cropped_tokens > 0
    assert session.held_tokens("original")[: len(whole)] == whole
    assert_cache_is_a_replay(session)


def test_without_a_template_turns_are_lines_of_one_text() -> None:
    session = Session(tiny_loaded(), METHOD)
    session.ask("one", ANSWER)
    turn = session.ask("two", ANSWER)
    text = "\n".join(message["content"] for message in session.messages("original")[:-1])
    assert turn.comparison.prompt_tokens == len(text)
    assert_cache_is_a_replay(session)


def test_reset_begins_anew(loaded) -> None:
    session = Session(loaded, METHOD)
    first = session.ask(PROMPTS[0], ANSWER)
    session.ask(PROMPTS[1], ANSWER)
    session.reset()
    assert session.turns == session.messages("original") == session.held_tokens("compressed") == []
    again = session.ask(PROMPTS[0], ANSWER)
    assert again.comparison.original.token_ids == first.comparison.original.token_ids
    assert again.comparison.compressed.token_ids == first.comparison.compressed.token_ids
    assert again.index == 0


def stop_after(calls: int):
    count = itertools.count()
    return lambda: next(count) >= calls


@pytest.mark.parametrize(
    "method", [METHOD, parse_method("turboquant-paper:bits=3"), parse_method("kivi:bits=2")], ids=str
)
@given(calls=st.integers(0, 90))
@settings(max_examples=4)
def test_a_stop_anywhere_leaves_a_session_that_goes_on(method, calls: int) -> None:
    loaded = LOADED
    session = Session(loaded, method)
    session.ask(PROMPTS[0], Settings(max_new_tokens=4))
    before = [session.messages(side) for side in ("original", "compressed")]
    stopped = session.ask(PROMPTS[1], ANSWER, cancelled=stop_after(calls))
    both_spoke = bool(stopped.comparison.original.token_ids and stopped.comparison.compressed.token_ids)
    if not stopped.kept:
        assert not both_spoke
        assert [session.messages(side) for side in ("original", "compressed")] == before
        assert len(session.turns) == 1
    else:
        assert session.messages("original")[-1]["content"] == stopped.comparison.original.text
    turn = session.ask(PROMPTS[2], ANSWER)
    assert turn.kept
    whole = rendered(loaded, session.messages("original")[:-1])
    assert session.held_tokens("original")[: len(whole)] == whole
    assert_cache_is_a_replay(session)


LOADED = tiny_loaded(chat_template=TEMPLATE)


def test_a_prompt_that_does_not_fit_changes_nothing(loaded) -> None:
    session = Session(loaded, METHOD)
    session.ask(PROMPTS[0], ANSWER)
    before = session.held_tokens("original"), session.messages("compressed")
    with pytest.raises(PromptError, match=r"context of 512 tokens"):
        session.ask("x" * 600, ANSWER)
    with pytest.raises(PromptError, match="empty"):
        session.ask("  ", ANSWER)
    assert (session.held_tokens("original"), session.messages("compressed")) == before
    assert session.ask(PROMPTS[1], ANSWER).original.cropped_tokens == 0


def test_sliding_layers_go_on_and_are_rebuilt_where_they_cannot_be_cropped() -> None:
    loaded = tiny_loaded("gemma3", chat_template=TEMPLATE)
    session = Session(loaded, METHOD)
    first = session.ask(PROMPTS[0], ANSWER)
    second = session.ask(PROMPTS[1], ANSWER)
    assert second.original.reused_tokens > first.original.tokens
    session.fork("compressed")
    third = session.ask(PROMPTS[2], ANSWER)
    assert third.same_history
    assert third.original.tokens == third.compressed.tokens


def test_memory_grows_turn_by_turn(loaded) -> None:
    session = Session(loaded, METHOD)
    turns = [session.ask(prompt, ANSWER) for prompt in PROMPTS]
    held = [turn.comparison.original.report.bytes for turn in turns]
    assert held == sorted(held)
    report = turns[-1].comparison.compressed.report
    assert report == cache_report(session.cache("compressed"))
    assert report.bits_per_value < 32


# -- the model comes and goes ---------------------------------------------------------------------------------------


def test_a_detached_conversation_lets_the_model_go_and_goes_on_with_it_again() -> None:
    def answers(pause: bool) -> list[list[int]]:
        loaded = tiny_loaded(chat_template=TEMPLATE)
        session = Session(loaded, METHOD)
        given = []
        for prompt in PROMPTS:
            turn = session.ask(prompt, ANSWER)
            given += [turn.comparison.original.token_ids, turn.comparison.compressed.token_ids]
            if pause:
                gone = weakref.ref(loaded.model)
                session.detach()
                del loaded
                gc.collect()
                assert gone() is None
                loaded = tiny_loaded(chat_template=TEMPLATE)
                session.attach(loaded)
        return given

    assert answers(pause=True) == answers(pause=False)


def test_a_detached_conversation_keeps_its_past_and_says_what_it_lacks(loaded) -> None:
    session = Session(loaded, METHOD)
    turn = session.ask(OPENING, ANSWER)
    held = session.held_tokens("compressed")
    session.detach()
    with pytest.raises(ValueError, match="has no model: attach tiny-llama"):
        session.ask("And then?", ANSWER)
    assert (session.turns, session.held_tokens("compressed")) == ([turn], held)
    assert cache_report(session.cache("compressed")) == turn.comparison.compressed.report
    session.reset()
    assert session.held_tokens("compressed") == []


def test_another_model_cannot_take_a_conversation_over(loaded) -> None:
    session = Session(loaded, METHOD)
    session.detach()
    with pytest.raises(ValueError, match=r"tiny-llama \(fp32, cpu\).*tiny-qwen2 \(fp32, cpu\)"):
        session.attach(tiny_loaded("qwen2"))
    with pytest.raises(ValueError, match="has no model"):
        session.ask("And then?", ANSWER)
