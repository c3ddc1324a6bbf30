"""A dry run: does a model say the same when its keys and values go through the packed cache as by its own attention?

Nothing else can be asked that cannot lie: flags of transformers name what its classes promise, not what they do. Two
short calls, without any rounding, are held against the model's own attention over Hugging Face's own cache. What is
wrong then is no quantization error.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from turboquant import hf_attention
from turboquant.cache.build import build_cache, cache_report
from turboquant.cache.kinds import takes_our_attention
from turboquant.hf_attention.steps import capture_steps
from turboquant.methods import METHODS, Method
from turboquant.quant.quantizer import PackedTensor, Quantizer
from turboquant.records.comparison import CacheReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE, ONE_BY_ONE = (6, 3), (6, 1, 1, 1)
"""Tokens of the first call and of those that read the first ones from the cache."""
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
    rounds_exact: ClassVar[bool] = False
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
        one_by_one: Must it be given one token a call behind a filled cache? With several, transformers itself computes
            something else (Jamba, Bamba, Zamba). `generate()` does so, the lab too; code of your own has to.
    """

    layers: int
    compressed_layers: int
    error: float
    one_by_one: bool = False


_SINGLY: "WeakSet[PreTrainedModel]" = WeakSet()


def attach(model: "PreTrainedModel") -> DryRun:
    """Prepare a model of your own: set the attention function "turboquant", and check that the model says the same.

    After it `build_cache(model.config, method)` gives caches for its `generate()` and forward calls. Costs seven
    forward calls of nine tokens at most.

    Args:
        model: A causal language model of transformers, or an image-text model that answers text.

    Returns:
        How many of its layers are compressed, how far its logits moved, and whether it takes tokens one by one.

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
        if takes_our_attention(type(model.config)):
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
    with _no_earlier_answer(model):
        return _dry_run(model)


@contextmanager
def _no_earlier_answer(model: "PreTrainedModel") -> Iterator[None]:
    """Hide what Qwen-VL and its like remember of their last answer: where its positions stand behind its images."""
    kept = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    try:
        for module, _ in kept:
            module.rope_deltas = None  # type: ignore[assignment]
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


def _dry_run(model: "PreTrainedModel") -> DryRun:
    ids = _tokens(model)
    if model.config.get_text_config(decoder=True)._attn_implementation == "turboquant":  # it cannot be its own witness
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    own, pieces = _own_logits(model, ids)
    limit = LIMITS.get(own.dtype, OTHER_LIMIT)
    hf_attention.register()
    if takes_our_attention(type(model.config)):
        _set_attention(model)
    full, _ = _logits(model, ids, METHODS["full"](), "with the attention function turboquant", pieces)
    packed, report = _logits(model, ids, Lossless(), "with packed keys and values", pieces)
    if not report.compressed_layers:
        raise DryRunError("none of its layers keeps keys and values of all tokens")
    if not report.compressed_tokens:
        raise DryRunError("its layers do not hand keys and values over as they came")
    apart = max(_apart(own, full), _apart(own, packed))
    if not apart <= limit:
        raise DryRunError(
            f"it says something else than by its own attention (logits differ by {apart:.2g} standard deviations, "
            f"at most {limit:g} would be rounding)"
        )
    _SINGLY.discard(model)
    if pieces == ONE_BY_ONE:
        _SINGLY.add(model)
    capture_steps(model)
    return DryRun(report.layers, report.compressed_layers, apart, pieces == ONE_BY_ONE)


def feeds_singly(model: "PreTrainedModel") -> bool:
    """Whether a dry run found that a model must be given one token at a time behind a filled cache."""
    return model in _SINGLY


def _own_logits(model: "PreTrainedModel", ids: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Return a model's own logits, and in which pieces it computes the same as in one call."""
    whole, first = model(ids).logits[0], AT_ONCE[0]
    limit = LIMITS.get(whole.dtype, OTHER_LIMIT)
    own, report = _logits(model, ids, METHODS["full"](), "by its own attention", AT_ONCE)
    if report.tokens < ids.shape[1]:
        raise DryRunError("it does not use the cache of keys and values that it is given")
    apart = _apart(whole, own)
    # What recurrent layers get wrong with several tokens is less than what 16 bits may round, so both are looked at.
    if apart <= limit and not (report.state_bytes and limit == OTHER_LIMIT):
        return own, AT_ONCE
    if _apart(whole[:first], own[:first]) > limit:
        raise DryRunError("it reads a prompt both ways, as encoders do: what it says of a token depends on later ones")
    singly, _ = _logits(model, ids, METHODS["full"](), "by its own attention", ONE_BY_ONE)
    if apart <= min(limit, 2 * _apart(whole, singly)):
        return own, AT_ONCE
    if _apart(whole, singly) <= limit:
        return singly, ONE_BY_ONE
    raise DryRunError(
        "transformers itself computes something else for tokens behind a filled cache than for all of them in one "
        f"call (logits differ by {apart:.2g} standard deviations)"
    )


def _set_attention(model: "PreTrainedModel") -> None:
    try:
        model.set_attn_implementation("turboquant")
    except (ValueError, TypeError, AttributeError) as error:
        raise DryRunError(f"its attention function cannot be replaced ({_first_line(error)})") from error
    if model.config.get_text_config(decoder=True)._attn_implementation != "turboquant":
        raise DryRunError("its attention function cannot be replaced")


def _tokens(model: "PreTrainedModel") -> Tensor:
    """Some tokens of the model's vocabulary, spread over it; the same every time."""
    size, count = int(model.config.get_text_config(decoder=True).vocab_size), sum(AT_ONCE)
    places = torch.arange(1, count + 1, device=model.device)
    return (places * (size // (count + 2)) % size)[None]


def _logits(
    model: "PreTrainedModel", ids: Tensor, method: Method, how: str, pieces: Sequence[int]
) -> tuple[Tensor, CacheReport]:
    cache = build_cache(model.config, method)
    try:
        parts = [model(part, past_key_values=cache).logits[0] for part in ids.split(tuple(pieces), dim=1)]
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
