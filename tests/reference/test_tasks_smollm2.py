"""The built-in model reads, searches and generates with compressed caches: one short run of each task."""

from typing import Any

import pytest

from turboquant.experiments.base import Watch
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.methods import parse_method
from turboquant.models.embedded import is_available
from turboquant.models.load import LoadedModel, load_model

pytestmark = pytest.mark.skipif(not is_available(), reason="the built-in model's package is not installed")


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2-135m", weights="fp32", device="cpu")


def measure(loaded: LoadedModel, name: str, specs: list[str], **settings: Any) -> list[dict[str, Any]]:
    experiment = EXPERIMENTS[name]
    chosen = experiment.settings(**settings)
    methods = [parse_method(spec) for spec in specs]
    return [found.metrics for _, found in experiment.run(loaded, methods, chosen, Watch())]


def test_perplexity_of_prose(smollm2: LoadedModel) -> None:
    specs = ["turboquant:bits=4", "turboquant:bits=2", "rtn:bits=4"]
    four, two, rtn = measure(smollm2, "perplexity", specs, texts=("persuasion",), context=576, prefill=448)
    assert 20 < four["ppl_full"] < 50
    assert 0 < four["kl_mean"] < 0.01 < two["kl_mean"] < 0.2
    assert four["kl_mean"] < rtn["kl_mean"]
    assert four["same_top_pct"] > 93 > two["same_top_pct"] > 70
    assert 4 < four["packed_bits_per_value"] < 4.7
    assert four["kl_low"] < four["kl_mean"] < four["kl_high"] < four["kl_p99"]


def test_needle_is_found_through_codes_and_lost_in_noise(smollm2: LoadedModel) -> None:
    specs = ["turboquant:bits=4", "turboquant-paper:bits=2"]
    four, paper = measure(smollm2, "needle", specs, context=480, depth=0.3, repetitions=2, max_new_tokens=10)
    assert four["success_full_pct"] == four["success_pct"] == 100
    assert paper["success_pct"] == 0
    assert paper["success_low_pct"] == pytest.approx(0, abs=1e-9)
    assert 50 < paper["success_high_pct"] < 70


def test_generation_in_a_padded_batch(smollm2: LoadedModel) -> None:
    settings = {"context": 220, "new_tokens": 8, "batch": 2, "shortest": 0.8, "repeats": 1}
    full, four = measure(smollm2, "generation", ["full", "turboquant:bits=4,residual_length=16"], **settings)
    assert four["full_cache_bytes"] == full["cache_bytes"] == 2 * 219 * 30 * 2 * 3 * 64 * 4
    assert four["cache_bytes"] < 0.8 * full["cache_bytes"]
    assert four["same_tokens_pct"] > 50
    assert four["tokens_per_second"] > 0
    assert four["encode_prompt_ms"] > 0
    assert four["peak_memory_bytes"] > 0
