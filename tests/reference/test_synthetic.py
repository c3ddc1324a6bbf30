"""Synthetic validation: theory computed apart from it, and faults that its checks must find."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special

from turboquant.experiments import theory as synthetic
from turboquant.experiments.theory import (
    beside,
    distortion_checks,
    measure_distortion,
    measure_recall,
    theory,
    unit_vectors,
    validate,
)
from turboquant.methods.scalar import TurboQuantMSE, TurboQuantProd
from turboquant.quant.rotation import qjl_projection, qjl_scale, random_rotation
from turboquant.records.settings import TheorySettings
from turboquant.records.spread import Estimate

CPU = torch.device("cpu")


def failed(settings: TheorySettings, exact=None) -> set[str]:
    exact = exact or theory(settings.bits, settings.dim)
    return {check.name for check in distortion_checks(exact, measure_distortion(settings)) if not check.passed}


@pytest.mark.parametrize("rotation", ["qr", "hadamard"])
@pytest.mark.parametrize(("dim", "bits"), [(64, 1), (80, 2), (128, 3), (96, 8)])
def test_every_check_passes_on_the_real_code(rotation, dim: int, bits: int) -> None:
    assert not failed(TheorySettings(dim=dim, bits=bits, seeds=24, vectors=128, rotation=rotation))


@pytest.mark.parametrize(("dim", "bits"), [(5, 1), (16, 3), (8, 2)])
def test_theory_is_exact_in_few_dimensions_too(dim: int, bits: int) -> None:
    """No Gaussian limit: at d = 5 that would be off by tens of per cent."""
    assert not failed(TheorySettings(dim=dim, bits=bits, seeds=64, vectors=256))


@pytest.mark.parametrize("dim", [3, 64, 128])
def test_prod_theory_against_quadrature(dim: int) -> None:
    """1 bit leaves the key itself as the error, so D = 1; m = E|u_1| by integration over the sphere's density."""
    constant = math.exp(special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2)) / math.sqrt(math.pi)
    mean_abs = 2 * integrate.quad(lambda u: u * constant * (1 - u * u) ** ((dim - 3) / 2), 0, 1, epsabs=1e-14)[0]
    assert theory(1, dim).prod_orthogonal == pytest.approx(1 / (dim * mean_abs**2) - 1, rel=1e-9)
    assert theory(1, dim).prod_gaussian == pytest.approx(math.pi / 2 - 1 / dim)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_exact_theory_lies_between_the_papers_bounds(dim: int, bits: int) -> None:
    exact = theory(bits, dim)
    assert exact.lower < exact.mse < exact.mse_upper
    assert exact.lower < exact.prod_orthogonal < exact.prod_gaussian < exact.prod_upper


def test_the_papers_rounded_values_are_near() -> None:
    """Theorem 2 names 1.57, 0.56, 0.18 and 0.047 over d for 1 to 4 bits; the last is 13 % too small."""
    found = [theory(bits, 4096).prod_gaussian for bits in range(1, 5)]
    assert found[:3] == pytest.approx([1.57, 0.56, 0.18], rel=0.03)
    assert found[3] == pytest.approx(0.0543, rel=5e-3)


def wrong_quantizers(settings: TheorySettings, seed: int):
    """The orthogonal projection with the Gaussian one's constant (a fault of public code), and shifted levels."""
    found = RIGHT(settings, seed)
    rotation = random_rotation(settings.rotation, settings.dim, seed, 0, CPU)
    projection = qjl_projection("orthogonal", settings.dim, seed, 0, CPU)
    wrong = qjl_scale("gaussian", settings.dim) * 0.97
    found["prod_orthogonal"] = TurboQuantProd(settings.dim, settings.bits, rotation, projection, wrong)
    shifted = TurboQuantMSE(settings.dim, settings.bits, rotation, "norm")
    shifted.codebook = shifted.codebook * 1.1
    found["mse"] = shifted
    return found


