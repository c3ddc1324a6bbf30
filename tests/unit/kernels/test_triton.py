"""The Triton kernels against the plain-torch reference: interpreted on a CPU, compiled where there is a GPU.

Errors are relative norms against the reference in float32, and are held against those of torch at the same precision.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant.cache.buffer import TokenBuffer
from turboquant.kernels import backend
from turboquant.kernels.attention import PackedSegment, _reference
from turboquant.kernels.encode import encode
from turboquant.kernels.scores import _reference as reference_scores
from turboquant.kernels.scoring import Scoring
from turboquant.methods import parse_method

pytest.importorskip("triton")

from turboquant.kernels.triton import attention, prefill
from turboquant.kernels.triton import encode as encoder
from turboquant.kernels.triton import scores as scorer
from turboquant.kernels.triton.attention import Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter cannot multiply bfloat16 matrices.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*", "ignore::DeprecationWarning")


def quantizers(spec: str, dim: int, value_dim: int | None = None) -> Any:
    return parse_method(spec).quantizers(dim, value_dim or dim, 0, DEVICE)


def segment(
    spec: str, tokens: int, dims: int | tuple[int, int], dtype: torch.dtype, batch: int = 2, heads: int = 2,
    outlier: float = 1.0,
) -> PackedSegment:  # fmt: skip
    """Packed keys and values; with an `outlier`, their sixth vectors are so many times as long."""
    dim, value_dim = (dims, dims) if isinstance(dims, int) else dims
    keys, values = quantizers(spec, dim, value_dim)
    generator = torch.Generator().manual_seed(tokens + dim)
    offset = torch.randn(dim, generator=generator)
    states = (3 * torch.randn(batch, heads, tokens, dim, generator=generator) + offset).to(DEVICE, dtype)
    others = torch.randn(batch, heads, tokens, value_dim, generator=generator).to(DEVICE, dtype)
    for x in (states, others):
        x[:, :, 5] *= outlier
    return PackedSegment(keys.quantize(states, None, None), values.quantize(others, None, None), keys, values)


def views(packed: PackedSegment) -> Any:
    return packed.key_quantizer.view(packed.keys), packed.value_quantizer.view(packed.values)


def exact_states(query: Tensor, kv_heads: int, tokens: int, value_dim: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    dims = (query.shape[3], value_dim or query.shape[3])
    keys, values = (torch.randn(query.shape[0], kv_heads, tokens, dim, generator=generator).to(query) for dim in dims)
    return 3 * keys, values


def queries(heads: int, count: int, dim: int, dtype: torch.dtype, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(heads + count)
    return torch.randn(batch, heads, count, dim, generator=generator).to(DEVICE, dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def same_precision(
    query: Tensor, exact: tuple[Tensor, Tensor], packed: PackedSegment, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Torch's attention over what the codes stand for, packed tokens first, all in the dtype of the query."""
    groups = query.shape[1] // exact[0].shape[1]
    keys, values = (
        torch.cat([quantizer.dequantize(codes).to(query.dtype), states], dim=2).repeat_interleave(groups, 1)
        for quantizer, codes, states in (
            (packed.key_quantizer, packed.keys, exact[0]),
            (packed.value_quantizer, packed.values, exact[1]),
        )
    )
    tokens, rows = keys.shape[2], query.shape[2]
    place = torch.arange(tokens, device=query.device)
    mask = place <= place[-rows:, None] if mask is None else mask
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


