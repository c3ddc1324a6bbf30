"""Needle prompts: exact length, the needle where it was asked for, the question behind the filler."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import tiny_tokenizer
from turboquant.experiments.needle_prompt import _PLACE, NeedlePrompt, needle_prompt
from turboquant.records.settings import STARTS, OwnNeedle
from turboquant.run.generate import PromptError
from turboquant.texts import TEXTS

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
TOKENIZERS = {"plain": tiny_tokenizer(), "chat": tiny_tokenizer(CHAT)}
LEAST = 460  # characters, and so tokens, that needle and questions may take here


def text_of(name: str, prompt: NeedlePrompt, start: int = 0, stop: int | None = None) -> str:
    return str(TOKENIZERS[name].decode(prompt.ids[0, start:stop]))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    tokens=st.integers(LEAST, 3000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    filler=st.sampled_from(["sentences", "persuasion", "sqlite"]),
)
def test_length_is_exact_and_the_needle_is_where_it_says(
    name: str, tokens: int, depth: float, seed: int, filler: str
) -> None:
    prompt = needle_prompt(TOKENIZERS[name], tokens, depth, seed, filler)
    assert prompt.ids.shape == (1, tokens)
    assert prompt.ids.dtype == torch.int64
    needle = text_of(name, prompt, prompt.needle_start, prompt.needle_stop)
    assert needle == f" One of the special magic numbers for {prompt.word} is: {prompt.answer}."
    assert prompt.needle_stop <= prompt.question_start
    assert text_of(name, prompt).count(prompt.answer) == 1
    question = text_of(name, prompt, prompt.question_start)
    assert question.startswith(f"\nWhat is the special magic number for {prompt.word} mentioned")
    assert question.endswith(f"The special magic number for {prompt.word} mentioned in the provided text is")


def test_the_needle_stands_between_sentences_nearest_to_its_depth() -> None:
    longest = len(" There and back again.")
    for depth in (0.0, 0.1, 0.37, 0.5, 0.9, 1.0):
        prompt = needle_prompt(TOKENIZERS["plain"], 3000, depth)
        start = text_of("plain", prompt).index("afterwards.\n") + len("afterwards.\n")
        room = prompt.question_start - start - (prompt.needle_stop - prompt.needle_start)
        assert abs(prompt.needle_start - start - depth * room) <= longest / 2
        assert text_of("plain", prompt, prompt.needle_start - 1, prompt.needle_start) in ".\n!?" or depth == 1.0


def test_the_chat_template_frames_the_prompt() -> None:
    prompt = needle_prompt(TOKENIZERS["chat"], 600)
    text = text_of("chat", prompt)
    assert text.startswith("<s>user: A special magic number is hidden")
    assert "provided text?</s><s>The special magic number" in text
    assert "<s>" not in text_of("plain", needle_prompt(TOKENIZERS["plain"], 600))


def test_without_the_chat_template_the_prompt_is_plain() -> None:
    prompt = needle_prompt(TOKENIZERS["chat"], 600, chat=False)
    assert torch.equal(prompt.ids, needle_prompt(TOKENIZERS["plain"], 600).ids)
    own = needle_prompt(TOKENIZERS["chat"], 600, own=OWN, chat=False)
    assert torch.equal(own.ids, needle_prompt(TOKENIZERS["plain"], 600, own=OWN).ids)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('No users') }}", r"chat template cannot be used \(No users\): leave it out"),
        ("{{ messages[0].content[:99] }}", "what it writes does not hold the prompt"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "it changes the prompt or writes it twice"),
        ("{{ messages[0].content.split() | join }}", "it changes the prompt or writes it twice"),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_a_chat_template_that_loses_the_needle_is_refused(template: str, message: str, own: bool) -> None:
    with pytest.raises(PromptError, match=message):
        needle_prompt(tiny_tokenizer(template), 900, own=OWN if own else None)


def test_seeds_choose_the_needle_and_the_place_in_a_text() -> None:
    one, same, other = (needle_prompt(TOKENIZERS["plain"], 900, seed=s, filler="hamlet") for s in (1, 1, 2))
    assert torch.equal(one.ids, same.ids)
    assert (one.word, one.answer) != (other.word, other.answer)
    assert text_of("plain", one)[200:300] != text_of("plain", other)[200:300]
    numbers = {needle_prompt(TOKENIZERS["plain"], LEAST, seed=s).answer for s in range(50)}
    assert len(numbers) == 50
    assert all(len(number) == 7 for number in numbers)


def test_an_own_text_is_repeated_for_as_long_as_it_takes(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("One line. Another!\nNo end", encoding="utf-8")
    prompt = needle_prompt(TOKENIZERS["plain"], 1500, depth=1.0, filler=str(file))
    assert text_of("plain", prompt).count("Another!") > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 100}, r"a prompt with a needle has at least \d{3} tokens, got 100"),
        ({"tokens": 900, "depth": 1.5}, "depth must be from 0 to 1, got 1.5"),
        ({"tokens": 900, "filler": "no-such-text"}, "the text must be one of persuasion"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle_prompt(TOKENIZERS["plain"], **options)


def test_the_shortest_prompt_is_the_one_the_error_names() -> None:
    with pytest.raises(PromptError) as error:
        needle_prompt(TOKENIZERS["plain"], 1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert needle_prompt(TOKENIZERS["plain"], least).ids.shape == (1, least)
    with pytest.raises(PromptError):
        needle_prompt(TOKENIZERS["plain"], least - 1)


def test_answers_are_recognised() -> None:
    prompt = needle_prompt(TOKENIZERS["plain"], 600)
    number = prompt.answer
    assert prompt.is_answered_by(f" {number}.")
    assert prompt.is_answered_by(f" {number[0]},{number[1:4]},{number[4:]}")
    assert not prompt.is_answered_by(number[:6])
    assert not prompt.is_answered_by(str(int(number) - 1))


def test_every_shipped_text_can_be_filler() -> None:
    for name in TEXTS:
        assert needle_prompt(TOKENIZERS["plain"], 1000, filler=name).ids.shape == (1, 1000)


OWN = OwnNeedle("The night train to Riga leaves from platform nineteen.", "Which platform?", "Nineteen")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(tokens=st.integers(LEAST, 1500), depth=st.floats(0, 1), seed=st.integers(0, 100))
def test_an_own_needle_takes_the_place_of_the_number(name: str, tokens: int, depth: float, seed: int) -> None:
    prompt = needle_prompt(TOKENIZERS[name], tokens, depth, seed, own=OWN)
    assert prompt.ids.shape == (1, tokens)
    assert text_of(name, prompt, prompt.needle_start, prompt.needle_stop) == f" {OWN.needle}"
    assert "magic number" not in text_of(name, prompt)
    question = text_of(name, prompt, prompt.question_start)
    assert question.startswith(f"\n{OWN.question}")
    assert question.endswith("<s>" if name == "chat" else " Answer:")
    assert (prompt.word, prompt.answer) == ("", OWN.answer)


def test_the_reply_to_an_own_needle_may_be_in_any_case() -> None:
    prompt = needle_prompt(TOKENIZERS["plain"], 900, own=OWN)
    assert prompt.is_answered_by("It leaves from platform NINETEEN, I believe.")
    assert not prompt.is_answered_by("It leaves from platform 19.")


def test_seeds_tell_prompts_with_an_own_needle_apart() -> None:
    plain = TOKENIZERS["plain"]
    texts = {text_of("plain", needle_prompt(plain, 900, seed=seed, own=OWN)) for seed in range(20)}
    assert len(texts) == STARTS
    assert len({text_of("plain", needle_prompt(plain, 900, 0.5, seed, "hamlet", OWN)) for seed in range(10)}) == 10


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("A red door.", "What colour is it?", "blue"), "the answer must occur in the needle, got 'blue'"),
        (("A red door.", "Is it red?", "RED"), "the question must not contain the answer 'RED'"),
        (("A red door.", " ", "red"), "none of them empty"),
        (("A red door.", "What?", ""), "none of them empty"),
    ],
)
def test_own_needles_that_ask_nothing_are_refused(texts: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OwnNeedle(*texts)


def test_a_filler_that_holds_the_answer_is_refused() -> None:
    with pytest.raises(PromptError, match="the answer 'blue' stands in the filler sentences as well"):
        needle_prompt(TOKENIZERS["plain"], 900, own=OwnNeedle("The door is blue.", "What colour has the door?", "blue"))


def test_a_question_cannot_move_the_filler() -> None:
    own = OwnNeedle("The door is red.", f"What colour {_PLACE} is it?", "red")
    prompt = needle_prompt(TOKENIZERS["chat"], 900, own=own)
    assert text_of("chat", prompt, prompt.question_start).startswith(f"\nWhat colour {_PLACE} is it?")
