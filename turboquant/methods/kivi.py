"""KIVI (arXiv:2402.02750): keys are rounded per channel, values per token, each group with its own range.

A group of keys is one channel of `group_size` successive tokens, because a few key channels are large in every token;
a group of values is `group_size` channels of one token. Both store their least value and their step in float16, so
that a value costs bits + 32 / group_size: 3 bits for KIVI-2 and 5 for KIVI-4 with groups of 32, as in the paper.

One thing differs from the authors' code: there keys leave the exact window `residual_length` at a time and values one
by one; here both leave it in blocks of one group, so the window is at most one group longer than `residual_length`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from turboquant.methods import BitsMethod, check_choice
from turboquant.quant.codebook import check_bits
from turboquant.quant.grouping import channel_groups, stored, uneven, ungrouped
from turboquant.quant.packing import Planes, pack_bits, unpack_bits
from turboquant.quant.quantizer import PackedTensor, Quantizer, token_groups

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class PackedAffine(PackedTensor):
    """Codes, and the least value and the step of every group in fp16 (in float32 where they are out of its range).

    Shapes: planes (batch, kv_heads, tokens, bytes) uint8; lows and steps (batch, kv_heads, token groups, dim) for
    keys, (batch, kv_heads, tokens, channel groups) for values.
    """

    codes: Planes
    lows: Tensor
    steps: Tensor


def _affine(lows: Tensor, highs: Tensor, bits: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return least values and steps as they are stored, in one dtype."""
    # A range is cut into 2^b - 1 steps, so that both of its ends are levels.
    kept, steps = stored(lows, valid, smallest=0.0), stored((highs - lows) / (2**bits - 1), valid)
    return (kept, steps) if kept.dtype == steps.dtype else (lows.float(), steps.float())


def _codes(groups: Tensor, lows: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Round to the levels that the stored ranges give."""
    # Codes are made from the range as it is stored, rounded, since that is what they are read with; a step of 0 is a
    # group of equal numbers.
    steps = steps.float()
    levels = torch.where(steps == 0, 0, (groups - lows.float()) / steps)
    return levels.round().clamp(0, 2**bits - 1).to(torch.uint8)


class PerChannel(Quantizer[PackedAffine]):
    """Asymmetric rounding of `group_size` successive tokens of one channel (KIVI's keys)."""

    def __init__(self, dim: int, bits: int, group_size: int = 32) -> None:
        self.dim, self.bits, self.token_group = dim, check_bits(bits), group_size

    def quantize(
        self,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        like: PackedAffine | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> PackedAffine:
        """Quantize vectors; see `Quantizer.quantize`.

        Raises:
            ValueError: If the number of tokens is no multiple of the group.
        """
        groups, real = token_groups(x.float(), valid, self.token_group)
        least, greatest = (groups, groups)  # pads must widen no channel's range
        if real is not None:
            least, greatest = groups.masked_fill(~real, torch.inf), groups.masked_fill(~real, -torch.inf)
        lows, steps = _affine(least.amin(dim=3), greatest.amax(dim=3), self.bits)
        codes = _codes(groups, lows.unsqueeze(3), steps.unsqueeze(3), self.bits).flatten(2, 3)
        return PackedAffine(pack_bits(codes, self.bits), lows, steps)

    def dequantize(self, packed: PackedAffine) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Return the vectors in float32."""
        levels = unpack_bits(packed.codes, self.bits, self.dim).float().unflatten(2, (-1, self.token_group))
        return (levels * packed.steps.float().unsqueeze(3) + packed.lows.float().unsqueeze(3)).flatten(2, 3)

    def may_misread(self, x: Float[Tensor, "batch kv_heads tokens dim"], like: PackedAffine | None) -> bool:
        """Return whether some token is so long that it takes the levels of its channels from others of its group."""
        return uneven(x)


class PerToken(Quantizer[PackedAffine]):
    """Asymmetric rounding of `group_size` channels of one token (KIVI's values); the last group may be shorter."""

    def __init__(self, dim: int, bits: int, group_size: int = 32) -> None:
        self.dim, self.bits, self.group_size = dim, check_bits(bits), group_size

    def quantize(
        self,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        like: PackedAffine | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> PackedAffine:
        """Quantize vectors; see `Quantizer.quantize`."""
        groups = channel_groups(x.float(), self.group_size)
        lows, steps = _affine(groups.amin(dim=-1), groups.amax(dim=-1), self.bits, valid)
        codes = _codes(groups, lows.unsqueeze(-1), steps.unsqueeze(-1), self.bits)
        return PackedAffine(pack_bits(ungrouped(codes, self.dim), self.bits), lows, steps)

    def dequantize(self, packed: PackedAffine) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Return the vectors in float32."""
        levels = channel_groups(unpack_bits(packed.codes, self.bits, self.dim).float(), self.group_size)
        groups = levels * packed.steps.float().unsqueeze(-1) + packed.lows.float().unsqueeze(-1)
        return ungrouped(groups, self.dim)


@dataclass(frozen=True)
class KIVI(BitsMethod):
    """KIVI; bits + 32 / group_size bits a value (for values, where group_size divides head_dim)."""

    name: ClassVar[str] = "kivi"
    title: ClassVar[str] = "KIVI"
    summary: ClassVar[str] = (
        "Keys are rounded per channel over 32 successive tokens and values per token over 32 channels, each group "
        "between its own least and greatest value. The most recent tokens stay exact."
    )
    reference: ClassVar[str] = "arXiv:2402.02750"
    color: ClassVar[str] = "#009e73"
    sign: ClassVar[str] = "diamond"
    presets: ClassVar[tuple[str, ...]] = ("bits=4", "bits=2")
    grid: ClassVar[tuple[str, ...]] = ("bits=2", "bits=4")
    residual_length: int = 128
    group_size: int = 32

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("group_size", self.group_size, GROUP_SIZES)

    @property
    def block_length(self) -> int:  # type: ignore[override]
        """Tokens leave the exact window one group at a time."""
        return self.group_size

    def quantizers(
        self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device
    ) -> tuple[Quantizer[Any], Quantizer[Any]]:
        """Return the key and the value quantizer of one layer."""
        key_bits, value_bits = self.resolved_bits
        return PerChannel(key_dim, key_bits, self.group_size), PerToken(value_dim, value_bits, self.group_size)
