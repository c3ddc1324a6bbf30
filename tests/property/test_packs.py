"""What a method says is packed, against caches that were really filled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import HF_FP8, Lossless
from turboquant.cache.build import build_cache, cache_report, fill_cache
from turboquant.methods import Method, parse_method

OWN = (
    "full",
    "turboquant:bits=4",
    "turboquant:bits=2,residual_length=8,group_size=32",
    "turboquant-paper:bits=3",
    "kivi:bits=2,residual_length=32",
    "rtn:bits=4,residual_length=20,sink_length=5",
    "polarquant:bits=4",
    "qjl:bits=2,residual_length=16",
)
FOREIGN = ("hf-quanto:residual_length=32", "hf-hqq:residual_length=8", HF_FP8)


def packed(model, method: Method, calls: list[int]) -> int:
    """Tokens that are packed once each call has stored so many."""
    cache = build_cache(model.config, method)
    for count in calls:
        fill_cache(cache, 0, *torch.randn(2, 1, 2, count, 64, generator=torch.Generator().manual_seed(count)))
    return cache_report(cache).compressed_tokens


CALLS = st.lists(st.integers(1, 90), min_size=1, max_size=4)


@pytest.mark.parametrize("method", [*map(parse_method, OWN), Lossless()], ids=str)
@given(calls=CALLS)
def test_packed_length_and_packs_are_those_of_a_filled_cache(llama, method: Method, calls: list[int]) -> None:
    found = packed(llama, method, calls)
    assert found == method.packed_length(sum(calls))
    assert method.packs(sum(calls)) is (found > 0)


@pytest.mark.parametrize("spec", FOREIGN)
@given(calls=CALLS)
def test_layers_of_other_libraries_pack_the_first_call(llama, spec: str, calls: list[int]) -> None:
    method = parse_method(spec)
    try:
        found = packed(llama, method, calls)
    except ImportError as error:
        pytest.skip(str(error))
    assert calls[0] <= found <= method.packed_length(sum(calls))
    assert method.packs(sum(calls))


@pytest.mark.parametrize("method", [*map(parse_method, OWN), Lossless()], ids=str)
def test_it_begins_at_one_number_of_tokens(llama, method: Method) -> None:
    says = [method.packs(count) for count in range(400)]
    assert says == sorted(says)
    if not method.compresses:
        assert not any(says)
        return
    least = says.index(True)
    assert packed(llama, method, [least - 1] if least > 1 else []) == 0
    assert packed(llama, method, [least]) > 0
