"""One prompt, two caches: real runs of tiny models, from the first event to the JSON record."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from tests.support.models import AttentionCalls, reachable_storages, tiny_loaded
from turboquant.cache.build import CompressedCache, build_cache
from turboquant.methods import parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import Comparison, Settings, SideResult
from turboquant.run import compare as comparison
from turboquant.run.compare import Event, compare, first_divergence

PROMPT = "The tide turns slowly and the boats wait. " * 3  # 126 tokens
PAPER_2, PAPER_4, FULL = (parse_method(s) for s in ("turboquant-paper:bits=2", "turboquant-paper:bits=4", "full"))
SHORT = Settings(max_new_tokens=16)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    with torch.no_grad():
        return tiny_loaded()


@pytest.fixture(scope="module")
def paper(loaded: LoadedModel) -> tuple[Comparison, list[Event]]:
    events: list[Event] = []
    with torch.no_grad():
        return compare(loaded, PROMPT, PAPER_2, SHORT, on_event=events.append), events


# -- the two answers ---------------------------------------------------------------------------------------------


def test_full_against_full_is_the_same_twice(loaded: LoadedModel) -> None:
    result = compare(loaded, PROMPT, FULL, SHORT)
    one, two = result.original, result.compressed
    assert one.text == two.text
    assert one.token_ids == two.token_ids
    assert len(set(one.text)) > 3  # no model that repeats one token
    assert one.cache_bytes == two.cache_bytes
    assert one.report == two.report
    assert one.report.cache_class == "DynamicCache"
    assert (result.divergence, result.heads, result.tokens, result.notes) == (None, None, None, [])


def test_two_bits_as_published_do_not_answer_as_the_full_cache(paper: tuple[Comparison, list[Event]]) -> None:
    result, _ = paper
    assert result.original.text != result.compressed.text
    assert result.divergence is not None
    place = result.divergence.index
    assert result.original.token_ids[:place] == result.compressed.token_ids[:place]
    assert result.original.token_ids[place] != result.compressed.token_ids[place]
    assert result.divergence.original == result.original.token_texts[place]
    assert result.divergence.compressed == result.compressed.token_texts[place]


def test_two_bits_differ_from_four(loaded: LoadedModel, paper: tuple[Comparison, list[Event]]) -> None:
    two, four = paper[0], compare(loaded, PROMPT, PAPER_4, SHORT)
    assert four.original.token_ids == two.original.token_ids
    assert four.compressed.text != two.compressed.text
    assert four.compressed.report.bytes > two.compressed.report.bytes
    assert two.heads is not None
    assert four.heads is not None
    assert (two.heads.packed.top1_match_pct or 0) < (four.heads.packed.top1_match_pct or 0)
    assert two.tokens is not None
    assert four.tokens is not None
    assert two.tokens.mean_kl > four.tokens.mean_kl > 0


def test_changing_bits_or_model_changes_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: dict[str, Tensor] = {}
    for name, seed, spec in (
        ("two", 4, "bits=2"),
        ("four", 4, "bits=4"),
        ("other", 5, "bits=2"),
        ("again", 4, "bits=2"),
    ):
        caches = spied_caches(monkeypatch)
        compare(tiny_loaded(seed=seed), PROMPT, parse_method(f"turboquant-paper:{spec}"), Settings(max_new_tokens=1))
        packed: Any = caches[1].layers[0]
        codes[name] = packed.packed_values.view().codes[0][:, :, :126]
    assert codes["four"].shape[-1] == 2 * codes["two"].shape[-1]
    assert (codes["two"] != codes["other"]).float().mean() > 0.5
    assert torch.equal(codes["two"], codes["again"])


def spied_caches(monkeypatch: pytest.MonkeyPatch) -> list[Cache]:
    """The caches that `compare` builds for its two answers, as it goes on to use them."""
    caches: list[Cache] = []

    def spy(*args: Any) -> Cache:
        caches.append(build_cache(*args))
        return caches[-1]

    monkeypatch.setattr("turboquant.run.generate.build_cache", spy)
    return caches


@pytest.mark.parametrize("spec", ["turboquant:bits=4", "turboquant:bits=2", "turboquant-paper:bits=3"])
def test_the_compressed_side_holds_fewer_bytes_than_sixteen_bits(
    loaded: LoadedModel, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by walking every tensor reachable from the caches that gave the answers."""
    caches = spied_caches(monkeypatch)
    result = compare(loaded, PROMPT * 3, parse_method(spec), SHORT)
    assert [type(cache) for cache in caches] == [DynamicCache, CompressedCache]
    held = [sum(reachable_storages(cache).values()) for cache in caches]
    cached = 3 * 126 + 16 - 1  # the last token of the answer is never fed back
    sixteen_bits = cached * 3 * 2 * 2 * 64 * 2  # layers, keys and values, KV heads, dims, bytes
    assert held[1] < sixteen_bits < held[0]
    for side, total in zip((result.original, result.compressed), held, strict=True):
        assert side.report.bytes == total
        assert side.cache_bytes[-1] == total
        assert side.report.full_precision_bytes == sixteen_bits
        assert side.report.tokens == cached
    assert result.compressed.report.compression_ratio == pytest.approx(sixteen_bits / held[1])
    assert result.compressed.report.compressed_tokens > 250
    assert result.original.report.compressed_tokens == 0