# method, dim, query heads a KV head, query tokens, packed tokens
CASES = [
    ("turboquant:bits=4", 64, 3, 1, 192),
    ("turboquant:bits=3", 64, 1, 1, 256),
    ("turboquant:bits=2", 64, 4, 2, 128),
    ("turboquant:bits=1", 64, 2, 1, 128),
    ("turboquant:key_bits=4,value_bits=2", 128, 4, 4, 64),
    ("turboquant:key_bits=2,value_bits=3", 128, 7, 1, 192),
    ("turboquant:bits=3", 80, 1, 1, 128),
    ("turboquant:bits=4", 80, 2, 3, 64),
    ("turboquant:bits=4", 96, 16, 2, 64),
    ("turboquant:bits=2", 256, 8, 1, 64),
    ("turboquant:bits=4,group_size=32", 64, 2, 1, 96),
    ("turboquant:bits=3,group_size=128", 64, 2, 1, 384),
    ("turboquant:bits=4,group_size=0", 64, 2, 1, 101),
    ("turboquant:bits=4,rotation=qr,center=false", 64, 2, 1, 128),
    ("turboquant:bits=4,qjl=orthogonal", 64, 2, 1, 128),
    ("turboquant-paper:bits=4", 64, 2, 2, 77),
    ("turboquant-paper:bits=3", 80, 1, 1, 66),
    ("turboquant-paper:bits=2", 128, 4, 1, 33),
]
PLANS = [None, Plan(32, 1, 3, 5), Plan(64, 4, 3, 2), Plan(128, 2, 3, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "dim", "groups", "rows", "tokens"), CASES)
def test_decode_is_as_good_as_torch_at_the_same_precision(
    spec: str, dim: int, groups: int, rows: int, tokens: int, dtype: torch.dtype
) -> None:
    packed = segment(spec, tokens, dim, dtype)
    query = queries(2 * groups, rows, dim, dtype)
    exact = exact_states(query, 2, 37)
    keys, values = views(packed)
    assert attention.unsupported(query, keys, values) is None
    assert attention.few_rows(query, 2)
    scaling = dim**-0.5
    expected = _reference(query, exact, packed, 4, None, Scoring(scaling))
    allowed = max(2 * error(same_precision(query, exact, packed, scaling), expected), 2e-3)
    for plan in PLANS if spec == "turboquant:bits=4" or DEVICE.type == "cuda" else PLANS[:1]:
        found = attention.attend(query, exact[0], exact[1], keys, values, Scoring(scaling), launch=plan)
        assert found.dtype == dtype
        assert found.shape == query.shape
        assert found.transpose(1, 2).is_contiguous()  # what Hugging Face's attention functions return
        assert error(found, expected) <= allowed, plan


# method, dims of keys and of values, soft cap, learned sinks, query heads a KV head, query tokens
MORE = [
    ("turboquant:bits=4", (64, 64), None, True, 8, 1),
    ("turboquant:bits=2", (64, 64), 4.0, True, 2, 3),
    ("turboquant:bits=3", (256, 256), 4.0, False, 2, 1),
    ("turboquant:bits=4", (192, 128), None, True, 2, 1),
    ("turboquant:bits=3", (192, 128), None, False, 4, 2),
    ("turboquant:key_bits=4,value_bits=2", (192, 128), 4.0, True, 2, 1),
    ("turboquant:bits=2", (128, 192), None, False, 1, 1),
    ("turboquant-paper:bits=4", (192, 128), None, True, 2, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "dims", "cap", "sinks", "groups", "rows"), MORE)
def test_decode_with_sinks_caps_and_values_of_other_dims(
    spec: str, dims: tuple[int, int], cap: float | None, sinks: bool, groups: int, rows: int, dtype: torch.dtype
) -> None:
    packed = segment(spec, 192, dims, dtype)
    query = queries(2 * groups, rows, dims[0], dtype)
    exact = exact_states(query, 2, 37, dims[1])
    keys, values = views(packed)
    assert attention.unsupported(query, keys, values) is None
    generator = torch.Generator().manual_seed(1)
    learned = torch.randn(2 * groups, generator=generator).to(DEVICE, dtype) * 2 + 8 if sinks else None
    scoring = Scoring(dims[0] ** -0.5, cap, learned)
    expected = _reference(query, exact, packed, 4, None, scoring)
    plain = Scoring(dims[0] ** -0.5)
    allowed = max(
        2
        * error(same_precision(query, exact, packed, plain.scaling), _reference(query, exact, packed, 4, None, plain)),
        2e-3,
    )
    found = attention.attend(query, exact[0], exact[1], keys, values, scoring)
    assert found.shape == (2, 2 * groups, rows, dims[1])
    assert error(found, expected) <= allowed
    if cap or sinks:  # it would be seen if they were left out
        assert error(attention.attend(query, exact[0], exact[1], keys, values, plain), expected) > 3 * allowed


