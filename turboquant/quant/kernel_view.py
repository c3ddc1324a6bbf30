"""What a fused kernel reads of packed vectors, whatever class they are held in."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from turboquant.quant.packing import Planes
from turboquant.quant.rotation import Rotation


@dataclass(frozen=True)
class KernelView:
    """Packed vectors as `center + mean of the group + scale * codebook[codes]` in the rotated space.

    Shapes: planes (batch, kv_heads, tokens, bytes) uint8; scales (batch, kv_heads, tokens) float16, or uint8 in units
    of tops / 255 where `group_size` tokens share one of tops (batch, kv_heads, groups); center (batch, kv_heads, 1,
    dim) float16; means (batch, kv_heads, groups, dim) int8 in units of mean_tops / 127; signs (one plane) and
    error_norms (batch, kv_heads, tokens) of a QJL stage whose estimate is `gain * error_norm * <projection y, sign>`.
    `boundaries` and `scale` (as in `TurboQuantMSE`) say how new vectors are rounded.
    """

    planes: Planes
    bits: int
    codebook: Tensor
    rotation: Rotation
    scales: Tensor
    group_size: int
    tops: Tensor | None = None
    center: Tensor | None = None
    means: Tensor | None = None
    mean_tops: Tensor | None = None
    signs: Tensor | None = None
    sign_levels: Tensor | None = None
    error_norms: Tensor | None = None
    projection: Tensor | None = None
    gain: float = 0.0
    boundaries: Tensor | None = None
    scale: str = "norm"

    @property
    def shared(self) -> int:
        """Tokens that share one of `tops`; 0 where every scale stands for itself."""
        return 0 if self.tops is None else self.group_size

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.scales.shape[2]

    def row(self, index: int) -> "KernelView":
        """Return the view of one row of the batch."""
        changes: dict[str, Any] = {"planes": tuple(plane[index : index + 1] for plane in self.planes)}
        for name in BATCHED:
            tensor = getattr(self, name)
            changes[name] = None if tensor is None else tensor[index : index + 1]
        return replace(self, **changes)


BATCHED = ("scales", "tops", "center", "means", "mean_tops", "signs", "error_norms")