def test_cache_bytes_grow_step_by_step(loaded: LoadedModel) -> None:
    result = compare(loaded, PROMPT, parse_method("turboquant:bits=4,residual_length=16"), Settings(max_new_tokens=80))
    full, compressed = result.original.cache_bytes, result.compressed.cache_bytes
    assert len(full) == len(compressed) == 80
    assert {b - a for a, b in pairwise(full)} == {3 * 2 * 2 * 64 * 4}
    # Half of that a step, and less than before where a block is packed
    changes = [b - a for a, b in pairwise(compressed)]
    assert max(changes) == 3 * 2 * 2 * 64 * 2
    assert 1 <= sum(change < max(changes) for change in changes) <= 2
    assert min(changes) < 0
    assert compressed[-1] > compressed[0]
    assert compressed[-1] - compressed[0] < 0.5 * (full[-1] - full[0])


def test_greedy_is_the_same_again(loaded: LoadedModel, paper: tuple[Comparison, list[Event]]) -> None:
    again = compare(loaded, PROMPT, PAPER_2, SHORT)
    assert again.original.token_ids == paper[0].original.token_ids
    assert again.compressed.token_ids == paper[0].compressed.token_ids
    assert (again.heads, again.tokens) == (paper[0].heads, paper[0].tokens)


# -- what is shown while it runs -----------------------------------------------------------------------------------


def test_events_come_in_turn(paper: tuple[Comparison, list[Event]]) -> None:
    result, events = paper
    sides = [event for event in events if event.side is not None]
    phases = events[len(sides) :]
    assert all(event.kind == "phase" for event in phases)
    expected = [pair for side in ("original", "compressed") for pair in (("prefill", side), ("token", side))]
    expected += [("token", side) for _ in range(15) for side in ("original", "compressed")]
    actual = [(event.kind, event.side) for event in sides if event.kind != "done"]
    assert actual == expected
    for side in (result.original, result.compressed):
        name = "original" if side is result.original else "compressed"
        own = [event for event in sides if event.side == name]
        steps = [event for event in own if event.kind == "token"]
        assert [event.text for event in steps] == ["".join(side.token_texts[: i + 1]) for i in range(16)]
        assert [event.tokens for event in steps] == list(range(1, 17))
        assert [event.cache_bytes for event in steps] == side.cache_bytes
        assert own[0].kind == "prefill"
        assert own[-1].kind == "done"
        assert [event.kind for event in own].count("done") == 1
        assert own[-1].text == side.text


def test_phases_say_what_is_measured_and_how_far(paper: tuple[Comparison, list[Event]]) -> None:
    phases = [event for event in paper[1] if event.kind == "phase"]
    texts = list(dict.fromkeys(event.text for event in phases))
    assert texts == ["Comparing attention heads", "Reading the original answer through both caches"]
    for text in texts:
        fractions = [event.fraction or 0.0 for event in phases if event.text == text]
        assert fractions == sorted(fractions)
        assert fractions[0] > 0
        assert fractions[-1] == 1


def test_the_measurements_are_of_the_original_answer(paper: tuple[Comparison, list[Event]]) -> None:
    result, _ = paper
    assert result.heads is not None
    assert result.tokens is not None
    assert result.prompt_tokens == 126
    assert result.heads.positions == list(range(125, 125 + 16))
    assert result.heads.packed_tokens == list(range(126, 126 + 16))
    assert result.heads.layer_indices == [0, 1, 2]
    assert len(result.tokens.kl) == len(result.original.token_ids)
    assert result.tokens.kl[0] == 0
    assert result.tokens.probability_full[-1] == max(result.tokens.probability_full[-1], 1 / 256)  # greedy choices
    assert result.tokens.same_top_pct == pytest.approx(100 * sum(result.tokens.same_top) / 16)


