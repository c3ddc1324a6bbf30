"""Comparisons by hand that keep the scores of their worst heads: no model ran here and nothing in them was measured."""

from typing import Any

from tests.support.factory import HEADS, LAYERS, comparison
from turboquant.records.comparison import Comparison
from turboquant.records.heads import AttentionDetail, HeadDetail

TOKENS = ["<s>", "The", " river", " runs", "\n", " to", " <b>the</b>", " sea"]
FULL = [0.0, 1.0, 3.0, 2.5, 0.5, 0.0, 1.0, 2.0]
FLIPPED = [0.0, 1.0, 2.4, 2.9, 0.5, 0.0, 1.0, 2.0]


def detail(compressed: list[float] = FLIPPED) -> AttentionDetail:
    """Two kept heads at two positions; of 8 tokens the first is a sink and four are packed."""
    kept: list[Any] = [[*FULL[:7]], [*FULL]]
    changed: list[Any] = [[*compressed[:7]], [*compressed]]
    table: list[list[float | None]] = [[0.4 + 0.1 * head for head in range(HEADS)] for _ in range(LAYERS)]
    return AttentionDetail(
        tokens=TOKENS,
        positions=[6, 7],
        packed=[4, 4],
        sinks=1,
        scaling=0.125,
        heads=[HeadDetail(layer=2, head=h, full=kept, compressed=changed) for h in (3, 2)],
        margins=table,
        errors=[[0.5] * HEADS for _ in range(LAYERS)],
    )


def explained(**changes: Any) -> Comparison:
    """A comparison by hand with attention detail."""
    c = comparison(**changes)
    assert c.heads is not None
    measured = c.heads.model_copy(update={"positions": [4, 5, 6, 7, 8]})
    return c.model_copy(update={"heads": measured, "attention": detail()})
