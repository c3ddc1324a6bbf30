"""Weights that a repository or a file holds quantized already: what they can be loaded as, and what that takes.

What transformers can write out as plain numbers on any device is loaded so (MXFP4, FP8, GGUF): its kernels for the
codes themselves are fetched from the hub as code, which never runs here. The rest is loaded as it is, where its package
is installed.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from turboquant.models.checks import BYTES_PER_PARAMETER, first_line, what_is_missing
from turboquant.models.gguf_file import Header
from turboquant.models.registry import ModelError, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PLAIN = ("fp32", "bf16")
WIDENED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config", "mxfp8": "FineGrainedFP8Config"}
"""Configurations of transformers that write weights out, by the method's name in a config.json."""


@dataclass(frozen=True)
class Stored:
    """How weights are stored.

    Attributes:
        name: Such as mxfp4, gptq or GGUF Q4_1.
        weights: What they can be loaded as; the first where nothing is asked for.
        bits: Of a weight in a linear layer, where they are loaded as they are.
        options: For `from_pretrained`.
    """

    name: str
    weights: tuple[str, ...]
    bits: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    def choose(self, asked: str, spec: ModelSpec) -> str:
        """Return the precision for what was asked.

        Raises:
            ModelError: If they cannot be loaded so.
        """
        if asked != "auto" and asked not in self.weights:
            raise ModelError(
                f"{spec.name} is stored as {self.name}, which is loaded as {' or '.join(self.weights)}: "
                f"use weights=auto{''.join(f' or {one}' for one in self.weights if one in BYTES_PER_PARAMETER)}, "
                f"got weights={asked}."
            )
        return self.weights[0] if asked == "auto" else asked


def unify(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Give all parameters the type that was asked for: beside codes transformers leaves them as the file has them.

    What the model's class keeps in float32 stays so.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        stays = parameter.is_meta or (parameter.dtype == torch.float32 and any(part in name for part in kept))
        if parameter.is_floating_point() and not stays:
            parameter.data = parameter.data.to(dtype)


def of_file(header: Header, device: torch.device) -> Stored:
    """Return how the weights of a GGUF file are stored."""
    return Stored(f"GGUF {header.kind}", PLAIN[::-1] if device.type == "cuda" else PLAIN)


def of_config(config: "PreTrainedConfig", device: torch.device, spec: ModelSpec) -> Stored | None:
    """Return how a repository's weights are stored; None where they are plain numbers.

    Raises:
        ModelError: If they cannot be loaded here; names the package or the device that is missing.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        saved = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if not saved:
        return None
    if not isinstance(saved, dict):
        raise ModelError(f"{spec.name} has a quantization_config that is no object with named fields.")
    if saved.get("load_in_4bit") or saved.get("load_in_8bit"):
        return Stored("bitsandbytes", ("4bit" if saved.get("load_in_4bit") else "8bit",))
    method = str(saved.get("quant_method"))
    if method in WIDENED:
        import transformers

        kind = getattr(transformers, WIDENED[method])
        return Stored(method, PLAIN[::-1], options={"quantization_config": kind(dequantize=True)})
    _check_environment(saved, method, device, spec)
    bits = saved.get("bits")
    return Stored(method, (method,), bits=bits if isinstance(bits, int) else 8)


def _check_environment(saved: dict[str, Any], method: str, device: torch.device, spec: ModelSpec) -> None:
    """Ask transformers whether it could load such weights, before they are fetched."""
    from transformers.quantizers.auto import AutoHfQuantizer

    begin = f"{spec.name} is stored as {method[:40]}, which cannot be loaded on {device}"
    if not AutoHfQuantizer.supports_quant_method({"quant_method": method}):
        raise ModelError(f"{begin}: this version of transformers does not know it; choose the original repository.")
    try:
        AutoHfQuantizer.from_config(dict(saved), pre_quantized=True).validate_environment(
            device_map={"": str(device)}, weights_only=True
        )
    except ImportError as error:
        raise ModelError(f"{begin}: {what_is_missing(error)}; or choose the original repository.") from error
    except Exception as error:  # whatever its classes make of values that nobody has checked
        raise ModelError(f"{begin}: {first_line(error).rstrip('.')}; choose the original repository.") from error
