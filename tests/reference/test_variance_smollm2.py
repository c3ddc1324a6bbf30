"""Variance on the real model: a short run in which 2 and 4 bits lie apart and rotation seeds matter little."""

import pytest

from turboquant.experiments.base import Watch, cells_for, run_cells
from turboquant.experiments.seeds import EXPERIMENT, differences, spreads, with_seeds
from turboquant.methods import parse_method
from turboquant.models.embedded import is_available
from turboquant.models.load import load_model
from turboquant.records.settings import SeedsSettings

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not is_available(), reason="the built-in model's package is not installed"),
]

LOW, HIGH = (parse_method(f"turboquant:bits={bits},residual_length=32") for bits in (2, 4))
SETTINGS = SeedsSettings(texts=("persuasion",), context=224, prefill=128, prompts=1, prompt_tokens=128, new_tokens=6)


@pytest.fixture(scope="module")
def records():
    loaded = load_model("smollm2-135m", weights="fp32", device="cpu")
    methods = [one for method in (LOW, HIGH) for one in with_seeds(method, (0, 1))]
    cells = cells_for(EXPERIMENT, "smollm2-135m", methods, [SETTINGS, SETTINGS.model_copy(update={"seed": 0})], "fp32")
    return list(run_cells(cells, {"variance": EXPERIMENT}, load=lambda name, weights: loaded, watch=Watch()))


def test_rotation_seeds_move_results_less_than_bits_do(records) -> None:
    assert [record.error for record in records] == [None] * 8
    low, high = (spreads(records, method)["kl_mean"] for method in (LOW, HIGH))
    assert low.count == high.count == 2
    assert low.sd is not None
    assert 0 < low.sd < 0.5 * low.mean
    assert high.maximum < 0.3 * low.minimum


def test_the_gap_is_told_from_tokens_and_not_from_two_seeds(records) -> None:
    found = differences(records, HIGH, LOW)
    assert found["kl_mean over text"].difference < 0
    assert found["kl_mean over rotation seeds"].pairs == 2
    assert found["kl_mean over rotation seeds"].real is None


def test_sampled_cells_hold_first_differences(records) -> None:
    sampled = [record for record in records if record.cell.settings["seed"] == 0]
    assert len(sampled) == 4
    for record in sampled:
        (first,) = record.detail["first_divergence"]
        assert first is None or 0 <= first < 6
        assert record.cache is not None
        assert record.cache.compressed_tokens > 0