OUTLIERS = [("turboquant:bits=4", 64), ("turboquant:bits=3", 128), ("turboquant:bits=2,group_size=32", 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "dim"), OUTLIERS)
def test_groups_that_keep_plain_scales_are_read_as_well(spec: str, dim: int, dtype: torch.dtype) -> None:
    """An outlier does not share its group's scale, but the group's mean: decode, scores and prefill."""
    packed = segment(spec, 192, dim, dtype, outlier=100.0)
    keys, values = views(packed)
    assert keys.tops is None is values.tops
    assert keys.means is not None
    query = queries(4, 1, dim, dtype)
    exact, scaling = exact_states(query, 2, 37), dim**-0.5 / 8
    assert attention.unsupported(query, keys, values) is None
    expected = _reference(query, exact, packed, 4, None, Scoring(scaling))
    found = attention.attend(query, exact[0], exact[1], keys, values, Scoring(scaling))
    assert error(found, expected) <= max(2 * error(same_precision(query, exact, packed, scaling), expected), 2e-3)
    expected = reference_scores(query, packed.keys, packed.key_quantizer, 2, scaling)
    assert error(scorer.scores(query, keys, scaling), expected) < 2 * torch.finfo(dtype).eps
    for quantizer, codes in ((packed.key_quantizer, packed.keys), (packed.value_quantizer, packed.values)):
        out = torch.zeros(2, 2, 128, dim, dtype=dtype, device=DEVICE)
        prefill.dequantize(quantizer.view(codes), 64, 128, out)
        assert error(out, quantizer.view(codes).rotation.apply(quantizer.dequantize(codes))[:, :, 64:]) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_encode_kernel_rounds_away_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the quantizers pack the block, in the format that holds it, and all that follow."""
    monkeypatch.setattr("turboquant.kernels.encode.usable", lambda tensor, name: encoder)
    keys, values = quantizers("turboquant:bits=4", 64)
    generator = torch.Generator().manual_seed(0)
    rooms = TokenBuffer(), TokenBuffer()
    calm = torch.randn(2, 2, 128, 64, generator=generator).to(DEVICE, dtype)
    blank = keys.blank(calm, None)
    assert encoder.encode(calm, calm, keys.view(blank), values.view(values.blank(calm, None))) == (True, False)
    blocks = [calm]
    for factor in (1.0, 1000.0, 1.0):
        block = torch.randn(2, 2, 128, 64, generator=generator).to(DEVICE, dtype)
        block[:, :, 9] *= factor
        blocks.append(block)
    for block in blocks:
        encode((keys, block, rooms[0]), (values, block, rooms[1]), None)
    for quantizer, room in zip((keys, values), rooms, strict=True):
        assert room.storage.tops is None
        read, true = quantizer.dequantize(room.view()), torch.cat(blocks, dim=2).float()
        error_of_each = (read - true).norm(dim=-1) / true.norm(dim=-1)
        assert error_of_each.max() < 0.25


@pytest.mark.parametrize("group_size", [64, 0])
def test_the_encode_kernel_says_what_its_format_does_not_hold(group_size: int) -> None:
    keys, values = quantizers(f"turboquant:bits=4,group_size={group_size}", 64)
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(2, 2, 128, 64, generator=generator).to(DEVICE, torch.float16)

    def said(key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[bool, bool]:
        blanks = keys.blank(key_states, None), values.blank(value_states, None)
        return encoder.encode(key_states, value_states, keys.view(blanks[0]), values.view(blanks[1]))

    assert said(usual, usual) == (True, False)
    one = usual.clone()
    one[1, 1, 70] = 0  # a zero vector is held as it is
    assert said(usual, one) == (True, False)
    one[1, 1, 70] = usual[1, 1, 70] / 100  # as a scale of its own it is, and as a share of the longest one not
    assert said(usual, one) == (group_size == 0, False)
    for factor in (2.0**-20, 1e4):  # lengths below and above float16
        assert said(usual, usual * factor) == (False, False)
        assert not said(usual * factor, usual)[0]
    # Keys far shorter than the center, which is that of the first block.
    keys, values = quantizers("turboquant:bits=4,group_size=0", 64)
    first = usual + 8
    blank = keys.blank(first, None)
    room = values.blank(usual, None)
    assert encoder.encode(first, usual, keys.view(blank), values.view(room)) == (True, False)
    assert encoder.encode(usual / 100, usual, keys.view(blank), values.view(room))[1]
    assert keys.may_misread(usual / 100, blank)
    assert not keys.may_misread(first, blank)


def test_scales_beyond_float16_are_left_to_the_reference() -> None:
    keys, values = views(segment("turboquant:bits=4", 64, 64, torch.float16, outlier=1.0))
    wide = replace(values, scales=values.scales.float(), tops=None)
    query = queries(4, 1, 64, torch.float16)
    assert attention.unsupported(query, keys, wide) == "value scales are out of the range of float16"


@pytest.mark.parametrize("spec", ["turboquant:bits=4", "turboquant:bits=2", "turboquant-paper:bits=3"])
def test_pads_at_the_front_of_rows_are_not_seen(spec: str) -> None:
    packed = segment(spec, 192, 64, DTYPES[0])
    query = queries(4, 1, 64, DTYPES[0])
    exact = exact_states(query, 2, 20)
    starts = torch.tensor([0, 130], device=DEVICE)
    mask = torch.arange(212, device=DEVICE) >= torch.where(starts > 0, starts + 4, 0)[:, None]
    mask |= torch.arange(212, device=DEVICE) < 4
    expected = _reference(query, exact, packed, 4, mask[:, None, None], Scoring(0.125))
    found = attention.attend(query, exact[0], exact[1], views(packed)[0], views(packed)[1], Scoring(0.125), starts)
    assert error(found, expected) < 2e-3


def test_lengths_on_the_device_bound_what_is_read() -> None:
    """As in a CUDA graph: the tensors have spare room, which holds anything."""
    packed = segment("turboquant:bits=4", 256, 64, DTYPES[0])
    query = queries(4, 1, 64, DTYPES[0])
    exact = exact_states(query, 2, 60)
    shorter = PackedSegment(
        packed.keys.narrow(0, 128), packed.values.narrow(0, 128), packed.key_quantizer, packed.value_quantizer
    )
    expected = _reference(query, (exact[0][:, :, :23], exact[1][:, :, :23]), shorter, 4, None, Scoring(0.125))
    held: list[Any] = [packed.keys, packed.values]
    held[0].scales[:, :, 128:] = 255
    held[1].tops[:, :, 2:] = torch.nan
    exact[0][:, :, 23:] = torch.inf
    exact[1][:, :, 23:] = torch.nan
    lengths = torch.tensor([128, 23], dtype=torch.int32, device=DEVICE)
    found = attention.attend(
        query, exact[0], exact[1], views(packed)[0], views(packed)[1], Scoring(0.125), lengths=lengths
    )
    assert error(found, expected) < 2e-3


SCORES = [case for case in CASES if "paper" not in case[0] and "qjl" not in case[0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "dim", "groups", "rows", "tokens"), SCORES)
def test_scores_are_the_references(
    spec: str, dim: int, groups: int, rows: int, tokens: int, dtype: torch.dtype
) -> None:
    for count in (tokens, 17 * 64) if spec == "turboquant:bits=3" else (tokens,):  # the latter takes two programs
        packed = segment(spec, count, dim, dtype)
        query = queries(2 * groups, rows, dim, dtype)
        view = views(packed)[0]
        assert scorer.unsupported(query, view) is None
        found = scorer.scores(query, view, dim**-0.5)
        expected = reference_scores(query, packed.keys, packed.key_quantizer, 2, dim**-0.5)
        assert found.dtype == dtype
        assert error(found, expected) < 2 * 2.0 ** (-10 if dtype == torch.float16 else -7)


def test_small_and_large_values_keep_their_precision() -> None:
    """Weights are held as fp16 in units of a part's largest value scale: norms may be anything."""
    for size in (0.05, 1e3):
        keys, values = quantizers("turboquant:bits=4", 64)
        generator = torch.Generator().manual_seed(0)
        states = [torch.randn(1, 1, 128, 64, generator=generator).to(DEVICE, torch.float16) for _ in range(2)]
        states[1] *= size / 10
        packed = PackedSegment(keys.quantize(states[0]), values.quantize(states[1]), keys, values)
        query = queries(2, 1, 64, torch.float16, batch=1)
        exact = states[0][:, :, :1], states[1][:, :, :1]
        expected = _reference(query, exact, packed, 0, None, Scoring(0.125))
        assert (
            error(
                attention.attend(query, exact[0], exact[1], views(packed)[0], views(packed)[1], Scoring(0.125)),
                expected,
            )
            < 3e-3
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spec", "dim", "tokens"),
    [
        ("turboquant:bits=4", 64, 128),
        ("turboquant:bits=3", 128, 64),
        ("turboquant:key_bits=2,value_bits=4", 64, 192),
        ("turboquant:bits=3,group_size=0", 64, 100),
        ("turboquant:bits=4,center=false,rotation=qr", 64, 128),
        ("turboquant:bits=1,scale=unbiased", 256, 64),
        ("turboquant:bits=2,group_size=32,scale=norm", 128, 64),
    ],
)
def test_encode_writes_the_codes_of_the_reference(spec: str, dim: int, tokens: int, dtype: torch.dtype) -> None:
    keys, values = quantizers(spec, dim)
    generator = torch.Generator().manual_seed(dim)
    states = [(2 * torch.randn(2, 2, tokens, dim, generator=generator) + 1).to(DEVICE, dtype) for _ in range(2)]
    blanks = keys.blank(states[0], None), values.blank(states[1], None)
    encoder.encode(states[0], states[1], keys.view(blanks[0]), values.view(blanks[1]))
    for quantizer, own, x in zip((keys, values), blanks, states, strict=True):
        expected = quantizer.quantize(x)
        for one, other in zip(own.codes, expected.codes, strict=True):
            assert (one != other).float().mean() < 1e-3  # sums in another order may tip a value over a boundary
        assert error(quantizer.dequantize(own), quantizer.dequantize(expected)) < 3e-3
        restored = error(quantizer.dequantize(own), x), error(quantizer.dequantize(expected), x)
        assert restored[0] == pytest.approx(restored[1], rel=1e-3)


