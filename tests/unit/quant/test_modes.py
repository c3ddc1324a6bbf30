"""What a cache keeps and the tables it shares do not depend on what the caller has switched on."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import pytest
import torch
from transformers import cache_utils

from tests.support.models import tokens
from turboquant.cache.build import build_cache, cache_report, layer_states
from turboquant.methods import METHODS, parse_method
from turboquant.models.load import tiny_model
from turboquant.quant.modes import plain, shared_table

PROMPT, STEPS = 110, 2


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Also fills new memory with NaN, so that nothing may read what it did not write."""
    # On a GPU cuBLAS asks for a setting of its own, which must be there when the process starts.
    torch.use_deterministic_algorithms(
        True, warn_only=torch.cuda.is_available() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def several() -> Iterator[None]:
    with ExitStack() as stack:
        for mode in ("inference", "autocast", "default bfloat16", "default device", "deterministic"):
            stack.enter_context(MODES[mode]())
        yield


MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "none": nullcontext,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "several": several,
}
# How much the logits and the states held may differ after autocast, which rounds what goes into the cache.
SPECS = {
    "turboquant:bits=8,residual_length=16": 0.1,
    "turboquant:bits=8,group_size=0,residual_length=16": 0.1,
    "turboquant-paper:bits=8": 0.2,
    "rtn:bits=8,rotation=hadamard": 0.1,
    "kivi:bits=8,residual_length=16": 0.1,
    "polarquant:bits=8": 0.1,
    "qjl:residual_length=16": 1.0,  # signs flip
    "hf-quanto:residual_length=16": 0.2,
    "hf-hqq:bits=8,residual_length=16": 0.1,
    "hf-fp8": 0.2,
}
WITHOUT_FP8 = not hasattr(cache_utils, "Fp8QuantizedLayer")


def test_every_method_is_tested_here() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == METHODS.keys() - {"full"}


def forget_tables() -> None:
    """Empty every table that the library keeps, so that the next call makes them in its own modes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("turboquant"):
            for thing in list(vars(module).values()):
                if isinstance(thing, functools._lru_cache_wrapper) and hasattr(thing.__wrapped__, "__wrapped__"):
                    thing.cache_clear()  # made by `shared_table`


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=2, vocab_size=256)


def run(model, spec: str, prefill: str, decode: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Fill a cache in one mode, go on in another; the last logits, and what the cache then holds."""
    ids = tokens(1, PROMPT + STEPS).to(model.device)
    cache = build_cache(model.config, parse_method(spec))
    with MODES[prefill]():
        model(ids[:, :PROMPT], past_key_values=cache)
    with MODES[decode]():
        for place in range(PROMPT, PROMPT + STEPS):
            logits = model(ids[:, place : place + 1], past_key_values=cache).logits
    assert spec == "full" or cache_report(cache).compressed_tokens
    held = [state.clone() for index in range(2) for state in layer_states(cache, index)]
    return logits.clone(), held


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("hf-")])
def test_every_method_in_every_mode_on_a_gpu(spec: str) -> None:
    """As below, with the kernels: what the modes change is held against bfloat16's own rounding."""
    model = tiny_model("llama", num_hidden_layers=2).to("cuda", torch.bfloat16)
    expected, _ = run(model, spec, "none", "none")
    for prefill in MODES:
        forget_tables()
        for decode in MODES:
            logits, _ = run(model, spec, prefill, decode)
            assert (logits.float() - expected).abs().max() <= SPECS[spec] * expected.abs().max(), (prefill, decode)
        again, _ = run(model, spec, "none", "none")
        assert torch.equal(again, expected), prefill


@pytest.mark.parametrize("spec", SPECS)
def test_every_method_in_every_mode(model, spec: str) -> None:
    """Prefill in one mode and decode in another; the tables are made in the first of them.

    All pairs for the first method; for others a mode with itself, with none and with several, which has all that apply.
    """
    if spec == "hf-fp8" and WITHOUT_FP8:
        pytest.skip("transformers has no fp8 cache yet")
    expected, held = run(model, spec, "none", "none")
    for prefill in MODES:
        forget_tables()
        for decode in MODES if spec == next(iter(SPECS)) else dict.fromkeys((prefill, "none", "several")):
            logits, own = run(model, spec, prefill, decode)
            bound = SPECS[spec] if {"autocast", "several"} & {prefill, decode} else 1e-4
            assert (logits.float() - expected).abs().max() <= bound * expected.abs().max(), (prefill, decode)
            for mine, its in zip(own, held, strict=True):
                assert (mine.float() - its).norm() <= bound * its.norm(), (prefill, decode)
        again, _ = run(model, spec, "none", "none")  # with the tables that were made in that mode
        assert torch.equal(again, expected), prefill


@pytest.mark.parametrize("spec", ["turboquant:bits=4,residual_length=16", "kivi:residual_length=16", "hf-quanto"])
def test_operations_of_a_cache_in_inference_mode_leave_it_usable(model, spec: str) -> None:
    cache = build_cache(model.config, parse_method(spec))
    with torch.inference_mode():
        model(tokens(2, 150), past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.crop(-3)
    for _ in range(70):
        model(tokens(2, 1), past_key_values=cache)
    cache.crop(-60)
    model(tokens(2, 90), past_key_values=cache)
    assert cache.get_seq_length() == 150 - 3 + 70 - 60 + 90


def test_a_wider_dtype_is_kept_as_hugging_face_keeps_it(model) -> None:
    """A prompt read under autocast is 16 bits; what comes later without it is not cut to that."""
    cache = build_cache(model.config, parse_method("turboquant:bits=8,residual_length=64"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(1, 40), past_key_values=cache)
    assert cache.layers[0].exact()[1].dtype == torch.bfloat16
    model(tokens(1, 1), past_key_values=cache)
    _, values = cache.layers[0].exact()
    assert values.dtype == torch.float32
    assert not torch.equal(values[:, :, -1], values[:, :, -1].bfloat16().float())


def test_plain_switches_off_what_is_on_and_puts_it_back() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with plain():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert (product.dtype, product.is_inference()) == (torch.float32, False)
            assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    with torch.enable_grad(), plain():
        assert not torch.is_grad_enabled()


def test_a_shared_table_is_made_once_for_equal_arguments() -> None:
    made = []

    @shared_table(maxsize=4)
    def table(size: int) -> torch.Tensor:
        made.append(size)
        return torch.eye(size)

    with torch.inference_mode():
        first = table(3)
    assert table(3) is first
    assert made == [3]
    assert not first.is_inference()
