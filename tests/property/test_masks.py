"""Any attention mask: what one query does not see is no padding, and reads back as well as any other token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.support.models import Lossless, tokens
from turboquant import hf_attention
from turboquant.cache.build import build_cache, cache_report, fill_cache, layer_states
from turboquant.hf_attention import _visible, attend, attention_forward
from turboquant.kernels import backend
from turboquant.methods import parse_method
from turboquant.models.load import tiny_model

FIRST, LAST = 160, 6
WINDOW = "residual_length=16,sink_length=2"
# The largest error of a key, relative to the usual length of its head's keys, and of the next call's logits.
METHODS = {
    f"turboquant:bits=8,{WINDOW}": (0.04, 0.05),
    f"turboquant:bits=8,group_size=0,{WINDOW}": (0.04, 0.05),
    f"turboquant-paper:bits=8,{WINDOW}": (0.08, 0.1),
    f"rtn:bits=8,{WINDOW}": (0.04, 0.05),
    f"kivi:bits=8,{WINDOW}": (0.04, 0.05),
    f"polarquant:bits=8,{WINDOW}": (0.08, 0.1),
    f"qjl:key_bits=8,value_bits=8,{WINDOW}": (0.8, 1.0),
}


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """A random causal 4D mask of the first call: blocks, hidden prefixes, holes, of one or several rows and heads."""
    rows, heads = draw(st.integers(1, 2)), draw(st.sampled_from([1, 4]))
    see = torch.ones(rows, heads, FIRST, FIRST, dtype=torch.bool)
    for row, head in [(r, h) for r in range(rows) for h in range(heads)]:
        kind = draw(st.sampled_from(["documents", "hidden prefix", "tree", "holes"]))
        cut, other = sorted(draw(st.tuples(st.integers(1, FIRST - 1), st.integers(1, FIRST - 1))))
        part = see[row, head]
        if kind == "documents":  # each is read for itself
            part[cut:, :cut] = part[other:, :other] = False
        elif kind == "hidden prefix":  # nobody sees it in this call, not even itself
            part[:, :cut] = False
        elif kind == "tree":  # two branches behind one trunk
            part[other:, cut:other] = False
        else:
            part &= torch.rand(FIRST, FIRST, generator=torch.Generator().manual_seed(cut)) < other / FIRST
    return see.tril()


def added(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same mask as numbers that are added to scores."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def read(model, cache, first: torch.Tensor, additive: bool) -> torch.Tensor:
    """Read a context under `first`, then some tokens that see all of it; the logits of those."""
    rows, shape = first.shape[0], added if additive else lambda mask: mask
    later = torch.ones(rows, 1, LAST, FIRST + LAST, dtype=torch.bool)
    later[..., FIRST:] = torch.ones(LAST, LAST, dtype=torch.bool).tril()
    model(tokens(rows, FIRST), attention_mask=shape(first), past_key_values=cache)
    return model(tokens(rows, LAST, seed=1), attention_mask=shape(later), past_key_values=cache).logits


@pytest.mark.parametrize("spec", METHODS)
@given(first=masks(), additive=st.booleans())
@settings(max_examples=10 if settings.default.max_examples < 100 else 200)
def test_tokens_that_some_queries_do_not_see_are_kept(model, spec: str, first: torch.Tensor, additive: bool) -> None:
    full, packed = DynamicCache(config=model.config), build_cache(model.config, parse_method(spec))
    expected, actual = read(model, full, first, additive), read(model, packed, first, additive)
    assert cache_report(packed).compressed_tokens >= 96
    key_error, logit_error = METHODS[spec]
    # In the first layer both sides computed the same keys; deeper ones start from the other's answers to the mask.
    for own, its in zip(layer_states(packed, 0), layer_states(full, 0), strict=True):
        usual = its.norm(dim=-1, keepdim=True).median(dim=2, keepdim=True).values
        assert ((own - its).norm(dim=-1, keepdim=True) / usual).max() < key_error
    assert (actual - expected).abs().max() < logit_error * expected.abs().max()


@given(first=masks(), additive=st.booleans())
def test_masks_are_followed_exactly_where_packing_loses_nothing(model, first: torch.Tensor, additive: bool) -> None:
    caches = DynamicCache(config=model.config), build_cache(model.config, Lossless())
    expected, actual = (read(model, cache, first, additive) for cache in caches)
    assert cache_report(caches[1]).compressed_tokens >= 96
    assert torch.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("spec", METHODS)
def test_what_a_2d_mask_hid_can_be_shown_later(model, spec: str) -> None:
    """A prefix that the 2D mask calls padding in the first call, and real in the second."""
    ids, visible = tokens(2, FIRST), torch.ones(2, FIRST, dtype=torch.long)
    visible[:, :70] = 0
    logits = []
    for cache in (DynamicCache(config=model.config), build_cache(model.config, parse_method(spec))):
        model(ids, attention_mask=visible, past_key_values=cache)
        logits.append(model(tokens(2, LAST, seed=1), past_key_values=cache).logits)
    # Pads have no say in a group's range, so those that share a group with real tokens may be cut off at it.
    assert (logits[1] - logits[0]).abs().max() < 4 * METHODS[spec][1] * logits[0].abs().max()


def test_sinks_stand_behind_the_pads_of_a_4d_mask_too(model) -> None:
    """The mask of a left-padded batch, made by hand in 4D, keeps the same sinks as the 2D one."""
    ids, real = tokens(2, FIRST), torch.ones(2, FIRST, dtype=torch.long)
    real[0, :40] = 0
    by_hand = torch.ones(FIRST, FIRST, dtype=torch.bool).tril() & real[:, None, None].bool()
    layers = []
    for mask in (real, by_hand, added(by_hand)):
        cache = build_cache(model.config, parse_method("turboquant:bits=4"))
        model(ids, attention_mask=mask, position_ids=torch.arange(FIRST)[None], past_key_values=cache)
        layers.append(cache.layers[0])
    for other in layers[1:]:
        assert other.padding.tolist() == layers[0].padding.tolist() == [40, 0]
        assert all(torch.equal(*pair) for pair in zip(other.exact(), layers[0].exact(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_masks_hide_in_every_dtype(dtype: torch.dtype) -> None:
    see = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    see[..., :2] = False
    assert _visible(added(see, dtype))[0].tolist() == [[False, False, True, True, True]]


def test_a_mask_that_says_nothing_but_causality_is_left_out(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks behind a filled cache come with a mask; where no row is padded, kernels need none of it."""
    masks = []

    def noting(*args, **kwargs):
        masks.append(args[5])
        return attend(*args, **kwargs)

    monkeypatch.setattr(hf_attention, "attend", noting)
    padded = torch.ones(2, FIRST + LAST, dtype=torch.long)
    padded[0, :30] = 0
    expected = {}
    for name, mask in (("none", None), ("ones", torch.ones_like(padded)), ("padded", padded)):
        cache = build_cache(model.config, Lossless())
        first = None if mask is None else mask[:, :FIRST]
        model(tokens(2, FIRST), attention_mask=first, past_key_values=cache)
        expected[name] = model(tokens(2, LAST, seed=1), attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(expected["none"], expected["ones"])
    assert [mask is None for mask in masks] == [True] * 6 + [False] * 3  # three layers each


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("hidden", [(30, 0), (30, 20), (0, 0)], ids=str)
@pytest.mark.parametrize("later", ["the same", "all shown", "more hidden"])
@pytest.mark.parametrize("count", [1, LAST])
def test_kernels_follow_2d_masks_that_change(hidden, later: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they read of pads is what the present mask says, not what it said when the prompt was packed."""
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    first = torch.ones(2, FIRST + count, dtype=torch.long, device="cuda")
    for row, pads in enumerate(hidden):
        first[row, :pads] = 0
    second = torch.ones_like(first) if later == "all shown" else first.clone()
    if later == "more hidden":
        second[:, :50] = 0
    logits = []
    for failed in (set(), {"attention", "prefill", "encode"}):
        monkeypatch.setattr(backend, "_failed", failed)
        cache = build_cache(model.config, parse_method(f"turboquant:bits=4,{WINDOW}"))
        model(tokens(2, FIRST).cuda(), attention_mask=first[:, :FIRST], past_key_values=cache)
        logits.append(model(tokens(2, count, seed=1).cuda(), attention_mask=second, past_key_values=cache).logits)
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[1].abs().max()


@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_tokens_seen_by_earlier_calls_are_no_padding(model, sizes: list[int], seed: int) -> None:
    """Several calls before the first packing, each of which sees random parts of what the earlier ones brought."""
    generator = torch.Generator().manual_seed(seed)
    caches = DynamicCache(config=model.config), build_cache(model.config, Lossless(residual_length=150))
    total = 0
    for number, size in enumerate([*sizes, 200]):
        see = torch.ones(1, 1, size, total + size, dtype=torch.bool)
        see[..., :total] = torch.rand(size, total, generator=generator) < 0.3
        see[..., total:] = torch.ones(size, size, dtype=torch.bool).tril()
        ids = tokens(1, size, seed=number)
        expected, actual = (model(ids, attention_mask=see, past_key_values=cache).logits for cache in caches)
        total += size
        assert torch.allclose(actual, expected, atol=1e-4)
    layer = caches[1].layers[0]
    assert layer.packed_length > 0
    assert layer.padding is None


def test_queries_that_are_not_causal_see_everything(model) -> None:
    """Without a mask, attention that is not causal shows every token to every query, packed or not."""
    keys, values = torch.randn(2, 1, 2, 200, 64)
    query = torch.randn(1, 4, 5, 64)
    attention = model.model.layers[0].self_attn
    cache = build_cache(model.config, Lossless())
    fill_cache(cache, 0, keys[:, :, :195], values[:, :, :195])
    states, _ = cache.layers[0].update(keys[:, :, 195:], values[:, :, 195:])
    actual, _ = attention_forward(attention, query, states, states, None, is_causal=False)
    every = torch.ones(1, 1, 5, 200, dtype=torch.bool)
    expected, _ = attention_forward(attention, query, keys, values, every)
    assert torch.allclose(actual, expected, atol=1e-5)
