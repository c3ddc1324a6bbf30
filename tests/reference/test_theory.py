"""The arithmetic against values computed apart from it: integrals in float64, published constants, exact estimates."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

from turboquant.methods.scalar import TurboQuantMSE, TurboQuantProd
from turboquant.quant.codebook import _centroids, _solve, boundaries, coordinate_density, expected_mse, lloyd_max
from turboquant.quant.rotation import qjl_projection, qjl_scale, random_rotation

CPU = torch.device("cpu")
# Exact relative MSE of Lloyd-Max for the beta density at 1 to 4 bits.
EXPECTED = {
    64: (0.35839, 0.11453, 0.03339, 0.00913),
    128: (0.36089, 0.11600, 0.03397, 0.00931),
    256: (0.36214, 0.11674, 0.03426, 0.00941),
}


def density(x: float, dim: int) -> float:
    constant = math.exp(special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2)) / math.sqrt(math.pi)
    return constant * (1 - x * x) ** ((dim - 3) / 2)


@pytest.mark.parametrize("dim", EXPECTED)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_expected_mse_is_the_published_value(dim: int, bits: int) -> None:
    assert expected_mse(bits, dim) == pytest.approx(EXPECTED[dim][bits - 1], rel=1e-3)


@pytest.mark.parametrize("dim", [2, 3, 8, 128])
def test_the_density_of_a_coordinate_is_lemma_1(dim: int) -> None:
    x = np.array([-0.9, -0.2, 0.0, 0.35])
    assert coordinate_density(x, dim) == pytest.approx([density(value, dim) for value in x], rel=1e-12)
    total, _ = integrate.quad(coordinate_density, -1, 1, args=(dim,))
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 64, 128, 4096])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_codebook_is_solved_to_the_last_digits(bits: int, dim: int) -> None:
    """Levels are their cells' means to the last digits: the plain Lloyd iteration stops far from there at 8 bits."""
    levels, _ = _solve(bits, dim)
    _, centroids = _centroids(levels, dim)
    assert np.abs(centroids - levels).max() * math.sqrt(dim) < 1e-8
    assert (np.diff(levels) > 0).all()


@pytest.mark.parametrize(("bits", "dim"), [(1, 64), (2, 80), (3, 128), (4, 96), (8, 64), (2, 3), (3, 5)])
def test_levels_satisfy_lloyds_conditions_by_quadrature(bits: int, dim: int) -> None:
    """Each level is the mean of its cell, and the error is what direct integration gives."""
    levels = lloyd_max(bits, dim).double().numpy()
    edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    error = 0.0
    for low, high, level in zip(edges[:-1], edges[1:], levels, strict=True):
        mass = integrate.quad(density, low, high, args=(dim,), epsabs=1e-14)[0]
        mean = integrate.quad(lambda x: x * density(x, dim), low, high, epsabs=1e-14)[0] / mass
        assert mean == pytest.approx(level, abs=2e-6)
        error += integrate.quad(lambda x, c=level: (x - c) ** 2 * density(x, dim), low, high, epsabs=1e-14)[0]
    assert dim * error == pytest.approx(expected_mse(bits, dim), rel=1e-4)


@pytest.mark.parametrize("dim", [2, 3, 64, 128])
def test_more_bits_always_mean_less_error(dim: int) -> None:
    errors = [expected_mse(bits, dim) for bits in range(1, 9)]
    assert all(after < before / 3 for before, after in itertools.pairwise(errors))
    assert errors[0] < 0.37


def test_one_dimension_high_codebook_is_uniform_when_the_density_is() -> None:
    """In three dimensions a coordinate of a unit vector is uniform, and so are its best levels (Archimedes)."""
    assert torch.allclose(lloyd_max(2, 3), torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=1e-6)


def test_gaussian_limit() -> None:
    expected = torch.tensor([0.2450, 0.7559, 1.3438, 2.1518])
    assert torch.allclose(lloyd_max(3, 4096)[4:] * 64, expected, rtol=2e-3)


@pytest.mark.parametrize(("bits", "dim"), [(0, 64), (9, 64), (2.5, 64), (True, 64), (3, 1), (3, 0)])
def test_codebook_refuses_what_it_cannot_do(bits: int, dim: int) -> None:
    with pytest.raises(ValueError, match=r"bits must be a whole number from 1 to 8|head_dim must be at least 2"):
        lloyd_max(bits, dim)


