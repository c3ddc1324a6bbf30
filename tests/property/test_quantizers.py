"""Properties that hold for every method, width and head_dim."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant.kernels import codes as ops
from turboquant.kernels.cpu import codes as cpu
from turboquant.methods import METHODS, BitsMethod, parse_method
from turboquant.quant.packing import PLANE_WIDTHS, pack_bits, unpack_bits
from turboquant.quant.quantizer import PackedTensor
from turboquant.quant.rotation import hadamard, random_rotation

CPU = torch.device("cpu")
DIMS = st.sampled_from([2, 8, 40, 64, 80, 96, 112, 128, 256])
SPECS = [
    f"{name}:{option}"
    for name, method in METHODS.items()
    if issubclass(method, BitsMethod)
    for option in ("bits=2", "bits=3", "bits=4", "key_bits=8,value_bits=1", "key_bits=1,value_bits=5")
] + [
    "turboquant:bits=3,qjl=orthogonal",
    "turboquant:bits=4,qjl=gaussian,rotation=qr,scale=unbiased",
    "turboquant:bits=2,scale=norm,center=false",
    "rtn:bits=2,rotation=hadamard",
    "rtn:bits=4,group_size=128",
    "kivi:bits=3,group_size=64",
    "polarquant:bits=4,rotation=hadamard",
    "qjl:bits=1,outliers=0,double_layers=0",
]


def vectors(dim: int, tokens: int = 64, seed: int = 0, batch: int = 2, heads: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, dim, generator=generator) * 3 + 1


def pair(spec: str, dim: int):
    quantizers = parse_method(spec).quantizers(dim, dim, 1, CPU)
    assert quantizers is not None
    return quantizers


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 5), st.randoms(use_true_random=False))
def test_unpack_inverts_pack_and_bytes_are_the_bits(bits: int, dim: int, rows: int, random) -> None:
    codes = torch.tensor([[random.randrange(2**bits) for _ in range(dim)] for _ in range(rows)], dtype=torch.uint8)
    codes = codes.reshape(rows, dim)
    planes = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(planes, bits, dim), codes)
    assert sum(plane.shape[-1] for plane in planes) == sum(-(-dim * w // 8) for w in PLANE_WIDTHS[bits])


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_size_is_exactly_the_bits_where_they_fill_bytes(bits: int) -> None:
    codes = torch.zeros(5, 64, dtype=torch.uint8)
    assert sum(plane.nbytes for plane in pack_bits(codes, bits)) == 5 * 64 * bits // 8


@given(st.sampled_from(["hadamard", "qr"]), DIMS, st.integers(0, 1000), st.integers(0, 60))
def test_rotation_keeps_norms_and_inverts(kind, dim: int, seed: int, layer: int) -> None:
    rotation = random_rotation(kind, dim, seed, layer, CPU)
    x = vectors(dim, 4)
    y = rotation.apply(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(rotation.inverse(y), x, atol=1e-4)


def test_rotations_are_reproducible_differ_by_layer_and_leave_the_global_seed_alone() -> None:
    before = torch.get_rng_state()
    first = random_rotation("qr", 64, 3, 0, CPU).matrix.clone()
    random_rotation.cache_clear()
    assert torch.equal(random_rotation("qr", 64, 3, 0, CPU).matrix, first)
    assert not torch.equal(random_rotation("qr", 64, 3, 1, CPU).matrix, first)
    one, two = (random_rotation("hadamard", 64, 3, layer, CPU) for layer in (0, 1))
    assert one.signs is not None
    assert two.signs is not None
    assert not torch.equal(one.signs, two.signs)
    assert one.matrix is two.matrix
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 64, 80, 96, 128, 160, 192, 576])
def test_hadamard_is_one(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.mT, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 28, 112])
def test_orders_without_a_construction_fall_back_to_a_haar_rotation(order: int) -> None:
    assert hadamard(order) is None
    assert random_rotation("hadamard", order, 0, 0, CPU).signs is None


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dim", [2, 40, 64, 80, 96, 112, 128])
def test_scores_and_combine_agree_with_dequantized_vectors(spec: str, dim: int) -> None:
    x, query = vectors(dim), vectors(dim, 5, seed=1)
    for quantizer in pair(spec, dim):
        packed = quantizer.quantize(x)
        dense = quantizer.dequantize(packed)
        scores = quantizer.scores(quantizer.project(query), packed)
        assert torch.allclose(scores, query @ dense.mT, rtol=1e-4, atol=2e-3)
        weights = scores.softmax(dim=-1)
        output = quantizer.unproject(quantizer.combine(weights, packed))
        assert torch.allclose(output, weights @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
@given(groups=st.integers(1, 9))
def test_quantizing_in_two_parts_is_quantizing_at_once(spec: str, groups: int) -> None:
    """With the statistics of what came first, the codes of later tokens do not depend on how they were split.

    Methods that quantize several tokens together (`Quantizer.token_group`) are split between their groups.
    """
    for quantizer in pair(spec, 64):
        x = vectors(64, 10 * quantizer.token_group)
        cut = groups * quantizer.token_group
        whole = quantizer.quantize(x)
        parts = [quantizer.quantize(x[:, :, :cut], like=whole), quantizer.quantize(x[:, :, cut:], like=whole)]
        assert PackedTensor.cat(parts).tokens == whole.tokens == 10 * quantizer.token_group
        for one, two in zip(whole.tensors(), PackedTensor.cat(parts).tensors(), strict=True):
            close = (one.float() - two.float()).abs() <= 1e-3 * one.float().abs()
            if one.dtype == torch.uint8:  # a coordinate on a decision point may fall either way: count, do not blur
                assert (one == two).float().mean() > 0.999
            else:
                assert close.float().mean() > 0.99


@pytest.mark.parametrize("spec", SPECS)
@given(power=st.integers(-3, 3))
def test_codes_do_not_depend_on_the_scale_of_a_vector(spec: str, power: int) -> None:
    x = vectors(64)
    for quantizer in pair(spec, 64):
        one, two = quantizer.dequantize(quantizer.quantize(x)), quantizer.dequantize(quantizer.quantize(x * 2.0**power))
        assert torch.allclose(one * 2.0**power, two, rtol=1e-3, atol=2.0**power * 1e-2)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-7, 6e4, 1e30])
def test_extreme_vectors_stay_finite(spec: str, value: float) -> None:
    x = torch.full((1, 1, 64, 64), value)
    for quantizer in pair(spec, 64):
        assert quantizer.dequantize(quantizer.quantize(x)).isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_nan_is_shown_not_hidden(spec: str) -> None:
    x = vectors(64)
    x[0, 0, 3, 5] = torch.nan
    for quantizer in pair(spec, 64):
        dense = quantizer.dequantize(quantizer.quantize(x))
        assert dense[0, 0, 3].isnan().any()
        assert dense[1].isfinite().all()


@pytest.mark.parametrize(
    "spec",
    [
        *(f"turboquant:scale={scale}" for scale in ("matched", "norm", "unbiased")),
        *("rtn:rotation=none", "rtn:rotation=hadamard", "kivi:seed=0", "polarquant:seed=0", "qjl:seed=0"),
    ],
)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_more_bits_never_hurt(spec: str, dim: int) -> None:
    x = vectors(dim, 256)
    for side in (0, 1):
        errors = []
        for bits in range(1, 9):
            quantizer = pair(f"{spec},bits={bits}", dim)[side]
            errors.append(float((quantizer.dequantize(quantizer.quantize(x)) - x).square().mean()))
        assert errors == sorted(errors, reverse=True)


def test_matched_scale_keeps_lengths() -> None:
    x = vectors(64)
    _, quantizer = pair("turboquant:bits=2,value_scale=matched,group_size=0", 64)
    norms = quantizer.dequantize(quantizer.quantize(x)).norm(dim=-1)
    assert torch.allclose(norms, x.norm(dim=-1), rtol=2e-3)
    _, quantizer = pair("turboquant:bits=2,value_scale=matched", 64)
    grouped = quantizer.dequantize(quantizer.quantize(x)).norm(dim=-1)
    assert (grouped - norms).abs().max() < norms.max() / 255


def test_unbiased_scale_keeps_inner_products_with_the_vector() -> None:
    """EDEN: <x, x^> = |x|^2, which a matched norm leaves short."""
    x = vectors(64)
    short = {}
    for scale in ("unbiased", "matched"):
        _, quantizer = pair(f"turboquant:bits=2,value_scale={scale},group_size=0", 64)
        short[scale] = (quantizer.dequantize(quantizer.quantize(x)) * x).sum(-1) / x.square().sum(-1)
    assert torch.allclose(short["unbiased"], torch.ones(()), rtol=2e-3)
    assert short["matched"].max() < 0.99


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_means_follow_a_drift_that_one_mean_cannot(group_size: int) -> None:
    """Keys that turn slowly along the text, as rotary embedding makes them, cost less behind the means of groups."""
    turn = torch.linspace(0, 2 * torch.pi, 512)[None, None, :, None]
    x = vectors(64, 512) + 12 * torch.cat([turn.cos().expand(2, 3, -1, 32), turn.sin().expand(2, 3, -1, 32)], dim=-1)
    errors = {}
    for size in (0, group_size):
        keys, _ = pair(f"turboquant:bits=4,group_size={size}", 64)
        errors[size] = float((keys.dequantize(keys.quantize(x)) - x).square().mean())
    assert errors[group_size] < errors[0] / 3


def test_centring_takes_away_an_offset_that_plain_codes_cannot_carry() -> None:
    """A constant key offset carries no information, but takes most of the bits of a quantizer with one norm."""
    x = vectors(128, 256) + 192 * torch.nn.functional.normalize(vectors(128, 1, seed=9, batch=1), dim=-1)
    errors = {}
    for center in ("true", "false"):
        keys, _ = pair(f"turboquant:bits=4,center={center}", 128)
        errors[center] = float((keys.dequantize(keys.quantize(x)) - x).square().mean())
    assert errors["true"] < errors["false"] / 20


@pytest.mark.parametrize("spec", SPECS)
@given(pads=st.integers(1, 64))
def test_what_stands_in_pads_changes_no_other_token(spec: str, pads: int) -> None:
    x = vectors(64)
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[0, :pads] = False
    for quantizer in pair(spec, 64):
        dense = []
        for content in (0.0, 1e3, torch.inf):
            x[0, :, :pads] = content
            dense.append(quantizer.dequantize(quantizer.quantize(x, valid=valid)))
        for other in dense[1:]:
            assert torch.equal(other[0, :, pads:], dense[0][0, :, pads:])
            assert torch.equal(other[1], dense[0][1])


@pytest.mark.parametrize("spec", ["kivi:bits=2", "kivi:bits=4,group_size=128", "qjl:bits=2"])
def test_groups_of_tokens_are_whole(spec: str) -> None:
    keys, values = pair(spec, 64)
    group = keys.token_group
    with pytest.raises(ValueError, match=f"whole groups of {group}, got {group + 1}"):
        keys.quantize(vectors(64, group + 1))
    packed = keys.quantize(vectors(64, 3 * group))
    assert (packed.tokens, packed.token_group) == (3 * group, group)
    assert packed.narrow(group, group).tokens == group
    assert torch.equal(keys.dequantize(packed.narrow(group, group)), keys.dequantize(packed)[:, :, group : 2 * group])
    with pytest.raises(ValueError, match=f"whole groups of {group}, got {group} tokens from 1"):
        packed.narrow(1, group)
    assert values.token_group == 1
    assert values.quantize(vectors(64, 3)).token_group == 1


def test_pad_tokens_stay_out_of_the_mean() -> None:
    x = vectors(64)
    x[0, :, :10] = 1e3
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[0, :10] = False
    keys, _ = pair("turboquant:bits=4,group_size=0", 64)
    packed = keys.quantize(x, valid=valid)
    alone = keys.quantize(x[:1, :, 10:])
    assert torch.allclose(packed.center[:1].float(), alone.center.float(), atol=2e-3)


def test_pad_tokens_stay_out_of_group_means_and_scales() -> None:
    x = vectors(64)
    calm = x.clone()
    x[0, :, :10] = 1e3
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[0, :10] = False
    for quantizer in pair("turboquant:bits=4", 64):
        packed = quantizer.quantize(x, valid=valid)
        error = (quantizer.dequantize(packed) - calm)[0, :, 10:].norm(dim=-1) / calm[0, :, 10:].norm(dim=-1)
        assert error.mean() < 0.12
        nothing = quantizer.quantize(x, valid=torch.zeros_like(valid))
        assert quantizer.dequantize(nothing).isfinite().all()


@given(
    st.integers(1, 8),
    st.sampled_from([8, 64, 80, 96]),
    st.integers(1, 70),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_the_cpu_kernel_reads_codes_as_the_reference_does(bits: int, dim: int, tokens: int, rows: int, skip: int):
    """Also from a view that starts inside larger storage, which is what a cache holds."""
    generator = torch.Generator().manual_seed(dim + tokens)
    codes = torch.randint(0, 2**bits, (2, 3, tokens + skip + 2, dim), generator=generator, dtype=torch.uint8)
    planes = tuple(plane.narrow(2, skip, tokens) for plane in pack_bits(codes, bits))
    scales = torch.rand(2, 3, tokens, generator=generator).half()
    codebook = torch.randn(2**bits, generator=generator).sort().values
    query = torch.randn(2, 3, rows, dim, generator=generator)
    weights = torch.rand(2, 3, rows, tokens, generator=generator)
    levels = ops.code_levels(planes, bits, codebook, dim) * scales.float().unsqueeze(-1)
    assert torch.allclose(cpu.code_scores(query, planes, bits, codebook, scales), query @ levels.mT, atol=1e-4)
    combined = cpu.code_combine(weights, planes, bits, codebook, scales, dim)
    assert torch.allclose(combined, weights @ levels, atol=1e-4)
