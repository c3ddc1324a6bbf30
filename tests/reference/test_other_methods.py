"""The other methods against float64 brute force and against the figures of their own papers."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from turboquant.methods import parse_method
from turboquant.methods.kivi import PerChannel, PerToken
from turboquant.methods.polarquant import Polar, angle_bits, angle_codebook, effective_bits
from turboquant.methods.qjl import SignSketch, sketch_matrix
from turboquant.methods.rtn import RoundToNearest
from turboquant.quant.rotation import random_rotation

CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(dense: torch.Tensor, true: torch.Tensor) -> float:
    return float((dense.double() - true.double()).square().sum() / true.double().square().sum())


@pytest.mark.parametrize(
    ("spec", "dim", "key_bits", "value_bits"),
    [
        ("rtn:bits=4", 64, 4.5, 4.5),  # q4_0
        ("rtn:bits=8", 128, 8.5, 8.5),  # q8_0
        ("rtn:bits=4,group_size=64", 128, 4.25, 4.25),
        ("kivi:bits=2", 64, 3.0, 3.0),  # "3" and "5" in TurboQuant's Table 1
        ("kivi:bits=4", 128, 5.0, 5.0),
        ("kivi:bits=2,group_size=64", 128, 2.5, 2.5),
        ("polarquant", 64, 3.875, 3.875),  # "3.9" there
        ("polarquant", 128, 3.875, 3.875),
        ("polarquant:bits=3", 128, 47 / 16, 47 / 16),
        ("qjl", 128, 2 + 1 + 34 / 128, 3.0),  # layers behind the first 15
        ("qjl", 64, 2 + 1 + 34 / 64, 3.0),
        ("qjl:outliers=0", 128, 2 + 16 / 128, 3.0),
    ],
)
def test_bits_of_a_value_as_stored(spec: str, dim: int, key_bits: float, value_bits: float) -> None:
    pair = parse_method(spec).quantizers(dim, dim, 20, CPU)
    assert pair is not None
    x = gaussian(1, 2, 128, dim)
    stored = [8 * quantizer.quantize(x).nbytes / x.numel() for quantizer in pair]
    assert stored == pytest.approx([key_bits, value_bits])


def brute_affine(block: np.ndarray, bits: int) -> np.ndarray:
    """One group of KIVI: round((x - min) / step), with min and step in fp16."""
    low, step = np.float64(np.float16(block.min())), np.float64(np.float16((block.max() - block.min()) / (2**bits - 1)))
    return np.clip(np.round((block - low) / step), 0, 2**bits - 1) * step + low


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_is_its_formula(bits: int) -> None:
    x = gaussian(1, 1, 64, 96)
    keys, values = PerChannel(96, bits), PerToken(96, bits)
    exact = x[0, 0].double().numpy()
    by_channel, by_token = np.empty_like(exact), np.empty_like(exact)
    for start in range(0, 64, 32):
        for channel in range(96):
            by_channel[start : start + 32, channel] = brute_affine(exact[start : start + 32, channel], bits)
    for token in range(64):
        for start in range(0, 96, 32):
            by_token[token, start : start + 32] = brute_affine(exact[token, start : start + 32], bits)
    for quantizer, expected in ((keys, by_channel), (values, by_token)):
        dense = quantizer.dequantize(quantizer.quantize(x))[0, 0].double().numpy()
        assert (np.abs(dense - expected) < 1e-5).mean() > 0.999  # a tie may fall either way


def brute_q4_0(block: np.ndarray) -> np.ndarray:
    """One block of 32 as in llama.cpp's reference code, its scale in fp16."""
    scale = np.float64(np.float16(block[np.abs(block).argmax()] / -8))
    return (np.clip(np.floor(block / scale + 8.5), 0, 15) - 8) * scale


def test_rtn_is_q4_0() -> None:
    x = gaussian(1, 1, 200, 64)
    dense = RoundToNearest(64, 4).dequantize(RoundToNearest(64, 4).quantize(x))[0, 0].double().numpy()
    expected = np.apply_along_axis(brute_q4_0, 1, x[0, 0].double().numpy().reshape(-1, 32)).reshape(200, 64)
    assert (np.abs(dense - expected) < 1e-6).mean() > 0.999
    largest = np.abs(x[0, 0].numpy()).reshape(-1, 32).argmax(1)
    rows = np.arange(len(largest))
    met = dense.reshape(-1, 32)[rows, largest] / x[0, 0].numpy().reshape(-1, 32)[rows, largest]
    assert np.allclose(met, 1, atol=1e-3)  # the largest value is met, but for the fp16 of its scale


