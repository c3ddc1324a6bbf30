"""Variance: spreads and paired differences, first differing tokens against real generation, records that resume."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support.models import Lossless, save_tiny, tiny_loaded
from tests.support.system import interrupted
from turboquant import cli
from turboquant.cache.build import NothingCompressedError, build_cache
from turboquant.experiments.base import Watch
from turboquant.experiments.perplexity import EXPERIMENT as PERPLEXITY
from turboquant.experiments.seeds import (
    EXPERIMENT,
    _Choice,
    differences,
    first_divergences,
    full_answers,
    prompts,
    run,
    spreads,
    with_seeds,
    without_seed,
)
from turboquant.methods import METHODS, parse_method
from turboquant.records.files import read_records
from turboquant.records.settings import SeedsSettings
from turboquant.records.spread import LEAST_PAIRS, paired_difference, spread
from turboquant.run.generate import Generation, QueryRecorder

RUNNER = CliRunner()
METHOD = parse_method("turboquant:bits=2,residual_length=8")
SMALL = SeedsSettings(texts=("persuasion",), context=192, prefill=100, prompts=3, prompt_tokens=100, new_tokens=12)
SIZES = ["--context", "192", "--prefill", "100", "--prompts", "2", "--prompt-tokens", "100", "--new-tokens", "8"]
FIXED = ["--text", "persuasion", *SIZES]


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


def test_a_spread_is_that_of_the_textbook() -> None:
    found = spread([1.0, 2.0, 3.0, 4.0])
    assert (found.count, found.mean, found.minimum, found.maximum) == (4, 2.5, 1.0, 4.0)
    assert found.sd == pytest.approx(1.2910, abs=1e-4)
    assert found.high == pytest.approx(2.5 + 3.1824 * 1.2910 / 2, abs=1e-3)  # t of 3 degrees of freedom
    assert found.high is not None
    assert found.low == pytest.approx(5.0 - found.high)
    alone = spread([7.0])
    assert (alone.mean, alone.sd, alone.low) == (7.0, None, None)
    share = spread([25.0, 100.0, 50.0], (0.0, 100.0))
    assert (share.low, share.high) == (0.0, 100.0)


def test_paired_differences_find_what_is_there_and_no_more() -> None:
    rng = np.random.default_rng(1)
    text = rng.gamma(0.5, size=80)  # as uneven as KL from block to block
    real = paired_difference(1.2 * text + rng.normal(0, 0.02, 80), text)
    assert real.real
    assert real.low < 0.2 * text.mean() < real.high
    alarms = 0
    for _ in range(40):
        noise = paired_difference(text + rng.normal(0, 0.1, 80), text + rng.normal(0, 0.1, 80))
        alarms += bool(noise.real)
    assert alarms <= 6  # 5 % of 40 is 2; 7 or more has a chance of 0.3 %


def test_few_or_equal_pairs_are_said_to_be_so() -> None:
    few = paired_difference([1.0] * (LEAST_PAIRS - 1), [0.0] * (LEAST_PAIRS - 1))
    assert (few.difference, few.real, few.low) == (1.0, None, None)
    same = paired_difference([1.0] * 8, [1.0] * 8)
    assert (same.real, same.p_value) == (False, 1.0)
    assert paired_difference([2.0] * 8, [1.0] * 8).real
    with pytest.raises(ValueError, match="equally many and at least one, got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference([], [])


@given(st.lists(st.floats(-5, 5), min_size=LEAST_PAIRS, max_size=12))
def test_swapping_the_sides_turns_the_sign(gaps: list[float]) -> None:
    zeros = [0.0] * len(gaps)
    one, other = paired_difference(gaps, zeros), paired_difference(zeros, gaps)
    assert one.difference == pytest.approx(-other.difference)
    assert one.p_value == pytest.approx(other.p_value)


def test_seeds_are_put_into_methods_and_taken_out() -> None:
    turned = with_seeds(METHOD, [0, 3])
    assert [str(one) for one in turned] == [str(METHOD), f"{METHOD},seed=3"]
    assert {without_seed(one) for one in turned} == {str(METHOD)}
    assert with_seeds(METHODS["full"](), range(5)) == [METHODS["full"]()]


@pytest.mark.parametrize("seed", [None, 5])
def test_full_answers_are_those_of_the_generation_loop(loaded, seed: int | None) -> None:
    settings = SMALL.model_copy(update={"seed": seed})
    ids = prompts(loaded, settings)
    assert ids.shape == (3, 100)
    answers = full_answers(loaded, ids, settings.sampling, Watch())
    for row, answer in zip(ids, answers, strict=True):
        if seed is not None:
            break  # the loop's one generator is seeded otherwise
        generation = Generation(
            loaded, row[None], build_cache(loaded.model.config, METHODS["full"]()), settings.sampling, RECORDER, **LOOP
        )
        generation.run()
        assert generation.tokens == answer.tolist()
    again = full_answers(loaded, ids, settings.sampling, Watch())
    assert torch.equal(answers, again)
    other = full_answers(loaded, ids, settings.model_copy(update={"seed": 6}).sampling, Watch())
    assert not torch.equal(answers, other)


RECORDER = QueryRecorder(keep=False)
LOOP = {"ignore_eos": True, "measure_bytes": False}


@pytest.mark.parametrize("spec", ["turboquant:bits=2,residual_length=8", "turboquant-paper:bits=3"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_first_divergences_are_those_of_real_generation(loaded, spec: str, seed: int | None) -> None:
    """The compressed side generates token by token, feeding itself, with the same draws."""
    method = parse_method(spec)
    settings = SMALL.model_copy(update={"seed": seed})
    ids = prompts(loaded, settings)
    answers = full_answers(loaded, ids, settings.sampling, Watch())
    found = first_divergences(loaded, ids, answers, method, settings.sampling, Watch())
    cache = build_cache(loaded.model.config, method)
    choose = _Choice(settings.sampling, len(ids), ids.device)
    tokens: list[torch.Tensor] = []
    for _ in range(settings.new_tokens):
        fed = tokens[-1][:, None] if tokens else ids
        tokens.append(choose(loaded.model(fed, past_key_values=cache).logits[:, -1]))
    differs = torch.stack(tokens, dim=1) != answers
    expected = [row.tolist().index(True) if row.any() else None for row in differs]
    assert found.first == expected
    assert any(one is not None for one in expected)
    assert found.report.compressed_tokens > 0


def test_a_lossless_cache_never_parts(loaded) -> None:
    for seed in (None, 3):
        settings = SMALL.model_copy(update={"seed": seed})
        ids = prompts(loaded, settings)
        answers = full_answers(loaded, ids, settings.sampling, Watch())
        found = first_divergences(loaded, ids, answers, Lossless(), settings.sampling, Watch())
        assert found.first == [None] * 3
        assert found.metrics == {"agreed_tokens": 12.0, "agreed_tokens_median": 12.0, "identical_pct": 100.0}


def test_cells_without_a_sampling_seed_hold_the_perplexity_experiment(loaded) -> None:
    turned = with_seeds(METHOD, [0, 1])
    found = dict(run(loaded, turned, SMALL, Watch()))
    reference = dict(PERPLEXITY.run(loaded, turned, SMALL.perplexity, Watch()))
    for method in turned:
        assert reference[method].metrics.items() <= found[method].metrics.items()
        assert found[method].detail["windows"] == reference[method].detail["windows"]
    assert found[turned[0]].metrics["kl_mean"] != found[turned[1]].metrics["kl_mean"]
    sampled = dict(run(loaded, turned, SMALL.model_copy(update={"seed": 0}), Watch()))
    assert set(sampled[turned[0]].metrics) == {"agreed_tokens", "agreed_tokens_median", "identical_pct"}


def test_a_method_that_packs_nothing_gets_no_figure(loaded) -> None:
    idle = parse_method("turboquant:bits=4,residual_length=400")
    for seed in (None, 0):
        with pytest.raises(NothingCompressedError):
            list(run(loaded, [idle], SMALL.model_copy(update={"seed": seed}), Watch()))


def invoke(folder: str, output: Path, *arguments: str):
    return RUNNER.invoke(cli.app, ["variance", "--model", folder, *FIXED, "--output", str(output), *arguments])


METHODS_ASKED = ("--method", str(METHOD), "turboquant:bits=4,residual_length=8")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("variance") / "variance.jsonl"
    return invoke(folder, output, *METHODS_ASKED, "--rotation-seeds", "6", "--sampling-seeds", "2"), output


def test_a_record_for_every_method_and_pair_of_seeds(finished) -> None:
    result, output = finished
    assert result.exit_code == 0, result.output
    records = read_records(output)
    cells = [(record.cell.method, record.cell.settings["seed"]) for record in records]
    assert len(cells) == len(set(cells)) == 2 * 6 * 3
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["records"], last["failed"], last["against"]) == (36, 0, str(METHOD))
    kl = last["spreads"][str(METHOD)]["kl_mean"]
    assert kl["count"] == 6
    own = [r.metrics["kl_mean"] for r in records if r.cell.settings["seed"] is None and "bits=2" in str(r.cell.method)]
    assert kl["mean"] == pytest.approx(np.mean(own))
    sampled = last["spreads"][str(METHOD)]["sampled_agreed_tokens"]
    assert (sampled["count"], sampled["low"], sampled["high"]) == (12, None, None)
    gap = last["differences"]["turboquant:bits=4,residual_length=8"]["kl_mean over rotation seeds"]
    assert gap["difference"] < 0
    assert gap["real"] is True
    assert "KL, nats, over text: -" in result.stdout
    assert ": real, turboquant:bits=4,residual_length=8 is better\n" in result.stdout  # less KL
    assert "first differing token, sampled, 24 answers" in result.stdout


def test_partial_records_are_usable(finished) -> None:
    records = read_records(finished[1])
    other = parse_method("turboquant:bits=4,residual_length=8")
    some = [r for r in records if r.cell.settings["seed"] is None][:-2]
    assert spreads(some, METHOD)["kl_mean"].count == 6
    assert spreads(some, other)["kl_mean"].count == 4
    found = differences(some, other, METHOD)
    assert found["kl_mean over rotation seeds"].pairs == 4
    assert found["kl_mean over rotation seeds"].real is None
    assert differences([], other, METHOD) == {}


def test_the_same_command_measures_nothing_again(folder, finished) -> None:
    before = finished[1].read_bytes()
    asked = [*METHODS_ASKED, "--against", METHODS_ASKED[2], "--rotation-seeds", "3", "--sampling-seeds", "1"]
    result = invoke(folder, finished[1], *asked)
    assert result.exit_code == 0, result.output
    assert "12 of 12 records are in" in result.stderr
    assert finished[1].read_bytes() == before
    assert json.loads(result.stdout.splitlines()[-1])["against"] == METHODS_ASKED[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nope"], "unknown method 'nope'"),
        (["--against", "turboquant:bits=4"], "is the only method"),
        (["--prefill", "192"], "prefill must be shorter than the context"),
        (["--text", "no-such-text"], "no-such-text"),
        (["--method", "turboquant:residual_length=300"], "packs none of 192 tokens of context"),
        (["--context", "600", "--method", str(METHOD)], "600"),
    ],
)
def test_wrong_use_is_refused_before_any_work(folder, tmp_path: Path, arguments: list[str], message: str) -> None:
    output = tmp_path / "v.jsonl"
    result = invoke(folder, output, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (output.exists() and output.read_bytes())


def test_ctrl_c_shows_what_there_is_and_the_next_run_goes_on(folder, tmp_path: Path) -> None:
    output = tmp_path / "variance.jsonl"
    words = ["variance", "--model", folder, *FIXED, "--output", str(output)]
    words += ["--method", str(METHOD), "--rotation-seeds", "40", "--sampling-seeds", "2"]
    kept = 0
    for _ in range(2):
        with interrupted(output, kept + 2):
            result = RUNNER.invoke(cli.app, words)
        assert result.exit_code == 1, result.output
        assert not kept or f"{kept} of 120 records are in" in result.stderr
        assert "the same command goes on from there" in result.stderr
        records = read_records(output)
        assert kept < len(records) < 120
        assert f"what {len(records)} of 120 records show" in result.stderr
        assert "KL, nats" in result.stdout
        kept = len(records)
    keys = [record.cell.key for record in records]
    assert len(keys) == len(set(keys))


def test_the_experiment_is_found_by_its_name() -> None:
    from turboquant.experiments.registry import EXPERIMENTS

    assert EXPERIMENTS["variance"] is EXPERIMENT
    assert list(itertools.islice(SeedsSettings.model_fields, 4)) == ["texts", "context", "prefill", "seed"]
