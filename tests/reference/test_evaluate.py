"""The attention experiment on the built-in model: its needle is found, heads look at it, recipes rank as known."""

from typing import Any

import pytest
import torch

from turboquant.experiments.base import Measurement, Watch
from turboquant.experiments.heads import EXPERIMENT, build_prompt
from turboquant.methods import parse_method
from turboquant.models.embedded import is_available
from turboquant.models.load import LoadedModel, load_model
from turboquant.records.settings import HeadsSettings

pytestmark = pytest.mark.skipif(not is_available(), reason="the built-in model's package is not installed")

SETTINGS = HeadsSettings(context=1024)
LAYERS, HEADS = 30, 9


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2-135m", weights="fp32", device="cpu")


@pytest.fixture(scope="module")
def measured(smollm2: LoadedModel) -> dict[str, Measurement]:
    methods = [parse_method(spec) for spec in ("full", "turboquant:bits=3", "turboquant-paper:bits=3")]
    with torch.no_grad():
        return {method.name: found for method, found in EXPERIMENT.run(smollm2, methods, SETTINGS, Watch())}


def test_the_model_finds_the_needle(smollm2: LoadedModel) -> None:
    prompt = build_prompt(smollm2, SETTINGS)
    ids = prompt.ids
    model: Any = smollm2.model
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    assert prompt.is_answered_by(str(smollm2.tokenizer.decode(written[0, ids.shape[1] :])))


def test_the_full_cache_is_the_reference(measured: dict[str, Measurement]) -> None:
    full = measured["full"].metrics
    assert (full["top1_match_pct"], full["same_top_pct"], full["needle_heads_kept_pct"]) == (100, 100, 100)
    assert full["cosine_similarity"] == pytest.approx(1, abs=1e-6)
    assert full["kl_mean"] == pytest.approx(0, abs=1e-9)


def test_heads_look_at_the_needle(measured: dict[str, Measurement]) -> None:
    found = measured["full"]
    start, stop = found.detail["needle"]
    share = 100 * (stop - start) / SETTINGS.context
    # Measured when written: 5.5 % of attention on the 2.1 % of the context that the needle takes, first in 6 heads.
    assert 1.5 * share < (found.metrics["needle_mass_full_pct"] or 0) < 20
    assert (found.metrics["needle_heads_full"] or 0) >= 2


def test_the_recipes_rank_as_known(measured: dict[str, Measurement]) -> None:
    """Measured when written, recommended and published recipe: cosine 0.9968, 0.9552; KL 0.010, 0.148 nats."""
    own, paper = (measured[name].metrics for name in ("turboquant", "turboquant-paper"))
    assert 0.99 < (own["cosine_similarity"] or 0) < 1
    assert 0.93 < (paper["cosine_similarity"] or 0) < 0.98
    assert 0 < (own["kl_mean"] or 0) < 0.03
    assert 0.05 < (paper["kl_mean"] or 0) < 0.5
    assert 85 < (own["top1_match_pct"] or 0) < 100
    assert 60 < (paper["top1_match_pct"] or 0) < 90
    assert (own["output_error"] or 1) < 0.5 * (paper["output_error"] or 0)
    assert paper["payload_ratio"] == pytest.approx(16 / 3)
    # 3 bits and two fp16 scalars a key, one a value, for 64 values each: 3.375 bits, without the last exact tokens.
    assert 3.375 < (paper["bits_per_value"] or 0) < 4.6


def test_every_layer_and_head_is_there(measured: dict[str, Measurement]) -> None:
    for found in measured.values():
        assert found.detail["layer_indices"] == list(range(LAYERS))
        assert [len(row) for row in found.detail["per_head_needle_rank"]] == [HEADS] * LAYERS
        assert all(1 <= rank <= SETTINGS.context for row in found.detail["per_head_needle_rank"] for rank in row)