def nearest(block: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.abs(block[:, None] - levels).argmin(1)]


def brute_symmetric(block: np.ndarray, bits: int) -> np.ndarray:
    """The nearest of the documented levels below 4 bits, by search."""
    step = 2 * np.abs(block).mean() if bits == 1 else np.abs(block).max() / 2 ** (bits - 1)
    return nearest(block, (np.arange(2**bits) - (2**bits - 1) / 2) * step)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rotated", [False, True])
def test_rtn_error_on_gaussians_is_that_of_a_brute_force(bits: int, rotated: bool) -> None:
    x = gaussian(1, 1, 2000, 64)
    rotation = random_rotation("hadamard", 64, 0, 0, CPU) if rotated else None
    quantizer = RoundToNearest(64, bits, rotation=rotation)
    other = gaussian(4000, 32, seed=1).double().numpy()
    brute = np.stack([brute_q4_0(b) if bits == 4 else brute_symmetric(b, bits) for b in other])
    expected = ((brute - other) ** 2).sum() / (other**2).sum()
    assert relative_error(quantizer.dequantize(quantizer.quantize(x)), x) == pytest.approx(expected, rel=0.03)


def test_a_short_last_group_has_its_own_scale() -> None:
    """80 channels are groups of 32, 32 and 16; at 1 bit the scale is a mean, which padding must not shift."""
    x = gaussian(1, 1, 50, 80)
    for bits in (1, 2, 3):
        dense = RoundToNearest(80, bits).dequantize(RoundToNearest(80, bits).quantize(x))[0, 0].double().numpy()
        tail = np.stack([brute_symmetric(row, bits) for row in x[0, 0, :, 64:].double().numpy()])
        assert np.allclose(dense[:, 64:], tail, rtol=2e-3)


def test_a_hadamard_rotation_tames_outliers() -> None:
    x = gaussian(1, 1, 500, 64)
    x[..., 5] *= 40
    errors = {}
    for rotation in ("none", "hadamard"):
        pair = parse_method(f"rtn:bits=4,rotation={rotation}").quantizers(64, 64, 0, CPU)
        assert pair is not None
        rest = torch.arange(64) != 5
        dense = pair[0].dequantize(pair[0].quantize(x))
        errors[rotation] = relative_error(dense[..., :32][..., rest[:32]], x[..., :32][..., rest[:32]])
    assert errors["hadamard"] < errors["none"] / 2


def angle_density(psi: float, level: int) -> float:
    return math.sin(2 * psi) ** (2 ** (level - 1) - 1)


@pytest.mark.parametrize("level", [2, 3, 4])
@pytest.mark.parametrize("bits", [1, 2, 3, 6])
def test_polar_levels_satisfy_lloyds_condition_by_quadrature(bits: int, level: int) -> None:
    levels = angle_codebook(bits, level).double().numpy()
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [math.pi / 2]])
    for low, high, angle in zip(edges[:-1], edges[1:], levels, strict=True):
        mass = integrate.quad(angle_density, low, high, args=(level,))[0]
        mean = integrate.quad(lambda psi: psi * angle_density(psi, level), low, high)[0] / mass
        assert mean == pytest.approx(angle, abs=2e-5)
    assert np.allclose(levels + levels[::-1], math.pi / 2, atol=1e-6)


@pytest.mark.parametrize("level", [2, 3, 4])
def test_angles_of_gaussians_have_that_density(level: int) -> None:
    """The ratio of two chi variables: the mean of cos(2 psi)^2 under the density, and from samples."""
    halves = gaussian(2, 200_000, 2 ** (level - 1)).double().norm(dim=-1)
    sampled = float(torch.atan2(halves[1], halves[0]).mul(2).cos().square().mean())
    mass = integrate.quad(angle_density, 0, math.pi / 2, args=(level,))[0]
    exact = integrate.quad(lambda psi: math.cos(2 * psi) ** 2 * angle_density(psi, level), 0, math.pi / 2)[0] / mass
    assert sampled == pytest.approx(exact, rel=0.02)


def polar_error(bits: int, depth: int) -> float:
    """Relative MSE in theory: 2 (1 - the product over levels of E cos(psi - its level)), radii exact."""
    product = 1.0
    for level in range(1, depth + 1):
        levels = angle_codebook(angle_bits(bits, level), level).double().numpy()
        top = 2 * math.pi if level == 1 else math.pi / 2
        psi = (np.arange(200_000) + 0.5) / 200_000 * top
        density = np.ones_like(psi) if level == 1 else np.sin(2 * psi) ** (2 ** (level - 1) - 1)
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, psi)
        product *= (density * np.cos(psi - levels[cell])).sum() / density.sum()
    return 2 * (1 - product)


