"""The quantizers of TurboQuant (arXiv:2504.19874, Algorithms 1 and 2): one code a coordinate of the rotated vector."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from turboquant.kernels.codes import code_combine, code_levels, code_scores, tile_tokens
from turboquant.methods import check_choice
from turboquant.quant.codebook import boundaries, check_bits, lloyd_max
from turboquant.quant.grouping import OUTLIER, in_float16, median, stored
from turboquant.quant.modes import plain, shared_table
from turboquant.quant.packing import Planes, pack_bits, plane_widths
from turboquant.quant.quantizer import KernelView, PackedTensor, Quantizer, token_groups
from turboquant.quant.rotation import Rotation

Scale = Literal["matched", "norm", "unbiased"]
SCALES: tuple[Scale, ...] = ("matched", "norm", "unbiased")
PackedMSEKind = TypeVar("PackedMSEKind", bound="PackedMSE")
FAR_OUTLIER = 4096
"""How many times as long as most vectors of a head one may be for the 16-bit weights of GPU kernels to reach them."""


@dataclass(frozen=True)
class PackedMSE(PackedTensor):
    """Codes and one scale a vector, in the rotated space; `center` was subtracted from all vectors, if any.

    Without groups a scale is a float16. With groups it is a whole number of 1/255 of the group's greatest scale
    (`tops`), and each group's mean, if it was subtracted, is one of 1/127 of its greatest entry (`mean_tops`). Where
    the scales of some group lie too far apart for that, or float16 does not hold a number, the layer keeps plain scales
    (no `tops`), or float32, for all tokens from then on.

    Shapes: planes (batch, kv_heads, tokens, bytes) uint8; scales (batch, kv_heads, tokens) float16 or uint8; center
    (batch, kv_heads, 1, dim) float16; tops and mean_tops (batch, kv_heads, groups) float16; means (batch, kv_heads,
    groups, dim) int8.
    """

    shared: ClassVar[frozenset[str]] = frozenset({"center"})
    codes: Planes
    scales: Tensor
    center: Tensor | None
    tops: Tensor | None
    means: Tensor | None
    mean_tops: Tensor | None

    def vector_scales(self) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return each vector's scale in float32."""
        if self.tops is None:
            return self.scales.float()
        return (self.scales.unflatten(2, (self.tops.shape[2], -1)) * self.tops.float().unsqueeze(-1) / 255).flatten(2)

    def alike(self: PackedMSEKind, other: PackedMSEKind) -> tuple[PackedMSEKind, PackedMSEKind]:
        """Return both in one format: with plain scales and in float32 where one of them needs that."""
        one, two = self, other
        if (one.tops is None) != (two.tops is None):
            one, two = one._with_plain_scales(), two._with_plain_scales()
        return super(PackedMSE, one).alike(two)

    def _with_plain_scales(self: PackedMSEKind) -> PackedMSEKind:
        return self if self.tops is None else replace(self, scales=stored(self.vector_scales()), tops=None)

    def group_means(self) -> Float[Tensor, "batch kv_heads groups dim"] | None:
        """Return what was subtracted from each group beyond the center, in float32; None where nothing was."""
        if self.means is None or self.mean_tops is None:
            return None
        return self.means * (self.mean_tops.float() / 127).unsqueeze(-1)


@dataclass(frozen=True)
class PackedProd(PackedMSE):
    """`PackedMSE` plus one sign bit a coordinate and the fp16 norm of the error."""

    code_fields: ClassVar[tuple[str, ...]] = ("codes", "signs")
    signs: Planes
    error_norms: Tensor


