"""Optimal scalar codebooks for one coordinate of a randomly rotated unit vector.

After a random rotation, a coordinate of a unit vector in d dimensions has the density
``f(x) = C (1 - x^2)^((d-3)/2)`` on [-1, 1] (TurboQuant, arXiv:2504.19874, Lemma 1). The levels solve Lloyd's two
conditions for that exact density (Max, 1960; Lloyd, 1982), not for its Gaussian limit.
"""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from scipy.linalg import solve_banded
from torch import Tensor

MAX_BITS = 8


def check_bits(bits: int, name: str = "bits", lowest: int = 1) -> int:
    """Return `bits`, or raise ValueError naming the rule and the value."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not lowest <= bits <= MAX_BITS:
        raise ValueError(f"{name} must be a whole number from {lowest} to {MAX_BITS}, got {bits!r}")
    return bits


def check_dim(dim: int) -> int:
    """Return `dim`, or raise ValueError: a rotated coordinate needs at least two dimensions."""
    if dim < 2:
        raise ValueError(f"head_dim must be at least 2, got {dim}")
    return dim


def coordinate_density(x: np.ndarray, dim: int) -> np.ndarray:
    """Return the density of one coordinate of a random unit vector at `x` within (-1, 1) (Lemma 1).

    Raises:
        ValueError: If `dim` is below 2.
    """
    half = check_dim(dim) / 2
    log_constant = special.gammaln(half) - special.gammaln(half - 0.5) - 0.5 * np.log(np.pi)
    return np.exp(log_constant) * (1 - x * x) ** (half - 1.5)


def _tail(x: np.ndarray, dim: int) -> np.ndarray:
    """P(X > x) for x >= 0, accurate in the tail."""
    return 0.5 * special.betainc((dim - 1) / 2, 0.5, 1 - x * x)


def _tail_mean(x: np.ndarray, dim: int) -> np.ndarray:
    """E[X; X > x] for x >= 0, in closed form."""
    log_constant = special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2) - 0.5 * np.log(np.pi) - np.log(dim - 1)
    return np.exp(log_constant) * (1 - x * x) ** ((dim - 1) / 2)


def _centroids(levels: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell probabilities and centroids of the positive half, cells split half-way between levels."""
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])  # Lloyd's first condition
    probability = -np.diff(_tail(edges, dim))
    return probability, -np.diff(_tail_mean(edges, dim)) / probability  # the second: levels are centroids


def _newton_step(levels: np.ndarray, probability: np.ndarray, centroids: np.ndarray, dim: int) -> np.ndarray:
    """Newton's step for `centroids = levels`: a centroid moves with its cell's two edges, so the system is banded."""
    edges = (levels[1:] + levels[:-1]) / 2
    density = coordinate_density(edges, dim)
    below = np.zeros_like(levels)
    above = np.zeros_like(levels)
    below[1:] = density * (centroids[1:] - edges) / (2 * probability[1:])
    above[:-1] = density * (edges - centroids[:-1]) / (2 * probability[:-1])
    bands = np.stack([-np.roll(above, 1), 1 - below - above, -np.roll(below, -1)])
    return solve_banded((1, 1), bands, centroids - levels)


@cache
def _solve(bits: int, dim: int) -> tuple[np.ndarray, float]:
    """The positive levels, ascending, and the relative mean squared error they reach."""
    count = 2 ** (bits - 1)
    # Start where Panter and Dite's high-rate compander puts the levels: quantiles of f^(1/3), again a beta density.
    quantiles = (np.arange(count) + 0.5) / count
    levels = np.sqrt(special.betaincinv(0.5, max((dim - 3) / 6 + 1, 0.5), quantiles))
    for _ in range(1_000):
        probability, centroids = _centroids(levels, dim)
        if np.abs(centroids - levels).max() * np.sqrt(dim) < 1e-9:  # in units of a standard deviation
            break
        better = levels + _newton_step(levels, probability, centroids, dim)
        # Lloyd's own step goes downhill from anywhere, but ever more slowly as the number of levels grows.
        inside = better[0] > 0 and better[-1] < 1 and (np.diff(better) > 0).all()
        levels = better if inside else centroids
    probability, centroids = _centroids(levels, dim)
    # With levels at centroids E(x - c)^2 = E x^2 - E c^2, and E x^2 = 1/dim; both halves count.
    return centroids, float(1 - 2 * dim * (probability * centroids**2).sum())


def lloyd_max(bits: int, dim: int) -> Float[Tensor, " levels"]:
    """Return the codebook that minimises mean squared error for one rotated coordinate.

    Args:
        bits: Bits a code, 1 to 8; the codebook has ``2**bits`` levels in ascending order, symmetric about 0.
        dim: Length of the rotated vector, at least 2. Levels scale as ``1/sqrt(dim)``.

    Raises:
        ValueError: If `bits` or `dim` is out of range.

    Example:
        >>> lloyd_max(bits=1, dim=128).shape
        torch.Size([2])
    """
    positive, _ = _solve(check_bits(bits), check_dim(dim))
    return torch.from_numpy(np.concatenate([-positive[::-1], positive])).float()


def expected_mse(bits: int, dim: int) -> float:
    """Return the exact relative mean squared error E|x - x^|^2 / |x|^2 of `lloyd_max(bits, dim)`.

    This is D_mse of the paper (section 3.1) for the exact density; it tends to Lloyd-Max on a Gaussian as dim grows.
    """
    return _solve(check_bits(bits), check_dim(dim))[1]


def boundaries(codebook: Float[Tensor, " levels"]) -> Float[Tensor, " levels-1"]:
    """Return the decision points half-way between neighbouring levels."""
    return (codebook[1:] + codebook[:-1]) / 2