@pytest.mark.parametrize(("dim", "depth"), [(64, 4), (80, 4), (40, 3), (2, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_polar_error_is_that_of_its_densities(dim: int, depth: int, bits: int) -> None:
    x = gaussian(1, 2, 60_000 // dim, dim)
    quantizer = Polar(dim, bits, random_rotation("qr", dim, 0, 0, CPU))
    assert quantizer.depth == depth
    expected = polar_error(bits, depth)
    assert relative_error(quantizer.dequantize(quantizer.quantize(x)), x) == pytest.approx(expected, rel=0.03)


def test_polar_bits_are_the_papers() -> None:
    assert effective_bits(4, 128) == effective_bits(4, 64) == 62 / 16 == 3.875
    assert [effective_bits(bits, 64) for bits in (1, 2, 3, 5)] == [31 / 16, 39 / 16, 47 / 16, 77 / 16]


def test_polar_decoding_is_the_papers_recursion() -> None:
    """Encode and decode one vector by the printed recursion, in float64 and with exact angles' nearest levels."""
    x = gaussian(1, 1, 1, 32)
    quantizer = Polar(32, 4, random_rotation("qr", 32, 0, 0, CPU))
    y = quantizer.rotation.apply(x)[0, 0, 0].double().numpy()
    radii, angles = y, []
    for level in range(1, 5):
        pairs = radii.reshape(-1, 2)
        psi = np.arctan2(pairs[:, 1], pairs[:, 0])
        levels = angle_codebook(angle_bits(4, level), level).double().numpy()
        angles.append(nearest(np.mod(psi, 2 * math.pi) if level == 1 else psi, levels))
        radii = np.hypot(pairs[:, 0], pairs[:, 1])
    for psi in reversed(angles):
        radii = np.stack([radii * np.cos(psi), radii * np.sin(psi)], axis=1).reshape(-1)
    decoded = quantizer.rotation.apply(quantizer.dequantize(quantizer.quantize(x)))[0, 0, 0].double().numpy()
    assert np.allclose(decoded, radii, atol=2e-3)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("outliers", [0, 8])
def test_qjl_is_unbiased_and_within_its_variance_bound(blocks: int, outliers: int) -> None:
    """Over independent projections: mean error 0, variance at most pi / (2 m) |q|^2 |k|^2 (m signs; Gaussian S)."""
    dim, seeds = 64, 400
    key, query = gaussian(1, 1, 32, dim), gaussian(1, 1, 1, dim, seed=1)
    query = query + key[:, :, :1]  # one pair is aligned, where a bias would show
    true = (query @ key.mT).double()
    estimates = []
    for seed in range(seeds):
        quantizer = SignSketch(sketch_matrix(blocks, dim, seed, CPU), outliers)
        estimates.append((query @ quantizer.dequantize(quantizer.quantize(key)).mT).double())
    error = torch.stack(estimates) - true
    deviation = error.std(dim=0)
    assert (error.mean(dim=0).abs() < 4.5 * deviation / math.sqrt(seeds) + 2e-3 * true.abs()).all()
    bound = math.pi / (2 * blocks * dim) * float(query.square().sum()) * key.square().sum(dim=-1)
    if not outliers:
        assert (deviation.square() < bound).all()
        assert float((deviation.square() / bound).mean()) < 0.75  # orthogonal rows vary less than Gaussian ones


def test_qjl_sketches_outlier_channels_apart() -> None:
    """With a few large key channels, the split lowers the error on queries that do not look at them."""
    key = gaussian(1, 1, 320, 128)
    key[..., 7] += 30
    query = gaussian(1, 1, 50, 128, seed=1)
    query[..., 7] = 0
    errors = {}
    for outliers in (0, 8):
        quantizer = SignSketch(sketch_matrix(2, 128, 0, CPU), outliers)
        packed = quantizer.quantize(key)
        if packed.outlier_channels is not None:
            assert (packed.outlier_channels == 7).any(dim=-1).all()
        errors[outliers] = float((query @ (quantizer.dequantize(packed) - key).mT).square().mean())
    assert errors[8] < errors[0] / 3


def test_qjl_gives_the_first_layers_twice_the_signs() -> None:
    method = parse_method("qjl")
    rows = []
    for layer_idx in (0, 14, 15, 29):
        pair = method.quantizers(128, 128, layer_idx, CPU)
        assert pair is not None
        rows.append(pair[0].rows)  # type: ignore[attr-defined]
    assert rows == [512, 512, 256, 256]
