"""The needle: answers read the packed text, all methods get the same questions, success has an honest interval."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import AttentionCalls, Lossless, tiny_loaded
from turboquant.cache.build import NothingCompressedError, build_cache
from turboquant.experiments.base import Watch
from turboquant.experiments.needle import EXPERIMENT, build_prompt, success
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.methods import METHODS, parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.files import read_records
from turboquant.records.settings import NeedleSettings
from turboquant.run.generate import CancelledError

RECORDED = Path(__file__).resolve().parents[3] / "results" / "needle.jsonl"
SMALL = NeedleSettings(context=480, repetitions=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return tiny_loaded("llama", num_hidden_layers=2)


def measure(loaded: LoadedModel, specs: list[str], chosen: NeedleSettings = SMALL) -> dict[str, Any]:
    methods = [parse_method(spec) for spec in specs]
    return {str(method): found for method, found in EXPERIMENT.run(loaded, methods, chosen, Watch())}


@torch.no_grad()
def by_hand(loaded: LoadedModel, spec: str, chosen: NeedleSettings, repetition: int) -> str:
    """One forward call over everything before the question, one over the question, then token by token."""
    prompt = build_prompt(loaded, chosen, repetition)
    cache = build_cache(loaded.model.config, parse_method(spec))
    loaded.model(prompt.ids[:, : prompt.question_start], past_key_values=cache)
    fed = prompt.ids[:, prompt.question_start :]
    tokens: list[int] = []
    while len(tokens) < chosen.max_new_tokens:
        token = int(loaded.model(fed, past_key_values=cache).logits[0, -1].argmax())
        if token == loaded.tokenizer.eos_token_id:
            break
        tokens.append(token)
        fed = torch.tensor([[token]])
    return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize(
    "spec", ["turboquant:bits=2", "turboquant-paper:bits=2", "rtn:bits=3", "kivi:residual_length=32"]
)
def test_answers_are_those_of_the_real_cache(tiny: LoadedModel, spec: str) -> None:
    (found,) = measure(tiny, [spec]).values()
    for i, repetition in enumerate(found.detail["repetitions"]):
        assert repetition["text"] == by_hand(tiny, spec, SMALL, i)
        assert repetition["text_full"] == by_hand(tiny, "full", SMALL, i)
        assert repetition["text"]
    assert found.metrics["compressed_tokens"] > 200


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
def test_other_models(architecture: str) -> None:
    loaded = tiny_loaded(architecture)
    chosen = SMALL.model_copy(update={"repetitions": 1})
    (found,) = measure(loaded, ["turboquant:bits=3"], chosen).values()
    (repetition,) = found.detail["repetitions"]
    assert repetition["text"] == by_hand(loaded, "turboquant:bits=3", chosen, 0)
    assert repetition["text_full"] == by_hand(loaded, "full", chosen, 0)


def test_compression_matters_and_no_loss_changes_nothing(tiny: LoadedModel) -> None:
    methods = [Lossless(), parse_method("turboquant:bits=1"), METHODS["full"]()]
    found = dict(EXPERIMENT.run(tiny, methods, SMALL, Watch()))
    texts = [[one["text"] for one in found[method].detail["repetitions"]] for method in methods]
    full = [one["text_full"] for one in found[methods[0]].detail["repetitions"]]
    assert texts[0] == full == texts[2]
    assert texts[1] != full


def test_methods_share_the_full_reading(tiny: LoadedModel) -> None:
    loaded = tiny_loaded("llama", num_hidden_layers=2)
    calls = AttentionCalls(loaded)
    chosen = SMALL.model_copy(update={"repetitions": 1, "max_new_tokens": 1})
    assert len(measure(loaded, ["turboquant:bits=2", "turboquant:bits=3", "rtn:bits=4"], chosen)) == 3
    # One pass in two chunks (text, question), then the question once for the full cache and for each method.
    assert len(calls.layers) == 2 * (2 + 1 + 3)


def test_repetitions_and_seeds_have_their_own_needles(tiny: LoadedModel) -> None:
    numbers = [
        build_prompt(tiny, SMALL.model_copy(update={"seed": seed}), repetition).answer
        for seed in range(3)
        for repetition in range(SMALL.repetitions)
    ]
    assert len(set(numbers)) == 6
    detail = measure(tiny, ["rtn:bits=4"])["rtn:bits=4"].detail["repetitions"]
    assert [one["answer"] for one in detail] == numbers[:2]


def test_the_number_in_the_answer_is_success(tiny: LoadedModel) -> None:
    prompt = build_prompt(tiny, SMALL, 0)
    assert prompt.is_answered_by(f" {prompt.answer}.")
    assert prompt.is_answered_by(f"{prompt.answer[0]},{prompt.answer[1:4]},{prompt.answer[4:]}")
    assert prompt.is_answered_by(f"{prompt.answer[:3]} {prompt.answer[3:]} 5")
    assert not prompt.is_answered_by(prompt.answer[:-1])
    assert not prompt.is_answered_by(f" {prompt.answer}5")
    assert not prompt.is_answered_by(f" 5{prompt.answer}")


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(counts: tuple[int, int]) -> None:
    found, asked = counts
    figures: Any = success([True] * found + [False] * (asked - found))
    z, share = 1.959964, found / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    assert figures["success_pct"] == pytest.approx(100 * share)
    assert figures["success_low_pct"] == pytest.approx(100 * (middle - half), abs=1e-3)
    assert figures["success_high_pct"] == pytest.approx(100 * (middle + half), abs=1e-3)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"context": 510}, "tiny-llama has a context of 512 tokens, got 516"),
        ({"context": 60}, "a prompt with a needle has at least"),
        ({"filler": "nope"}, "the text must be one of"),
    ],
)
def test_what_cannot_be_asked_is_refused(tiny: LoadedModel, update: dict[str, Any], message: str) -> None:
    chosen = SMALL.model_copy(update=update)
    with pytest.raises(ValueError, match=message):
        EXPERIMENT.check(tiny, chosen)
    with pytest.raises(ValueError, match=message):
        measure(tiny, ["rtn"], chosen)


def test_a_method_that_packs_nothing_has_no_figure_and_the_others_have(tiny: LoadedModel) -> None:
    methods = [parse_method("turboquant:residual_length=400"), parse_method("rtn:bits=4")]
    measured = EXPERIMENT.run(tiny, methods, SMALL, Watch())
    assert next(measured)[0] == methods[1]
    with pytest.raises(NothingCompressedError, match=r"turboquant:.* packs none of 480 tokens"):
        next(measured)
    with pytest.raises(NothingCompressedError):
        next(EXPERIMENT.run(tiny, methods[:1], SMALL, Watch(cancelled=lambda: True)))  # before any forward call
    assert EXPERIMENTS["needle"] is EXPERIMENT


def test_a_window_filled_in_some_repetitions_only_costs_that_method_alone(tiny: LoadedModel) -> None:
    chosen = next(
        one for seed in range(20) if read(tiny, one := SMALL.model_copy(update={"seed": seed}), 0) > read(tiny, one, 1)
    )
    just = parse_method(f"rtn:residual_length={read(tiny, chosen, 0) - 32}")
    assert just.packed_length(read(tiny, chosen, 0))
    assert not just.packed_length(read(tiny, chosen, 1))
    measured = EXPERIMENT.run(tiny, [just, parse_method("rtn:bits=2")], chosen, Watch())
    assert str(next(measured)[0]) == "rtn:bits=2"
    with pytest.raises(NothingCompressedError, match=r"rtn:bits=4,residual_length=.* packs none of 480 tokens"):
        next(measured)


def read(loaded: LoadedModel, chosen: NeedleSettings, repetition: int) -> int:
    """Tokens before the question."""
    return build_prompt(loaded, chosen, repetition).question_start


def test_cancelling_stops(tiny: LoadedModel) -> None:
    with pytest.raises(CancelledError):
        list(EXPERIMENT.run(tiny, [parse_method("rtn")], SMALL, Watch(cancelled=lambda: True)))


def test_progress_rises(tiny: LoadedModel) -> None:
    seen: list[float] = []
    list(
        EXPERIMENT.run(tiny, [parse_method("rtn")], SMALL, Watch(progress=lambda fraction, text: seen.append(fraction)))
    )
    assert seen == sorted(seen)
    assert 0.6 < seen[-1] <= 1


OWN = {"needle": "The night train leaves from platform nineteen.", "question": "Which platform?", "answer": "nineteen"}


def test_an_own_needle_is_asked_about_and_counted(tiny: LoadedModel) -> None:
    chosen = SMALL.model_copy(update=OWN)
    (found,) = measure(tiny, ["turboquant:bits=2"], chosen).values()
    for i, repetition in enumerate(found.detail["repetitions"]):
        assert repetition["text"] == by_hand(tiny, "turboquant:bits=2", chosen, i)
        assert repetition["answer"] == "nineteen"
        assert repetition["found"] == ("nineteen" in repetition["text"].casefold())


def test_cells_without_an_own_needle_keep_their_keys() -> None:
    old = {"context": 480, "depth": 0.5, "repetitions": 2, "seed": 0, "filler": "sentences"}
    old |= {"max_new_tokens": 6, "chunk_tokens": 512}
    assert SMALL.model_dump(mode="json") == old
    own = NeedleSettings(**SMALL.model_dump(), **OWN)
    assert own.model_dump(mode="json").items() > OWN.items()
    assert NeedleSettings.model_validate(own.model_dump(mode="json")) == own


def test_recorded_cells_are_the_cells_of_today() -> None:
    records = read_records(RECORDED)
    assert records
    for record in records:
        again = NeedleSettings.model_validate(record.cell.settings).model_dump(mode="json")
        assert record.cell.model_copy(update={"settings": again}).key == record.cell.key


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"needle": "A red door."}, "given together or not at all"),
        ({**OWN, "answer": "twenty"}, "the answer must occur in the needle"),
        ({**OWN, "needle": "nineteen " * 60}, "at most 400 characters"),
        ({**OWN, "repetitions": 6}, "5 different prompts in the filler sentences, got 6 repetitions"),
    ],
)
def test_own_needles_that_cannot_be_asked_are_refused(update: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeedleSettings(**update)
