"""QJL (arXiv:2406.03482): keys are kept as the signs of a random projection, values as 2-bit codes.

<q, k> is estimated by c |k| <S q, sign(S k)>, where S has `key_bits` x head_dim rows in orthogonal blocks, as in the
authors' code (the paper's text has Gaussian rows; orthogonal ones vary less). c is the exact constant for such rows,
so the estimate is unbiased. As the authors do: the first 15 layers get twice the rows; in every group of 32 tokens the
8 channels of largest norm are sketched apart, with head_dim signs and a norm of their own, and meet only their own
channels of the query; 128 recent tokens stay exact; values are rounded per token in groups of 32 channels.
The estimator's variance is at most pi / (2 m) |q|^2 |k|^2 with m rows (the paper's Lemma 3.5 for Gaussian S).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from turboquant.methods import BitsMethod, check_count
from turboquant.methods.kivi import PerToken
from turboquant.quant.codebook import check_dim
from turboquant.quant.grouping import stored
from turboquant.quant.modes import shared_table
from turboquant.quant.packing import Planes, pack_bits, unpack_bits
from turboquant.quant.quantizer import PackedTensor, Quantizer, token_groups
from turboquant.quant.rotation import qjl_projection, qjl_scale

TOKEN_GROUP = 32
VALUE_GROUP = 32


@shared_table(maxsize=16)
def sketch_matrix(blocks: int, dim: int, seed: int, device: torch.device) -> Float[Tensor, "rows dim"]:
    """Return `blocks` independent orthogonal matrices times sqrt(dim), one below the other; shared by all layers."""
    return torch.cat([qjl_projection("orthogonal", dim, seed, block, device) for block in range(blocks)])


@dataclass(frozen=True)
class PackedSketch(PackedTensor):
    """Signs and fp16 norms of the usual channels and of the outlier channels of each group of tokens.

    Shapes: planes (batch, kv_heads, tokens, bytes) uint8; norms (batch, kv_heads, tokens) float16; outlier_channels
    (batch, kv_heads, token groups, channels), uint8 up to head_dim 256 and int16 above. Without outlier channels the
    last three are empty or None.
    """

    code_fields: ClassVar[tuple[str, ...]] = ("codes", "outlier_codes")
    codes: Planes
    norms: Tensor
    outlier_codes: Planes
    outlier_norms: Tensor | None
    outlier_channels: Tensor | None


class SignSketch(Quantizer[PackedSketch]):
    """QJL's keys. The dequantized vector is the one whose inner product with a query is the estimate.

    Args:
        projection: S, with a whole number of orthogonal blocks.
        outliers: Channels of a group of 32 tokens that are sketched apart, at most half of them; 0 for none.
    """

    def __init__(self, projection: Float[Tensor, "rows dim"], outliers: int) -> None:
        self.projection = projection
        self.rows, self.dim = projection.shape
        self.outliers = min(outliers, self.dim // 2)
        self.token_group = TOKEN_GROUP if self.outliers else 1
        # sqrt(pi/2) / m in the paper, for m Gaussian rows; here the constant of orthogonal ones.
        self.scale = qjl_scale("orthogonal", self.dim) * self.dim / self.rows
        self.outlier_scale = qjl_scale("orthogonal", self.dim)

    def _outlier_mask(self, channels: Tensor) -> Tensor:
        """Return (batch, kv_heads, tokens, dim), 1.0 in the outlier channels of each token's group."""
        mask = torch.zeros(*channels.shape[:3], self.dim, dtype=torch.float32, device=channels.device)
        mask.scatter_(-1, channels.long(), 1.0)
        return mask.repeat_interleave(TOKEN_GROUP, dim=2)

    def quantize(
        self,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        like: PackedSketch | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> PackedSketch:
        """Quantize vectors; see `Quantizer.quantize`.

        Raises:
            ValueError: If there are outlier channels and the number of tokens is no multiple of 32.
        """
        x = x.float()
        if not self.outliers:
            return PackedSketch(*self._sketch(x, self.projection, valid), (), None, None)
        groups, real = token_groups(x, valid, TOKEN_GROUP)
        largest = groups if real is None else groups.masked_fill(~real, 0)
        # The channels of largest norm over the group, as the authors choose them; pads have no say.
        channels = largest.norm(dim=3).topk(self.outliers, dim=-1).indices
        mask = self._outlier_mask(channels)
        usual = self._sketch(torch.where(mask > 0, 0, x), self.projection, valid)
        # Outliers are few, so the first orthogonal block alone sketches them: head_dim signs.
        outlier = self._sketch(torch.where(mask > 0, x, 0), self.projection[: self.dim], valid)
        return PackedSketch(*usual, *outlier, channels.to(torch.uint8 if self.dim <= 256 else torch.int16))

    @staticmethod
    def _sketch(x: Tensor, projection: Tensor, valid: Tensor | None) -> tuple[Planes, Tensor]:
        signs = (x @ projection.mT >= 0).to(torch.uint8)
        return pack_bits(signs, 1), stored(x.norm(dim=-1), valid)

    def dequantize(self, packed: PackedSketch) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Return the vectors whose inner products are the estimates, in float32."""
        x = self._estimate(packed.codes, packed.norms, self.projection, self.scale)
        if packed.outlier_norms is None or packed.outlier_channels is None:
            return x
        mask = self._outlier_mask(packed.outlier_channels)
        projection = self.projection[: self.dim]
        outlier = self._estimate(packed.outlier_codes, packed.outlier_norms, projection, self.outlier_scale)
        # Each estimate is of a vector that is 0 in the other's channels, so what it has there is noise, and left out.
        return torch.where(mask > 0, outlier, x)

    @staticmethod
    def _estimate(codes: Planes, norms: Tensor, projection: Tensor, scale: float) -> Tensor:
        signs = unpack_bits(codes, 1, projection.shape[0]).float() * 2 - 1
        return (signs @ projection) * (norms.float() * scale).unsqueeze(-1)

    def tables(self) -> tuple[Tensor, ...]:
        """Return the projection."""
        return (self.projection,)


@dataclass(frozen=True)
class QJL(BitsMethod):
    """QJL; `key_bits` signs a coordinate (twice as many in the first `double_layers` layers), `value_bits` codes.

    Keys cost key_bits + 1 + 34 / head_dim bits with 8 outlier channels, values value_bits + 1.
    """

    name: ClassVar[str] = "qjl"
    title: ClassVar[str] = "QJL"
    summary: ClassVar[str] = (
        "A key is the signs of its random projections and its length, which estimate inner products without bias; "
        "outlier channels are sketched apart. Values are rounded per token. The most recent tokens stay exact."
    )
    reference: ClassVar[str] = "arXiv:2406.03482, with the authors' orthogonal projection"
    color: ClassVar[str] = "#d55e00"
    sign: ClassVar[str] = "triangle-down"
    presets: ClassVar[tuple[str, ...]] = ("",)
    grid: ClassVar[tuple[str, ...]] = ("",)
    default_bits: ClassVar[int] = 2
    residual_length: int = 128
    double_layers: int = 15
    outliers: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_count("double_layers", self.double_layers)
        check_count("outliers", self.outliers)

    @property
    def payload_bits(self) -> None:
        """Return None: layers differ, so the bits of the signs and codes that are held are counted instead."""
        return None

    def layer_kind(self, layer_idx: int) -> bool:
        """Return whether the layer has twice the signs."""
        return layer_idx < self.double_layers

    def quantizers(
        self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device
    ) -> tuple[Quantizer[Any], Quantizer[Any]]:
        """Return the key and the value quantizer of one layer."""
        key_bits, value_bits = self.resolved_bits
        blocks = key_bits * (2 if self.layer_kind(layer_idx) else 1)
        projection = sketch_matrix(blocks, check_dim(key_dim), self.seed, device)
        return SignSketch(projection, self.outliers), PerToken(value_dim, value_bits, VALUE_GROUP)
