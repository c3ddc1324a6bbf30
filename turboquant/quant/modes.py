"""Work that does not depend on what the caller has switched on, and gradients that end at the cache.

A cache outlives the call that fills it, and a table outlives the cache. So neither may follow the modes of the moment:
in inference mode torch makes tensors that nothing may write to afterwards, and autocast rounds matrix products to 16
bits. (The default dtype and the default device belong to the whole process: tensors are made with both named.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

P = ParamSpec("P")
T = TypeVar("T")
DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
_NOTHING = nullcontext()


def plain() -> AbstractContextManager[None]:
    """Return a context without inference mode, gradients and autocast; what is off already costs nothing."""
    # Asked in every layer and step, so the usual case, nothing to switch off, enters no context at all.
    cast = [kind for kind in DEVICE_TYPES if torch.is_autocast_enabled(kind)]
    if cast or torch.is_inference_mode_enabled() or torch.is_grad_enabled():
        return _switched_off(cast)
    return _NOTHING


@contextmanager
def _switched_off(cast: Sequence[str]) -> Iterator[None]:
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))  # switches gradients on, so it comes before they go off
        modes.enter_context(torch.no_grad())
        for kind in cast:
            modes.enter_context(torch.autocast(kind, enabled=False))
        yield


def in_plain_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function run in `plain` modes."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with plain():
            return function(*args, **kwargs)

    return run


def shared_table(maxsize: int) -> "Callable[[Callable[..., T]], _lru_cache_wrapper[T]]":
    """Make a function keep what it returned for equal arguments, made in `plain` modes: `lru_cache` for tables."""

    def decorate(make: Callable[..., T]) -> "_lru_cache_wrapper[T]":
        return lru_cache(maxsize=maxsize)(in_plain_modes(make))

    return decorate


def gradients_wanted(*sources: Tensor) -> bool:
    """Return whether autograd follows what is made from one of these tensors."""
    return torch.is_grad_enabled() and any(source.requires_grad for source in sources)


class _NoGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *sources: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise RuntimeError(
            "no gradients flow through the tokens that a compressed cache took in earlier calls: train on all tokens "
            "in one call with an empty cache, or with the method full"
        )


def without_gradients(output: Tensor, *sources: Tensor) -> Tensor:
    """Return `output`; where gradients are wanted of what it was made from, their way back is refused when it is taken.

    So a call in a training loop fails in one sentence, and a call without `torch.no_grad()` that nobody trains on runs.
    """
    if not gradients_wanted(*sources):
        return output
    refusing: Tensor = _NoGradients.apply(output, *sources)
    return refusing