@shared_table(maxsize=64)
def _shared_codebook(bits: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the level of each code, the boundaries between levels, and the code of each level in ascending order.

    Codes are sign and magnitude: the highest bit is set for negative levels, the others count from the least magnitude
    up. One object for all layers; 0 bits have the one level 0.
    """
    levels = (lloyd_max(bits, dim) if bits else torch.zeros(1, dtype=torch.float32, device="cpu")).to(device)
    half = 2**bits // 2
    # levels[half:] are the positive ones, ascending; of the negative ones the last has the least magnitude.
    order = torch.cat([torch.arange(half, 2**bits, device=device), torch.arange(half, device=device).flip(0)])
    return levels[order], boundaries(levels), order.argsort().to(torch.uint8)


@shared_table(maxsize=8)
def _sign_levels(device: torch.device) -> Tensor:
    """Return what the two sign codes stand for."""
    return torch.tensor([-1.0, 1.0], dtype=torch.float32, device=device)


class TurboQuantMSE(Quantizer[PackedMSE]):
    """TurboQuant_mse (Algorithm 1): x^ = scale * R^T codebook[argmin |R x / |x| - c|], plus the mean if centred.

    The scale is the plain norm as in the paper ("norm"), the norm divided by that of the code ("matched", so that x^
    has the length of x), or EDEN's |x|^2 / <x, x^> ("unbiased").

    Args:
        dim: Length of the vectors, at least 2.
        bits: Bits a coordinate, 1 to 8.
        rotation: The layer's rotation.
        scale: Which scalar is stored with a vector.
        center: Subtract means. For keys the mean of all tokens leaves softmax unchanged, because <q, mean> is the same
            for every token, and takes away offsets that would cost most of the bits (a key bias, for example). The
            means of groups follow what changes slowly along the text, such as the slow channels of rotary embedding.
        group_size: Successive tokens whose vectors share a mean and the unit of their scales, both in 8 bits; 0 for
            one mean (that of the first block) and scales in float16. Vectors more than `OUTLIER` times as long as most
            of the others have no say in a mean.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        rotation: Rotation,
        scale: Scale = "matched",
        center: bool = False,
        group_size: int = 0,
    ) -> None:
        check_choice("scale", scale, SCALES)
        self.dim, self.bits = dim, check_bits(bits, lowest=0)
        self.rotation, self.scale, self.center = rotation, scale, center
        self.group_size, self.token_group = group_size, group_size or 1
        self.codebook, self.boundaries, self.codes = _shared_codebook(bits, dim, rotation.matrix.device)

    def _encode(self, x: Tensor, like: PackedMSE | None, valid: Tensor | None) -> tuple[PackedMSE, Tensor]:
        """Return the packed vectors and the error that is left, in the rotated space."""
        y = self.rotation.apply(x.float())  # y = Pi x (Algorithm 1, Quant); means can be taken before or after
        center = like.center if like is not None else stored(_mean(y, valid), smallest=0.0) if self.center else None
        packed = PackedMSE((), y, center, None, None, None)  # the fields that are known so far
        if center is not None:
            y = y - center.float()
            if self.group_size:
                packed, y = self._without_group_means(packed, y, valid)
        norms = y.norm(dim=-1, keepdim=True)  # section 3.1: vectors of any length store their L2 norm beside the codes
        unit = y / norms.clamp_min(torch.finfo(torch.float32).tiny)
        # idx_j = argmin_k |y_j - c_k| (Algorithm 1): the levels are sorted, so the boundaries between them decide
        codes = self.codes[torch.bucketize(unit, self.boundaries, out_int32=True, right=True)]
        levels = self.codebook[codes.int()]
        if self.bits and self.scale == "matched":  # beyond the paper: |x^| = |x|
            norms = norms / levels.norm(dim=-1, keepdim=True)
        elif self.bits and self.scale == "unbiased":  # EDEN (arXiv:2108.08842): <x, x^> = |x|^2
            norms = norms / (unit * levels).sum(dim=-1, keepdim=True).clamp_min(1e-6)
        scales, tops = self._stored_scales(norms, valid)
        packed = replace(packed, codes=pack_bits(codes, self.bits), scales=scales, tops=tops)
        return packed, y - packed.vector_scales().unsqueeze(-1) * levels

    def _without_group_means(
        self, packed: PackedMSE, y: Tensor, valid: Tensor | None
    ) -> tuple[PackedMSE, Float[Tensor, "batch kv_heads tokens dim"]]:
        groups, real = token_groups(y, valid, self.group_size)
        means = _mean_without_outliers(groups, real)
        tops = stored(means.abs().amax(dim=-1), smallest=0.0)
        means = _steps(means, tops.unsqueeze(-1), 127).to(torch.int8)  # 8 bits a channel, one float16 a group
        # The mean as it is read back is subtracted, so that codes make up for its rounding.
        packed = replace(packed, means=means, mean_tops=tops)
        subtracted = packed.group_means()
        assert subtracted is not None
        return packed, (groups - subtracted.unsqueeze(3)).flatten(2, 3)

    def _stored_scales(self, norms: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return scales and tops as they are stored; pad tokens have no say in a group's top."""
        if self.group_size:
            groups, real = token_groups(norms, valid, self.group_size)
            groups = (groups if real is None else torch.where(real, groups, 0)).squeeze(-1)
            greatest, least = groups.amax(dim=3), torch.where(groups > 0, groups, torch.inf).amin(dim=3)
            # In steps of 1/255 of the greatest scale a much smaller one would have few steps or none.
            if in_float16(greatest) and not bool((greatest > OUTLIER * least).any()):
                tops = stored(greatest)
                return _steps(groups, tops.unsqueeze(-1), 255).to(torch.uint8).flatten(2), tops
        # GPU kernels multiply weights by scales in fp16, in units of a part's greatest: float32 sends the layer to the
        # reference where that would lose most vectors (`attention.unsupported`).
        scales = norms.squeeze(-1)
        asked = scales if valid is None else torch.where(valid[:, None], scales, torch.nan)
        far = asked.nan_to_num(nan=0.0).amax(dim=2, keepdim=True) > FAR_OUTLIER * median(asked, dim=2)
        return scales if bool(far.any()) else stored(scales, valid), None

    def quantize(
        self,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        like: PackedMSE | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> PackedMSE:
        """Quantize vectors; see `Quantizer.quantize`."""
        return self._encode(x, like, valid)[0]

    def dequantize(self, packed: PackedMSE) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Return the vectors in float32."""
        y = torch.zeros(*packed.scales.shape, self.dim, dtype=torch.float32, device=packed.scales.device)
        if self.bits:
            # y~_j = c_idx_j, rescaled (Algorithm 1, DeQuant)
            y = code_levels(packed.codes, self.bits, self.codebook, self.dim) * packed.vector_scales().unsqueeze(-1)
        means = packed.group_means()
        if means is not None:
            y = (y.unflatten(2, (means.shape[2], -1)) + means.unsqueeze(3)).flatten(2, 3)
        return self.rotation.inverse(y if packed.center is None else y + packed.center.float())

    def project(self, query: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch projected"]:
        """Rotate queries: <q, x^> = scale * <R q, codebook[codes]>, so keys are never rotated back."""
        return self.rotation.apply(query)

    def scores(
        self, projected: Float[Tensor, "batch kv_heads queries projected"], packed: PackedMSE
    ) -> Float[Tensor, "batch kv_heads queries tokens"]:
        """Return inner products of rotated queries and packed keys, from the codes."""
        if not self.bits:
            scores = projected.new_zeros(*projected.shape[:3], packed.tokens)
        else:
            scores = code_scores(projected, packed.codes, self.bits, self.codebook, packed.vector_scales())
        means = packed.group_means()
        if means is not None:  # <R q, y~ + mean> = <R q, y~> + <R q, mean>, the second once a group
            scores = (scores.unflatten(-1, (means.shape[2], -1)) + (projected @ means.mT).unsqueeze(-1)).flatten(-2)
        return scores if packed.center is None else scores + projected @ packed.center.float().mT

    def combine(
        self, weights: Float[Tensor, "batch kv_heads queries tokens"], packed: PackedMSE
    ) -> Float[Tensor, "batch kv_heads queries dim"]:
        """Return the weighted sum of packed values in the rotated space."""
        if not self.bits:
            output = weights.new_zeros(*weights.shape[:3], self.dim)
        else:
            scales = packed.vector_scales()
            output = code_combine(weights, packed.codes, self.bits, self.codebook, scales, self.dim)
        means = packed.group_means()
        if means is not None:  # every token of a group brings its mean along: the group's weights are added up first
            output = output + weights.unflatten(-1, (means.shape[2], -1)).sum(-1) @ means
        return output if packed.center is None else output + weights.sum(-1, keepdim=True) * packed.center.float()

    def unproject(self, output: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Rotate a sum of values back."""
        return self.rotation.inverse(output)

    def tile_tokens(self, rows: Tensor) -> int:
        """Return how many tokens attention reads at once."""
        return tile_tokens(rows, self.bits)

    def may_misread(self, x: Float[Tensor, "batch kv_heads tokens dim"], like: PackedMSE | None) -> bool:
        """Return whether the mean of the first block, which is subtracted, is far longer than these vectors."""
        if like is None or like.center is None:
            return False
        usual = median(x.float().norm(dim=-1), dim=2)
        return bool((like.center.float().norm(dim=-1) > OUTLIER * usual).any())

    def blank(self, x: Float[Tensor, "batch kv_heads tokens dim"], like: PackedMSE | None) -> PackedMSE | None:
        """Return room for these vectors, which a fused kernel fills; only the center is set.

        None where the layer holds plain scales in place of groups, or float32.
        """
        if like is not None and not self._usual(like):
            return None
        batch, heads, tokens, dim = x.shape
        center = None
        if self.center:
            center = stored(self.rotation.apply(_mean(x.float(), None)), smallest=0.0) if like is None else like.center

        def room(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(batch, heads, *shape, dtype=dtype, device=x.device)

        codes = tuple(room(tokens, -(-dim * width // 8), dtype=torch.uint8) for width in plane_widths(self.bits))
        if not self.group_size:
            return PackedMSE(codes, room(tokens, dtype=torch.float16), center, None, None, None)
        groups = tokens // self.group_size
        scales, tops = room(tokens, dtype=torch.uint8), room(groups, dtype=torch.float16)
        if not self.center:
            return PackedMSE(codes, scales, None, tops, None, None)
        means, mean_tops = room(groups, dim, dtype=torch.int8), room(groups, dtype=torch.float16)
        return PackedMSE(codes, scales, center, tops, means, mean_tops)

    def _usual(self, packed: PackedMSE) -> bool:
        """Return whether packed vectors have the format that nearly all have, which kernels write."""
        scales = torch.uint8 if self.group_size else torch.float16
        others = (packed.center, packed.tops, packed.mean_tops)
        return packed.scales.dtype == scales and all(x is None or x.dtype == torch.float16 for x in others)

    def view(self, packed: PackedMSE) -> KernelView:
        """Return what fused kernels read."""
        return KernelView(
            packed.codes,
            self.bits,
            self.codebook,
            self.rotation,
            packed.scales,
            self.group_size,
            packed.tops,
            packed.center,
            packed.means,
            packed.mean_tops,
            boundaries=self.boundaries,
            scale=self.scale,
        )

    def tables(self) -> tuple[Tensor, ...]:
        """Return rotation, codebook, boundaries and the codes of levels."""
        return (*self.rotation.tensors, self.codebook, self.boundaries, self.codes)


class TurboQuantProd(TurboQuantMSE):
    """TurboQuant_prod (Algorithm 2): (bits - 1)-bit codes, then one sign a coordinate of the projected error (QJL).

    <q, x> is estimated, without bias, by <q, x_mse> + c |e| <S q, sign(S e)> with e = x - x_mse and c of
    `rotation.qjl_scale` (sqrt(pi/2)/dim for Gaussian S). The methodology calls this TurboQuantV2. `bits` includes the
    sign bit.
    """

    def __init__(  # noqa: PLR0913
        self,
        dim: int,
        bits: int,
        rotation: Rotation,
        projection: Float[Tensor, "dim dim"],
        qjl_scale: float,
        scale: Scale = "norm",
        center: bool = False,
        group_size: int = 0,
    ) -> None:
        super().__init__(dim, check_bits(bits) - 1, rotation, scale, center, group_size)
        # S acts on the error before rotation; S R^T does the same on the rotated error.
        with plain():
            self.projection = rotation.apply(projection)
        self.qjl_scale = qjl_scale
        self.sign_levels = _sign_levels(projection.device)

    def quantize(
        self,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        like: PackedMSE | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> PackedProd:
        """Quantize vectors; see `Quantizer.quantize`."""
        packed, error = self._encode(x, like, valid)
        # qjl = sign(S r) of the residual r = x - x~_mse (Algorithm 2, Quant), and its norm gamma
        signs = (error @ self.projection.mT >= 0).to(torch.uint8)
        return PackedProd(**vars(packed), signs=pack_bits(signs, 1), error_norms=stored(error.norm(dim=-1), valid))

    def _gains(self, packed: PackedProd) -> Tensor:
        return packed.error_norms.float() * self.qjl_scale

    def dequantize(self, packed: PackedMSE) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Return the vector whose inner product with q is the estimate."""
        assert isinstance(packed, PackedProd)
        signs = code_levels(packed.signs, 1, self.sign_levels, self.dim)
        # sqrt(pi/2)/d * gamma * S^T qjl (Algorithm 2, DeQuant; QJL's Definition 1)
        correction = (signs @ self.projection) * self._gains(packed).unsqueeze(-1)
        return super().dequantize(packed) + self.rotation.inverse(correction)

    def project(self, query: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch projected"]:
        """Return R q and S q, side by side."""
        rotated = self.rotation.apply(query)
        return torch.cat([rotated, rotated @ self.projection.mT], dim=-1)

    def scores(
        self, projected: Float[Tensor, "batch kv_heads queries projected"], packed: PackedMSE
    ) -> Float[Tensor, "batch kv_heads queries tokens"]:
        """Return the unbiased estimates of inner products, from codes and signs."""
        assert isinstance(packed, PackedProd)
        rotated, sketched = projected.split(
            self.dim, dim=-1
        )  # <q, S^T qjl> = <S q, qjl>: signs are never projected back
        correction = code_scores(sketched, packed.signs, 1, self.sign_levels, self._gains(packed))
        return super().scores(rotated, packed) + correction

    def combine(
        self, weights: Float[Tensor, "batch kv_heads queries tokens"], packed: PackedMSE
    ) -> Float[Tensor, "batch kv_heads queries dim"]:
        """Return the weighted sum in the rotated space."""
        assert isinstance(packed, PackedProd)
        signs = code_combine(weights, packed.signs, 1, self.sign_levels, self._gains(packed), self.dim)
        correction = signs @ self.projection
        return super().combine(weights, packed) + correction

    def blank(self, x: Float[Tensor, "batch kv_heads tokens dim"], like: PackedMSE | None) -> None:
        """No kernel fills the signs of the error."""

    def view(self, packed: PackedMSE) -> KernelView:
        """Return what fused kernels read."""
        assert isinstance(packed, PackedProd)
        return replace(
            super().view(packed),
            signs=packed.signs[0],
            sign_levels=self.sign_levels,
            error_norms=packed.error_norms,
            projection=self.projection,
            gain=self.qjl_scale,
        )

    def tables(self) -> tuple[Tensor, ...]:
        """Return what `TurboQuantMSE` does, the projection and the two signs."""
        return (*super().tables(), self.projection, self.sign_levels)


def _steps(x: Tensor, top: Tensor, count: int) -> Tensor:
    """Return x in whole steps of top / count, 0 where the top is 0 (NaN in x shows in the top, infinity saturates)."""
    top = top.float()
    return torch.where(top > 0, x / top * count, 0).round().clamp(-count, count)


def _mean(y: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over all tokens (batch, kv_heads, 1, dim); see `_mean_without_outliers`."""
    groups, real = token_groups(y, valid, y.shape[2])
    return _mean_without_outliers(groups, real)


def _mean_without_outliers(
    groups: Float[Tensor, "batch kv_heads groups size dim"], real: Bool[Tensor, "batch 1 groups size 1"] | None
) -> Float[Tensor, "batch kv_heads groups dim"]:
    """Mean of each group's real vectors; those more than `OUTLIER` times as long as the median one are left out."""
    lengths = groups.norm(dim=-1, keepdim=True)
    # One key of huge length (a sink, say) would move the mean, and with it the error of all others of the group.
    counted = lengths if real is None else torch.where(real, lengths, torch.nan)
    outlier = lengths > OUTLIER * median(counted, dim=3)
    if bool(outlier.any()):
        real = ~outlier if real is None else real & ~outlier
    if real is None:
        return groups.mean(dim=3)
    return torch.where(real, groups, 0).sum(dim=3) / real.sum(dim=3).clamp_min(1)