def test_timing_and_provenance_are_filled_in(paper: tuple[Comparison, list[Event]]) -> None:
    result, _ = paper
    for side in (result.original, result.compressed):
        assert len(side.step_ms) == 15
        assert side.tokens_per_second == pytest.approx(1e3 * 15 / sum(side.step_ms))
        assert (side.time_to_first_token_ms or 0) > 0
    assert (result.model.name, result.model.weights, result.model.dtype) == ("tiny-llama", "fp32", "float32")
    shape = result.model.layers, result.model.query_heads, result.model.kv_heads, result.model.head_dim
    assert shape == (3, 4, 2, 64)
    assert result.compressed.method == "turboquant-paper:bits=2"
    assert result.original.method == "full"


# -- stopping ----------------------------------------------------------------------------------------------------


class After:
    """Turns true when it has been asked a number of times (once before each layer's attention)."""

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked > self.times


@pytest.mark.parametrize(
    ("layers", "tokens"),
    [(0, (0, 0)), (1, (0, 0)), (3, (1, 0)), (5, (1, 0)), (6, (1, 1)), (9, (2, 1)), (20, (3, 3)), (60, (10, 10))],
)
def test_a_stop_is_heard_within_a_layer_and_keeps_the_text(
    paper: tuple[Comparison, list[Event]], layers: int, tokens: tuple[int, int]
) -> None:
    loaded = tiny_loaded()
    calls, whole = AttentionCalls(loaded), paper[0]
    result = compare(loaded, PROMPT, PAPER_2, SHORT, cancelled=After(layers))
    assert len(calls.layers) == layers + 1
    for side, complete, count in zip(
        (result.original, result.compressed), (whole.original, whole.compressed), tokens, strict=True
    ):
        assert side.finish == "cancelled"
        assert side.token_ids == complete.token_ids[:count]
        assert side.text == complete.text[:count]
        assert len(side.cache_bytes) == count
    assert (result.heads, result.tokens) == (None, None)
    assert result.divergence is None or result.divergence.index < min(tokens)
    assert Comparison.model_validate_json(result.model_dump_json()) == result


def test_a_stop_before_anything_was_packed_is_said_to_be_that(loaded: LoadedModel) -> None:
    result = compare(loaded, PROMPT, PAPER_2, SHORT, cancelled=lambda: True)
    assert result.notes == [
        "No token was packed: the run was stopped before the compressed cache had anything to pack."
    ]


def test_one_side_may_be_done_when_the_other_is_stopped(paper: tuple[Comparison, list[Event]]) -> None:
    ids = paper[0].original.token_ids
    end = next(i for i, token in enumerate(ids) if token not in (*ids[:i], *paper[0].compressed.token_ids[:9]))
    loaded = tiny_loaded()
    assert loaded.model.generation_config is not None
    loaded.model.generation_config.eos_token_id = ids[end]
    result = compare(loaded, PROMPT, PAPER_2, SHORT, cancelled=After(3 * (2 * end + 4)))
    assert (result.original.finish, result.original.token_ids) == ("stop", ids[:end])
    assert result.compressed.finish == "cancelled"
    assert result.compressed.token_ids == paper[0].compressed.token_ids[: end + 3]


ANSWERED = 2 * 3 * 16  # layers of both answers


@pytest.mark.parametrize(
    ("times", "heads", "tokens"),
    # After the answers: once before measuring, once a layer for the heads, then once a layer and call of the model.
    [
        (0, False, False),
        (1, False, False),
        (3, False, False),
        (4, True, False),
        (40, True, False),
        (10_000, True, True),
    ],
)
def test_a_stop_while_measuring_keeps_what_is_complete(
    paper: tuple[Comparison, list[Event]], times: int, heads: bool, tokens: bool
) -> None:
    loaded, whole = tiny_loaded(), paper[0]
    calls = AttentionCalls(loaded)
    result = compare(loaded, PROMPT, PAPER_2, SHORT, cancelled=After(ANSWERED + times))
    assert result.original.text == whole.original.text
    assert result.compressed.text == whole.compressed.text
    assert result.heads == (whole.heads if heads else None)
    assert result.tokens == (whole.tokens if tokens else None)
    measuring = len(calls.layers) - ANSWERED
    assert measuring == (2 * 3 * 16 if tokens else max(0, times - 4 + 1) if heads else 0)


# -- runs that compress little or nothing ----------------------------------------------------------------------


