"""Long prompts of an exact number of tokens with a needle hidden in them, in the style of RULER (arXiv:2404.06654).

A sentence "One of the special magic numbers for violet-harbor is: 4821907." stands at a chosen depth of a filler text;
the question about it follows at the end, through the chat template where there is one, and the answer is begun for the
model, so that its next tokens are the number. An own needle, question and answer may take their place; then the model
answers in its own words.
"""

import random
import re
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from turboquant.records.settings import REPEATED, SENTENCES, OwnNeedle, contains
from turboquant.run.generate import PromptError, chat_text, template_error
from turboquant.texts import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
_NEEDLE = " One of the special magic numbers for {word} is: {number}."
_QUESTION = "What is the special magic number for {word} mentioned in the provided text?"
_ANSWER = "The special magic number for {word} mentioned in the provided text is"
_ADJECTIVES = "amber brave calm distant eager fading gentle hollow idle jolly lively mellow narrow olive patient"
_NOUNS = "anchor basket candle dragon engine feather garden harbor island jacket kettle lantern meadow needle orchard"
_OWN_INTRODUCTION = (
    "A fact is hidden within the following text. Make sure to memorize it. I will quiz you about it afterwards."
)
_OWN_ANSWER = "Answer:"
_PLACE = "<|filler goes here|>"


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt with a needle.

    Attributes:
        ids: The tokens, (1, tokens), on the CPU.
        needle_start: Place of the needle sentence's first token.
        needle_stop: The place behind its last token.
        question_start: Where the filler ends and the question (with what follows it) begins.
        word: What the number belongs to; empty with an own needle.
        answer: The number, seven digits, as the model should go on, or the own needle's answer.
        own: Is the needle somebody's own?
    """

    ids: Int[Tensor, "1 tokens"]
    needle_start: int
    needle_stop: int
    question_start: int
    word: str
    answer: str
    own: bool = False

    def is_answered_by(self, text: str) -> bool:
        """Return whether a continuation names the number, its digits grouped or not; a longer number is another one.

        The answer to an own needle is its text, whatever the case.
        """
        if self.own:
            return contains(text, self.answer)
        digits = r"[,\s]?".join(self.answer)
        return re.search(rf"(?<!\d){digits}(?!\d)", text) is not None


def filler_text(filler: str) -> str:
    """Return the text that fills a prompt.

    Args:
        filler: "sentences" (what RULER repeats), the name of a shipped text, or the path of a text file.

    Raises:
        ValueError: If there is no such text, or it cannot be used (see `turboquant.texts.read_text`).
    """
    return REPEATED if filler == SENTENCES else read_text(filler)


def check_filler(own: OwnNeedle, filler: str) -> None:
    """Raise PromptError where a filler holds an own needle's answer as well; ValueError where there is none such."""
    if contains(filler_text(filler), own.answer):
        raise PromptError(f"the answer {own.answer!r} stands in the filler {filler} as well")


def needle_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    tokens: int,
    depth: float = 0.5,
    seed: int = 0,
    filler: str = SENTENCES,
    own: OwnNeedle | None = None,
    chat: bool = True,
) -> NeedlePrompt:
    """Return a prompt of exactly `tokens` tokens with a needle at `depth` of its filler.

    The needle stands between two sentences of the filler, at the boundary nearest to the depth; the filler's last
    sentence is cut where the length asks for it.

    Args:
        tokenizer: The model's.
        tokens: Length of the prompt, answer's beginning included.
        depth: 0 is the start of the filler, 1 its end.
        seed: Chooses word and number, and with a text of many sentences where in it the filler begins.
        filler: See `filler_text`.
        own: Takes the place of word and number; the seed then only chooses where the filler begins.
        chat: Go through the chat template, where there is one.

    Raises:
        PromptError: If the needle and the question alone are longer, the depth is out of range, the filler holds the
            own needle's answer as well, or the chat template cannot be used.
        ValueError: If there is no such filler.
    """
    if not 0 <= depth <= 1:
        raise PromptError(f"depth must be from 0 to 1, got {depth}")
    draw = random.Random(f"needle {seed}")
    chat = chat and bool(tokenizer.chat_template)
    word, answer, needle, head, tail = _own(tokenizer, own, filler, chat) if own else _number(tokenizer, draw, chat)
    needle_ids = _encoded(tokenizer, [needle])[0]
    room = tokens - len(head) - len(needle_ids) - len(tail)
    if room < 0:
        raise PromptError(f"a prompt with a needle has at least {tokens - room} tokens, got {tokens}")
    before, after = _filled(_sentences(tokenizer, filler, draw, seed if own else 0), room, depth)
    start = len(head) + len(before)
    return NeedlePrompt(
        ids=torch.tensor([head + before + needle_ids + after + tail]),
        needle_start=start,
        needle_stop=start + len(needle_ids),
        question_start=tokens - len(tail),
        word=word,
        answer=answer,
        own=own is not None,
    )


