"""Perplexity through the cache: the same as decoding token by token, the statistics, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.models import HF_FP8, Lossless, tiny_loaded
from turboquant.cache.build import NothingCompressedError, build_cache, cache_report
from turboquant.experiments.base import Watch
from turboquant.experiments.perplexity import (
    EXPERIMENT,
    _relative_pct,
    feeding_runs,
    packed_bits_per_value,
    text_windows,
)
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.methods import METHODS, parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.settings import PerplexitySettings
from turboquant.records.spread import block_interval
from turboquant.run.generate import CancelledError

SMALL = PerplexitySettings(texts=("persuasion",), context=260, prefill=180)
SPECS = [
    "turboquant:bits=3",
    "turboquant-paper:bits=2",
    "rtn:bits=4",
    "kivi:bits=2,residual_length=32",
    "qjl",
    "polarquant",
]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return tiny_loaded("llama", num_hidden_layers=2)


def measure(loaded: LoadedModel, spec: str, chosen: PerplexitySettings = SMALL) -> Any:
    ((_, found),) = EXPERIMENT.run(loaded, [parse_method(spec)], chosen, Watch())
    return found


@torch.no_grad()
def token_by_token(loaded: LoadedModel, spec: str, chosen: PerplexitySettings) -> dict[str, float]:
    """The slow way: every token in a call of its own, logits compared in float64."""
    (window,) = text_windows(loaded, chosen)
    caches = [build_cache(loaded.model.config, parse_method(one)) for one in ("full", spec)]
    for cache in caches:
        loaded.model(window.ids[:, : chosen.prefill], past_key_values=cache)
    kl: list[float] = []
    nll: tuple[list[float], list[float]] = ([], [])
    for i in range(chosen.prefill, chosen.context):
        one = window.ids[:, i : i + 1]
        full, own = (loaded.model(one, past_key_values=c).logits[0, -1].double().log_softmax(-1) for c in caches)
        kl.append(float((full.exp() * (full - own)).sum()))
        target = int(window.ids[0, i + 1])
        nll[0].append(-float(full[target]))
        nll[1].append(-float(own[target]))
    return {
        "kl_mean": float(np.mean(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "ppl_full": math.exp(np.mean(nll[0])),
        "ppl": math.exp(np.mean(nll[1])),
        "bits_per_value": cache_report(caches[1]).bits_per_value,
        "compressed_tokens": cache_report(caches[1]).compressed_tokens,
    }


@pytest.mark.parametrize("spec", SPECS)
def test_chunks_give_what_token_by_token_gives(tiny: LoadedModel, spec: str) -> None:
    found, slow = measure(tiny, spec).metrics, token_by_token(tiny, spec, SMALL)
    assert found["kl_mean"] > 1e-3  # the cache matters here
    for name, value in slow.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("spec", ["hf-quanto:bits=2,residual_length=32", "hf-hqq:bits=2,residual_length=32", HF_FP8])
def test_caches_of_other_libraries(tiny: LoadedModel, spec: str) -> None:
    try:
        parse_method(spec).check_available()
    except ImportError as error:
        pytest.skip(str(error))
    found, slow = measure(tiny, spec).metrics, token_by_token(tiny, spec, SMALL)
    assert found["kl_mean"] > 1e-5
    for name, value in slow.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    coarse = measure(tiny, spec, SMALL.model_copy(update={"chunk_tokens": 40})).metrics
    assert coarse["ppl_full"] == pytest.approx(found["ppl_full"], rel=1e-5)


@pytest.mark.parametrize("architecture", ["qwen2", "phi", "gemma3", "mistral"])
def test_other_models(architecture: str) -> None:
    loaded = tiny_loaded(architecture)
    if architecture == "mistral":  # every layer slides a window of its own
        with pytest.raises(NothingCompressedError):
            measure(loaded, "turboquant:bits=3")
        return
    found, slow = measure(loaded, "turboquant:bits=3"), token_by_token(loaded, "turboquant:bits=3", SMALL)
    for name, value in slow.items():
        assert found.metrics[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert (found.metrics["packed_bits_per_value"] is None) == (architecture == "gemma3")


def test_what_the_model_does_to_its_logits_is_kept(tiny: LoadedModel) -> None:
    """The full side's logits are made again from the output layer's inputs; here the model also scales them."""
    loaded = tiny_loaded("llama", num_hidden_layers=2)
    forward = loaded.model.lm_head.forward
    loaded.model.lm_head.forward = lambda x: 5 * torch.tanh(forward(x))
    found, slow = measure(loaded, "rtn:bits=2"), token_by_token(loaded, "rtn:bits=2", SMALL)
    assert found.metrics["kl_mean"] == pytest.approx(slow["kl_mean"], rel=2e-3)
    assert found.metrics["kl_mean"] != pytest.approx(measure(tiny, "rtn:bits=2").metrics["kl_mean"], rel=0.1)
    assert not loaded.model.lm_head._forward_pre_hooks


def test_no_loss_is_no_difference_and_full_is_the_reference(tiny: LoadedModel) -> None:
    found: dict[Any, Any] = dict(EXPERIMENT.run(tiny, [Lossless(), METHODS["full"]()], SMALL, Watch()))
    lossless, full = found.values()
    assert lossless.metrics["compressed_tokens"] > 0
    assert lossless.metrics["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert lossless.metrics["ppl"] == pytest.approx(full.metrics["ppl"], rel=1e-5)
    assert lossless.metrics["same_top_pct"] == 100
    assert full.metrics["ppl"] == full.metrics["ppl_full"]
    assert full.metrics["kl_mean"] == full.metrics["delta_ppl_pct"] == full.metrics["compressed_tokens"] == 0
    assert full.metrics["bits_per_value"] == 32  # the tiny model runs in float32


def test_methods_share_the_full_run(tiny: LoadedModel) -> None:
    calls = []
    handle = tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["past_key_values"]), with_kwargs=True
    )
    try:
        methods = [parse_method(spec) for spec in ("full", "rtn:bits=4", "turboquant:bits=2")]
        assert len(list(EXPERIMENT.run(tiny, methods, SMALL, Watch()))) == 3
    finally:
        handle.remove()
    assert len({id(cache) for cache in calls}) == 3
    assert sum(type(cache).__name__ == "DynamicCache" for cache in calls) == 1 + math.ceil(80 / 64)


def test_fewer_bits_are_worse_and_hold_less(tiny: LoadedModel) -> None:
    found = [measure(tiny, f"turboquant:bits={bits}").metrics for bits in (2, 4, 8)]
    assert found[0]["kl_mean"] > found[1]["kl_mean"] > found[2]["kl_mean"] > 0
    assert [int(one["packed_bits_per_value"]) for one in found] == [2, 4, 8]
    assert found[0]["bits_per_value"] < found[1]["bits_per_value"] < found[2]["bits_per_value"] < 32


def test_chunks_may_be_coarser(tiny: LoadedModel) -> None:
    paper = "turboquant-paper:bits=2"
    coarse = measure(tiny, paper, SMALL.model_copy(update={"chunk_tokens": 50})).metrics
    assert coarse["kl_mean"] < measure(tiny, paper).metrics["kl_mean"]  # neighbours attend to each other exactly
    runs = feeding_runs(parse_method(paper), SMALL.model_copy(update={"chunk_tokens": 50}))
    assert runs == [(180, 230), (230, 260)]
    assert len(feeding_runs(parse_method(paper), SMALL)) == 80


def test_windows_of_several_texts_and_the_detail(tiny: LoadedModel) -> None:
    chosen = PerplexitySettings(texts=("sqlite", "hamlet"), context=200, prefill=100, windows=2, start=50)
    windows = text_windows(tiny, chosen)
    assert [(one.text, one.start) for one in windows] == [
        ("sqlite", 50),
        ("sqlite", 251),
        ("hamlet", 50),
        ("hamlet", 251),
    ]
    found = measure(tiny, "turboquant:bits=2,residual_length=16", chosen)
    detail = found.detail["windows"]
    assert [len(one["kl"]) for one in detail] == [100] * 4
    assert np.mean([one["kl"] for one in detail]) == pytest.approx(found.metrics["kl_mean"], rel=1e-4)
    assert found.metrics["measured_tokens"] == 400
    assert found.metrics["kl_low"] < found.metrics["kl_mean"] < found.metrics["kl_high"]
    assert found.metrics["delta_ppl_low_pct"] < found.metrics["delta_ppl_pct"] < found.metrics["delta_ppl_high_pct"]
    positions = found.detail["by_position"]
    assert [positions[0]["start"], positions[-1]["stop"]] == [100, 200]
    assert np.mean([one["kl_mean"] for one in positions]) == pytest.approx(found.metrics["kl_mean"])
    assert len(found.detail["sha256"]["hamlet"]) == 64


def test_a_seed_draws_windows_that_do_not_overlap(tiny: LoadedModel) -> None:
    drawn = [
        [one.start for one in text_windows(tiny, SMALL.model_copy(update={"windows": 5, "seed": seed}))]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert np.diff(sorted(drawn[0])).min() >= 261
    assert drawn[0] != sorted(drawn[0]) or drawn[0][0] > 0


def test_text_begins_as_the_tokenizer_begins_it(tiny: LoadedModel) -> None:
    class Marked:
        def __call__(self, text, add_special_tokens=True, **options):
            encoded = tiny.tokenizer(text)
            encoded["input_ids"] = ([1] if add_special_tokens else []) + list(encoded["input_ids"])
            return encoded

    loaded = LoadedModel(tiny.model, Marked(), tiny.spec, "fp32", "cpu")
    first, second = text_windows(loaded, SMALL.model_copy(update={"windows": 2}))
    assert first.ids.shape == second.ids.shape == (1, 261)
    assert first.ids[0, 0] == second.ids[0, 0] == 1
    assert second.start == 260


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"context": 513}, "tiny-llama has a context of 512 tokens, got 513"),
        ({"windows": 500}, "the text persuasion has .* tokens, too few for 500 windows of 261 from token 0"),
        ({"start": 89_500}, "too few for 1 windows"),
        ({"texts": ("nope",)}, "the text must be one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny: LoadedModel, update: dict, message: str) -> None:
    chosen = SMALL.model_copy(update=update)
    with pytest.raises(ValueError, match=message):
        EXPERIMENT.check(tiny, chosen)
    with pytest.raises(ValueError, match=message):
        measure(tiny, "rtn", chosen)


def test_prefill_is_shorter_than_context() -> None:
    with pytest.raises(ValueError, match="prefill must be shorter than the context of 100 tokens, got 100"):
        PerplexitySettings(context=100, prefill=100)


def test_a_chunk_is_one_forward_call() -> None:
    """Longer chunks would be read in calls of 64 all the same, so a record must not name another length."""
    with pytest.raises(ValueError, match="less than or equal to 64"):
        PerplexitySettings(chunk_tokens=65)
    assert PerplexitySettings(chunk_tokens=64).chunk_tokens == 64


def test_a_method_that_packs_nothing_has_no_figure_and_the_others_have(tiny: LoadedModel) -> None:
    methods = [parse_method(spec) for spec in ("turboquant:residual_length=230", "rtn:bits=4")]
    measured = EXPERIMENT.run(tiny, methods, SMALL, Watch())
    assert next(measured)[0] == methods[1]
    with pytest.raises(NothingCompressedError, match=r"turboquant:.* packs none of 260 tokens"):
        next(measured)
    with pytest.raises(NothingCompressedError):
        next(EXPERIMENT.run(tiny, methods[:1], SMALL, Watch(cancelled=lambda: True)))  # before any forward call


def test_cancelling_stops_between_layers(tiny: LoadedModel) -> None:
    asked = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 5

    with pytest.raises(CancelledError):
        list(EXPERIMENT.run(tiny, [parse_method("rtn")], SMALL, Watch(cancelled=cancelled)))
    assert len(asked) == 6


def test_stopping_ends_before_the_next_method(tiny: LoadedModel) -> None:
    done: list[object] = []
    methods = [parse_method("rtn:bits=4"), parse_method("rtn:bits=2")]
    for method, _ in EXPERIMENT.run(tiny, methods, SMALL, Watch(stopping=lambda: bool(done))):
        done.append(method)
    assert done == methods[:1]


def test_progress_rises_to_one(tiny: LoadedModel) -> None:
    seen: list[float] = []
    methods = [parse_method("rtn:bits=4"), parse_method("rtn:bits=2")]
    list(EXPERIMENT.run(tiny, methods, SMALL, Watch(progress=lambda fraction, text: seen.append(fraction))))
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(20, 40), st.floats(0.1, 5.0), st.integers(0, 1000))
def test_the_interval_holds_the_mean_of_noise(blocks: int, spread: float, seed: int) -> None:
    values = spread * torch.randn(2, 32 * blocks, generator=torch.Generator().manual_seed(seed)).double() + 3
    low, high = block_interval(values.numpy(), 32)
    assert low is not None
    assert high is not None
    assert low < float(values.mean()) < high
    expected = 2 * 1.96 * spread / math.sqrt(values.numel())
    assert 0.5 * expected < high - low < 1.6 * expected


def test_too_few_blocks_have_no_interval() -> None:
    assert block_interval(np.ones((1, 64)), 32) == (None, None)


def test_figures_from_reports(tiny: LoadedModel) -> None:
    assert _relative_pct(math.log(1.1)) == pytest.approx(10)
    assert _relative_pct(None) is None
    full = measure(tiny, "full").cache
    assert packed_bits_per_value(full) is None
    assert EXPERIMENTS["perplexity"] is EXPERIMENT


def test_losses_are_cross_entropy(tiny: LoadedModel) -> None:
    (window,) = text_windows(tiny, SMALL)
    with torch.no_grad():
        logits = tiny.model(window.ids).logits[0]
    loss = nn.functional.cross_entropy(logits[180:260], window.ids[0, 181:])
    assert measure(tiny, "full").metrics["ppl"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
