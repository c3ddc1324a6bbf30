"""What is said and drawn of heads follows from their scores, and files whose scores do not fit are refused."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.heads import attention_charts as attention
from app.heads import charts as heads
from app.heads.attention_charts import Look
from app.tab.runs import RunError, import_run
from tests.support.attention_factory import FULL, TOKENS, detail, explained
from tests.support.factory import HEADS, LAYERS

# -- what is said of one head ------------------------------------------------------------------------------------


def test_the_sentence_names_both_tokens_margin_and_error_of_a_flip() -> None:
    words = attention.why(attention.look(detail(), 0, 1, "packed"))
    assert words == (
        "Under full keys “ river” (position 2) leads “ runs” (position 3) by 0.5. Compression moves the two 1 against "
        "each other, more than that margin, so under compressed keys “ runs” (position 3) comes first: the head flips "
        "here."
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [(2.8, "moves the two 0.3 against each other, which is less"), (2.2, "widens that lead by 0.3")],
)
def test_a_head_that_keeps_its_token_is_said_to(changed: float, words: str) -> None:
    compressed = [*FULL[:3], changed, *FULL[4:]]
    sentence = attention.why(attention.look(detail(compressed), 0, 1, "packed"))
    assert words in sentence
    assert "does not flip" in sentence


SCORES = st.lists(st.floats(-20, 20).map(lambda value: round(value, 2)), min_size=2, max_size=12)


@given(full=SCORES, data=st.data())
def test_margin_and_error_decide_whether_a_head_flips(full: list[float], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.sampled_from(full), min_size=len(full), max_size=len(full)))
    sides = np.array(full), np.array(other)
    one = Look(["x"] * len(full), np.arange(len(full)), *sides, sinks=0, packed=len(full))
    flipped = one.tops[0] != one.tops[1]
    assert ("the head flips here" in attention.why(one)) == flipped
    assert one.tops == (full.index(max(full)), other.index(max(other)))


def test_weights_are_the_softmax_of_the_tokens_that_count() -> None:
    packed, served = (attention.look(detail(), 0, 1, part) for part in ("packed", "served"))
    assert packed.places.tolist() == [1, 2, 3, 4]
    assert served.places.tolist() == list(range(8))
    for one in (packed, served):
        chosen = [FULL[place] for place in one.places]
        expected = [math.exp(value) / sum(map(math.exp, chosen)) for value in chosen]
        assert one.weights[0].tolist() == pytest.approx(expected)
        assert one.weights[1].sum() == pytest.approx(1)
    assert [served.held(place) for place in (0, 1, 4, 5)] == ["sink", "packed", "packed", "exact window"]


def test_the_top_tokens_have_their_ranks_on_both_sides() -> None:
    table = attention.top_tokens(attention.look(detail(), 0, 1, "served"), count=2)
    rows = table[["position", "rank, full", "rank, compressed", "held as"]].values.tolist()
    assert rows == [[2, 1, 2, "packed"], [3, 2, 1, "packed"]]


def test_the_flips_are_those_of_the_positions() -> None:
    assert attention.flips(detail(), 0, "packed") == [True, True]
    assert attention.flips(detail(FULL), 0, "packed") == [False, False]


def test_charts_of_one_head_have_a_sentence_and_a_table() -> None:
    for part in ("packed", "served"):
        one = attention.look(detail(), 1, 0, part)
        for chart in (attention.attention(one), attention.scores(one)):
            assert len(chart.table) == len(one.places)
            assert chart.alt.endswith(".")
            json.loads(chart.figure.to_json())


def test_a_tokens_markup_is_text_in_figures() -> None:
    figure = attention.attention(attention.look(detail(), 0, 1, "served")).figure.to_json()
    assert "<b>" not in figure.replace("\\u003c", "<")
    assert "&lt;b&gt;" in figure.replace("\\u0026", "&")


def test_scores_that_are_no_numbers_draw_as_nothing() -> None:
    broken = detail().heads[0].model_copy(update={"compressed": [[None] * 7, [None] * 8]})
    one = attention.look(detail().model_copy(update={"heads": [broken]}), 0, 1, "served")
    assert one.weights[1].sum() == 0
    for chart in (attention.attention(one), attention.scores(one)):
        json.loads(chart.figure.to_json())


# -- all heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", heads.METRICS)
@pytest.mark.parametrize("part", ["packed", "served"])
def test_the_map_shows_every_head_and_marks_the_worst(part: Any, metric: str) -> None:
    chart = heads.head_map(explained(), part, metric, (1, 2))
    grid, worst, chosen = chart.figure.data
    assert (len(grid.z), len(grid.z[0])) == (HEADS, LAYERS)
    assert (chosen.x[0], chosen.y[0]) == ("1", 2)
    assert (worst.x[0], worst.y[0]) == ("2", 3)  # the factory's table falls with layer and head
    assert "layer 2, head 3" in chart.alt


def test_margins_and_errors_are_drawn_by_how_often_a_head_misses() -> None:
    c = explained()
    chart = heads.margins(c, (2, 3))
    groups = {trace.name: trace for trace in chart.figure.data}
    assert len({trace.marker.symbol for trace in chart.figure.data if trace.mode == "markers"}) == 4
    assert len(groups["never misses"].x) == 1  # layer 0, head 0 agrees in every step
    assert len(groups["misses in a quarter of the steps or more"].x) == 1
    assert sum(len(groups[name].x) for name in groups if "misses" in name) == LAYERS * HEADS
    own = groups["the chosen head"]
    assert (own.x[0], own.y[0]) == pytest.approx((0.7, 0.5))
    table = chart.table.set_index(["layer", "head"])
    assert table.loc[(2, 3), "steps at risk"] == pytest.approx(25)


# -- files ---------------------------------------------------------------------------------------------------------


def exported(**changes: Any) -> str:
    c = explained()
    assert c.attention is not None
    part = c.attention.model_copy(update=changes)
    return c.model_copy(update={"attention": part}).model_dump_json()


def test_a_run_travels_with_its_detail() -> None:
    assert import_run(exported()).comparison == explained()


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": [7, 6]},
        {"positions": [6]},
        {"positions": [6, 99]},
        {"packed": [4, 8]},
        {"tokens": TOKENS[:7]},
        {"margins": [[0.1] * HEADS] * (LAYERS - 1)},
        {"errors": [[0.1] * (HEADS + 1)] * LAYERS},
        {"heads": [detail().heads[0].model_copy(update={"layer": 7})]},
        {"heads": [detail().heads[0].model_copy(update={"compressed": [[0.0] * 7, [0.0] * 7]})]},
        {"sinks": -1},
    ],
    ids=str,
)
def test_detail_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="no run"):
        import_run(exported(**changes))
