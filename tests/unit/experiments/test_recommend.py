"""`recommend` with a tiny model and real measurements."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.models import tiny_loaded
from turboquant.experiments import recommend as module
from turboquant.experiments.base import Watch
from turboquant.experiments.perplexity import EXPERIMENT
from turboquant.experiments.recommend import recommend
from turboquant.experiments.recommendation import Recommendation, RecommendSettings
from turboquant.methods import parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.files import read_records
from turboquant.run.generate import CancelledError, PromptError
from turboquant.sizing import SizingError

TEXT = "\n".join(
    f"On day {i} the keeper wrote {i * 37 % 101} ships and a tide of {i * i % 89} feet." for i in range(20)
)
SMALL = RecommendSettings(recipes=("turboquant",), context=300, max_kl=0.008, min_same_top_pct=50)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded("llama", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def records() -> dict[str, ExperimentRecord]:
    return {}


@pytest.fixture(scope="module")
def found(loaded: LoadedModel, records: dict[str, ExperimentRecord]) -> Recommendation:
    return recommend(loaded, SMALL, text=TEXT, keep=lambda one: records.update({one.cell.key: one}))


def test_the_choice_is_within_the_limits_on_both_parts(found: Recommendation) -> None:
    assert found.method is not None
    for part in ("choose", "confirm"):
        one = found.evidence(part)
        assert one is not None
        assert one.failure is None
        assert one.kl is not None
        assert one.kl <= SMALL.max_kl
        assert one.kl_low is not None
        assert one.kl_low <= one.kl
        assert one.same_top_pct is not None
        assert one.same_top_pct >= 50
    assert found.method in found.sentence
    assert 1 < found.measured < found.candidates == 24


def test_nothing_smaller_was_seen_to_pass(found: Recommendation) -> None:
    chosen = found.evidence("confirm")
    assert chosen is not None
    passed = {
        part: {one.method for one in found.tried if one.part == part and not one.failure}
        for part in ("choose", "confirm")
    }
    assert all(
        one.estimated_bytes >= chosen.estimated_bytes
        for one in found.tried
        if one.method in passed["choose"] & passed["confirm"]
    )
    assert [one for one in found.tried if one.failure], "some method must have failed, or nothing was searched"


def test_recipes_are_compared_by_bytes(loaded: LoadedModel) -> None:
    both = recommend(loaded, SMALL.model_copy(update={"recipes": ("turboquant", "rtn")}), text=TEXT)
    assert both.candidates == 48
    assert {one.method.partition(":")[0] for one in both.tried} == {"turboquant", "rtn"}
    assert str(both.method).startswith("rtn:"), "without a window it is the smaller one in a short text"


def test_layers_with_fewer_bits_save_bytes(found: Recommendation) -> None:
    assert found.uniform is not None
    assert set(found.layer_kl) == {0, 1, 2}
    assert found.lower_bits is not None
    uniform, chosen = found.evidence("confirm", found.uniform), found.evidence("confirm")
    assert uniform is not None
    assert chosen is not None
    assert uniform.bytes is not None
    assert chosen.bytes is not None
    fewer = sum(parse_method(str(found.method)).layer_kind(layer) == found.lower_bits for layer in range(3))
    assert (fewer > 0) == (found.method != found.uniform)
    assert fewer < 3
    if fewer:
        assert "layers=" in str(found.method)
        assert chosen.bytes < uniform.bytes
        assert chosen.estimated_bytes < uniform.estimated_bytes


def test_figures_are_those_of_the_perplexity_experiment(
    found: Recommendation, loaded: LoadedModel, tmp_path: Any
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    half = len(TEXT) // 2
    for part, start in (("choose", 0), ("confirm", half)):
        one = found.evidence(part)
        assert one is not None
        settings = EXPERIMENT.settings(texts=(str(path),), context=300, prefill=150, start=start)
        ((_, measured),) = EXPERIMENT.run(loaded, [parse_method(one.method)], settings, Watch())
        assert one.kl == measured.metrics["kl_mean"]
        assert one.kl_high == measured.metrics["kl_high"]
        assert one.same_top_pct == measured.metrics["same_top_pct"]
        assert measured.cache is not None
        assert one.bytes == measured.cache.bytes


def test_memory_is_measured_once_and_estimated_beyond(found: Recommendation, loaded: LoadedModel) -> None:
    first, *longer = found.memory
    assert first.measured
    assert first.tokens == 300
    assert first.full_bytes == 2 * 300 * 3 * 2 * (64 + 64)
    assert [row.tokens for row in longer] == [512, 2048]
    assert not any(row.measured for row in longer)
    assert longer[-1].times_smaller > longer[0].times_smaller > first.times_smaller
    search = module._Search(loaded, SMALL, Watch(), TEXT, {}, lambda record: None)
    assert found.method is not None
    estimate = search.sized(parse_method(found.method), 300).bytes
    assert estimate == pytest.approx(first.bytes, rel=0.1)  # a cache that grew has some room to grow


def test_the_full_cache_reads_each_part_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = module.read_full

    def counted(loaded: LoadedModel, settings: Any, *rest: Any) -> Any:
        read.append(settings.start)
        return real(loaded, settings, *rest)

    monkeypatch.setattr(module, "read_full", counted)
    recommend(loaded, SMALL.model_copy(update={"layers": False}), text=TEXT)
    assert read == [0, len(TEXT) // 2]


def test_what_is_known_is_not_measured_again(
    found: Recommendation, loaded: LoadedModel, records: dict[str, ExperimentRecord]
) -> None:
    new: list[ExperimentRecord] = []
    again = recommend(loaded, SMALL, text=TEXT, known=records.values(), keep=new.append)
    assert not new
    assert again.method == found.method
    assert again.tried == found.tried
    assert found.reused == 0
    assert again.reused == len(found.tried) + len(found.layer_kl) == len(records)
    other = recommend(loaded, SMALL, text=TEXT.replace("keeper", "sailor"), known=records.values(), keep=new.append)
    assert new, "records of another text say nothing about this one"
    assert other.tried != found.tried


def test_it_stops_between_two_measurements_and_goes_on(loaded: LoadedModel, found: Recommendation) -> None:
    kept: list[ExperimentRecord] = []
    with pytest.raises(CancelledError):
        recommend(loaded, SMALL, Watch(stopping=lambda: len(kept) == 2), text=TEXT, keep=kept.append)
    assert len(kept) == 2
    assert recommend(loaded, SMALL, text=TEXT, known=kept).tried == found.tried
    with pytest.raises(CancelledError):
        recommend(loaded, SMALL, Watch(cancelled=lambda: True), text=TEXT)


def test_progress_grows_to_at_most_one(loaded: LoadedModel) -> None:
    seen: list[tuple[float, str]] = []
    recommend(loaded, SMALL, Watch(progress=lambda *one: seen.append(one)), text=TEXT)
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert max(fractions) <= 1
    assert {text.partition(":")[0] for _, text in seen} == {"choosing", "confirming", "layer by layer"}


def test_where_a_choice_is_not_confirmed_a_larger_one_is(
    loaded: LoadedModel, found: Recommendation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the held-out part said no to the first choice."""
    real = module._Search.try_out

    def doubtful(self: Any, method: str, part: Any) -> Any:
        one = real(self, method, part)
        if part == "confirm" and method == found.uniform:
            one = self.tried[method, part] = one.model_copy(update={"failure": "made up"})
        return one

    monkeypatch.setattr(module._Search, "try_out", doubtful)
    other = recommend(loaded, SMALL.model_copy(update={"layers": False}), text=TEXT)
    assert other.uniform is not None
    assert other.uniform != found.uniform
    sizes = {one.method: one.estimated_bytes for one in other.tried}
    assert sizes[other.uniform] >= sizes[str(found.uniform)]


