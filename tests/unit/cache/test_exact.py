"""Exact tokens of float32 models are kept in 16 bits that hold them, whatever is done to the cache."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant.cache.build import QuantizedLayer
from turboquant.cache.exact import MANY, RANGES, appended, rounded
from turboquant.methods import parse_method

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
METHOD = "turboquant:bits=4"
LOSS = {HALF: 2**-11 + 2**-13 * 8, BRAIN: 2**-8 + 2**-11 + 2**-13 * 8, SINGLE: 0.0}
"""Of the length of a vector of 64 dims; what is in bfloat16 may have been in float16 before."""


def vectors(sizes: list[list[float]], seed: int = 0) -> torch.Tensor:
    """(1, heads, tokens, 64) from the greatest magnitude of each vector."""
    states = torch.randn(1, len(sizes), len(sizes[0]), 64, generator=torch.Generator().manual_seed(seed))
    return states / states.abs().amax(-1, keepdim=True) * torch.tensor(sizes)[None, :, :, None]


def put(layer: QuantizedLayer, *states: torch.Tensor) -> None:
    layer.update(*states)
    layer.compress()


def error(got: torch.Tensor, true: torch.Tensor) -> float:
    got, true = got.double(), true.double()
    lengths = true.norm(dim=-1)
    return float(((got - true).norm(dim=-1) / lengths.where(lengths > 0, 1)).max())


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((0.0, HALF), (2**-12, HALF), (1.0, HALF), (65504.0, HALF)),
        *((1e-30, BRAIN), (1e-8, BRAIN), (0.99 * 2**-12, BRAIN), (65505.0, BRAIN), (3e38, BRAIN)),
        *((1e-42, SINGLE), (3.4e38, SINGLE), (torch.inf, SINGLE), (torch.nan, SINGLE)),
    ],
)
@pytest.mark.parametrize("heads", [2, MANY])
def test_a_vector_is_kept_in_the_finest_format_that_it_fits(size: float, dtype: torch.dtype, heads: int) -> None:
    states = vectors([[1.0, size, 0.0]] + [[1.0] * 3] * (heads - 1))
    states[0, 0, 1, 0] = size  # the greatest number itself, whatever the others round to
    kept = appended(None, states)
    assert kept.dtype == dtype
    if states.isfinite().all():
        assert error(kept, states) <= LOSS[dtype]
    # Where it comes later, what is held already takes the same format
    later = appended(appended(None, states[:, :, :1]), states[:, :, 1:])
    assert later.dtype == dtype
    assert torch.equal(later[:, :, 0], states[:, :, 0].half().to(dtype))


def test_16_bit_models_keep_their_own_format_and_wider_ones_win() -> None:
    for dtype in (HALF, BRAIN, torch.float64):
        states = 1e-8 * torch.ones(1, 1, 3, 8, dtype=dtype)
        assert torch.equal(appended(appended(None, states), states)[:, :, 3:], states)
    one = torch.ones(1, 1, 1, 8)
    assert appended(one.half(), one.bfloat16()).dtype == SINGLE
    assert appended(one.bfloat16(), one).dtype == BRAIN
    assert appended(one.double(), one).dtype == torch.float64
    assert appended(None, one, rounds=False).dtype == SINGLE
    assert appended(one[:, :, :0].bfloat16(), one).dtype == HALF  # nothing is held
    assert appended(None, one[:, :, :0]).dtype == HALF


SIZES = st.sampled_from([0.0, 1e-40, 1e-8, 1e-4, 3e-4, 1.0, 300.0, 6e4, 7e4, 1e8, 3.39e38])


@given(st.lists(st.lists(SIZES, min_size=2, max_size=2), min_size=1, max_size=6), st.data())
def test_nothing_is_lost_and_calls_do_not_matter(sizes: list[list[float]], data: st.DataObject) -> None:
    """Tiny, huge and mixed heads, in one call or in several."""
    states = vectors([list(head) for head in zip(*sizes, strict=True)])
    calls = data.draw(st.lists(st.integers(0, len(sizes)), max_size=3).map(sorted))
    kept = None
    for start, stop in zip([0, *calls], [*calls, len(sizes)], strict=True):
        kept = appended(kept, states[:, :, start:stop])
    assert kept is not None
    assert error(kept, states) <= LOSS[HALF if kept.dtype == HALF else BRAIN]  # held ones were rounded before
    assert torch.equal((kept == 0).all(-1), (states == 0).all(-1))
    once = appended(None, states)
    assert kept.dtype == once.dtype
    assert error(rounded(states, once[:, :, :0]), states) <= LOSS[once.dtype]
    tops = states.abs().amax(-1)
    fits = [((tops == 0) | ((tops >= low) & (tops <= high))).all() for low, high in RANGES.values()]
    assert kept.dtype == (HALF if fits[0] else BRAIN if fits[1] else SINGLE)


def test_a_token_that_does_not_fit_is_read_and_codes_before_it_stay() -> None:
    layer = QuantizedLayer(parse_method(METHOD), 0)
    usual = torch.randn(1, 2, 150, 64)
    put(layer, usual, usual)
    before = layer.dense()[0]
    put(layer, usual[:, :, :1], 1e6 * usual[:, :, :1])
    assert [states.dtype for states in layer.kept()] == [HALF, BRAIN]
    keys, values = layer.dense()
    assert keys.dtype == values.dtype == SINGLE
    assert torch.equal(keys[:, :, :150], before)
    assert error(values[:, :, 150:], 1e6 * usual[:, :, :1]) <= LOSS[BRAIN]
    for i in range(80):  # it is packed, and the storage stays as it is
        put(layer, usual[:, :, i : i + 1], usual[:, :, i : i + 1])
    assert layer.packed_length == 128
    assert layer.kept()[1].dtype == BRAIN
    layer.reset()
    put(layer, usual, usual)
    assert layer.kept()[1].dtype == HALF


def away_and_back(layer: QuantizedLayer) -> None:
    layer.offload()
    layer.prefetch()


OPERATIONS: dict[str, tuple[Callable[[QuantizedLayer], None], Callable[[torch.Tensor], torch.Tensor]]] = {
    "crop": (lambda layer: layer.crop(-3), lambda x: x[:, :, :-3]),
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), lambda x: x[[1, 1]]),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([1])), lambda x: x[[1]]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
    "offload": (away_and_back, lambda x: x),
    "copy": (lambda layer: vars(layer).update(vars(copy.deepcopy(layer))), lambda x: x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_go_on_with_the_format(name: str) -> None:
    """After a later token has turned the values to bfloat16: what is held stays bit for bit, and grows on."""
    layer = QuantizedLayer(parse_method(METHOD), 0)
    usual = torch.randn(2, 2, 150, 64)
    put(layer, usual, usual)
    put(layer, usual[:, :, :5], 1e6 * usual[:, :, :5])
    do, expect = OPERATIONS[name]
    before = [expect(states) for states in layer.dense()]
    do(layer)
    assert [states.dtype for states in layer.kept()] == [HALF, BRAIN]
    assert all(torch.equal(*pair) for pair in zip(layer.dense(), before, strict=True))
    more = torch.randn(layer.batch_size, 2, 7, 64)
    put(layer, more, 1e-9 * more)
    keys, values = layer.dense()
    assert torch.equal(keys[:, :, : before[0].shape[2]], before[0])
    assert error(values[:, :, -7:], 1e-9 * more) <= LOSS[BRAIN]


def test_a_crop_into_a_group_unpacks_into_the_format() -> None:
    layer = QuantizedLayer(parse_method(METHOD), 0)
    huge = 1e6 * torch.randn(1, 2, 300, 64)
    put(layer, huge, huge)
    before = layer.dense()
    for kept in (130, 40):  # into a group, and to where no group is left
        layer.crop(kept - layer.get_seq_length())
        assert [states.dtype for states in layer.kept()] == [BRAIN, BRAIN]
        for states, was in zip(layer.dense(), before, strict=True):
            assert error(states, was[:, :, :kept]) <= LOSS[BRAIN]


def test_a_first_call_is_read_as_the_model_made_it_and_takes_two_bytes_a_value() -> None:
    layer = QuantizedLayer(parse_method(METHOD), 0)
    calls = [torch.randn(1, 2, count, 64) for count in (150, 1, 30)]
    for i, states in enumerate(calls):
        given, _ = layer.update(states, states)
        assert given.own == (states, states)
        assert (given.added == layer.get_seq_length()) == (i == 0)
        layer.compress()
        keys, values = layer.exact()
        assert keys.dtype == SINGLE
        assert torch.equal(keys, values)
        assert torch.equal(keys[:, :, -1:], states[:, :, -1:].half().float())
        storages = [states.untyped_storage().nbytes() for states in (layer.exact_keys, layer.exact_values)]
        assert sum(storages) == 2 * 2 * 2 * 64 * layer.exact_length


def test_room_is_given_in_the_dtype_of_the_model() -> None:
    """While steps are replayed states are written as they come; the next call after them rounds again."""
    layer = QuantizedLayer(parse_method(METHOD), 0)
    put(layer, torch.randn(1, 2, 150, 64), torch.randn(1, 2, 150, 64))
    before = layer.exact()
    layer.reserve(300)
    assert layer.exact_keys.dtype == SINGLE
    assert layer.exact_keys.shape[2] == 4 + 64 + 64
    assert all(torch.equal(*pair) for pair in zip(before, layer.exact(), strict=True))
    tiny = 1e-8 * torch.randn(1, 2, 1, 64)
    layer.lengths = torch.tensor([layer.packed_length, layer.exact_length], dtype=torch.int32)
    layer.update(tiny, tiny)
    layer.exact_length += 1
    layer.lengths = None
    put(layer, before[0][:, :, :1], before[0][:, :, :1])
    assert [states.dtype for states in layer.kept()] == [BRAIN, BRAIN]
    assert error(layer.exact()[0][:, :, -2:-1], tiny) <= LOSS[BRAIN]
