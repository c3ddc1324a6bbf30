"""The cache against the uncompressed one: what generate() asks of it, what it holds, what it refuses."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.support.models import reachable_storages
from turboquant.cache.build import CompressedCache, QuantizedLayer, build_cache, cache_report
from turboquant.methods import parse_method
from turboquant.models.load import tiny_model
from turboquant.models.tiny import ARCHITECTURES, tiny_config

TINY_WINDOW = "residual_length=8,sink_length=2"
EIGHT = f"turboquant:bits=8,{TINY_WINDOW}"
OTHERS = ("rtn", "kivi", "polarquant", "qjl")
FULL_ATTENTION = [name for name in ARCHITECTURES if name != "mistral"]


def tokens(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 256, (rows, count), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, cache, chunk: int, mask=None) -> torch.Tensor:
    """Logits of all positions, fed in chunks."""
    parts = []
    for start in range(0, ids.shape[1], chunk):
        seen = None if mask is None else mask[:, : start + chunk]
        parts.append(model(ids[:, start : start + chunk], past_key_values=cache, attention_mask=seen).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_eight_bits_are_nearly_the_full_cache(architecture: str, chunk: int) -> None:
    model = tiny_model(architecture)
    ids = tokens(2, 120)
    expected = logits(model, ids, DynamicCache(config=model.config), chunk)
    cache = build_cache(model.config, parse_method(EIGHT))
    actual = logits(model, ids, cache, chunk)
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
    assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97
    if architecture != "mistral":
        assert cache_report(cache).compressed_tokens >= 64
        assert not torch.equal(actual, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_is_exactly_the_plain_cache(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = tokens(2, 60)
    cache = build_cache(model.config, parse_method("full"))
    assert type(cache) is DynamicCache
    assert torch.equal(logits(model, ids, cache, 16), logits(model, ids, DynamicCache(config=model.config), 16))


@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma3"])
def test_until_something_is_packed_the_result_is_exact(architecture: str) -> None:
    """The first call bit for bit, later ones but for the 16 bits in which earlier tokens are kept."""
    model = tiny_model(architecture)
    ids = tokens(2, 90)
    specs = ("turboquant:bits=2,residual_length=200", "full")
    cache, full = (build_cache(model.config, parse_method(spec)) for spec in specs)
    assert torch.equal(logits(model, ids[:, :60], cache, 60), logits(model, ids[:, :60], full, 60))
    later, expected = logits(model, ids[:, 60:], cache, 7), logits(model, ids[:, 60:], full, 7)
    assert 0 < (later - expected).square().mean().sqrt() < 1e-3 * expected.std()
    assert cache_report(cache).compressed_tokens == 0


@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma3"])
def test_until_something_is_packed_16_bit_models_say_the_same(architecture: str) -> None:
    model = tiny_model(architecture).to(torch.bfloat16)
    specs = ("turboquant:bits=2,residual_length=200", "full")
    cache, full = (build_cache(model.config, parse_method(spec)) for spec in specs)
    assert torch.equal(logits(model, tokens(2, 90), cache, 16), logits(model, tokens(2, 90), full, 16))


def test_layers_that_are_not_full_attention_keep_their_own_kind() -> None:
    gemma, mistral = (tiny_model(name) for name in ("gemma3", "mistral"))
    method = parse_method(EIGHT)
    kinds = [type(layer).__name__ for layer in build_cache(gemma.config, method).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "DynamicSlidingWindowLayer", "QuantizedLayer"]
    cache = build_cache(mistral.config, method)
    logits(mistral, tokens(1, 120), cache, 120)
    report = cache_report(cache)
    assert (report.compressed_layers, report.compressed_tokens, report.layers) == (0, 0, 3)


@pytest.mark.parametrize(
    "spec", ["turboquant:bits=4", "turboquant-paper:bits=4", EIGHT, *OTHERS, "kivi:residual_length=0,group_size=64"]
)
@pytest.mark.parametrize("rows", [1, 3])
@given(calls=st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_packed_length_follows_the_calls(llama, spec: str, rows: int, calls: list[int]) -> None:
    """However the tokens come, the same number is packed and the rest is held exactly."""
    method = parse_method(spec)
    layer = QuantizedLayer(method, 0)
    total = 0
    for count in calls:
        states = torch.randn(rows, 2, count, 64)
        layer.update(states, states)
        layer.compress()
        total += count
        assert layer.get_seq_length() == total
        assert layer.packed_length == method.packed_length(total)
        window = layer.exact_length - layer.sink_length
        assert window <= method.residual_length + method.block_length + method.sink_length


def test_exact_tokens_are_exact_and_packed_ones_are_not() -> None:
    layer = QuantizedLayer(parse_method("turboquant:bits=4"), 0)
    keys, values = torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64)
    for start in range(0, 300, 50):
        layer.update(keys[:, :, start : start + 50], values[:, :, start : start + 50])
        layer.compress()
    packed = layer.packed_length
    for dense, true in zip(layer.dense(), (keys.half().float(), values.half().float()), strict=True):
        assert torch.equal(dense[:, :, :4], true[:, :, :4])
        assert torch.equal(dense[:, :, 4 + packed :], true[:, :, 4 + packed :])
        error = (dense - true)[:, :, 4 : 4 + packed].square().sum() / true[:, :, 4 : 4 + packed].square().sum()
        assert 0.005 < error < 0.012


def put(layer: QuantizedLayer, *states: torch.Tensor) -> None:
    layer.update(*states)
    layer.compress()


def test_codes_of_values_do_not_depend_on_how_tokens_came() -> None:
    keys, values = torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
    once, singly = (QuantizedLayer(parse_method("turboquant:bits=4"), 0) for _ in range(2))
    put(once, keys, values)
    for i in range(200):
        put(singly, keys[:, :, i : i + 1], values[:, :, i : i + 1])
    assert torch.equal(once.dense()[1], singly.dense()[1])


@pytest.mark.parametrize(("bits", "most"), [(4, 6.0), (3, 5.1), (2, 4.2)])
def test_a_cache_is_never_much_larger_than_one_in_16_bits(bits: int, most: float) -> None:
    """In the shape of the built-in model, everything counted, from a prompt of 36 tokens on."""
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    cache = build_cache(tiny_config("llama", **shape), parse_method(f"turboquant:bits={bits}"))
    reports = {}
    for count in (36, *[1] * 130, 634 - 166, 1024 - 634):
        for layer in cache.layers:
            put(layer, torch.randn(1, 3, count, 64), torch.randn(1, 3, count, 64))
        report = cache_report(cache)
        reports[report.tokens] = report
    assert all(report.bytes <= 1.05 * report.full_precision_bytes for report in reports.values())
    assert reports[166].compressed_tokens == 64
    assert reports[634].compression_ratio > 2.4
    assert reports[1024].bits_per_value <= most


def test_room_is_given_in_the_dtype_of_the_model() -> None:
    """While steps are replayed, states are written as they come."""
    layer = QuantizedLayer(parse_method("turboquant:bits=4"), 0)
    put(layer, torch.randn(1, 2, 150, 64), torch.randn(1, 2, 150, 64))
    before = layer.exact()
    layer.reserve(300)
    assert layer.exact_keys.dtype == torch.float32
    assert layer.exact_keys.shape[2] == 4 + 64 + 64
    assert all(torch.equal(*pair) for pair in zip(before, layer.exact(), strict=True))


def test_nothing_is_quantized_twice() -> None:
    layer = QuantizedLayer(parse_method("turboquant:bits=2"), 0)
    layer.update(*(torch.randn(1, 2, 200, 64),) * 2)
    layer.compress()
    count = layer.packed_length
    before = [tensor.clone() for tensor in layer.packed_keys.view().tensors()]
    for _ in range(300):
        layer.update(*(torch.randn(1, 2, 1, 64),) * 2)
        layer.compress()
    assert layer.packed_length > count
    after = layer.packed_keys.view().narrow(0, count).tensors()
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "spec",
    [
        "turboquant:bits=3",
        "turboquant-paper:bits=2",
        "turboquant:key_bits=4,value_bits=2",
        *OTHERS,
        "rtn:rotation=hadamard",
    ],
)
def test_report_counts_every_storage_that_can_be_reached(llama, spec: str) -> None:
    cache = build_cache(llama.config, parse_method(spec))
    ids = tokens(2, 400)
    logits(llama, ids[:, :300], cache, 300)
    logits(llama, ids[:, 300:], cache, 4)
    report = cache_report(cache)
    assert report.bytes == sum(reachable_storages(cache).values())
    parts = ("key", "value", "scale", "exact", "spare", "shared")
    assert report.bytes == sum(getattr(report, f"{part}_bytes") for part in parts)
    assert report.full_precision_bytes == 2 * 2 * 3 * 2 * 2 * 64 * 400  # 16 bits, K and V, layers, rows, heads, dim
    assert report.bits_per_value == pytest.approx(16 * report.bytes / report.full_precision_bytes)


def test_compressed_bytes_are_the_bits_and_no_dense_copy_survives(llama) -> None:
    """Marginal cost of a token: codes and one byte a vector; a group adds the mean of its keys and three fp16 units."""
    held = {}
    for count in (260, 452):
        cache = build_cache(llama.config, parse_method("turboquant:bits=3"))
        llama(tokens(1, count), past_key_values=cache)
        report = cache_report(cache)
        assert report.compressed_tokens == (count - 68) // 64 * 64
        assert max(reachable_storages(cache).values()) < 4 * 2 * 132 * 64 * 1.1  # the exact window, in float32
        held[count] = report.key_bytes + report.value_bytes + report.scale_bytes
    per_value = 8 * (held[452] - held[260]) / (192 * 3 * 2 * 2 * 64)
    assert per_value == pytest.approx(3 + 8 / 64 + (8 * 64 + 3 * 16) / (2 * 64 * 64))  # 3.193


def test_spare_room_is_bounded(llama) -> None:
    cache = build_cache(llama.config, parse_method("turboquant:bits=4"))
    logits(llama, tokens(1, 500), cache, 4)
    report = cache_report(cache)
    assert report.spare_bytes < 0.3 * (report.bytes - report.exact_bytes) + 32 * 4 * 2 * 2 * 3 * 64 * 2


def test_rows_with_left_padding_are_what_they_are_alone(llama) -> None:
    """Pads change neither the codes of a padded row nor its result, and its sinks stay exact."""
    count, pads = 132 + 64, 64  # a whole number of blocks, so that both caches pack the same tokens
    ids = tokens(2, count)
    mask = torch.ones(2, count, dtype=torch.long)
    mask[0, :pads] = 0
    for spec in ("turboquant:bits=4", "turboquant:bits=2,residual_length=32", "turboquant-paper:bits=4", *OTHERS):
        method = parse_method(spec)
        both, alone = (build_cache(llama.config, method) for _ in range(2))
        seen = mask
        places = (seen.cumsum(-1) - 1).clamp_min(0)
        llama(ids, attention_mask=seen, position_ids=places, past_key_values=both)
        llama(ids[:1, pads:], past_key_values=alone)
        for step in range(40):
            new = tokens(2, 1, seed=step)
            seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.long)], dim=1)
            places = seen.sum(-1, keepdim=True) - 1
            together = llama(new, attention_mask=seen, position_ids=places, past_key_values=both).logits[0, -1]
            single = llama(new[:1], past_key_values=alone).logits[0, -1]
            assert torch.allclose(together, single, atol=0.02 * float(single.abs().max()))
        assert both.layers[0].packed_length == alone.layers[0].packed_length + pads
        for one, two in zip(both.layers[0].dense(), alone.layers[0].dense(), strict=True):
            difference = (one[:1, :, pads:] - two).norm(dim=-1) / two.norm(dim=-1)
            assert difference[:, :, : method.sink_length].sum() < 1e-4
            assert difference.median() < 1e-3


def test_padded_batch_at_eight_bits_equals_the_full_cache(llama) -> None:
    ids, mask = tokens(3, 140), torch.ones(3, 140, dtype=torch.long)
    mask[0, :50], mask[2, :9] = 0, 0
    expected = logits(llama, ids, DynamicCache(config=llama.config), 20, mask)
    cache = build_cache(llama.config, parse_method(EIGHT))
    actual = logits(llama, ids, cache, 20, mask)
    real = mask.bool()
    assert cache.layers[0].packed_length > 0
    assert (actual - expected)[real].abs().max() < 0.05 * expected.abs().max()
    assert actual.isfinite().all()


def test_an_all_pad_first_chunk_waits(llama) -> None:
    """A row that has not begun yet has no sinks: packing waits for its first tokens."""
    ids, mask = tokens(2, 250), torch.ones(2, 250, dtype=torch.long)
    mask[0, :120] = 0
    cache = build_cache(llama.config, parse_method("turboquant:bits=8,residual_length=8,sink_length=2"))
    parts = []
    for start in range(0, 250, 50):
        seen = mask[:, : start + 50]
        parts.append(llama(ids[:, start : start + 50], past_key_values=cache, attention_mask=seen).logits)
        # Packing starts at 2 sinks, 8 of the window, 120 pads in whole groups of 64, and one group.
        assert bool(cache.layers[0].packed_length) == (start + 50 >= 2 + 8 + 128 + 64)
    expected = logits(llama, ids, DynamicCache(config=llama.config), 50, mask)
    assert (torch.cat(parts, 1) - expected)[mask.bool()].abs().max() < 0.05 * expected.abs().max()


def test_repeat_and_reset() -> None:
    layer = QuantizedLayer(parse_method("turboquant:bits=4"), 0)
    layer.update(*(torch.randn(2, 2, 200, 64),) * 2)
    layer.compress()
    before = layer.dense()[0]
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.dense()[0], before.repeat_interleave(2, dim=0))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not reachable_storages(layer.packed_keys)


@pytest.mark.parametrize("tokens", [20, 300])
def test_a_cache_that_was_cropped_to_nothing_takes_other_rows(tokens: int) -> None:
    """Neither the rows nor the pads of what was there reach what comes."""
    layer, fresh = (QuantizedLayer(parse_method("turboquant:bits=4"), 0) for _ in range(2))
    layer.update(*torch.randn(2, 3, 2, tokens, 64))
    layer.compress(torch.arange(tokens) >= torch.tensor([[5], [0], [2]]))
    layer.crop(-tokens)
    assert (layer.get_seq_length(), layer.batch_size) == (0, 0)
    new = torch.randn(2, 1, 2, 300, 64)
    for one in (layer, fresh):
        one.update(*new)
        one.compress()
    for got, expected in zip(layer.dense(), fresh.dense(), strict=True):
        assert torch.equal(got, expected)


def test_a_call_with_another_number_of_rows_is_refused() -> None:
    layer = QuantizedLayer(parse_method("turboquant"), 0)
    layer.update(*torch.randn(2, 3, 2, 5, 64))
    with pytest.raises(ValueError, match="the cache holds 3 rows, the call has 1"):
        layer.update(*torch.randn(2, 1, 2, 1, 64))


def test_an_emptied_cache_still_counts_its_tables(llama) -> None:
    cache = build_cache(llama.config, parse_method("turboquant"))
    llama(tokens(1, 200), past_key_values=cache)
    cache.reset()
    assert cache_report(cache).bytes == sum(reachable_storages(cache).values()) > 0


def test_crop_takes_a_negative_number() -> None:
    layer = QuantizedLayer(parse_method("turboquant"), 0)
    with pytest.raises(ValueError, match="negative integer, got 3"):
        layer.crop(3)


def test_another_attention_function_is_told_what_is_missing() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    cache = build_cache(model.config, parse_method("turboquant"))
    with pytest.raises(RuntimeError, match="needs the attention function 'turboquant'"):
        model(tokens(1, 20), past_key_values=cache)


def test_changing_bits_or_seed_changes_the_codes(llama) -> None:
    ids = tokens(1, 200)
    codes = {}
    for spec in ("bits=4", "bits=2", "bits=4,seed=1"):
        cache = build_cache(llama.config, parse_method(f"turboquant:{spec}"))
        llama(ids, past_key_values=cache)
        codes[spec] = cache.layers[0].packed_keys.view().codes[0]
    assert codes["bits=4"].shape[-1] == 2 * codes["bits=2"].shape[-1]
    assert not torch.equal(codes["bits=4"], codes["bits=4,seed=1"])


def test_a_cache_holds_no_gradients_and_needs_no_no_grad(llama) -> None:
    with torch.enable_grad():
        cache = build_cache(llama.config, parse_method(EIGHT))
        logits(llama, tokens(1, 60), cache, 20)
    assert all(not tensor.requires_grad for tensor in cache.layers[0].exact())


def test_bfloat16_runs_keep_their_dtype() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    cache = build_cache(model.config, parse_method("turboquant:bits=8,residual_length=8"))
    output = logits(model, tokens(1, 150), cache, 1)
    expected = logits(model, tokens(1, 150), DynamicCache(config=model.config), 1)
    assert output.dtype == torch.bfloat16
    assert cache.layers[0].exact()[0].dtype == torch.bfloat16
    assert (output - expected).float().abs().mean() < 0.05 * expected.float().abs().mean()


def test_compressed_cache_is_ours(llama) -> None:
    assert isinstance(build_cache(llama.config, parse_method("turboquant")), CompressedCache)


def test_a_deep_copy_goes_its_own_way(llama) -> None:
    """Forking a conversation copies the cache; both copies go on, and neither disturbs the other."""
    ids = tokens(1, 150)
    cache = build_cache(llama.config, parse_method("turboquant:bits=4"))
    llama(ids, past_key_values=cache)
    fork = copy.deepcopy(cache)
    before = [tensor.clone() for tensor in cache.layers[0].dense()]
    logits(llama, tokens(1, 60, seed=1), fork, 1)
    assert fork.get_seq_length() == 210
    assert all(torch.equal(one, two) for one, two in zip(before, cache.layers[0].dense(), strict=True))
    again = build_cache(llama.config, parse_method("turboquant:bits=4"))
    llama(ids, past_key_values=again)
    expected = logits(llama, tokens(1, 60, seed=1), again, 1)
    assert torch.allclose(logits(llama, tokens(1, 60, seed=1), cache, 1), expected)


def test_one_mask_may_serve_all_rows() -> None:
    """A mask with a batch of one means the same padding in every row."""
    states = torch.randn(3, 2, 200, 64)
    visible = torch.ones(1, 200, dtype=torch.bool)
    visible[:, :20] = False
    layers = []
    for mask in (visible, visible.repeat(3, 1)):
        layer = QuantizedLayer(parse_method("turboquant:bits=4"), 0)
        layer.update(states, states)
        layer.compress(mask)
        layers.append(layer)
    assert layers[0].packed_length > 0
    assert all(torch.equal(*pair) for pair in zip(layers[0].dense(), layers[1].dense(), strict=True))
    layers[0].reorder_cache(torch.tensor([2, 0, 1]))
