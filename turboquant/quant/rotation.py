"""Random rotations: Haar-distributed (QR) and randomised Hadamard, and the projections of QJL.

Every matrix is drawn on the CPU in float64 from its own generator, so a seed gives the same rotation on every device,
and no global random state is read or changed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from turboquant.quant.codebook import check_dim
from turboquant.quant.modes import shared_table

RotationKind = Literal["hadamard", "qr"]
ROTATIONS: tuple[RotationKind, ...] = ("hadamard", "qr")
_FLOAT64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of row vectors: multiply by `signs`, then by `matrix` transposed.

    For a randomised Hadamard rotation `matrix` is shared by all layers and only `signs` differ; a Haar rotation has
    no signs and its own matrix.
    """

    matrix: Float[Tensor, "dim dim"]
    signs: Float[Tensor, " dim"] | None = None

    def apply(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Rotate row vectors."""
        return (x if self.signs is None else x * self.signs) @ self.matrix.mT

    def inverse(self, y: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Undo `apply`."""
        x = y @ self.matrix
        return x if self.signs is None else x * self.signs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tables this rotation holds, for byte counts."""
        return (self.matrix,) if self.signs is None else (self.matrix, self.signs)


def _generator(seed: int, layer_idx: int, stream: int) -> torch.Generator:
    """An independent generator for one (seed, layer, purpose)."""
    # Fewer than 1_000_003 layers and eight purposes: no two of a seed's generators are alike.
    mixed = (seed * 1_000_003 + layer_idx) * 8 + stream
    return torch.Generator("cpu").manual_seed(mixed % 2**63)


def haar(dim: int, generator: torch.Generator) -> Float[Tensor, "dim dim"]:
    """Draw an orthogonal matrix from the Haar measure in float64 (QR with the signs of R fixed; Mezzadri, 2007)."""
    gaussian = torch.randn(dim, dim, generator=generator, **_FLOAT64)
    # A library may return any signs on R's diagonal; with them positive the decomposition is unique, and Q is uniform.
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def hadamard(order: int) -> Float[Tensor, "order order"] | None:
    """Return a Hadamard matrix (entries +1 and -1) in float64, or None where neither construction below gives one.

    Sylvester's doubling, on top of Paley's first construction of order q + 1 for a prime q = 3 mod 4. That covers the
    powers of two and head dims such as 80 (4 x 20) and 96 (8 x 12), so nothing is padded.
    """
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], **_FLOAT64)[:order, :order]
    if order % 4:
        return None
    smaller = hadamard(order // 2)
    if smaller is not None:  # Sylvester: [[H, H], [H, -H]]
        return torch.cat([torch.cat([smaller, smaller], 1), torch.cat([smaller, -smaller], 1)], 0)
    q = order - 1
    if q % 4 != 3 or not _is_prime(q):
        return None
    # Paley I: H = I + S, where S[i, j] is the quadratic character of j - i mod q, bordered by ones and minus ones.
    character = -torch.ones(q, **_FLOAT64)
    character[[x * x % q for x in range(1, q)]] = 1
    character[0] = 0
    index = torch.arange(q, device="cpu")
    skew = torch.zeros(order, order, **_FLOAT64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(index[None, :] - index[:, None]) % q]
    return skew + torch.eye(order, **_FLOAT64)


@shared_table(maxsize=1024)  # no fewer than rotations are kept: one that outlives its table would keep a second copy
def _hadamard_table(dim: int, device: torch.device) -> Tensor | None:
    matrix = hadamard(dim)
    return None if matrix is None else (matrix / math.sqrt(dim)).float().to(device)


@shared_table(maxsize=1024)
def random_rotation(kind: RotationKind, dim: int, seed: int, layer_idx: int, device: torch.device) -> Rotation:
    """Return the rotation of one layer; equal arguments share one object and its memory.

    Args:
        kind: "hadamard" (random signs, then an orthonormal Hadamard matrix) or "qr" (Haar). Dims without a Hadamard
            matrix from `hadamard` get a Haar rotation instead.
        dim: Length of the vectors, at least 2.
        seed: Seed shared by all layers.
        layer_idx: Layer; each has its own signs or matrix.
        device: Where the tables live.

    Raises:
        ValueError: If `kind` or `dim` is out of range.
    """
    if kind not in ROTATIONS:
        raise ValueError(f"rotation must be one of {', '.join(ROTATIONS)}, got {kind!r}")
    generator = _generator(seed, layer_idx, stream=0)
    # The matrix is one for all layers; a layer's own are its signs, drawn in front of it (x -> H D x / sqrt(d)).
    table = _hadamard_table(check_dim(dim), device) if kind == "hadamard" else None
    if table is None:
        return Rotation(haar(dim, generator).float().contiguous().to(device))
    signs = torch.randint(0, 2, (dim,), generator=generator, device="cpu") * 2 - 1
    return Rotation(table, signs.float().to(device))


@shared_table(maxsize=1024)
def qjl_projection(
    kind: Literal["gaussian", "orthogonal"], dim: int, seed: int, layer_idx: int, device: torch.device
) -> Float[Tensor, "dim dim"]:
    """Return the projection S of QJL (arXiv:2406.03482, Definition 1).

    "gaussian" has independent standard normal entries, as printed; "orthogonal" is a Haar matrix times sqrt(dim), as
    in the code of QJL's authors, with lower variance.
    """
    generator = _generator(seed, layer_idx, stream=1)
    if kind == "gaussian":
        return torch.randn(dim, dim, generator=generator, **_FLOAT64).float().to(device)
    if kind == "orthogonal":
        return (haar(dim, generator) * math.sqrt(dim)).float().to(device)
    raise ValueError(f"qjl must be none, gaussian or orthogonal, got {kind!r}")


def qjl_scale(kind: Literal["gaussian", "orthogonal"], dim: int) -> float:
    """Return c such that c * |e| * <S q, sign(S e)> estimates <q, e> without bias.

    sqrt(pi/2)/dim for Gaussian rows (arXiv:2504.19874, Algorithm 2). A row of the orthogonal projection is uniform on
    a sphere of radius sqrt(dim), where E|u_1| = Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)) takes the place of its limit.
    """
    if kind == "gaussian":
        return math.sqrt(math.pi / 2) / dim
    mean_abs = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)
    return 1 / (dim * math.sqrt(dim) * mean_abs)
