"""A conversation in words and files: what each turn's caches did, the table of turns, JSON, Markdown and CSV."""

import json
from typing import TYPE_CHECKING, Any

from app.session.conversation import SIDES, Conversation, SideName
from app.tab.runs import csv_text, fenced
from app.tab.verdict import human_bytes, verdict
from turboquant.records.metrics import metric

if TYPE_CHECKING:
    from turboquant.run.chat import Context, Turn

FINISH = {"stop": "ended by itself", "length": "ended at the longest answer", "cancelled": "stopped"}


def context_words(context: "Context") -> str:
    """What one side's cache held already and what it had to read for this turn."""
    parts = []
    if context.rebuilt:
        parts.append(f"cache rebuilt: all {tokens(context.fed_tokens)} were read again in one call")
    elif not context.reused_tokens:
        parts.append(f"{tokens(context.fed_tokens)} read")
    else:
        parts.append(f"{tokens(context.reused_tokens)} reused from the cache, {context.fed_tokens:,} read")
    if context.cropped_tokens and not context.rebuilt:
        parts.append(f"{context.cropped_tokens:,} taken out first, because the conversation is written differently now")
    return "; ".join(parts)


def history_words(turn: "Turn", forked: SideName | None = None) -> str:
    """Did both sides answer the same conversation, and what does that mean for the figures?"""
    if forked:
        return f"Both sides went on with the {forked} answer, so the cache alone makes the difference in this turn."
    if turn.index == 0:
        return "Both sides read the same message, so the cache alone makes the difference."
    if turn.same_history:
        return "Both sides answered the same conversation, so the cache alone makes the difference."
    return (
        "The sides answered different conversations, because earlier answers had parted. Their texts are not compared; "
        "KL, same top and heads at risk are those of the original side's conversation."
    )


def turn_words(turn: "Turn", forked: SideName | None = None) -> str:
    """What a turn's figures are figures of, where its answers part, and what the library notes about it."""
    c = turn.comparison
    words = [history_words(turn, forked)]
    if not turn.same_history:
        return " ".join([*words, *c.notes[:-1]])  # the last note says the same as the words
    if c.compressed.report.compressed_tokens or not c.notes:
        words.append(verdict(c))
    return " ".join([*words, *c.notes])


def answer_words(turn: "Turn", side: SideName) -> str:
    """What one answer was, and what its cache holds after it."""
    result = getattr(turn.comparison, side)
    report = result.report
    held = f"{human_bytes(report.bytes)} held"
    packed = f"{report.compressed_tokens:,} of {tokens(report.tokens)} packed"
    ended = f"{tokens(len(result.token_ids))}, {FINISH.get(result.finish, result.finish)}"
    return " · ".join([ended, held, *([packed] if side == "compressed" else [f"{tokens(report.tokens)} in it"])])


def memory_words(talk: Conversation) -> str:
    """What the conversation keeps in memory, as measured after the last turn."""
    original, compressed = talk.held_bytes
    total = human_bytes(original + compressed)
    return (
        f"This conversation keeps both caches in memory: {human_bytes(original)} original and "
        f"{human_bytes(compressed)} compressed, {total} in all. New conversation frees them."
    )


def tokens(count: int) -> str:
    """A number of tokens, in words."""
    return f"{count:,} token{'' if count == 1 else 's'}"


def rows(talk: Conversation) -> list[dict[str, Any]]:
    """One row a turn with every figure; None where it was not measured."""
    return [_row(turn, talk.forks.get(turn.index)) for turn in talk.turns]


def _row(turn: "Turn", forked: SideName | None) -> dict[str, Any]:
    c = turn.comparison
    row: dict[str, Any] = {
        "turn": turn.index + 1,
        "same history": turn.same_history,
        "continued with": forked,
        "first difference at token": c.divergence.index if c.divergence else None,
        metric("mean_kl").spelled: c.tokens.mean_kl if c.tokens else None,
        metric("same_top_pct").spelled: c.tokens.same_top_pct if c.tokens else None,
        metric("heads_at_risk_pct").spelled: c.heads.packed.heads_at_risk_pct if c.heads else None,
        metric("compressed_tokens").title: c.compressed.report.compressed_tokens,
        "original bytes": c.original.report.bytes,
        "compressed bytes": c.compressed.report.bytes,
        f"{metric('full_precision_bytes').title} bytes": c.compressed.report.full_precision_bytes,
    }
    for side in SIDES:
        context: Context = getattr(turn, side)
        row |= {
            f"{side}: tokens reused": context.reused_tokens,
            f"{side}: tokens read": context.fed_tokens,
            f"{side}: tokens taken out": context.cropped_tokens,
            f"{side}: cache rebuilt": context.rebuilt,
            f"{side}: tokens answered": len(getattr(c, side).token_ids),
        }
    return row


def to_csv(talk: Conversation) -> str:
    """One line a turn: its figures, the message and both answers."""
    texts = [(turn.comparison.prompt, *(getattr(turn.comparison, side).text for side in SIDES)) for turn in talk.turns]
    names = ["message", "original answer", "compressed answer"]
    lines = [row | dict(zip(names, text, strict=True)) for row, text in zip(rows(talk), texts, strict=True)]
    return csv_text(list(lines[0]), [list(line.values()) for line in lines]) if lines else ""


def to_json(talk: Conversation) -> str:
    """The conversation as JSON: its settings, and every turn as the library records it."""
    return json.dumps(
        {
            "conversation": talk.id,
            "model": talk.model,
            "weights": talk.weights,
            "method": talk.method,
            "chat": talk.chat,
            "forks": {str(index + 1): side for index, side in talk.forks.items()},
            "turns": [turn.model_dump(mode="json") for turn in talk.turns],
        },
        indent=1,
    )


def to_markdown(talk: Conversation) -> str:
    """The conversation to read; what people and models wrote stands in fences."""
    template = "on" if talk.chat else "off"
    head = f"model {talk.model} (weights {talk.weights})\nmethod {talk.method}\nchat template {template}"
    parts = ["# A conversation in two caches", fenced(head)]
    for turn in talk.turns:
        c = turn.comparison
        parts += [f"## Turn {turn.index + 1}", turn_words(turn, talk.forks.get(turn.index)), fenced(c.prompt)]
        for side in SIDES:
            parts += [
                f"### {side.capitalize()}",
                fenced(getattr(c, side).text),
                f"{answer_words(turn, side)}; {context_words(getattr(turn, side))}.",
            ]
        figures = [f"- {name}: {value}" for name, value in _row(turn, None).items() if value is not None]
        parts.append("\n".join(figures))
    return "\n\n".join(parts) + "\n"