def test_an_answer_that_ends_at_once_is_empty_and_says_so(paper: tuple[Comparison, list[Event]]) -> None:
    loaded = tiny_loaded()
    assert loaded.model.generation_config is not None
    loaded.model.generation_config.eos_token_id = paper[0].original.token_ids[0]
    events: list[Event] = []
    result = compare(loaded, PROMPT, PAPER_2, SHORT, on_event=events.append)
    assert (result.original.text, result.original.token_ids, result.original.finish) == ("", [], "stop")
    assert (result.heads, result.tokens) == (None, None)
    assert result.notes == ["The original answer is empty, so there is nothing to measure."]
    assert result.original.time_to_first_token_ms is not None
    assert result.original.tokens_per_second is None
    assert [event.kind for event in events if event.side == "original"] == ["prefill", "token", "done"]


def test_a_run_that_packs_nothing_gives_no_figures_and_says_why(loaded: LoadedModel) -> None:
    method = parse_method("turboquant:bits=2,residual_length=120,sink_length=3,group_size=32")
    result = compare(loaded, PROMPT, method, Settings(max_new_tokens=29))
    assert (result.heads, result.tokens) == (None, None)
    assert result.compressed.text == result.original.text
    assert len(result.notes) == 1
    for words in ("holds 154 tokens", "packing starts at 155", "3 sinks", "120 recent tokens", "a block of 32"):
        assert words in result.notes[0]
    one_more = compare(loaded, PROMPT, method, Settings(max_new_tokens=30))
    assert one_more.compressed.report.compressed_tokens == 32
    assert one_more.notes == []
    assert one_more.heads is not None


def test_vectors_that_are_misread_are_told(paper: tuple[Comparison, list[Event]]) -> None:
    compressed = paper[0].compressed
    assert comparison._misread(compressed, PAPER_2) == []
    report = compressed.report.model_copy(update={"misread_vectors": 1234})
    (note,) = comparison._misread(compressed.model_copy(update={"report": report}), parse_method("kivi"))
    assert note.startswith("1,234 keys and values (of one head and token each) are read back from kivi as something")


def test_gemma_compresses_one_layer_in_three() -> None:
    result = compare(tiny_loaded("gemma3", seed=0), PROMPT, PAPER_2, SHORT)
    report = result.compressed.report
    assert (report.compressed_layers, report.layers) == (1, 3)
    assert report.compressed_tokens == 126 + 15
    assert result.heads is not None
    assert result.heads.layer_indices == [2]
    assert len(result.heads.served.per_head_top1) == 1
    assert result.original.text != result.compressed.text
    assert result.notes == []


def test_a_model_of_sliding_layers_says_why_nothing_was_packed() -> None:
    result = compare(tiny_loaded("mistral"), PROMPT, PAPER_2, SHORT)
    assert result.notes == ["turboquant-paper packed nothing: none of the model's 3 layers has plain full attention."]
    assert (result.heads, result.tokens) == (None, None)
    assert result.compressed.report.compressed_layers == 0
    assert result.compressed.text == result.original.text


# -- the record --------------------------------------------------------------------------------------------------


def test_a_comparison_travels_as_json(paper: tuple[Comparison, list[Event]]) -> None:
    result, _ = paper
    again = Comparison.model_validate_json(result.model_dump_json())
    assert again == result
    assert again.heads == result.heads
    assert isinstance(again.settings.stop, tuple)


IDS = st.lists(st.integers(0, 2), max_size=5)
FINISHES = st.sampled_from(["stop", "length", "cancelled"])


def side_of(template: SideResult, ids: list[int], finish: str) -> SideResult:
    return template.model_copy(update={"token_ids": ids, "token_texts": [f"t{i}" for i in ids], "finish": finish})


@given(one=IDS, two=IDS, finishes=st.tuples(FINISHES, FINISHES))
def test_the_first_divergence(
    paper: tuple[Comparison, list[Event]], one: list[int], two: list[int], finishes: tuple[str, str]
) -> None:
    sides = [side_of(paper[0].original, ids, finish) for ids, finish in zip((one, two), finishes, strict=True)]
    result = first_divergence(sides[0], sides[1])
    common = min(len(one), len(two))
    differing = [i for i in range(common) if one[i] != two[i]]
    if differing:
        place = differing[0]
        assert result is not None
        assert (result.index, result.original, result.compressed) == (place, f"t{one[place]}", f"t{two[place]}")
    elif len(one) == len(two) or finishes[len(one) > len(two)] == "cancelled":
        assert result is None  # alike, or the shorter answer was only cut off
    else:
        longer = f"t{max(one, two, key=len)[common]}"
        expected = (longer, None) if len(one) > len(two) else (None, longer)
        assert result is not None
        assert (result.index, result.original, result.compressed) == (common, *expected)
