"""A machine that does anything to a cache, in any order, beside a model that knows what the cache must then hold.

The model keeps every state densely and applies the contract: which tokens are packed after a call, which of them a crop
takes back, and that nothing else ever changes. So after each step every token is either just what it was, or has been
packed in this step and is within one quantization error of what it was, or is exact from this step on and is rounded to
16 bits. Attention is checked on the way: it must be what plain attention over the model's states gives.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

from tests.support.models import reachable_storages
from turboquant.cache.buffer import round_up
from turboquant.cache.build import build_cache, cache_report
from turboquant.hf_attention import attention_forward
from turboquant.methods import Method, parse_method
from turboquant.models.tiny import tiny_config

LAYERS, KV_HEADS, GROUPS = 2, 2, 2
MAX_TOKENS, MAX_ROWS = 420, 6

# The largest error of one key and of one value, relative to its length: 1.6 times the largest among 32,000 vectors like
# those made here.
OWN: dict[str, tuple[float, float]] = {
    "turboquant:bits=8,residual_length=8,sink_length=2": (0.02, 0.08),
    "turboquant": (0.14, 0.54),
    "turboquant:bits=3,residual_length=0,sink_length=1": (0.21, 0.67),
    "turboquant:bits=2,residual_length=32,group_size=32": (0.32, 1.06),
    "turboquant:bits=4,layers=0:8+1:3/4": (0.21, 0.54),
    "turboquant:bits=4,center=false,group_size=0": (0.38, 0.45),
    "turboquant:bits=4,qjl=orthogonal": (0.17, 0.45),
    "turboquant-paper:bits=4": (0.74, 0.56),
    "turboquant-paper:bits=8,sink_length=3": (0.08, 0.14),
    "rtn": (0.22, 0.28),
    "rtn:bits=8,rotation=hadamard,residual_length=40": (0.015, 0.018),
    "kivi:residual_length=32": (0.08, 0.21),
    "kivi:bits=8,residual_length=0,group_size=64": (0.01, 0.02),
    "polarquant": (0.51, 0.58),
    "polarquant:bits=8,residual_length=8": (0.08, 0.13),
    "qjl:bits=4,residual_length=16": (0.6, 0.23),
}
FOREIGN: dict[str, tuple[float, float]] = {
    "hf-hqq:bits=8,group_size=16,residual_length=16": (0.02, 0.02),
    "hf-hqq:bits=4,group_size=16,residual_length=0": (0.3, 0.3),
    "hf-quanto:group_size=16,residual_length=24": (0.3, 0.3),
    "hf-fp8": (0.08, 0.08),
}


@dataclass
class Side:
    """What one layer must hold: keys and values (rows, heads, tokens, dim) as attention reads them."""

    keys: Tensor
    values: Tensor

    def map(self, fn: Any) -> None:
        self.keys, self.values = fn(self.keys), fn(self.values)

    def extend(self, new: "Side") -> None:
        self.keys = torch.cat([self.keys, new.keys], dim=2)
        self.values = torch.cat([self.values, new.values], dim=2)


class Expected:
    """The model of a cache of `QuantizedLayer`s: dense states, and how many tokens are packed behind how many sinks."""

    def __init__(self, method: Method, group: int) -> None:
        self.method, self.group = method, group
        self.sides: list[Side] = []
        self.pads = torch.zeros(0, dtype=torch.long)
        self.packed = self.sinks = 0

    @property
    def rows(self) -> int:
        return len(self.pads)

    @property
    def tokens(self) -> int:
        return self.sides[0].keys.shape[2] if self.sides else 0

    @property
    def front(self) -> int:
        """Places behind the sinks that hold pads in some row, up to whole groups."""
        return round_up(int(self.pads.clamp_max(self.tokens).max()), self.group)

    def real(self) -> Tensor:
        """Which places hold a token and no pad, (rows, tokens)."""
        return torch.arange(self.tokens) >= self.pads[:, None]

    def exact(self) -> Tensor:
        """Which places are not packed, (rows, tokens): each row's first real ones and the last ones of all."""
        place, pads = torch.arange(self.tokens), self.pads[:, None]
        window = (place >= self.sinks + self.packed).expand(self.rows, -1)
        return window | ((place >= pads) & (place < pads + self.sinks)) if self.packed else torch.ones_like(window)

    def take(self, new: list[Side]) -> None:
        """Put the states of a call behind those that are held."""
        if not self.sides:
            self.sides = new
            return
        for side, add in zip(self.sides, new, strict=True):
            side.extend(add)

    def extend(self, new: list[Side]) -> Tensor:
        """Take a call; returns which places are packed after it."""
        self.take(new)
        before = self.exact()
        first, block = not self.packed, self.method.block_length
        sinks, front = (self.method.sink_length, self.front) if first else (self.sinks, 0)
        count = (self.tokens - sinks - self.packed - self.method.residual_length - front) // block * block
        if count > 0:
            self.packed, self.sinks = self.packed + count + front, sinks
        return before & ~self.exact()

    def crop(self, count: int) -> Tensor:
        """Remove the last tokens; returns which places are packed by that."""
        kept = self.tokens - count
        if kept <= 0:
            self.sides, self.packed, self.sinks = [], 0, 0
        elif self.packed:
            self.packed = min(self.packed, kept - self.sinks) // self.group * self.group
            if self.packed <= self.front:
                self.packed = self.sinks = 0
        self._cut(kept)
        return torch.zeros_like(self.real())

    def _cut(self, kept: int) -> None:
        for side in self.sides:
            side.map(lambda states: states[:, :, :kept])

    def select(self, rows: Tensor) -> None:
        for side in self.sides:
            side.map(lambda states: states[rows])
        self.pads = self.pads[rows]