RIGHT = synthetic.quantizers


def test_faults_are_found(monkeypatch) -> None:
    settings = TheorySettings(dim=64, bits=1, seeds=24, vectors=256)
    assert not failed(settings)
    monkeypatch.setattr(synthetic, "quantizers", wrong_quantizers)
    found = failed(settings)
    assert {"MSE, exact density", "shrink of mse, correlated query", "no bias, prod, orthogonal S"} <= found
    assert "no bias, prod, Gaussian S" not in found


def test_an_imprecise_measurement_does_not_pass() -> None:
    exact = theory(4, 64)
    vague = Estimate(mean=exact.mse, standard_error=exact.mse, seeds=32)
    sharp = Estimate(mean=exact.mse, standard_error=exact.mse / 100, seeds=32)
    assert not synthetic._equals("", vague, exact.mse).passed
    assert synthetic._equals("", sharp, exact.mse).passed


@pytest.mark.parametrize("seed", [0, 1])
def test_vectors_have_nothing_to_do_with_the_rotation_of_their_seed(seed: int) -> None:
    """Drawn from the same numbers the vectors would be rows of the rotation, and the first seed would stand out."""
    found = measure_distortion(TheorySettings(dim=256, bits=8, seeds=3, vectors=64, seed=seed))
    assert found.mse["mse"].standard_error < 0.02 * found.mse["mse"].mean


def test_z_is_a_normal_deviate_of_equal_probability() -> None:
    many = Estimate(mean=1.0, standard_error=0.1, seeds=100_000)
    assert many.z(1.3) == pytest.approx(3.0, rel=1e-3)
    assert Estimate(mean=1.0, standard_error=0.1, seeds=4).z(1.3) == pytest.approx(1.9, abs=0.02)
    assert many.z(1.3, rounding=0.4) == 0
    assert Estimate(mean=1.0, standard_error=0.0, seeds=4).z(1.1) == 99
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 8))
    deviates = [Estimate(mean=x.mean(), standard_error=x.std(ddof=1) / math.sqrt(8), seeds=8).z(0.0) for x in draws]
    assert np.mean(np.array(deviates) > 1.96) == pytest.approx(0.05, abs=0.015)


@given(st.integers(2, 300), st.floats(-0.99, 0.99), st.integers(0, 1000))
def test_a_query_beside_a_key_has_exactly_that_cosine(dim: int, cosine: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = unit_vectors(5, dim, generator)
    y = beside(x, cosine, generator)
    assert torch.allclose((x * y).sum(-1), torch.full((5,), cosine, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(y.norm(dim=-1), torch.ones(5, dtype=torch.float64), atol=1e-9)


def test_needles_are_found_in_full_keys_lost_at_two_bits_and_found_again_at_eight() -> None:
    low, high = (measure_recall(TheorySettings(dim=64, bits=bits, seeds=12)) for bits in (2, 8))
    assert low["full"].mean > 0.98
    assert low["mse"].mean < 0.6 < 0.7 < low["matched"].mean < low["full"].mean
    assert high["mse"].mean > 0.97
    assert low["prod_gaussian"].mean < low["prod_orthogonal"].mean


def test_validation_gathers_everything_and_is_repeatable() -> None:
    settings = TheorySettings(dim=64, bits=2, seeds=4, vectors=32)
    steps: list[float] = []
    first, second = validate(settings, steps.append), validate(settings)
    assert first.distortion == second.distortion
    assert first.recall == second.recall
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(1.0)
    rates = first.encode["mse"].vectors_per_second
    assert 0 < rates.p20 <= rates.median <= rates.p80
    assert first.encode["mse"].gb_per_second.median == pytest.approx(rates.median * 2 * 64 / 1e9)


def test_progress_may_end_the_work() -> None:
    def stop(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(TheorySettings(dim=64, bits=2, seeds=4, vectors=32), stop)
