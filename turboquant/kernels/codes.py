"""Inner products with, and weighted sums of, vectors held as packed codes: the reference, and which backend runs.

A vector is ``scale * codebook[codes]``. The plain-torch reference unpacks what it is given, so callers hand it tiles;
for a few query rows on the CPU a compiled kernel reads the codes row by row and unpacks nothing.
"""

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from turboquant.kernels.backend import cpu_kernels
from turboquant.quant.packing import Planes, unpack_bits

KERNEL_ROWS = 32
"""Up to this many query rows a KV head the CPU kernel beats unpacking for a matrix product."""
REFERENCE_TILE_TOKENS = 512
KERNEL_TILE_TOKENS = 16384


def compile_kernels() -> None:
    """Compile the CPU kernels now (seconds the first time on a machine, then from disk) and not in the first answer."""
    if cpu_kernels("codes") is None:
        return
    cpu_kernels("attention")  # compiles on import

    def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cpu")

    # numba compiles by types, not by shapes: one small call of each kernel is enough.
    planes, codebook, scales = (nothing(1, 1, 1, 4, dtype=torch.uint8),), nothing(16), nothing(1, 1, 1)
    rows = code_scores(nothing(1, 1, 1, 8), planes, 4, codebook, scales)
    code_combine(rows, planes, 4, codebook, scales, 8)


def _kernels(rows: Tensor, bits: int) -> ModuleType | None:
    if rows.device.type != "cpu" or rows.shape[2] > KERNEL_ROWS or not bits or rows.dtype != torch.float32:
        return None
    return cpu_kernels("codes")


def tile_tokens(rows: Tensor, bits: int) -> int:
    """Return how many tokens to hand over at once: few where they are unpacked, many where a kernel reads codes."""
    return REFERENCE_TILE_TOKENS if _kernels(rows, bits) is None else KERNEL_TILE_TOKENS


def code_levels(
    planes: Planes, bits: int, codebook: Float[Tensor, " levels"], dim: int
) -> Float[Tensor, "batch heads tokens dim"]:
    """Return codebook[codes], the vectors without their scales."""
    return codebook[unpack_bits(planes, bits, dim).int()]


def code_scores(
    query: Float[Tensor, "batch heads rows dim"],
    planes: Planes,
    bits: int,
    codebook: Float[Tensor, " levels"],
    scales: Float[Tensor, "batch heads tokens"],
) -> Float[Tensor, "batch heads rows tokens"]:
    """Return scale * <query, codebook[codes]> for every query row and token."""
    kernels = _kernels(query, bits)
    if kernels is not None:
        scores: Tensor = kernels.code_scores(query, planes, bits, codebook, scales)
        return scores
    # The scale is a factor of the whole vector: applied to the scores, it spares a second tensor of levels.
    levels = code_levels(planes, bits, codebook, query.shape[-1])
    return (query @ levels.mT) * scales.float().unsqueeze(-2)


def code_combine(
    weights: Float[Tensor, "batch heads rows tokens"],
    planes: Planes,
    bits: int,
    codebook: Float[Tensor, " levels"],
    scales: Float[Tensor, "batch heads tokens"],
    dim: int,
) -> Float[Tensor, "batch heads rows dim"]:
    """Return the sum over tokens of weight * scale * codebook[codes] for every query row."""
    kernels = _kernels(weights, bits)
    if kernels is not None:
        output: Tensor = kernels.code_combine(weights, planes, bits, codebook, scales, dim)
        return output
    return (weights * scales.float().unsqueeze(-2)) @ code_levels(planes, bits, codebook, dim)