class ExpectedForeign(Expected):
    """The model of Hugging Face's layers: no sinks, and a full window sends the whole history through the rounding."""

    def extend(self, new: list[Side]) -> Tensor:
        held, fp8 = self.tokens, self.method.name == "hf-fp8"
        window = held - self.packed + new[0].keys.shape[2]
        self.take(new)
        full = not held or fp8 or window >= self.method.residual_length
        self.packed = self.tokens if full else self.packed
        place = torch.arange(self.tokens).expand(self.rows, -1)
        return (place >= (held if fp8 else 0)) & full

    def crop(self, count: int) -> Tensor:
        kept = max(0, self.tokens - count)
        again = kept < self.packed and self.method.name != "hf-fp8"
        if not kept:
            self.sides = []
        self._cut(kept)
        self.packed = min(self.packed, kept)
        return torch.ones_like(self.real()) & again


class CacheMachine(RuleBasedStateMachine):
    """Sequences of what a model, `generate()` or a person does to a cache of this package's layers."""

    specs: ClassVar[dict[str, tuple[float, float]]] = OWN
    done: ClassVar[Counter[str]] = Counter()

    @initialize(
        data=st.data(),
        dims=st.sampled_from([(64, 64), (64, 32), (80, 80)]),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
        seed=st.integers(0, 2**31 - 1),
    )
    def begin(self, data: st.DataObject, dims: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
        spec = data.draw(st.sampled_from(sorted(self.specs)), "method")
        self.method, self.bounds = parse_method(spec), self.specs[spec]
        self.dims, self.dtype = dims, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.offset = self.random(1, KV_HEADS, 1, dims[0]) * 3
        self.cache: Any = build_cache(tiny_config("llama", num_hidden_layers=LAYERS), self.method)
        self.expected = self.nothing()
        self.module = torch.nn.Module()
        self.module.num_key_value_groups, self.module.is_causal = GROUPS, True  # type: ignore[assignment]

    def nothing(self) -> Expected:
        """The model of an empty cache."""
        quantizers = self.method.quantizers(*self.dims, 0, torch.device("cpu"))
        assert quantizers is not None
        return Expected(self.method, max(quantizer.token_group for quantizer in quantizers))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def states(self, tokens: int) -> Side:
        """New keys, which have an offset for each channel as many models' have, and values."""
        shape = (self.expected.rows, KV_HEADS, tokens)
        keys, values = self.random(*shape, self.dims[0]) + self.offset, self.random(*shape, self.dims[1])
        return Side(keys.to(self.dtype), values.to(self.dtype))

    # --- what happens to a cache

    @precondition(lambda self: not self.expected.tokens)
    @rule(
        pads=st.lists(st.sampled_from([0, 0, 1, 5, 33, 70]), min_size=1, max_size=3),
        tokens=st.one_of(st.integers(1, 100), st.integers(100, 250)),
    )
    def first_call(self, pads: list[int], tokens: int) -> None:
        self.expected.pads = torch.tensor(pads) - min(pads)
        self.call(tokens)

    @precondition(lambda self: 0 < self.expected.tokens < MAX_TOKENS)
    @rule(tokens=st.one_of(st.integers(1, 3), st.integers(1, 90)))
    def next_call(self, tokens: int) -> None:
        self.call(tokens)

    @precondition(lambda self: 0 < self.expected.tokens < MAX_TOKENS)
    @rule(steps=st.integers(2, 40))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.call(1)

    @precondition(lambda self: self.expected.tokens)
    @rule(tokens=st.one_of(st.integers(1, 8), st.integers(1, 70), st.integers(1, 200)))
    def crop(self, tokens: int) -> None:
        self.done["crops into packed tokens"] += 0 < self.expected.tokens - tokens < self.expected.packed
        before = self.expected.exact()
        self.cache.crop(-tokens)
        packed = self.expected.crop(tokens)
        self.check(packed, self.expected.exact() & ~before[:, : self.expected.tokens])

    @precondition(lambda self: self.expected.tokens)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        count = self.expected.rows
        rows = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count), "rows"))
        self.cache.reorder_cache(rows)
        self.selected(rows)

    @precondition(lambda self: self.expected.tokens)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = torch.tensor(data.draw(st.lists(st.integers(0, self.expected.rows - 1), min_size=1, max_size=4), "rows"))
        self.cache.batch_select_indices(rows)
        self.selected(rows)

    @precondition(lambda self: self.expected.tokens and self.expected.rows * 2 <= MAX_ROWS)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats: int) -> None:
        repeats = min(repeats, MAX_ROWS // self.expected.rows)
        self.cache.batch_repeat_interleave(repeats)
        self.selected(torch.arange(self.expected.rows).repeat_interleave(repeats))

    def selected(self, rows: Tensor) -> None:
        self.expected.select(rows)
        self.unchanged()

    @rule()
    def offload_and_prefetch(self) -> None:
        for layer in self.cache.layers:
            layer.offload()
        for layer in self.cache.layers:
            layer.prefetch()
        self.unchanged()

    @rule(tokens=st.integers(1, 80))
    def go_on_with_a_copy(self, tokens: int) -> None:
        """The first one goes other ways: none of them may reach the copy."""
        first, self.cache = self.cache, copy.deepcopy(self.cache)
        if self.expected.tokens > 1:
            first.crop(-(self.expected.tokens // 2))
            for index in range(LAYERS):
                new = self.states(tokens)
                first.update(new.keys, new.values, index)
                getattr(first.layers[index], "compress", lambda visible: None)(None)
        self.unchanged()
        first.reset()
        self.unchanged()

    @precondition(lambda self: self.expected.tokens > MAX_TOKENS // 2)
    @rule(by_crop=st.booleans())
    def start_again(self, by_crop: bool) -> None:
        if by_crop:
            self.cache.crop(-self.expected.tokens - 5)
        else:
            self.cache.reset()
        self.expected = self.nothing()
        self.unchanged()

    # --- what must be so

    def call(self, tokens: int) -> None:
        """One forward call of all layers, as the attention function sees it."""
        self.done["calls"] += 1
        new = [self.states(tokens) for _ in range(LAYERS)]
        query = self.random(self.expected.rows, KV_HEADS * GROUPS, tokens, self.dims[0]).to(self.dtype)
        packed = self.expected.extend([copy.copy(side) for side in new])
        mask = self.mask(tokens)
        for index, (add, side) in enumerate(zip(new, self.expected.sides, strict=True)):
            self.attend(self.cache.update(add.keys, add.values, index), side, query, mask)
        place = torch.arange(self.expected.tokens)
        self.check(packed, place >= place[-tokens])

    def attend(self, states: Any, side: Side, query: Tensor, mask: Tensor | None) -> None:
        keys, values = states
        got, _ = attention_forward(self.module, query, keys, values, mask, scaling=self.dims[0] ** -0.5)
        wanted, seen = self.plain_attention(side, query), self.expected.real()[:, -query.shape[2] :, None, None]
        error = float(((got.float() - wanted) * seen).abs().max())
        assert error < (0.05 if self.dtype == torch.bfloat16 else 0.005), f"attention is off by {error}"

    def mask(self, tokens: int) -> Tensor | None:
        """What Hugging Face's SDPA mask would be: none where plain causality or one query needs none."""
        expected = self.expected
        if not expected.pads.any() and tokens in (1, expected.tokens):
            return None
        place = torch.arange(expected.tokens)
        causal = place <= place[-tokens:, None]
        return (causal & expected.real()[:, None])[:, None]

    def plain_attention(self, side: Side, query: Tensor) -> Tensor:
        place = torch.arange(self.expected.tokens)
        hidden = ~((place <= place[-query.shape[2] :, None]) & self.expected.real()[:, None])[:, None]
        scores = query.float() @ repeat_kv(side.keys.float(), GROUPS).mT * self.dims[0] ** -0.5
        weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
        return (weights @ repeat_kv(side.values.float(), GROUPS)).transpose(1, 2)

    def unchanged(self) -> None:
        nothing = torch.zeros_like(self.expected.real())
        self.check(nothing, nothing)

    def check(self, packed: Tensor, rounded: Tensor) -> None:
        """Tokens packed in this step are within an error of what they were, all others are what they were.

        Those that are exact from this step on are within the error of float16.
        """
        expected, rounding = self.expected, 1e-5 if self.method.foreign else 2**-11
        assert self.cache.get_seq_length() == expected.tokens
        for layer, side in zip(self.cache.layers, expected.sides, strict=bool(expected.sides)):
            assert layer.packed_length == expected.packed
            for name, got, bound in zip(("keys", "values"), layer.dense(), self.bounds, strict=True):
                was = getattr(side, name)
                assert (got.shape, got.dtype) == (was.shape, was.dtype)
                assert got.isfinite().all(), "pads too must be finite: they are multiplied by 0"
                error = ((got.float() - was.float()).norm(dim=-1) / was.float().norm(dim=-1)).amax(1)
                slack = 0.01 if self.dtype == torch.bfloat16 else rounding
                real = expected.real()
                changed = error > torch.where(rounded, rounding, 1e-5)
                assert not (real & ~packed & changed).any(), f"{name} changed that were not to be packed"
                assert not (real & packed & (error > bound + slack)).any(), f"{name} are off by {error.max()}"
                setattr(side, name, got.clone())

    @invariant()
    def bytes_are_those_that_are_held(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.done["steps"] += 1
        self.done["steps with packed tokens"] += self.expected.packed > 0
        report = cache_report(self.cache)
        assert report.bytes == sum(reachable_storages(self.cache).values())
        assert (report.tokens, report.compressed_tokens) == (self.expected.tokens, self.expected.packed)


class ForeignMachine(CacheMachine):
    """The same with Hugging Face's quantized layers, which hand out dense states."""

    specs: ClassVar[dict[str, tuple[float, float]]] = FOREIGN

    def nothing(self) -> Expected:
        return ExpectedForeign(self.method, 1)

    def states(self, tokens: int) -> Side:
        """One channel is the largest in every call, so that the fp8 scale of the first one fits the others."""
        new = super().states(tokens)
        new.keys[..., 0] = new.values[..., 0] = 12
        return new

    def attend(self, states: Any, side: Side, query: Tensor, mask: Tensor | None) -> None:
        bounds = self.bounds if self.method.name == "hf-fp8" else (1e-5, 1e-5)
        for got, was, bound in zip(states, (side.keys, side.values), bounds, strict=True):
            assert (got.float() - was.float()).norm(dim=-1).max() <= (bound + 0.01) * was.float().norm(dim=-1).max()