def test_where_nothing_passes_it_says_so_with_the_best(loaded: LoadedModel) -> None:
    none = recommend(loaded, SMALL.model_copy(update={"max_kl": 1e-12}), text=TEXT)
    assert none.method is None
    assert none.memory == ()
    assert none.closest is not None
    assert none.sentence.startswith("None of 24 methods stays within the limits (KL at most 1e-12 nats")
    assert none.sentence.count(". ") == 0
    assert none.closest in none.sentence
    best = min((one for one in none.tried if one.kl is not None), key=lambda one: one.kl or 0)
    assert none.closest == best.method


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        (
            {"recipes": ("turboquant",)},
            "Short. " * 50,
            "the text typed in has 350 tokens, too few to choose on one half and confirm on the other: that takes "
            "530, in windows of 264 (half of each is read first, and turboquant packs from 132)",
        ),
        ({}, "Short. " * 80, "that takes 642, in windows of 320 (half of each is read first, and kivi packs from 160)"),
        ({"context": 200}, TEXT, "context must be at least 320 tokens"),
        ({"windows": 3}, TEXT, "that takes 1,926"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_rule_and_the_value(
    loaded: LoadedModel, settings: dict[str, Any], text: str, message: str
) -> None:
    with pytest.raises((PromptError, ValueError)) as error:
        recommend(loaded, RecommendSettings(**settings), text=text)
    assert message in str(error.value)


def test_a_model_with_few_positions_is_refused() -> None:
    short = tiny_loaded("llama", max_position_embeddings=256)
    with pytest.raises(ValueError, match=r"context must be at least 320 tokens .* got 256"):
        recommend(short, text=TEXT)


def test_layers_with_a_sliding_window_are_left_alone() -> None:
    some = recommend(tiny_loaded("gemma3", max_position_embeddings=2048), SMALL, text=TEXT)
    assert some.method is not None
    assert set(some.layer_kl) <= {2}
    with pytest.raises(SizingError, match="no layer of this model has plain full attention"):
        recommend(tiny_loaded("mistral", max_position_embeddings=2048), SMALL, text=TEXT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_kl": 0}, "greater than 0"),
        ({"min_same_top_pct": 101}, "less than or equal to 100"),
        ({"recipes": ("turboquant:bits=4",)}, "names no bits"),
        ({"recipes": ("hf-quanto",)}, "a method with bits to choose"),
        ({"recipes": ("nope",)}, "unknown method 'nope'"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecommendSettings(**values)


def test_the_least_share_of_same_tops_is_what_the_records_say() -> None:
    """docs/recommend.md and the settings' docstring quote this."""
    records = read_records(Path(__file__).resolve().parents[3] / "results" / "methods.jsonl")
    figures = [(one.metrics["kl_mean"] or 0.0, one.metrics["same_top_pct"] or 0.0) for one in records if not one.error]
    assert min(same for kl, same in figures if kl < 0.02) >= 92
    assert min(same for kl, same in figures if kl < 0.03) >= 91
    assert RecommendSettings().min_same_top_pct == 90


def test_limits_are_inclusive_and_say_which_one_was_broken() -> None:
    limits = RecommendSettings(max_kl=0.01, min_same_top_pct=90)
    assert limits.failure(0.01, 90.0) is None
    assert limits.failure(0.0101, 99.0) == "KL is 0.0101, above 0.01"
    assert limits.failure(0.001, 89.96) == "the top token is the same at 90.0 %, below 90 %"
    assert limits.failure(None, None) == "it could not be measured"


def test_an_interval_above_the_limit_is_said(found: Recommendation) -> None:
    for high, said in ((SMALL.max_kl / 2, False), (SMALL.max_kl * 2, True)):
        tried = tuple(
            one.model_copy(update={"kl_high": high}) if one.method == found.method else one for one in found.tried
        )
        assert bool(found.model_copy(update={"tried": tried}).caution) == said


def test_a_method_that_cannot_be_measured_is_passed_over(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise ValueError("no such thing here")

    monkeypatch.setattr(module, "EXPERIMENT", replace(EXPERIMENT))
    monkeypatch.setattr(module, "run_perplexity", broken)
    none = recommend(loaded, SMALL, text=TEXT)
    assert none.method is None
    assert none.sentence.endswith("none could be measured.")
    assert {one.failure for one in none.tried} == {"no such thing here"}