def unit_vectors(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(1, 1, count, dim, generator=generator), dim=-1)


@pytest.mark.parametrize("kind", ["hadamard", "qr"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_measured_mse_is_the_expected_one(kind, dim: int, bits: int) -> None:
    x = unit_vectors(8192, dim)
    quantizer = TurboQuantMSE(dim, bits, random_rotation(kind, dim, 0, 0, CPU), scale="norm")
    error = (quantizer.dequantize(quantizer.quantize(x)) - x).square().sum(-1).mean()
    assert float(error) == pytest.approx(expected_mse(bits, dim), rel=0.01)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_prod_is_unbiased_even_for_queries_aligned_with_the_key(kind, bits: int) -> None:
    """The mean estimate over 400 projections is within 4 standard errors of the inner product."""
    dim = 64
    x = unit_vectors(1, dim, seed=1)
    query = 0.6 * x + 0.8 * unit_vectors(1, dim, seed=2)
    estimates = []
    for seed in range(400):
        rotation = random_rotation("qr", dim, seed, 0, CPU)
        projection = qjl_projection(kind, dim, seed, 0, CPU)
        quantizer = TurboQuantProd(dim, bits, rotation, projection, qjl_scale(kind, dim))
        packed = quantizer.quantize(x)
        estimates.append(float(quantizer.scores(quantizer.project(query), packed)))
    error = np.mean(estimates) - float((query * x).sum())
    assert abs(error) < 4 * np.std(estimates) / math.sqrt(len(estimates)) + 2e-4


def test_mse_codes_are_biased_where_prod_is_not() -> None:
    """At one bit the MSE estimate shrinks inner products by about 2/pi (paper, section 3.2)."""
    x = unit_vectors(4096, 128)
    quantizer = TurboQuantMSE(128, 1, random_rotation("qr", 128, 0, 0, CPU), scale="norm")
    shrink = (quantizer.dequantize(quantizer.quantize(x)) * x).sum(-1).mean()
    assert float(shrink) == pytest.approx(2 / math.pi, rel=0.02)
    unbiased = TurboQuantMSE(128, 1, random_rotation("qr", 128, 0, 0, CPU), scale="unbiased")
    assert float((unbiased.dequantize(unbiased.quantize(x)) * x).sum(-1).mean()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.571 * 0.995), (3, 0.1845 * 0.98), (4, 0.0543 * 0.98)])
def test_prod_variance_with_gaussian_projection(bits: int, expected: float) -> None:
    """d E[err^2] for random unit queries is (pi/2) D_mse(b-1) (paper, Theorem 2, with the exact density)."""
    dim = 128
    x, query = unit_vectors(20000, dim), unit_vectors(16, dim, seed=5)
    projection = qjl_projection("gaussian", dim, 0, 0, CPU)
    rotation = random_rotation("qr", dim, 0, 0, CPU)
    quantizer = TurboQuantProd(dim, bits, rotation, projection, qjl_scale("gaussian", dim))
    error = quantizer.scores(quantizer.project(query), quantizer.quantize(x)) - query @ x.mT
    assert dim * float(error.square().mean()) == pytest.approx(expected, rel=0.08)


def test_orthogonal_projection_has_less_variance() -> None:
    dim = 128
    x, query = unit_vectors(8192, dim), unit_vectors(16, dim, seed=5)
    rotation = random_rotation("qr", dim, 0, 0, CPU)
    errors = {}
    for kind in ("gaussian", "orthogonal"):
        quantizer = TurboQuantProd(dim, 3, rotation, qjl_projection(kind, dim, 0, 0, CPU), qjl_scale(kind, dim))
        estimate = quantizer.scores(quantizer.project(query), quantizer.quantize(x))
        errors[kind] = float((estimate - query @ x.mT).square().mean())
    assert errors["orthogonal"] < 0.5 * errors["gaussian"]


def test_boundaries_are_half_way() -> None:
    assert torch.equal(boundaries(torch.tensor([-1.0, 0.0, 3.0])), torch.tensor([-0.5, 1.5]))