def _number(tokenizer: Any, draw: random.Random, chat: bool) -> tuple[str, str, str, list[int], list[int]]:
    """Return word, number, needle, and the tokens before and behind the filler."""
    word = f"{draw.choice(_ADJECTIVES.split())}-{draw.choice(_NOUNS.split())}"
    number = str(draw.randrange(1_000_000, 10_000_000))
    head, tail = _frame(tokenizer, _INTRODUCTION, _QUESTION.format(word=word), _ANSWER.format(word=word), chat)
    return word, number, _NEEDLE.format(word=word, number=number), head, tail


def _own(tokenizer: Any, own: OwnNeedle, filler: str, chat: bool) -> tuple[str, str, str, list[int], list[int]]:
    """Return the same for an own needle, which has no word; a chat model's answer is not begun."""
    check_filler(own, filler)
    head, tail = _frame(tokenizer, _OWN_INTRODUCTION, own.question.strip(), "" if chat else _OWN_ANSWER, chat)
    return "", own.answer, f" {own.needle.strip()}", head, tail


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    return ids


def _frame(tokenizer: Any, introduction: str, question: str, begun: str, chat: bool) -> tuple[list[int], list[int]]:
    """Return the tokens before the filler and those behind it; `begun` begins the answer."""
    content = f"{introduction}\n{_PLACE}\n{question}"
    if not chat:
        head, _, tail = content.partition(_PLACE)
        return list(tokenizer(head).input_ids), _encoded(tokenizer, [f"{tail} {begun}"])[0]
    # Templates of models that think first open the answer itself with this.
    rendered = chat_text(tokenizer, [{"role": "user", "content": content}], enable_thinking=False)
    if rendered.count(_PLACE) != content.count(_PLACE):
        raise template_error("it changes the prompt or writes it twice")
    head, _, tail = rendered.partition(_PLACE)
    first, second = _encoded(tokenizer, [head, tail + begun])
    return first, second


def _sentences(tokenizer: Any, filler: str, draw: random.Random, turn: int = 0) -> list[list[int]]:
    """Return the filler's sentences as tokens, beginning at one that the seed chose.

    The repeated sentences begin with the first; `turn` of them are passed over, which is all that tells prompts with an
    own needle apart.
    """
    texts = re.split(r"(?<=[.!?])\s+", filler_text(filler).strip())
    start = turn % len(texts) if filler == SENTENCES else draw.randrange(len(texts))
    return _encoded(tokenizer, [f" {text}" for text in texts[start:] + texts[:start]])


def _filled(sentences: list[list[int]], room: int, depth: float) -> tuple[list[int], list[int]]:
    """Return `room` tokens of filler, split at the sentence boundary nearest to the depth."""
    if not any(sentences):
        raise PromptError("the filler text has no tokens")
    filled: list[int] = []
    boundaries = [0]
    for sentence in cycle(sentences):
        if len(filled) >= room:
            break
        filled += sentence
        boundaries.append(min(len(filled), room))
    place = min(boundaries, key=lambda boundary: abs(boundary - depth * room))
    return filled[:place], filled[place:room]
