"""Several methods on one prompt, and what is kept to explain the heads at risk."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.models import tiny_loaded
from turboquant.cache.build import QuantizedLayer
from turboquant.methods import parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import Comparison, Settings
from turboquant.records.heads import AttentionDetail
from turboquant.run import compare as comparison
from turboquant.run import margins as attention
from turboquant.run.compare import Event, compare, compare_methods
from turboquant.run.generate import Generation
from turboquant.run.margins import AttentionCollector, chosen_steps, rounded

PROMPT = "The tide turns slowly and the boats wait. " * 3  # 126 tokens
TOKENS = 126
METHODS = [parse_method(s) for s in ("turboquant-paper:bits=2", "turboquant:bits=3,residual_length=16,sink_length=2")]
SHORT = Settings(max_new_tokens=16)
UNTIMED = {"time_to_first_token_ms", "tokens_per_second", "step_ms"}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    with torch.no_grad():
        return tiny_loaded()


@pytest.fixture(scope="module")
def both(loaded: LoadedModel) -> tuple[list[Comparison], list[Event]]:
    events: list[Event] = []
    return compare_methods(loaded, PROMPT, METHODS, SHORT, on_event=events.append), events


def untimed(comparison: Comparison) -> dict[str, Any]:
    return comparison.model_dump(exclude={"environment": True, "original": UNTIMED, "compressed": UNTIMED})


# -- several methods -----------------------------------------------------------------------------------------------


def test_methods_together_give_what_each_gives_alone(loaded: LoadedModel, both: tuple[list[Comparison], Any]) -> None:
    together = both[0]
    alone = [compare(loaded, PROMPT, method, SHORT) for method in METHODS]
    assert [untimed(one) for one in together] == [untimed(one) for one in alone]
    assert together[0].original is together[1].original
    assert [one.compressed.method for one in together] == [str(method) for method in METHODS]
    assert together[0].compressed.text != together[1].compressed.text
    assert all(one.heads is not None and one.tokens is not None for one in together)


def test_events_say_which_method_they_belong_to(both: tuple[list[Comparison], list[Event]]) -> None:
    comparisons, events = both
    steps = [(event.side, event.number) for event in events if event.kind == "token"]
    assert steps == [("original", 0), ("compressed", 0), ("compressed", 1)] * 16
    for number, one in enumerate(comparisons):
        last = [event for event in events if (event.kind, event.side, event.number) == ("done", "compressed", number)]
        assert [event.text for event in last] == [one.compressed.text]
        phases = {event.text for event in events if event.kind == "phase" and event.number == number}
        assert len(phases) == 2
        assert all(text.endswith(f": {METHODS[number]}") for text in phases)


def test_a_stop_reaches_every_method(loaded: LoadedModel) -> None:
    steps: list[Event] = []
    stopped = compare_methods(loaded, PROMPT, METHODS, SHORT, on_event=steps.append, cancelled=lambda: len(steps) > 6)
    for one in stopped:
        assert one.compressed.finish == one.original.finish == "cancelled"
        assert 0 < len(one.compressed.token_ids) < 16
        assert one.heads is None


@pytest.mark.parametrize("count", [0, 4])
def test_only_one_to_three_methods_are_taken(loaded: LoadedModel, count: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 3 methods at once, got {count}"):
        compare_methods(loaded, PROMPT, METHODS[:1] * count, SHORT)


# -- attention detail ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=METHODS, ids=str)
def explained(loaded: LoadedModel, request: pytest.FixtureRequest) -> tuple[Comparison, Generation]:
    generations: list[Generation] = []

    class Spied(Generation):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            generations.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "Generation", Spied)
        result = compare(loaded, PROMPT, request.param, SHORT, detail=True)
    return result, generations[0]


def replayed(generation: Generation, method: Any, layer_idx: int) -> list[tuple[Tensor, Tensor, int]]:
    """Scaled scores (heads, tokens) in float64 under full keys and under those a real layer holds, step by step."""
    full: Any = generation.cache.layers[layer_idx]
    keys, values, queries = full.keys, full.values, generation.recorder.queries[layer_idx]
    layer = QuantizedLayer(method, layer_idx)
    steps = []
    for step, query in enumerate(queries):
        start, stop = (TOKENS + step - 1 if step else 0), TOKENS + step
        layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        layer.compress()
        pair = [
            torch.einsum("hd,htd->ht", query[0, :, 0].double(), side[0].double().repeat_interleave(2, dim=0))
            * generation.recorder.scoring[layer_idx].scaling
            for side in (keys[:, :, :stop], layer.dense()[0])
        ]
        steps.append((pair[0], pair[1], layer.packed_length))
    return steps


def test_the_detail_is_what_a_layer_fed_call_by_call_gives(explained: tuple[Comparison, Generation]) -> None:
    result, generation = explained
    method = parse_method(result.compressed.method)
    detail, heads = result.attention, result.heads
    assert detail is not None
    assert heads is not None
    assert detail.sinks == method.sink_length
    layers = [replayed(generation, method, layer_idx) for layer_idx in heads.layer_indices]
    for row, steps in enumerate(layers):
        for head in range(4):
            places = [
                (f[head, (s := slice(method.sink_length, method.sink_length + n))], c[head, s]) for f, c, n in steps
            ]
            squares = torch.stack([(full - compressed).square().mean() for full, compressed in places])
            margins = torch.stack([(best := full.sort().values[-2:])[1] - best[0] for full, _ in places])
            assert detail.errors[row][head] == pytest.approx(float(squares.mean().sqrt()), rel=1e-3)
            assert detail.margins[row][head] == pytest.approx(float(margins.mean()), rel=1e-3)
    for kept in detail.heads:
        for place, position in enumerate(detail.positions):
            full, compressed, packed = layers[heads.layer_indices.index(kept.layer)][position - TOKENS + 1]
            assert detail.packed[place] == packed
            for held, expected in ((kept.full[place], full), (kept.compressed[place], compressed)):
                assert held.tolist() == pytest.approx(expected[kept.head].tolist(), rel=6e-4, abs=1e-4)


def test_the_detail_names_its_tokens_and_keeps_the_worst_heads(explained: tuple[Comparison, Generation]) -> None:
    result, _ = explained
    detail, heads = result.attention, result.heads
    assert detail is not None
    assert heads is not None
    assert "".join(detail.tokens) == PROMPT + result.original.text
    assert detail.positions[0] == heads.positions[0]
    assert detail.positions[-1] == heads.positions[-1]
    assert len(detail.positions) == 8
    flat = [
        (top1, heads.packed.per_head_cosine_scores[row][head], layer, head)
        for row, layer in enumerate(heads.layer_indices)
        for head, top1 in enumerate(heads.packed.per_head_top1[row])
    ]
    worst = sorted(flat, key=lambda entry: entry[:2])[:10]
    assert [(kept.layer, kept.head) for kept in detail.heads] == [(layer, head) for *_, layer, head in worst]


def test_detail_changes_no_other_figure_and_travels_as_json(explained: tuple[Comparison, Generation]) -> None:
    result, _ = explained
    plain = compare(tiny_loaded(), PROMPT, parse_method(result.compressed.method), SHORT)
    assert plain.attention is None
    assert (plain.heads, plain.tokens) == (result.heads, result.tokens)
    assert Comparison.model_validate_json(result.model_dump_json()) == result
    older = result.model_dump(mode="json", exclude={"attention"})
    assert Comparison.model_validate(older).attention is None


@pytest.mark.parametrize(
    ("prompt_tokens", "positions", "heads"),
    [(100, 8, 10), (1000, 6, 10), (8000, 1, 8), (70_000, 0, 0)],
)
def test_a_long_context_keeps_fewer_positions_then_fewer_heads(prompt_tokens: int, positions: int, heads: int) -> None:
    steps = 9
    collector = AttentionCollector(prompt_tokens, [prompt_tokens - 10] * steps, 4)
    assert len(collector.steps) == positions
    scores = torch.randn(12, steps, prompt_tokens + steps - 1, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        collector.take(0, scores, scores + 0.5)
        collector.end_layer(layer, 0.5, {"top1": torch.ones(12, steps), "cosine_scores": torch.ones(12, steps)})
    detail = collector.detail([])
    assert len(detail.heads) == heads
    for kept in detail.heads:
        assert [len(row) for row in kept.full] == [position + 1 for position in detail.positions]
    assert sum(len(row) for kept in detail.heads for row in kept.full) <= attention.MAX_SCORES
    assert detail.errors == [[0.25] * 12] * 2


def test_steps_that_packed_nothing_are_passed_over() -> None:
    collector = AttentionCollector(10, [0, 0, 1], 2)
    for start, packed in ((0, 0), (2, 1)):
        scores = torch.randn(2, 2 if packed == 0 else 1, 12)
        collector.take(start, scores, scores + 1)
    collector.end_layer(5, 1.0, {"top1": torch.ones(2, 1), "cosine_scores": torch.ones(2, 1)})
    detail = collector.detail(["x"] * 13)
    assert (detail.positions, detail.packed) == ([11], [1])
    assert detail.errors[0] == pytest.approx([1.0, 1.0])
    assert detail.margins == [[None, None]]  # one packed token has no rival
    assert AttentionDetail.model_validate_json(detail.model_dump_json()) == detail


@given(packed=st.lists(st.integers(0, 3), max_size=40).map(sorted), count=st.integers(0, 9))
def test_chosen_steps_are_spread_over_the_packed_ones(packed: list[int], count: int) -> None:
    steps = chosen_steps(packed, count)
    possible = [step for step, tokens in enumerate(packed) if tokens]
    assert len(steps) == min(count, len(possible))
    assert steps == sorted(set(steps))
    assert set(steps) <= set(possible)
    if len(steps) > 1:
        assert (steps[0], steps[-1]) == (possible[0], possible[-1])
        gaps = [b - a for a, b in pairwise(steps)]
        assert max(gaps) - min(gaps) <= 1


@given(st.lists(st.floats(width=32, allow_subnormal=False), max_size=8))
def test_rounding_keeps_four_significant_digits(values: list[float]) -> None:
    for value, short in zip(values, rounded(torch.tensor(values)), strict=True):
        if value != value or abs(value) == float("inf"):
            assert short is None
        elif 1e-12 < abs(value) < 1e18:
            assert short == float(f"{value:.4g}") or short == pytest.approx(value, rel=5.1e-4)
            assert len(f"{short:.10g}".lstrip("-0.").replace(".", "").split("e")[0].rstrip("0")) <= 4
