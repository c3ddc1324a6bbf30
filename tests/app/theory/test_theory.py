"""The Theory page: its lessons against theory, its sentences against the numbers, and the page from a cold link."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app.tab import state
from app.tab.requests import RequestError
from app.theory import charts
from app.theory import request as lessons
from app.theory.request import Setting
from turboquant.experiments.theory import TOLERANCE
from turboquant.quant.codebook import expected_mse
from turboquant.records.files import read_records

ROOT = Path(__file__).resolve().parents[3]
DIMS = st.sampled_from([8, 16, 32, 64])
BITS = st.integers(1, 8)
SEEDS = st.integers(0, lessons.MAX_SEED)


@pytest.mark.parametrize("kind", lessons.SPIKES)
@pytest.mark.parametrize("rotation", ["qr", "hadamard"])
def test_rotation_keeps_the_length_and_spreads_the_spike(kind: str, rotation) -> None:
    lesson = lessons.rotate(kind, rotation, 128, 3, 5)
    before, after = np.array(lesson.before), np.array(lesson.after)
    assert np.linalg.norm(before) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(after) == pytest.approx(1, abs=1e-5)
    assert np.abs(after).max() < np.abs(before).max()
    assert lesson.lost_after < 2 * expected_mse(3, 128) < lesson.lost_before


def test_an_unknown_spike_or_quantizer_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of outlier, few, single, got 'flat'"):
        lessons.spiky_vectors("flat", 8, 1, 0)
    with pytest.raises(ValueError, match=r"quantizers are mse, .*, got 'kivi'"):
        lessons.inner_products(Setting(), ("mse", "kivi"))


def test_coordinates_follow_the_exact_density_where_the_gaussian_is_wrong() -> None:
    lesson = lessons.coordinates("outlier", 8, 256, 0)
    exact = np.interp(lesson.middles, lesson.grid, lesson.exact)
    gaussian = np.interp(lesson.middles, lesson.grid, lesson.gaussian)
    assert np.sum(lesson.heights) * (lesson.middles[1] - lesson.middles[0]) == pytest.approx(1, abs=1e-6)
    assert np.abs(lesson.heights - exact).sum() < np.abs(lesson.heights - gaussian).sum()
    assert abs(lesson.far - lesson.far_exact) < abs(lesson.far - lesson.far_gaussian)


@settings(max_examples=25, deadline=None)
@given(bits=BITS, dim=st.sampled_from(lessons.DIMS), value=st.floats(-3, 3))
def test_the_errors_of_all_levels_add_up_and_rounding_takes_the_nearest(bits: int, dim: int, value: float) -> None:
    book = lessons.codebook(bits, dim)
    assert sum(book.probability) == pytest.approx(1, abs=1e-9)
    assert sum(book.errors) == pytest.approx(book.expected, rel=1e-5)
    assert len(book.levels) == 2**bits
    chosen = abs(book.levels[lessons.code_of(value, book)] - value)
    assert chosen == pytest.approx(min(abs(level - value) for level in book.levels), abs=1e-6)


@pytest.mark.parametrize(("dim", "bits"), [(8, 1), (64, 2), (128, 3), (256, 4)])
def test_the_measured_loss_is_the_expected_one(dim: int, bits: int) -> None:
    found = lessons.distortion(dim, bits, vectors=64, seed=1)
    assert found.mse["mse"].z(expected_mse(bits, dim)) < TOLERANCE
    assert found.mse["mse"].mean < lessons.expectations(dim)[bits].mse_upper


def test_slopes_show_the_bias_and_its_absence() -> None:
    lesson = lessons.inner_products(Setting(dim=128, bits=1, vectors=256), ("mse", "unbiased", "prod_orthogonal"))
    assert lesson.slope["mse"] == pytest.approx(1 - expected_mse(1, 128), abs=0.02)
    assert lesson.slope["unbiased"] == pytest.approx(1, abs=0.04)
    assert lesson.slope["prod_orthogonal"] == pytest.approx(1, abs=0.04)
    assert lesson.true[0] == pytest.approx(-0.9)


def test_qjl_costs_recall_at_two_bits() -> None:
    found = lessons.recall(64, 2, seed=0)
    assert found["full"].mean > 0.95
    assert found["matched"].mean > found["prod_gaussian"].mean


def test_every_sentence_holds_the_number_that_was_measured() -> None:
    rotated = lessons.rotate("outlier", "qr", 64, 2, 0)
    assert f"{max(map(abs, rotated.before)):.2f}" in charts.rotation(rotated).alt
    found = {bits: lessons.distortion(64, bits, 32, 3) for bits in (1, 2)}
    expected = lessons.expectations(64)
    assert f"{found[2].mse['mse'].mean:.4g} ±" in charts.distortion(found, expected, 2).alt
    ratio = found[2].inner_product["prod_gaussian"].mean / found[2].inner_product["mse"].mean
    assert f"Gaussian S has {ratio:.1f} times" in charts.price(found, expected, 2).alt
    recall = {2: lessons.recall(64, 2, 3)}
    assert f"{100 * recall[2]['matched'].mean:.1f}" in charts.recall(recall, 2).alt
    products = lessons.inner_products(Setting(dim=64), ("mse",))
    assert f"{products.slope['mse']:.3f}" in charts.inner_products(products, 2, expected[2]).alt


def test_a_wrong_measurement_is_called_wrong() -> None:
    found = {2: lessons.distortion(64, 2, 32, 0)}
    other = {2: lessons.expectations(64)[3]}
    assert "agrees with" in charts.distortion(found, {2: lessons.expectations(64)[2]}, 2).alt
    assert "differs from" in charts.distortion(found, other, 2).alt


def test_equal_settings_give_equal_numbers_and_touch_no_global_state() -> None:
    before = torch.get_rng_state()
    first = (lessons.distortion(16, 2, 16, 4), lessons.coordinates("few", 16, 16, 4), lessons.recall(16, 2, 4))
    assert first == (lessons.distortion(16, 2, 16, 4), lessons.coordinates("few", 16, 16, 4), lessons.recall(16, 2, 4))
    assert first[0] != lessons.distortion(16, 2, 16, 5)
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=25, deadline=None)
@given(dim=DIMS, bits=BITS, vectors=st.sampled_from([16, 32]), seed=SEEDS, kind=st.sampled_from(list(lessons.SPIKES)))
def test_no_setting_breaks_a_figure(dim: int, bits: int, vectors: int, seed: int, kind: str) -> None:
    setting = lessons.check_setting(dim, bits, vectors, seed)
    found = {bits: lessons.distortion(dim, bits, vectors, seed)}
    expected = lessons.expectations(dim)
    drawn = [
        charts.rotation(lessons.rotate(kind, "hadamard", dim, bits, seed)),
        charts.coordinates(lessons.coordinates(kind, dim, vectors, seed), dim),
        charts.codebook(lessons.codebook(bits, dim), 0.35),
        charts.distortion(found, expected, bits),
        charts.inner_products(lessons.inner_products(setting, tuple(charts.QUANTIZERS)), bits, expected[bits]),
        charts.price(found, expected, bits),
        charts.recall({bits: lessons.recall(dim, bits, seed)}, bits),
    ]
    for chart in drawn:
        assert chart.alt
        assert "nan" not in chart.alt
        assert len(chart.table)
        assert chart.figure.data
    gains = charts.gains(found[bits], expected[bits])
    assert not gains.select_dtypes("number").map(math.isnan).any().any()


ANYTHING = st.one_of(st.integers(), st.none(), st.text(max_size=5), st.floats(), st.booleans())


@settings(max_examples=100, deadline=None)
@given(dim=ANYTHING, bits=ANYTHING, vectors=ANYTHING, seed=ANYTHING)
def test_whatever_a_browser_sends_is_refused_or_bounded(dim, bits, vectors, seed) -> None:
    try:
        setting = lessons.check_setting(dim, bits, vectors, seed)
    except RequestError:
        return
    assert 8 <= setting.dim <= 512
    assert 1 <= setting.bits <= 8
    assert 16 <= setting.vectors <= 256
    assert 0 <= setting.seed <= lessons.MAX_SEED


@pytest.mark.parametrize("dim", lessons.DIMS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_live_work_is_bounded_and_measures_the_chosen_bits(dim: int, bits: int) -> None:
    widths = lessons.measured_bits(dim, bits)
    assert bits in widths
    assert len(widths) <= 7
    assert len(widths) * dim <= 7 * 512


def test_the_recorded_validation_is_counted_check_by_check() -> None:
    records = read_records(ROOT / "results" / "validate.jsonl")
    found = lessons.recorded_checks(records)
    assert len(found) == len(records)
    assert sum(check.total for check in found) == sum(len(record.detail["checks"]) for record in records)
    assert all(check.passed == check.total for check in found)
    failed = records[0].model_copy(deep=True)
    failed.detail["checks"][0]["passed"] = False
    (check,) = lessons.recorded_checks([failed, records[1].model_copy(update={"error": "stopped"})])
    assert check.passed == check.total - 1
    table = charts.checks(found)
    assert list(table["dimensions"]) == sorted({check.dim for check in found})
    assert re.fullmatch(r"\d+ of \d+", table["4 bits"][0])


# --- the page


def captions(page: AppTest) -> str:
    return "\n".join(str(caption.value) for caption in page.caption)


@pytest.fixture
def cold(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setattr(state, "recorded", lambda name: read_records(ROOT / "results" / f"{name}.jsonl"))
    page.query_params["theory_dim"] = "64"
    page.query_params["theory_bits"] = "1"
    page.query_params["theory_vectors"] = "16"
    page.query_params["theory_seed"] = "2"
    return page.run().switch_page("../pages/theory.py").run()


def test_a_deep_link_draws_six_figures_with_its_settings(cold: AppTest) -> None:
    assert not cold.exception
    assert cold.selectbox(key="theory_dim").value == 64
    assert cold.selectbox(key="theory_seed").value == 2
    assert len(cold.get("plotly_chart")) == 7  # the sixth has two halves
    found = lessons.distortion(64, 1, 16, 2).mse["mse"]
    assert f"{found.mean:.4g} ±" in captions(cold)


def test_foreign_values_in_the_link_give_the_defaults(page: AppTest) -> None:
    foreign = {"dim": "9999", "bits": "abc", "seed": "-1", "vectors": "", "vector": "<script>", "value": "1e9"}
    for name, value in (foreign | {"rotation": "none", "quantizer": "kivi:bits=4"}).items():
        page.query_params[f"theory_{name}"] = value
    page.run().switch_page("../pages/theory.py").run()
    assert not page.exception
    assert [page.selectbox(key=f"theory_{name}").value for name in ("dim", "bits", "vectors", "seed")] == [
        128,
        2,
        64,
        0,
    ]
    assert len(page.get("plotly_chart")) == 7


def test_every_widget_moves_the_figures(cold: AppTest) -> None:
    for key, value in (("theory_bits", 2), ("theory_dim", 16), ("theory_seed", 3), ("theory_vectors", 32)):
        before = captions(cold)
        cold.selectbox(key=key).set_value(value).run()
        assert not cold.exception
        assert captions(cold) != before, key
    before = captions(cold)
    cold.slider(key="theory_value").set_value(-1.5).run()
    assert captions(cold) != before


def test_more_vectors_are_measured_on_demand(cold: AppTest) -> None:
    cold.selectbox(key="theory_dim").set_value(8).run()
    cold.button(key="theory_more_button").click().run()
    assert not cold.exception
    assert f"({lessons.MORE_SEEDS} seeds)" in captions(cold)
    assert cold.button(key="theory_more_button").disabled


def test_without_a_recorded_validation_the_page_says_so(cold: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "recorded", lambda name: [])
    cold.run()
    assert not cold.exception
    assert any("No recorded validation" in str(info.value) for info in cold.info)
