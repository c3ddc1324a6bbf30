"""Hugging Face's own quantized caches, to compare with: quanto, HQQ and fp8.

Their layers return dense tensors at every step, so they save memory between steps but not work. See
`turboquant.cache.foreign` for what is done to make every operation of a cache safe with them. transformers is imported
when a layer is made, never before.
"""

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from turboquant.methods import Method, NoSuchLayerError, check_choice, check_length

GROUP_SIZES = (16, 32, 64, 128)


class HFMethod(Method, ABC):
    """A method whose layers are Hugging Face's."""

    foreign: ClassVar[bool] = True
    backend: ClassVar[str]

    @property
    def options(self) -> dict[str, int]:
        """What Hugging Face's layer takes, by its names."""
        return {}

    def layer(self, plain: Any, layer_idx: int, last_reader: int | None = None, config: Any = None) -> Any:
        """Return a new layer; see `turboquant.cache.foreign.foreign_layer`."""
        from transformers.cache_utils import LinearAttentionLayer

        if isinstance(plain, LinearAttentionLayer):
            raise NoSuchLayerError(
                f"{self.name} cannot hold layer {layer_idx}, which keeps a recurrent state beside keys and values: "
                "choose a method of the lab's own"
            )
        return self._new_layer()

    def check_available(self) -> None:
        """Raise ImportError where the backend's package is missing, or transformers has no such layer."""
        self._new_layer()

    def _new_layer(self) -> Any:
        from turboquant.cache.foreign import foreign_layer

        return foreign_layer(self.backend, **self.options)

    def quantizers(self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device) -> None:
        """Return None: the layers quantize by themselves."""
        return None

    def packed_length(self, tokens: int) -> int:
        """Return `tokens`, the most that can be packed.

        The whole first call is; later tokens wait until the window is full, so it depends on how they came.
        """
        return tokens


@dataclass(frozen=True)
class _GroupWise(HFMethod, ABC):
    """Options of the group-wise backends, named as here; the axes are Hugging Face's."""

    bits: int = 4
    group_size: int = 64
    axis_key: int = 0
    axis_value: int = 0
    residual_length: int = 128
    widths: ClassVar[tuple[int, ...]]
    axes: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("bits", self.bits, self.widths)
        check_choice("group_size", self.group_size, GROUP_SIZES)
        check_choice("axis_key", self.axis_key, self.axes)
        check_choice("axis_value", self.axis_value, self.axes)
        check_length(self.residual_length, "residual_length")

    @property
    def payload_bits(self) -> float:
        """Bits of a code."""
        return float(self.bits)

    @property
    def options(self) -> dict[str, int]:
        """What Hugging Face's layer takes, by its names."""
        return {
            "nbits": self.bits,
            "axis_key": self.axis_key,
            "axis_value": self.axis_value,
            "q_group_size": self.group_size,
            "residual_length": self.residual_length,
        }


@dataclass(frozen=True)
class HFQuanto(_GroupWise):
    """QuantoQuantizedLayer. Axis 0 groups channels of one vector, axis -1 tokens of one channel (of all rows)."""

    name: ClassVar[str] = "hf-quanto"
    title: ClassVar[str] = "Hugging Face cache, quanto"
    summary: ClassVar[str] = (
        "transformers' own cache on optimum-quanto: groups of 64 values between their least and greatest. It hands out "
        "dense tensors, and quantizes its whole history again whenever its exact window is full."
    )
    reference: ClassVar[str] = "transformers QuantizedCache, backend quanto"
    color: ClassVar[str] = "#999933"
    sign: ClassVar[str] = "square-open"
    presets: ClassVar[tuple[str, ...]] = ("bits=4",)
    grid: ClassVar[tuple[str, ...]] = ("bits=2", "bits=4")
    backend: ClassVar[str] = "quanto"
    widths: ClassVar[tuple[int, ...]] = (2, 4)
    axes: ClassVar[tuple[int, ...]] = (0, -1)


@dataclass(frozen=True)
class HFHQQ(_GroupWise):
    """HQQQuantizedLayer. Axis 1, which HQQ advises, groups channels of one vector; axis 0 strides over all states.

    3 bits are not offered: HQQ unpacks them for matrices only, and fails on the four axes of a cache.
    """

    name: ClassVar[str] = "hf-hqq"
    title: ClassVar[str] = "Hugging Face cache, HQQ"
    summary: ClassVar[str] = (
        "transformers' own cache on HQQ: groups of 64 values whose zero point is optimised without data. It hands out "
        "dense tensors, and quantizes its whole history again whenever its exact window is full."
    )
    reference: ClassVar[str] = "transformers QuantizedCache, backend hqq"
    color: ClassVar[str] = "#aa4499"
    sign: ClassVar[str] = "diamond-open"
    grid: ClassVar[tuple[str, ...]] = ("bits=2", "bits=4")
    axis_key: int = 1
    axis_value: int = 1
    backend: ClassVar[str] = "hqq"
    widths: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    axes: ClassVar[tuple[int, ...]] = (0, 1)


@dataclass(frozen=True)
class HFFp8(HFMethod):
    """Fp8QuantizedLayer: 8-bit floats (e4m3) with one scale a tensor, that of the first call."""

    name: ClassVar[str] = "hf-fp8"
    title: ClassVar[str] = "Hugging Face cache, fp8"
    summary: ClassVar[str] = (
        "transformers' own cache in 8-bit floating point, with one scale for all keys and one for all values of a "
        "layer, taken from the first call. It hands out dense tensors."
    )
    reference: ClassVar[str] = "transformers QuantizedCache, backend fp8"
    color: ClassVar[str] = "#44aa99"
    sign: ClassVar[str] = "triangle-up-open"
    grid: ClassVar[tuple[str, ...]] = ("",)
    backend: ClassVar[str] = "fp8"

    @property
    def payload_bits(self) -> float:
        """Bits of a code."""
        return 8.0
