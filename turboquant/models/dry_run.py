"""A dry run: does a model say the same when its keys and values go through the packed cache as by its own attention?

Nothing else can be asked that cannot lie: flags of transformers name what its classes promise, not what they do. Two
short calls, without any rounding, are held against the model's own attention over Hugging Face's own cache. What is
wrong then is no quantization error.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from turboquant import hf_attention
from turboquant.cache.build import build_cache, cache_report
from turboquant.methods import METHODS, Method
from turboquant.quant.quantizer import PackedTensor, Quantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT, MORE = 6, 3
"""Tokens of the first call and of the second, which reads the first ones from the cache."""
LIMITS = {torch.float32: 0.002}
OTHER_LIMIT = 0.15
"""How far logits may be apart: root mean square of the difference, in standard deviations of the logits. What is wrong
moves them by about one. 16-bit models round in every layer, and a mixture of experts may take another expert then.
"""


class DryRunError(ValueError):
    """The model cannot be served by a compressed cache; the message says why."""


@dataclass(frozen=True)
class _Vectors(PackedTensor):
    codes: Tensor


class PlainQuantizer(Quantizer[_Vectors]):
    """Keeps float32 vectors."""

    def quantize(self, x: Tensor, like: Any = None, valid: Any = None) -> _Vectors:
        """Return them as they are."""
        return _Vectors(x.float())

    def dequantize(self, packed: _Vectors) -> Tensor:
        """Return them again."""
        return packed.codes


@dataclass(frozen=True)
class Lossless(Method):
    """Everything is packed at once and nothing is rounded; not registered."""

    title: ClassVar[str] = "lossless"
    block_length: ClassVar[int] = 1
    residual_length: int = 0
    sink_length: int = 1

    def quantizers(
        self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device
    ) -> tuple[Quantizer[Any], Quantizer[Any]]:
        """Return the two that keep their vectors."""
        return PlainQuantizer(), PlainQuantizer()

    def __str__(self) -> str:
        return "lossless"


Lossless.name = "lossless"


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        layers: All of the model.
        compressed_layers: Those whose keys and values are packed.
        error: Root mean square difference of the logits, in their standard deviations.
    """

    layers: int
    compressed_layers: int
    error: float


def attach(model: "PreTrainedModel") -> DryRun:
    """Prepare a model of your own: set the attention function "turboquant", and check that the model says the same.

    After it `build_cache(model.config, method)` gives caches for its `generate()` and forward calls. Costs seven
    forward calls of nine tokens at most.

    Args:
        model: A causal language model of transformers, or an image-text model that answers text.

    Returns:
        How many of its layers are compressed, and how far its logits moved.

    Raises:
        DryRunError: If a compressed cache cannot serve it, with the reason; its own attention function is set again.

    Example:
        >>> from turboquant import attach, tiny_model
        >>> attach(tiny_model("llama"))
        DryRun(layers=3, compressed_layers=3, ...)
    """
    from turboquant.models.checks import why_not

    if (reason := why_not(model)) is not None:
        raise DryRunError(f"a compressed cache cannot serve this model: {reason}")
    before, trained = model.config.get_text_config(decoder=True)._attn_implementation, model.training
    model.eval()  # dropout would tell every call from the next
    try:
        return dry_run(model)
    except DryRunError as error:
        model.set_attn_implementation(before)
        raise DryRunError(f"a compressed cache cannot serve this model: {error}") from error
    finally:
        model.train(trained)


@torch.no_grad()
def dry_run(model: "PreTrainedModel") -> DryRun:
    """Hold the packed cache against a model's own attention, and leave the attention function "turboquant" set.

    Raises:
        DryRunError: If the model cannot run so, says something else, or nothing of it is packed.
    """
    ids = _tokens(model)
    if model.config.get_text_config(decoder=True)._attn_implementation == "turboquant":  # it cannot be its own witness
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    own = _logits(model, ids, METHODS["full"](), "by its own attention")
    limit = LIMITS.get(own[0].dtype, OTHER_LIMIT)
    if (apart := _apart(model(ids).logits[0], own[0])) > limit:
        raise DryRunError(
            "transformers itself computes something else for tokens behind a filled cache than for all of them in one "
            f"call (logits differ by {apart:.2g} standard deviations)"
        )
    hf_attention.register()
    try:
        model.set_attn_implementation("turboquant")
    except (ValueError, TypeError, AttributeError) as error:
        raise DryRunError(f"its attention function cannot be replaced ({_first_line(error)})") from error
    if model.config.get_text_config(decoder=True)._attn_implementation != "turboquant":
        raise DryRunError("its attention function cannot be replaced")
    full = _logits(model, ids, METHODS["full"](), "with the attention function turboquant")
    packed = _logits(model, ids, Lossless(), "with packed keys and values")
    report = packed[1]
    if not report.compressed_layers:
        raise DryRunError("none of its layers keeps keys and values of all tokens")
    if not report.compressed_tokens:
        raise DryRunError("its layers do not hand keys and values over as they came")
    apart = max(_apart(own[0], full[0]), _apart(own[0], packed[0]))
    if not apart <= limit:
        raise DryRunError(
            f"it says something else than by its own attention (logits differ by {apart:.2g} standard deviations, "
            f"at most {limit:g} would be rounding)"
        )
    return DryRun(report.layers, report.compressed_layers, apart)


def _tokens(model: "PreTrainedModel") -> Tensor:
    """Some tokens of the model's vocabulary, spread over it; the same every time."""
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    places = torch.arange(1, PROMPT + MORE + 1, device=model.device)
    return (places * (size // (PROMPT + MORE + 2)) % size)[None]


def _logits(model: "PreTrainedModel", ids: Tensor, method: Method, how: str) -> tuple[Tensor, Any]:
    cache = build_cache(model.config, method)
    try:
        parts = [model(part, past_key_values=cache).logits[0] for part in (ids[:, :PROMPT], ids[:, PROMPT:])]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's own code makes of states that are no tensors
        if isinstance(error, ValueError) and "attention option" in str(error):
            raise DryRunError(_first_line(error)) from error
        raise DryRunError(f"it does not run {how} ({type(error).__name__}: {_first_line(error)})") from error
    return torch.cat(parts), cache_report(cache)


def _apart(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).square().mean().sqrt() / one.std().clamp_min(1e-12))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