def test_zero_vectors_are_encoded_as_zero() -> None:
    keys, values = quantizers("turboquant:bits=3", 64)
    zeros = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=DEVICE)
    blanks = keys.blank(zeros, None), values.blank(zeros, None)
    assert encoder.encode(zeros, zeros, keys.view(blanks[0]), values.view(blanks[1])) == (True, False)
    for quantizer, own in zip((keys, values), blanks, strict=True):
        assert not quantizer.dequantize(own).any()


@pytest.mark.parametrize("spec", ["turboquant:bits=4", "turboquant:bits=3", "turboquant:bits=1,center=false"])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_prefix_is_dequantized_in_the_rotated_space(spec: str, dim: int) -> None:
    packed = segment(spec, 192, dim, DTYPES[0])
    for quantizer, codes in ((packed.key_quantizer, packed.keys), (packed.value_quantizer, packed.values)):
        rotation: Any = quantizer.view(codes).rotation
        expected = rotation.apply(quantizer.dequantize(codes))
        out = torch.zeros(2, 2, 110, dim, dtype=DTYPES[0], device=DEVICE)
        prefill.dequantize(quantizer.view(codes), 64, 100, out)
        assert error(out[:, :, :100], expected[:, :, 64:164]) < 1e-3
        assert not out[:, :, 100:].any()


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float) -> Any:
    """What cuDNN and flash attention return on a GPU."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(groups, dim=1).float() for states in (keys, values))
    scores = query.float() @ keys.mT * scaling
    if causal:
        scores.masked_fill_(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), -torch.inf)
    return (scores.softmax(dim=-1) @ values).to(query.dtype), scores.logsumexp(dim=-1)


@pytest.mark.parametrize("workspace", [2**27, 2**14])
@pytest.mark.parametrize(
    ("spec", "dim", "rows", "exact", "tokens"),
    [
        ("turboquant:bits=4", 64, 33, 68, 2112),
        ("turboquant:key_bits=3,value_bits=2", 128, 5, 0, 1088),
        ("turboquant:bits=2,rotation=qr,group_size=0", 80, 17, 4, 1100),
    ],
)
def test_prefill_on_a_packed_prefix(
    spec: str, dim: int, rows: int, exact: int, tokens: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "WORKSPACE", workspace)
    if DEVICE.type != "cuda":
        monkeypatch.setattr(prefill, "_attention", plain_attention)
    dtype = DTYPES[-1]
    packed = segment(spec, tokens, dim, dtype)
    query = queries(8, rows, dim, dtype)
    states = exact_states(query, 2, exact + rows)
    expected = _reference(query, states, packed, min(exact, 4), None, Scoring(dim**-0.5))
    allowed = 2 * error(same_precision(query, states, packed, dim**-0.5), expected)
    found = prefill.attend(query, states[0], states[1], views(packed)[0], views(packed)[1], Scoring(dim**-0.5))
    assert error(found, expected) <= max(allowed, 2e-3)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("exact", [0, 9])
def test_prefill_of_padded_rows(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "WORKSPACE", 2**14)
    if DEVICE.type != "cuda":
        monkeypatch.setattr(prefill, "_attention", plain_attention)
    dtype, rows, tokens, sinks = DTYPES[-1], 12, 1216, min(exact, 4)
    packed = segment("turboquant:bits=4", tokens, 64, dtype, batch=4)
    query = queries(4, rows, 64, dtype, batch=4)
    states = exact_states(query, 2, exact + rows)
    starts = torch.tensor([0, 70, 1100, tokens], device=DEVICE)
    place = torch.arange(tokens + exact + rows, device=DEVICE)
    mask = (place < sinks) | (place >= sinks + starts[:, None])
    mask = mask[:, None, None] & (place <= place[-rows:, None])
    expected = _reference(query, states, packed, sinks, mask, Scoring(0.125))
    # The same mask where sinks stand behind the packed tokens.
    order = torch.cat([place[sinks : sinks + tokens], place[:sinks], place[sinks + tokens :]])
    plain = same_precision(query, states, packed, 0.125, mask[..., order])
    found = prefill.attend(query, states[0], states[1], views(packed)[0], views(packed)[1], Scoring(0.125), starts)
    rounding = torch.finfo(dtype).eps / 4  # a row's parts are rounded once more before they are joined
    for row, wanted, torchs in zip(found, expected, plain, strict=True):
        assert error(row, wanted) <= 2 * error(torchs, wanted) + rounding
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("rows", "tokens"), [(33, 2112), (40, 0), (1, 0)], ids=["prefix", "prompt", "step"])
def test_prefill_gives_learned_sinks_their_share(rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a packed prefix, and over plain tensors: a prompt, and a step of an uncompressed cache."""
    if DEVICE.type != "cuda":
        monkeypatch.setattr(prefill, "_attention", plain_attention)
    dtype = DTYPES[-1]
    query = queries(8, rows, 64, dtype)
    scoring = Scoring(0.125, None, torch.linspace(2, 12, 8).to(DEVICE, dtype))
    states = exact_states(query, 2, rows + 20 if tokens or rows == 1 else rows)
    packed = segment("turboquant:bits=4", tokens, 64, dtype) if tokens else None

    def both(scoring: Scoring) -> tuple[Tensor | None, Tensor]:
        if packed is None:
            found = prefill.attend_exact(query, *states, scoring)
            return found, _reference(query, states, None, states[0].shape[2], None, scoring)
        found = prefill.attend(query, states[0], states[1], views(packed)[0], views(packed)[1], scoring)
        return found, _reference(query, states, packed, 4, None, scoring)

    found, expected = both(scoring)
    plain, without = both(Scoring(0.125))
    allowed = max(2 * error(plain, without), 4e-3)
    assert error(found, expected) <= allowed
    assert error(plain, expected) > 10 * allowed
    assert prefill.attend_exact(query.float(), *states, scoring) is None
    assert prefill.attend_exact(query, *states, Scoring(0.125, cap=30.0)) is None


