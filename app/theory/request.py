"""What the Theory page measures: small, bounded experiments on random vectors, all of them made by the library.

Pure functions of their settings: equal settings give equal numbers, no global random state is read or changed. A
coordinate is given in units of 1/sqrt(dim), its standard deviation after a random rotation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import integrate

from app.tab.requests import check_bound
from turboquant.experiments.theory import (
    QUANTIZERS,
    Distortion,
    Theory,
    beside,
    measure_distortion,
    measure_recall,
    quantizers,
    theory,
    unit_vectors,
)
from turboquant.methods.scalar import TurboQuantMSE
from turboquant.quant.codebook import MAX_BITS, boundaries, coordinate_density, expected_mse, lloyd_max
from turboquant.quant.rotation import Rotation, RotationKind, random_rotation
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.settings import TheorySettings
from turboquant.records.spread import Estimate

DIMS = (8, 16, 32, 64, 80, 96, 128, 256, 512)
VECTORS = (16, 32, 64, 128, 256)
MAX_SEED = 15
SEEDS = 4
"""Seeds of a live measurement, beginning with the chosen one."""
MORE_VECTORS, MORE_SEEDS = 256, 16
SPIKES = {"outlier": "one", "few": "a few", "single": "one, the rest is zero"}
ROTATIONS: dict[str, RotationKind] = {"random orthogonal": "qr", "Hadamard": "hadamard"}
COSINES = np.linspace(-0.9, 0.9, 19).tolist()
_CPU = torch.device("cpu")
_FAR = 2.0
"""How far out, in standard deviations, a coordinate counts as far."""
_QUADRATURE = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Setting:
    """What all figures share: dimensions of a vector, bits a coordinate, vectors measured a seed, first seed."""

    dim: int = 128
    bits: int = 2
    vectors: int = 64
    seed: int = 0


def check_setting(dim: object, bits: object, vectors: object, seed: object) -> Setting:
    """Return the setting, if all of it is within bounds; a browser can send anything.

    Raises:
        RequestError: It is not; the message names the rule and the value.
    """
    return Setting(
        dim=check_bound("Dimensions", dim, DIMS[0], DIMS[-1]),
        bits=check_bound("Bits", bits, 1, MAX_BITS),
        vectors=check_bound("Vectors", vectors, VECTORS[0], VECTORS[-1]),
        seed=check_bound("Seed", seed, 0, MAX_SEED),
    )


def spiky_vectors(kind: str, dim: int, count: int, seed: int) -> torch.Tensor:
    """Draw unit vectors (count, dim) of which a few coordinates, at random places, hold most of the length.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in SPIKES:
        raise ValueError(f"kind must be one of {', '.join(SPIKES)}, got {kind!r}")
    generator = torch.Generator().manual_seed(8 * seed + 7)  # rotations and the library's vectors use other streams
    x = torch.randn(count, dim, generator=generator)
    place = torch.rand(count, dim, generator=generator).argsort(dim=-1)
    if kind == "single":
        x = torch.where(place == 0, x.sign(), 0.0)
    elif kind == "outlier":
        x = torch.where(place == 0, 20 * x.sign(), x)
    else:
        x = torch.where(place < max(2, dim // 16), 10 * x.sign(), x)
    return x / x.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Rotated:
    """One vector as it was and after rotation, and the squared length that rounding either to `bits` bits loses."""

    before: list[float]
    after: list[float]
    bits: int
    lost_before: float
    lost_after: float


def rotate(kind: str, rotation: RotationKind, dim: int, bits: int, seed: int) -> Rotated:
    """Rotate one spiky vector, and round it with and without the rotation (the paper's Algorithm 1)."""
    x = spiky_vectors(kind, dim, 1, seed)
    turned = random_rotation(rotation, dim, seed, 0, _CPU)

    def lost(by: Rotation) -> float:
        quantizer = TurboQuantMSE(dim, bits, by, "norm")
        restored = quantizer.dequantize(quantizer.quantize(x[None, None]))[0, 0]
        return float((x - restored).square().sum())

    before, after = x[0].tolist(), turned.apply(x)[0].tolist()
    return Rotated(before, after, bits, lost(Rotation(torch.eye(dim))), lost(turned))


@dataclass(frozen=True)
class Coordinates:
    """Measured density of rotated coordinates, and what theory says; `far` are shares beyond two deviations."""

    count: int
    rotations: int
    middles: list[float]
    heights: list[float]
    grid: list[float]
    exact: list[float]
    gaussian: list[float]
    far: float
    far_exact: float
    far_gaussian: float


def coordinates(kind: str, dim: int, vectors: int, seed: int) -> Coordinates:
    """Rotate spiky vectors by several rotations and count where their coordinates lie.

    In few dimensions more rotations are drawn: one rotation has only `dim` columns for the spikes to land on.
    """
    rotations = min(vectors, max(SEEDS, 256 // dim))
    x = spiky_vectors(kind, dim, vectors, seed)
    parts = [
        random_rotation("qr", dim, seed + i, 0, _CPU).apply(part) for i, part in enumerate(x.tensor_split(rotations))
    ]
    values = torch.cat(parts).flatten().double().numpy() * math.sqrt(dim)
    edge = min(math.sqrt(dim), 4.0)
    heights, edges = np.histogram(values, bins=41, range=(-edge, edge))
    grid = np.linspace(-edge, edge, 241)[1:-1]
    beyond = integrate.quad(_scaled_density, _FAR, min(math.sqrt(dim), 12.0), args=(dim,))[0]
    return Coordinates(
        count=len(values),
        rotations=rotations,
        middles=((edges[1:] + edges[:-1]) / 2).tolist(),
        heights=(heights / (len(values) * np.diff(edges))).tolist(),
        grid=grid.tolist(),
        exact=_scaled_density(grid, dim).tolist(),
        gaussian=(np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)).tolist(),
        far=float((np.abs(values) > _FAR).mean()),
        far_exact=2 * beyond,
        far_gaussian=math.erfc(_FAR / math.sqrt(2)),
    )


def _scaled_density(z: np.ndarray, dim: int) -> np.ndarray:
    """The exact density of a coordinate in units of 1/sqrt(dim)."""
    return coordinate_density(z / math.sqrt(dim), dim) / math.sqrt(dim)


@dataclass(frozen=True)
class Codebook:
    """Levels and boundaries of one code, and where its error comes from.

    `probability` of a cell; `errors`: what it adds to the expected loss of squared length (they sum to `expected`).
    """

    bits: int
    dim: int
    levels: list[float]
    boundaries: list[float]
    probability: list[float]
    errors: list[float]
    expected: float
    grid: list[float]
    density: list[float]


def codebook(bits: int, dim: int) -> Codebook:
    """Describe the optimal codebook of `bits` bits for a coordinate in `dim` dimensions (section 3.1)."""
    scale = math.sqrt(dim)
    levels = lloyd_max(bits, dim)
    middle = boundaries(levels)
    end = min(scale, 10.0)  # beyond ten deviations nothing is left to count
    edges = np.concatenate([[-end], middle.double().numpy() * scale, [end]])
    nodes, weights = _QUADRATURE
    half = np.diff(edges)[:, None] / 2
    z = (edges[1:, None] + edges[:-1, None]) / 2 + half * nodes
    mass = half * weights * _scaled_density(z, dim)
    scaled = levels.double().numpy() * scale
    grid = np.linspace(-min(scale, 4.0), min(scale, 4.0), 241)[1:-1]
    return Codebook(
        bits=bits,
        dim=dim,
        levels=scaled.tolist(),
        boundaries=edges[1:-1].tolist(),
        probability=mass.sum(-1).tolist(),
        errors=(mass * (z - scaled[:, None]) ** 2).sum(-1).tolist(),
        expected=expected_mse(bits, dim),
        grid=grid.tolist(),
        density=_scaled_density(grid, dim).tolist(),
    )


def code_of(value: float, book: Codebook) -> int:
    """Return the code of one coordinate: how many boundaries it lies above."""
    return int(torch.bucketize(torch.tensor(value, dtype=torch.float64), torch.tensor(book.boundaries).double()))


def measured_bits(dim: int, bits: int) -> tuple[int, ...]:
    """Return the bit widths that are measured live: fewer in many dimensions, the chosen one always."""
    most = 6 if dim <= 128 else 4 if dim <= 256 else 3
    return tuple(sorted({*range(1, most + 1), bits}))


def distortion(dim: int, bits: int, vectors: int, seed: int, seeds: int = SEEDS) -> Distortion:
    """Measure errors and gains of every quantizer at one bit width (sections 3.1 and 3.2)."""
    return measure_distortion(TheorySettings(dim=dim, bits=bits, vectors=vectors, seeds=seeds, seed=seed))


def recall(dim: int, bits: int, seed: int) -> dict[str, Estimate]:
    """Measure how often the best key stays the best, by quantizer; `full` is full precision."""
    return measure_recall(TheorySettings(dim=dim, bits=bits, seeds=SEEDS, seed=seed))


def expectations(dim: int) -> dict[int, Theory]:
    """Return what theory says, by bits from 1 to 8."""
    return {bits: theory(bits, dim) for bits in range(1, 9)}


@dataclass(frozen=True)
class InnerProducts:
    """True and estimated inner products of unit queries and keys, and the slope of the line through the origin."""

    true: list[float]
    estimated: dict[str, list[float]]
    slope: dict[str, float]


def inner_products(setting: Setting, names: tuple[str, ...]) -> InnerProducts:
    """Estimate inner products at known cosines from packed keys (sections 3.1 and 3.2).

    Raises:
        ValueError: If a name is no quantizer's.
    """
    if unknown := set(names) - set(QUANTIZERS):
        raise ValueError(f"quantizers are {', '.join(QUANTIZERS)}, got {min(unknown)!r}")
    generator = torch.Generator().manual_seed(8 * setting.seed + 2)
    each = max(2, setting.vectors // 8)
    keys = unit_vectors(each * len(COSINES), setting.dim, generator)
    near = partial(beside, generator=generator)
    queries = torch.cat([near(part, cosine) for part, cosine in zip(keys.split(each), COSINES, strict=True)])
    true = (queries * keys).sum(-1)
    made = quantizers(TheorySettings(dim=setting.dim, bits=setting.bits), setting.seed)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        restored = made[name].dequantize(made[name].quantize(keys.float()[None, None]))[0, 0].double()
        found[name] = (queries * restored).sum(-1)
    slope = {name: float((values * true).sum() / true.square().sum()) for name, values in found.items()}
    return InnerProducts(true.tolist(), {name: values.tolist() for name, values in found.items()}, slope)


@dataclass(frozen=True)
class RecordedCheck:
    """The recorded validation of one (dim, bits): how many of its checks passed, and the error it measured."""

    dim: int
    bits: int
    passed: int
    total: int
    mse: Estimate
    largest_z: float


def recorded_checks(records: Sequence[ExperimentRecord]) -> list[RecordedCheck]:
    """Read the recorded validation; records that failed or are no validation are left out."""
    found = []
    for record in records:
        checks = record.detail.get("checks")
        if record.error is not None or record.cell.experiment != "validate" or not checks:
            continue
        settings = record.cell.settings
        found.append(
            RecordedCheck(
                dim=settings["dim"],
                bits=settings["bits"],
                passed=sum(check["passed"] for check in checks),
                total=len(checks),
                mse=Estimate(**record.detail["distortion"]["mse"]["mse"]),
                largest_z=max(check["z"] for check in checks),
            )
        )
    return sorted(found, key=lambda check: (check.dim, check.bits))
