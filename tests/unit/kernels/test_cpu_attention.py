"""The fused CPU kernel against attention in float64 over what the quantizers read back."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turboquant.cache.buffer import TokenBuffer
from turboquant.kernels import attention
from turboquant.kernels.attention import PackedSegment
from turboquant.kernels.scoring import Scoring
from turboquant.methods import parse_method
from turboquant.methods.scalar import TurboQuantMSE
from turboquant.quant.rotation import random_rotation

kernel = pytest.importorskip("turboquant.kernels.cpu.attention")
CPU = torch.device("cpu")
CLOSE = 1e-5
"""Relative error that float32 may leave."""


@dataclass
class Case:
    """Random queries over random tokens; the keys have an offset, as a key bias gives them."""

    method: str = "turboquant:bits=4"
    dims: tuple[int, int] = (64, 64)
    batch: int = 1
    kv_heads: int = 2
    groups: int = 3
    queries: int = 1
    packed: int = 192
    exact: int = 70
    dtype: torch.dtype = torch.float32
    cap: float | None = None
    sinks: bool = False
    pads: tuple[int, ...] | None = None
    seed: int = 0
    scoring: Scoring = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        key_dim, value_dim = self.dims
        rows, heads = (self.batch, self.kv_heads), self.kv_heads * self.groups
        found = parse_method(self.method).quantizers(key_dim, value_dim, 3, CPU)
        assert found is not None
        self.quantizers = found
        keys = random(*rows, self.packed, key_dim) + 2 * random(key_dim)
        self.keys, self.values = found[0].quantize(keys), found[1].quantize(random(*rows, self.packed, value_dim))
        self.exact_states = tuple(random(*rows, self.exact, dim).to(self.dtype) for dim in self.dims)
        self.query = random(self.batch, heads, self.queries, key_dim)
        self.scoring = Scoring(key_dim**-0.5, self.cap, random(heads) if self.sinks else None)
        self.starts = None if self.pads is None else torch.tensor(self.pads)

    def run(self) -> Tensor | None:
        sides = tuple(zip(self.quantizers, (self.keys, self.values), strict=True))
        return kernel.attend(self.query, self.exact_states, sides, self.scoring, self.starts)

    def expected(self) -> Tensor:
        """Packed tokens first, then exact ones: where no token is hidden but by causality, order has no say."""
        pairs = zip(self.quantizers, (self.keys, self.values), self.exact_states, strict=True)
        keys, values = (
            torch.cat([quantizer.dequantize(packed), exact.float()], dim=2).double().repeat_interleave(self.groups, 1)
            for quantizer, packed, exact in pairs
        )
        tokens = keys.shape[2]
        scores = self.query.double() @ keys.mT * self.scoring.scaling
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        seen = torch.ones(self.queries, tokens).tril(tokens - self.queries).bool()[None, None]
        if self.starts is not None:
            seen = seen & (torch.arange(tokens) >= self.starts[:, None])[:, None, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.scoring.sinks is not None:
            sinks = self.scoring.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        return scores.softmax(-1)[..., :tokens] @ values

    def check(self) -> None:
        found = self.run()
        assert found is not None
        assert found.dtype == torch.float32
        expected = self.expected()
        assert float((found - expected).norm() / expected.norm()) < CLOSE


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (20, 36)])
def test_dims_and_bits(dims: tuple[int, int], bits: int) -> None:
    Case(f"turboquant:bits={bits}", dims, groups=2, queries=2, exact=9).check()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_a_qjl_stage(bits: int) -> None:
    Case(f"turboquant-paper:bits={bits}", (64, 80), exact=1).check()
    Case(f"turboquant:qjl=orthogonal,bits={bits}").check()


@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@pytest.mark.parametrize("options", ["", ",center=false", ",rotation=qr"])
def test_groups_means_and_rotations(group_size: int, options: str) -> None:
    Case(f"turboquant:bits=3,group_size={group_size}{options}", packed=256, batch=2).check()


@pytest.mark.parametrize("group_size", [16, 96])
def test_groups_that_are_no_tile(group_size: int) -> None:
    case, rotation = Case(), random_rotation("hadamard", 64, 0, 0, CPU)
    case.quantizers = (
        TurboQuantMSE(64, 3, rotation, center=True, group_size=group_size),
        TurboQuantMSE(64, 3, rotation, group_size=group_size),
    )
    states = torch.randn(2, 1, 2, 192, 64, generator=torch.Generator().manual_seed(1)) + 1
    case.keys, case.values = (one.quantize(part) for one, part in zip(case.quantizers, states, strict=True))
    case.check()


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("queries", [1, 3, 4])
def test_query_tokens_do_not_see_those_behind_them(groups: int, queries: int) -> None:
    for exact in (queries, 64, 131):
        Case(groups=groups, queries=queries, exact=exact, batch=2).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_tokens_in_16_bits(dtype: torch.dtype) -> None:
    Case(dtype=dtype).check()


def test_caps_and_learned_sinks() -> None:
    Case(cap=2.0).check()
    Case(sinks=True, queries=2, batch=2).check()
    Case(cap=2.0, sinks=True).check()


def test_pads_in_front_of_rows_are_not_seen() -> None:
    Case(batch=3, pads=(0, 64, 131), queries=2).check()


@given(
    bits=st.integers(1, 8),
    dims=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    shape=st.fixed_dictionaries(
        {"batch": st.integers(1, 3), "kv_heads": st.integers(1, 3), "groups": st.integers(1, 4)}
    ),
    queries=st.integers(1, 5),
    window=st.integers(0, 140),
    packed=st.integers(1, 5),
    cap=st.sampled_from([None, 1.0, 30.0]),
    sinks=st.booleans(),
    data=st.data(),
)
def test_any_shape(  # noqa: PLR0913
    bits: int,
    dims: tuple[int, int],
    shape: dict[str, int],
    queries: int,
    window: int,
    packed: int,
    cap: float | None,
    sinks: bool,
    data: st.DataObject,
) -> None:
    pads = data.draw(st.none() | st.tuples(*[st.integers(0, 64 * packed)] * shape["batch"]))
    Case(
        f"turboquant:bits={bits}",
        dims,
        **shape,
        queries=queries,
        packed=64 * packed,
        exact=queries + window,
        cap=cap,
        sinks=sinks,
        pads=pads,
    ).check()


def test_outliers_kept_with_plain_scales() -> None:
    case = Case()
    far = torch.ones(192)
    far[5], far[100] = 1e4, 1e-4
    states = torch.randn(1, 2, 192, 64, generator=torch.Generator().manual_seed(1)) * far[:, None]
    case.values = case.quantizers[1].quantize(states)
    assert case.values.tops is None
    assert case.values.scales.dtype == torch.float32
    case.check()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_are_joined(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "GRAIN", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Case(packed=64 * 17, kv_heads=1, sinks=True).check()
        Case(packed=64, batch=3).check()  # more parts than tiles
    finally:
        torch.set_num_threads(before)


def test_several_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "GRAIN", 1)
    cases = [Case(packed=64 * (3 + seed), seed=seed) for seed in range(4)]
    failed = []

    def repeat(case: Case) -> None:
        first = case.run()
        for _ in range(30):
            found = case.run()
            if first is None or found is None or not torch.allclose(found, first, atol=1e-6, rtol=1e-5):
                failed.append(case)

    callers = [threading.Thread(target=repeat, args=(case,)) for case in cases]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failed
    for case in cases:
        case.check()


def test_no_number_stays_no_number() -> None:
    case = Case()
    case.query[0, 1, 0, 3] = torch.nan
    found = case.run()
    assert found is not None
    assert bool(found[0, 1].isnan().all())
    assert not bool(found[0, [0, 2, 3, 4, 5]].isnan().any())


def test_a_view_of_a_larger_storage_is_read_where_it_lies() -> None:
    case, buffer = Case(), TokenBuffer()
    buffer.append(case.keys)
    buffer.append(case.keys)
    buffer.length = case.packed
    case.keys = buffer.view()
    assert buffer.storage is not None
    assert case.keys.tokens < buffer.storage.tokens
    case.check()


def test_a_side_is_forgotten_with_its_tokens() -> None:
    from turboquant.kernels.cpu import job

    case = Case()
    case.run()
    known = len(job._prepared)
    del case.keys
    assert len(job._prepared) == known - 1


@pytest.mark.parametrize("case", [Case(groups=11, queries=3), Case(method="kivi:bits=4"), Case(exact=0)])
def test_what_is_not_served(case: Case) -> None:
    assert case.run() is None


def test_attend_runs_it_where_the_mask_says_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=2, pads=(0, 64))
    calls: list[object] = []
    segment = PackedSegment(case.keys, case.values, *case.quantizers)
    original = kernel.attend

    def counted(*given: object) -> Tensor | None:
        calls.append(given)
        found: Tensor | None = original(*given)
        return found

    monkeypatch.setattr(kernel, "attend", counted)
    tokens = case.packed + case.exact
    mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    mask[1, :, :, :64] = False  # stored order without sinks: packed tokens first

    def run(mask: Tensor | None, starts: Tensor | None) -> Tensor:
        keys, values = case.exact_states
        return attention.attend(case.query, keys, values, segment, 0, mask, case.scoring, starts)

    served = run(mask, case.starts)
    assert len(calls) == 1
    assert torch.allclose(run(mask, None), served, atol=1e-5)
    assert len(calls) == 1  # a mask that may say more goes to the reference
    run(None, None)
    assert len(calls) == 2
