"""TurboQuant on random unit vectors, without a model: what is measured against what theory says.

Every figure comes with its standard error over seeds; a seed draws new vectors, queries, rotation and projection. The
theory is exact for these vectors (no Gaussian limit), so a check is a test of the code: it passes where the measured
value lies within `TOLERANCE` standard errors. Inner products are taken in float64.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.methods import Method
from turboquant.methods.scalar import TurboQuantMSE, TurboQuantProd
from turboquant.quant.codebook import check_bits, check_dim, expected_mse
from turboquant.quant.quantizer import Quantizer
from turboquant.quant.rotation import qjl_projection, qjl_scale, random_rotation
from turboquant.records.base import Record
from turboquant.records.experiment import Spread
from turboquant.records.settings import TheorySettings
from turboquant.records.spread import Estimate, estimate, timing_spread

TOLERANCE = 4.0
"""Standard errors, or what is as improbable with few seeds (1 in 16,000), between a measured value and its theory."""
PRECISION = 0.1
"""The largest standard error, relative to what is expected, with which agreement says anything."""
HALF_ROUNDING = 2.0**-11
"""The largest relative error of a scale that is stored in float16."""
COSINE = 0.6
"""Cosine between a key and its correlated query."""
QUERIES = 16
NEEDLES, NEIGHBOURS = 8, 32
"""Needles a seed, and the keys around each of them, itself included."""
QUANTIZERS = ("mse", "matched", "unbiased", "prod_gaussian", "prod_orthogonal")
Progress = Callable[[float], None]


class Theory(Record):
    """Exact expectations and the paper's bounds; inner-product figures are d E[error^2] for unit queries.

    `mse`: relative MSE of the exact density (section 3.1). `prod_gaussian` and `prod_orthogonal`: TurboQuant_prod with
    that projection. `mse_upper`, `prod_upper`: Theorems 1 and 2; `lower`: Theorem 3, the same for both.
    `shrink`: what an MSE code multiplies inner products by, on average.
    """

    mse: float
    mse_upper: float
    prod_gaussian: float
    prod_orthogonal: float
    prod_upper: float
    lower: float
    shrink: float


def theory(bits: int, dim: int) -> Theory:
    """Return what theory says about `bits` bits a coordinate in `dim` dimensions (arXiv:2504.19874, section 3).

    An MSE code's error e has E|e|^2 = D and, being a centroid code, <x, x^> = 1 - D on average. With a Gaussian S the
    error of the estimated <q, e> has variance ((pi/2)|e|^2 |q|^2 - <q, e>^2) / d (QJL, Lemma 4, with equality); over
    random q that is (pi/2 - 1/d) D/d. With an orthogonal S, m = E|u_1| for u uniform on the sphere, it is
    (1/(d m^2) - 1) D/d. D is that of the bits that are left when one goes to the signs; no bits leave D = 1.

    Raises:
        ValueError: If `bits` or `dim` is out of range.
    """
    mse = expected_mse(bits, dim)
    left = expected_mse(bits - 1, dim) if bits > 1 else 1.0
    mean_abs = 1 / (qjl_scale("orthogonal", dim) * dim * math.sqrt(dim))
    return Theory(
        mse=mse,
        mse_upper=math.sqrt(3) * math.pi / 2 * 4.0**-bits,
        prod_gaussian=(math.pi / 2 - 1 / dim) * left,
        prod_orthogonal=(1 / (dim * mean_abs**2) - 1) * left,
        prod_upper=math.sqrt(3) * math.pi**2 * 4.0**-bits,
        lower=4.0**-bits,
        shrink=1 - mse,
    )


class Check(Record):
    """One line of the validation: a measured value, what it must be, and whether it is.

    It has not passed either where its standard error is too large for it to say anything (`PRECISION`).
    """

    name: str
    measured: float
    standard_error: float
    expected: str
    z: float
    passed: bool


class Distortion(Record):
    """Measured means by quantizer (`QUANTIZERS`): "mse" stores plain norms as the paper does.

    `mse`: |x - x^|^2. `inner_product`: d times the squared error of <q, x> for random unit queries, `correlated` for
    queries of cosine `COSINE` with their key. `gain`: the mean estimate for those, divided by the true value; 1 is
    unbiased. `variance_gap`: d E[error^2] with Gaussian S less the ratio theory predicts times that with orthogonal S.
    """

    mse: dict[str, Estimate]
    inner_product: dict[str, Estimate]
    correlated: dict[str, Estimate]
    gain: dict[str, Estimate]
    variance_ratio: float
    variance_gap: Estimate


class Throughput(Record):
    """Vectors a second and, counting 2 bytes a value, 1e9 bytes a second."""

    vectors_per_second: Spread
    gb_per_second: Spread


class Validation(Record):
    """Everything about one (dim, bits): theory, measurements and checks. `recall` is recall@1 by quantizer."""

    settings: TheorySettings
    theory: Theory
    distortion: Distortion
    recall: dict[str, Estimate]
    encode: dict[str, Throughput]
    decode: dict[str, Throughput]
    checks: list[Check]

    def metrics(self) -> dict[str, float | None]:
        """Return the headline numbers by name."""
        found: dict[str, float | None] = {"mse": self.distortion.mse["mse"].mean, "mse_theory": self.theory.mse}
        for kind in ("mse", "prod_gaussian", "prod_orthogonal"):
            found[f"inner_product_{kind}"] = self.distortion.inner_product[kind].mean
            found[f"inner_product_{kind}_theory"] = getattr(self.theory, kind)
        found |= {f"gain_{name}": gain.mean for name, gain in self.distortion.gain.items()}
        found |= {f"recall_{name}_pct": 100 * recall.mean for name, recall in self.recall.items()}
        for name in self.encode:
            found[f"encode_{name}_vectors_per_second"] = self.encode[name].vectors_per_second.median
            found[f"decode_{name}_vectors_per_second"] = self.decode[name].vectors_per_second.median
        return {**found, "largest_z": max(check.z for check in self.checks)}


def unit_vectors(count: int, dim: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
    """Draw float64 vectors uniformly from the unit sphere."""
    x = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def beside(x: Float[Tensor, "count dim"], cosine: float, generator: torch.Generator) -> Float[Tensor, "count dim"]:
    """Draw a unit vector at exactly this cosine from each unit vector, in a random direction."""
    other = unit_vectors(len(x), x.shape[1], generator)
    other = other - (other * x).sum(-1, keepdim=True) * x
    return cosine * x + math.sqrt(1 - cosine**2) * other / other.norm(dim=-1, keepdim=True)


def quantizers(settings: TheorySettings, seed: int) -> dict[str, TurboQuantMSE]:
    """Return the quantizers of `QUANTIZERS` with the rotation and projections of one seed."""
    dim, bits, device = check_dim(settings.dim), check_bits(settings.bits), torch.device(settings.device)
    rotation = random_rotation(settings.rotation, dim, seed, 0, device)
    found: dict[str, TurboQuantMSE] = {
        "mse": TurboQuantMSE(dim, bits, rotation, "norm"),
        "matched": TurboQuantMSE(dim, bits, rotation, "matched"),
        "unbiased": TurboQuantMSE(dim, bits, rotation, "unbiased"),
    }
    for kind in ("gaussian", "orthogonal"):
        projection, scale = qjl_projection(kind, dim, seed, 0, device), qjl_scale(kind, dim)
        found[f"prod_{kind}"] = TurboQuantProd(dim, bits, rotation, projection, scale)
    return found


def _generator(seed: int, stream: int) -> torch.Generator:
    """Vectors must not be drawn from the numbers that rotations (seeds of 0 and 1 modulo 8) are made of."""
    return torch.Generator().manual_seed(8 * seed + stream)


def _states(x: Tensor, settings: TheorySettings) -> Tensor:
    return x.float().to(settings.device)[None, None]


def _scores(quantizer: Quantizer[Any], queries: Tensor, packed: Any, settings: TheorySettings) -> Tensor:
    """Inner products of queries (queries, dim) and packed keys, by the code that attention runs."""
    return quantizer.scores(quantizer.project(_states(queries, settings)), packed)[0, 0].cpu().double()


def _distortion_of_seed(settings: TheorySettings, seed: int) -> dict[str, dict[str, float]]:
    generator = _generator(seed, 5)
    x = unit_vectors(settings.vectors, settings.dim, generator)
    queries = unit_vectors(QUERIES, settings.dim, generator)
    correlated = beside(x, COSINE, generator)
    found: dict[str, dict[str, float]] = {"mse": {}, "inner_product": {}, "correlated": {}, "gain": {}}
    for name, quantizer in quantizers(settings, seed).items():
        packed = quantizer.quantize(_states(x, settings))
        error = _scores(quantizer, queries, packed, settings) - queries @ x.mT
        restored = quantizer.dequantize(packed)[0, 0].cpu().double()
        estimate = (correlated * restored).sum(-1)
        found["mse"][name] = float((x - restored).square().sum(-1).mean())
        found["inner_product"][name] = settings.dim * float(error.square().mean())
        found["correlated"][name] = settings.dim * float((estimate - COSINE).square().mean())
        found["gain"][name] = float(estimate.mean()) / COSINE
    return found


def measure_distortion(settings: TheorySettings, progress: Progress = lambda _: None) -> Distortion:
    """Measure MSE, inner-product errors and bias over the seeds (sections 3.1 and 3.2).

    Args:
        settings: How much of what.
        progress: Called with the fraction done; what it raises ends the work.
    """
    parts = []
    for i in range(settings.seeds):
        parts.append(_distortion_of_seed(settings, settings.seed + i))
        progress((i + 1) / settings.seeds)
    means = {
        figure: {name: estimate([part[figure][name] for part in parts]) for name in QUANTIZERS} for figure in parts[0]
    }
    exact = theory(settings.bits, settings.dim)
    ratio = exact.prod_gaussian / exact.prod_orthogonal
    pairs = [part["inner_product"] for part in parts]
    return Distortion(
        **means,
        variance_ratio=means["inner_product"]["prod_gaussian"].mean / means["inner_product"]["prod_orthogonal"].mean,
        variance_gap=estimate([pair["prod_gaussian"] - ratio * pair["prod_orthogonal"] for pair in pairs]),
    )


def measure_recall(settings: TheorySettings, progress: Progress = lambda _: None) -> dict[str, Estimate]:
    """Measure how often the key nearest to a query is found among compressed keys (recall@1), and among full ones.

    A seed holds `NEEDLES` needles. Each has a query at cosine 0.9, and neighbours at cosine 0.9 to the needle, which
    lie beside the query at 0.81 on average; the other needles and their neighbours are random distractors. Full
    precision finds practically all, few bits confuse a needle with its neighbours. The key `full` is full precision.
    """
    parts: list[dict[str, float]] = []
    for i in range(settings.seeds):
        seed = settings.seed + i
        generator = _generator(seed, 6)
        needles = unit_vectors(NEEDLES, settings.dim, generator)
        around = beside(needles.repeat_interleave(NEIGHBOURS - 1, 0), 0.9, generator)
        keys, queries = torch.cat([needles, around]), beside(needles, 0.9, generator)
        right = torch.arange(NEEDLES)
        found = {"full": float(((queries @ keys.mT).argmax(-1) == right).double().mean())}
        for name, quantizer in quantizers(settings, seed).items():
            scores = _scores(quantizer, queries, quantizer.quantize(_states(keys, settings)), settings)
            found[name] = float((scores.argmax(-1) == right).double().mean())
        parts.append(found)
        progress((i + 1) / settings.seeds)
    return {name: estimate([part[name] for part in parts]) for name in parts[0]}


def measure_throughput(
    settings: TheorySettings, vectors: int | None = None, repeats: int = 5, progress: Progress = lambda _: None
) -> tuple[dict[str, Throughput], dict[str, Throughput]]:
    """Time quantizing and dequantizing `vectors` vectors, one warm-up and `repeats` measured runs each.

    Args:
        settings: Dim, bits and device.
        vectors: How many at once; None for 2,048 on a CPU and 262,144 elsewhere.
        repeats: Measured runs.
        progress: Called with the fraction done.

    Returns:
        Encode and decode throughput for "mse" and "prod_gaussian".
    """
    vectors = vectors or (2**11 if settings.device == "cpu" else 2**18)
    x = _states(unit_vectors(vectors, settings.dim, torch.Generator().manual_seed(0)), settings)
    encode, decode = {}, {}
    chosen = {name: quantizers(settings, settings.seed)[name] for name in ("mse", "prod_gaussian")}
    for i, (name, quantizer) in enumerate(chosen.items()):
        packed = quantizer.quantize(x)
        encode[name] = _throughput(partial(quantizer.quantize, x), x, repeats)
        decode[name] = _throughput(partial(quantizer.dequantize, packed), x, repeats)
        progress((i + 1) / len(chosen))
    return encode, decode


def _throughput(run: Callable[[], object], x: Tensor, repeats: int) -> Throughput:
    wait = partial(torch.cuda.synchronize, x.device) if x.device.type == "cuda" else (lambda: None)
    rates = []
    for _ in range(repeats + 1):
        wait()
        started = time.perf_counter()
        run()
        wait()
        rates.append(x.shape[2] / (time.perf_counter() - started))
    scale = 2 * x.shape[-1] / 1e9
    return Throughput(
        vectors_per_second=timing_spread(rates[1:]),
        gb_per_second=timing_spread([scale * rate for rate in rates[1:]]),
    )


def _equals(name: str, found: Estimate, expected: float, rounding: float = 0.0, scale: float | None = None) -> Check:
    """A mean at its expectation; `scale` is what its standard error is judged by where that is 0."""
    precise = found.standard_error <= PRECISION * abs(scale or expected)
    return _check(name, found, f"{expected:.5g}", found.z(expected, rounding), precise)


def _within(name: str, found: Estimate, low: float, high: float) -> Check:
    """A mean between two bounds, give or take its standard error."""
    z = found.z(min(max(found.mean, low), high))
    return _check(name, found, f"{low:.3g} to {high:.3g}", z, found.standard_error <= PRECISION * high)


def _check(name: str, found: Estimate, expected: str, z: float, precise: bool) -> Check:
    return Check(
        name=name,
        measured=found.mean,
        standard_error=found.standard_error,
        expected=expected,
        z=z,
        passed=z < TOLERANCE and precise,
    )


def distortion_checks(exact: Theory, found: Distortion) -> list[Check]:
    """Hold measured distortions against exact theory and against Theorems 1 to 3."""
    product = found.inner_product
    return [
        _equals("MSE, exact density", found.mse["mse"], exact.mse),
        _within("MSE, Theorems 1 and 3", found.mse["mse"], exact.lower, exact.mse_upper),
        _equals("inner product, mse", product["mse"], exact.mse),
        _equals("inner product, prod, Gaussian S", product["prod_gaussian"], exact.prod_gaussian),
        _within("inner product, Theorems 2 and 3", product["prod_gaussian"], exact.lower, exact.prod_upper),
        _equals("inner product, prod, orthogonal S", product["prod_orthogonal"], exact.prod_orthogonal),
        _equals("variance, Gaussian to orthogonal S", found.variance_gap, 0.0, scale=exact.prod_gaussian),
        _equals("shrink of mse, correlated query", found.gain["mse"], exact.shrink),
        _equals("no bias, prod, Gaussian S", found.gain["prod_gaussian"], 1.0),
        _equals("no bias, prod, orthogonal S", found.gain["prod_orthogonal"], 1.0),
        _equals("no bias, unbiased scale", found.gain["unbiased"], 1.0, HALF_ROUNDING),
    ]


def recall_checks(bits: int, found: dict[str, Estimate]) -> list[Check]:
    """Full keys must find the needles, or the test says nothing; from 6 bits on mse codes find them as well."""
    checks = [_within("needles found, full keys", found["full"], 0.99, 1.0)]
    if bits >= 6:
        checks.append(_within("needles found, mse codes", found["mse"], found["full"].mean - 0.02, 1.0))
    return checks


def validate(settings: TheorySettings, progress: Progress = lambda _: None) -> Validation:
    """Measure one (dim, bits) in full and check it.

    Args:
        settings: What and how much.
        progress: Called with the fraction done; what it raises ends the work.
    """
    distortion = measure_distortion(settings, lambda done: progress(0.5 * done))
    recall = measure_recall(settings, lambda done: progress(0.5 + 0.3 * done))
    encode, decode = measure_throughput(settings, progress=lambda done: progress(0.8 + 0.2 * done))
    exact = theory(settings.bits, settings.dim)
    return Validation(
        settings=settings,
        theory=exact,
        distortion=distortion,
        recall=recall,
        encode=encode,
        decode=decode,
        checks=[*distortion_checks(exact, distortion), *recall_checks(settings.bits, recall)],
    )


def check_device(_: Sequence[Method], settings: TheorySettings) -> None:
    """Raise ValueError where the device is a GPU and there is none."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but no CUDA device is to be had")


def run(
    _: None, methods: Sequence[Method], settings: TheorySettings, watch: Watch
) -> Iterator[tuple[None, Measurement]]:
    """Measure and check one (dim, bits) as an experiment."""

    def progress(done: float) -> None:
        watch.check()
        watch.progress(done, f"{settings.bits} bits in {settings.dim} dimensions")

    found = validate(settings, progress)
    yield None, Measurement(metrics=found.metrics(), detail=found.model_dump(mode="json", exclude={"settings"}))


THEORY = Experiment("validate", TheorySettings, run, check_methods=check_device, model=False, methods=False)