# -- which implementation runs -----------------------------------------------------------------------------------------


def test_what_kernels_cannot_read_is_named() -> None:
    query = queries(4, 1, 64, torch.float32)
    keys, values = views(segment("turboquant:bits=4", 64, 64, torch.float16))
    assert "float32" in str(attention.unsupported(query, keys, values))
    assert "5 bits" in str(
        attention.unsupported(query.half(), views(segment("turboquant:bits=5", 64, 64, torch.float16))[0], values)
    )
    assert "64 dimensions and queries in 32" in str(
        attention.unsupported(queries(4, 1, 32, torch.float16), keys, values)
    )
    short = views(segment("turboquant:bits=4", 64, 32, torch.float16))
    assert "head_dim" in str(attention.unsupported(queries(4, 1, 32, torch.float16), *short))
    assert "no kernel" in str(attention.unsupported(query.half(), None, values))
    kivi = quantizers("kivi:bits=4,group_size=32", 64)
    assert kivi[0].view(kivi[0].quantize(torch.randn(1, 1, 32, 64, device=DEVICE))) is None


def test_a_kernel_that_fails_warns_once_and_the_reference_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_failed", set())
    monkeypatch.setattr(encoder, "encode_pair", None)  # what a compiler's error leaves
    monkeypatch.setattr(backend, "usable", lambda tensor, name: encoder if name not in backend._failed else None)
    monkeypatch.setattr("turboquant.kernels.encode.usable", lambda tensor, name: backend.usable(tensor, name))
    keys, values = quantizers("turboquant:bits=4", 64)
    states = torch.randn(1, 1, 64, 64, device=DEVICE).half()
    rooms = TokenBuffer(), TokenBuffer()
    with pytest.warns(RuntimeWarning, match="encode kernels do not run here"):
        encode((keys, states, rooms[0]), (values, states, rooms[1]), None)
    encode((keys, states, rooms[0]), (values, states, rooms[1]), None)  # without a second warning
    assert rooms[0].length == rooms[1].length == 128
    expected = keys.dequantize(keys.quantize(states))
    torch.testing.assert_close(keys.dequantize(rooms[0].view())[:, :, :64], expected)


def test_out_of_memory_is_not_taken_for_a_broken_kernel() -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        backend.guarded("attention", run)
    assert "attention" not in backend._failed


def test_the_backend_has_a_name() -> None:
    assert backend.attention_backend("cpu").startswith(("numba", "torch"))
    if DEVICE.type == "cuda":
        assert backend.attention_backend("cuda").startswith("triton")


@pytest.mark.parametrize("spec", ["turboquant-paper:bits=3", "turboquant:bits=4,qjl=gaussian", "kivi:bits=4"])
def test_what_the_encode_kernel_cannot_fill_is_packed_by_the_quantizers(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboquant.kernels.encode.usable", lambda tensor, name: encoder)
    keys, values = quantizers(spec, 64)
    states = torch.randn(1, 1, 64, 64, device=DEVICE).half()
    rooms = TokenBuffer(), TokenBuffer()
    for _ in range(2):
        encode((keys, states, rooms[0]), (values, states, rooms[1]), None)
    assert rooms[0].length == rooms[1].length == 128
    torch.testing.assert_close(
        keys.dequantize(rooms[0].view())[:, :, :64], keys.dequantize(keys.quantize(states)), rtol=0, atol=1e-5
    )
