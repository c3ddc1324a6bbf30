"""The attention experiment against brute force in float64, against what real caches serve, and against its limits."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.models import HF_FP8, AttentionCalls, Lossless, tiny_loaded, tokens
from turboquant.cache.build import NothingCompressedError, QuantizedLayer, build_cache, layer_states
from turboquant.experiments.base import Measurement, Watch
from turboquant.experiments.capture import Captured, capture
from turboquant.experiments.heads import EXPERIMENT, compare_attention
from turboquant.hf_attention import observe_queries
from turboquant.kernels.scoring import Scoring
from turboquant.methods import METHODS, Method, parse_method
from turboquant.models.load import LoadedModel, tiny_model
from turboquant.records.settings import HeadsSettings
from turboquant.run.generate import CancelledError, PromptError, QueryRecorder
from turboquant.run.memory import WORKSPACE_BYTES, check_context, full_bytes, tokens_that_fit
from turboquant.run.metrics import Span, compare_layer

QUERIES = 24
SMALL = "residual_length=8,sink_length=2"
SPECS = [f"turboquant:bits=3,{SMALL}", "turboquant-paper:bits=2", "kivi:bits=2,residual_length=32"]
ARCHITECTURES = ["llama", "qwen2", "phi", "gemma3"]


def captured_pass(loaded: LoadedModel, count: int = 400, chunk: int = 100) -> Captured:
    return capture(loaded, tokens(1, count), QUERIES, chunk, Watch())


# -- the captured pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_chunked_pass_keeps_what_one_call_computes(architecture: str) -> None:
    loaded = tiny_loaded(architecture)
    captured = captured_pass(loaded)
    cache = build_cache(loaded.model.config, METHODS["full"]())
    recorder = QueryRecorder(last=QUERIES)
    with observe_queries(recorder):
        logits = loaded.model(captured.ids, past_key_values=cache).logits[0, -QUERIES:]
    torch.testing.assert_close(captured.logits, logits, atol=2e-4, rtol=1e-4)
    for layer_idx in captured.layer_indices:
        for own, expected in zip(captured.states(layer_idx), layer_states(cache, layer_idx), strict=True):
            torch.testing.assert_close(own, expected, atol=2e-4, rtol=1e-4)
        (query,) = recorder.queries[layer_idx]
        assert query.shape[2] == QUERIES
        torch.testing.assert_close(captured.queries[layer_idx], query, atol=2e-4, rtol=1e-4)
    assert captured.layer_indices == ([2] if architecture == "gemma3" else [0, 1, 2])
    assert sorted(captured.windows) == ([0, 1] if architecture == "gemma3" else [])


@pytest.mark.parametrize("spec", ["full", *SPECS])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_filled_cache_serves_what_a_real_prefill_would(architecture: str, spec: str) -> None:
    """One call over everything before the last chunk, then the chunk: the logits are the same up to float error."""
    loaded, method = tiny_loaded(architecture), parse_method(spec)
    captured = captured_pass(loaded)
    real = build_cache(loaded.model.config, method)
    loaded.model(captured.ids[:, : captured.before], past_key_values=real)
    expected = loaded.model(captured.ids[:, captured.before :], past_key_values=real).logits[0]
    replayed = captured.replay(loaded, captured.filled(loaded, method), Watch())
    # Keys of two passes differ by rounding, and now and then a code with them.
    torch.testing.assert_close(replayed, expected, atol=3e-2, rtol=0)
    assert (replayed - expected).abs().mean() < 1e-3
    if spec != "full":
        assert (replayed - captured.logits).abs().mean() > 1e-2


def test_the_full_cache_is_as_it_was_after_a_replay() -> None:
    loaded = tiny_loaded()
    captured = captured_pass(loaded)
    before = [states.clone() for i in captured.layer_indices for states in captured.states(i)]
    replayed = captured.replay(loaded, captured.filled(loaded, METHODS["full"]()), Watch())
    after = [states for i in captured.layer_indices for states in captured.states(i)]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    torch.testing.assert_close(replayed, captured.logits, atol=1e-6, rtol=0)


def test_methods_share_one_forward_pass() -> None:
    loaded = tiny_loaded(max_position_embeddings=1024)
    calls = AttentionCalls(loaded)
    methods = [parse_method(f"turboquant:bits={bits}") for bits in (2, 3, 4)]
    settings = HeadsSettings(context=700, chunk_tokens=100)
    results = list(EXPERIMENT.run(loaded, methods, settings, Watch()))
    assert [method for method, _ in results] == methods
    chunks = -(-(700 - settings.queries) // 100) + 1
    assert calls.layers.count(0) == chunks + len(methods)  # one pass, and each method reads the last chunk


# -- what is compared --------------------------------------------------------------------------------------------------


def brute_force(query: Tensor, full: tuple, served: tuple, scaling: float, packed: Span, needle: Span) -> dict:
    """Head by head and query by query in float64."""
    heads, queries = query.shape[:2]
    count, groups = full[0].shape[1], heads // full[0].shape[0]
    found: dict[str, dict[str, Tensor]] = {"served": {}, "packed": {}, "needle": {}}

    def note(side: str, name: str, head: int, place: int | None, value: float) -> None:
        shape = (heads, queries) if place is not None else (heads,)
        target = found[side].setdefault(name, torch.zeros(shape, dtype=torch.float64))
        target[(head, place) if place is not None else head] = float(value)

    for head in range(heads):
        keys, values = ([states[head // groups].double() for states in (full[i], served[i])] for i in (0, 1))
        for place in range(queries):
            seen = count - queries + place + 1
            scores = [key[:seen] @ query[head, place].double() for key in keys]
            weights = [(side * scaling).softmax(-1) for side in scores]
            outputs = [weight @ value[:seen] for weight, value in zip(weights, values, strict=True)]
            note("served", "output_error", head, place, (outputs[1] - outputs[0]).norm() / outputs[0].norm())
            for side, part in (("served", slice(0, seen)), ("packed", packed.places)):
                one, two = (score[part] for score in scores)
                best, order = one.argmax(), two.argsort(descending=True)
                note(side, "cosine_scores", head, place, one @ two / one.norm() / two.norm())
                softened = [(score[part] * scaling).softmax(-1) for score in scores]
                cosine = softened[0] @ softened[1] / softened[0].norm() / softened[1].norm()
                note(side, "cosine_weights", head, place, cosine)
                note(side, "top1", head, place, order[0] == best)
                note(side, "top5", head, place, best in order[:5])
        for suffix, score, weight in zip(("_full", ""), scores, weights, strict=True):
            note("needle", f"rank{suffix}", head, None, 1 + (score > score[needle.places].max()).sum())
            note("needle", f"mass{suffix}", head, None, weight[needle.places].sum())
    return found


@pytest.mark.parametrize("tile", [1, 4000, 2**20])
def test_layers_are_compared_as_a_loop_over_heads_would(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboquant.run.metrics.TILE_SCORES", tile)
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator)
    query, keys, values = draw(6, 9, 16), 2 * draw(2, 70, 16), draw(2, 70, 16)
    served = (keys + 0.4 * draw(2, 70, 16), values + 0.2 * draw(2, 70, 16))
    packed, needle = Span(4, 52), Span(20, 25)
    actual = compare_layer(query, (keys, values), served, Scoring(0.25), packed, needle)
    expected = brute_force(query, (keys, values), served, 0.25, packed, needle)
    for side, figures in expected.items():
        assert set(actual[side]) == set(figures)
        for name, value in figures.items():
            torch.testing.assert_close(actual[side][name].double(), value, atol=1e-5, rtol=1e-5, msg=f"{side} {name}")
    assert 0 < actual["served"]["top1"].mean() < 1


def test_nothing_packed_gives_no_packed_figures() -> None:
    query, keys = torch.randn(2, 3, 8), torch.randn(1, 10, 8)
    found = compare_layer(query, (keys, keys), (keys, keys), Scoring(1.0), None, Span(2, 4))
    assert found["packed"] == {}
    assert bool((found["served"]["top1"] == 1).all())


@pytest.mark.parametrize("spec", SPECS)
def test_the_compared_states_are_what_attention_reads(spec: str) -> None:
    """Outputs from the compared states equal those of the real attention function over the packed codes."""
    from turboquant.experiments.heads import _served
    from turboquant.hf_attention import attention_forward

    loaded, method = tiny_loaded(), parse_method(spec)
    captured = captured_pass(loaded)
    cache = captured.filled(loaded, method)
    for layer_idx in captured.layer_indices:
        keys, values = _served(captured, cache, layer_idx)
        query = captured.queries[layer_idx]
        place = torch.arange(keys.shape[1])
        visible = place <= place[captured.before :, None]
        groups = query.shape[1] // keys.shape[0]
        weights = query[0] @ keys.repeat_interleave(groups, 0).mT * captured.scoring[layer_idx].scaling
        expected = weights.masked_fill(~visible, -torch.inf).softmax(-1) @ values.repeat_interleave(groups, 0)
        layer = cache.layers[layer_idx]
        assert isinstance(layer, QuantizedLayer)
        own = [states[:, :, captured.before :] for states in captured.states(layer_idx)]
        module = loaded.model.model.layers[layer_idx].self_attn
        states = layer.update(*own)
        output, _ = attention_forward(module, query, *states, None, scaling=captured.scoring[layer_idx].scaling)
        torch.testing.assert_close(output[0].transpose(0, 1), expected, atol=2e-5, rtol=1e-4)


# -- the experiment ----------------------------------------------------------------------------------------------------


def measured(loaded: LoadedModel, *specs: str | Method, **settings) -> list[Measurement]:
    methods = [parse_method(spec) if isinstance(spec, str) else spec for spec in specs]
    chosen = HeadsSettings(**{"context": 640, "queries": 32, "chunk_tokens": 128, **settings})
    return [found for _, found in EXPERIMENT.run(loaded, methods, chosen, Watch())]


def figures(found: Measurement) -> dict[str, float]:
    """The metrics that could be had."""
    return {name: value for name, value in found.metrics.items() if value is not None}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded(max_position_embeddings=1024)


def test_the_full_cache_is_the_reference_row(loaded: LoadedModel) -> None:
    (full,) = measured(loaded, "full")
    assert full.metrics["cosine_similarity"] == pytest.approx(1, abs=1e-6)
    assert (full.metrics["top1_match_pct"], full.metrics["top5_match_pct"]) == (100, 100)
    assert full.metrics["kl_mean"] == pytest.approx(0, abs=1e-9)
    assert full.metrics["needle_rank"] == full.metrics["needle_rank_full"]
    assert full.cache is not None
    assert full.cache.bits_per_value == 32  # float32 on the CPU
    assert full.cache.tokens == 640


def test_without_loss_nothing_changes(loaded: LoadedModel) -> None:
    (found,) = measured(loaded, Lossless())
    assert found.metrics["packed_cosine_similarity"] == pytest.approx(1, abs=1e-6)
    assert found.metrics["top1_match_pct"] == 100
    assert found.metrics["output_error"] == pytest.approx(0, abs=1e-5)
    assert found.metrics["kl_mean"] == pytest.approx(0, abs=1e-6)


def test_figures_fall_as_bits_go_away(loaded: LoadedModel) -> None:
    eight, four, two = (figures(found) for found in measured(loaded, *(f"turboquant:bits={b}" for b in (8, 4, 2))))
    for name in ("cosine_similarity", "cosine_weights", "top1_match_pct", "packed_top1_match_pct"):
        assert two[name] < four[name] <= eight[name], name
    for name in ("kl_mean", "output_error"):
        assert two[name] > 2 * four[name] > 4 * eight[name] > 0, name
    assert two["compression_ratio"] > four["compression_ratio"] > eight["compression_ratio"]


def test_measured_and_formula_ratio_stand_side_by_side(loaded: LoadedModel) -> None:
    (found,) = measured(loaded, "turboquant-paper:bits=4")
    assert found.cache is not None
    assert found.metrics["payload_ratio"] == 4
    assert found.metrics["compression_ratio"] == found.cache.full_precision_bytes / found.cache.bytes
    assert found.cache.tokens == 640


@pytest.mark.parametrize("spec", ["turboquant:bits=3", "hf-quanto:bits=4", HF_FP8, "rtn:bits=4"])
def test_layers_with_a_window_are_passed_over_and_counted(spec: str) -> None:
    if spec.startswith("hf-quanto"):
        pytest.importorskip("optimum.quanto")
    (found,) = measured(tiny_loaded("gemma3", max_position_embeddings=1024), spec)
    assert found.detail["layer_indices"] == [2]
    assert found.detail["window_layers"] == 2
    assert len(found.detail["served"]["per_head_top1"]) == 1
    assert 0 < figures(found)["kl_mean"] < 1
    assert found.detail["packed"] is not None


def test_detail_is_per_layer_and_head(loaded: LoadedModel) -> None:
    (found,) = measured(loaded, "turboquant:bits=3")
    matrices = [found.detail[name] for name in found.detail if name.startswith("per_head_")]
    matrices += [
        found.detail[side][name] for side in ("served", "packed") for name in ("per_head_top1", "per_head_top5")
    ]
    assert [(len(one), len(one[0])) for one in matrices] == [(3, 4)] * len(matrices)
    assert len(found.detail["kl"]) == 32
    mean = sum(sum(row) for row in found.detail["served"]["per_head_top1"]) / 12
    assert found.metrics["top1_match_pct"] == pytest.approx(100 * mean, abs=1e-3)


def test_a_method_that_packed_nothing_gives_no_figure(loaded: LoadedModel) -> None:
    with pytest.raises(NothingCompressedError, match="packed none of the 608 tokens"):
        measured(loaded, "turboquant:residual_length=2000")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 2000}, "has a context of 1,024 tokens, got 2,000"),
        ({"context": 20, "queries": 32}, "queries must be fewer than the context's 20, got 32"),
        ({"context": 100}, "a prompt with a needle has at least"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(loaded: LoadedModel, settings, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        measured(loaded, "turboquant", **settings)


def test_a_cancel_is_heard_in_the_pass_and_in_the_comparison(loaded: LoadedModel) -> None:
    for after in (1, 8, 10, 14):  # 3 layers: 3 chunks, the comparison, the last chunk again
        asked: list[bool] = []

        def cancelled(asked: list = asked, after: int = after) -> bool:
            asked.append(True)
            return len(asked) > after

        settings = HeadsSettings(context=640)
        with pytest.raises(CancelledError):
            list(EXPERIMENT.run(loaded, [parse_method("turboquant")], settings, Watch(cancelled=cancelled)))
        assert len(asked) == after + 1


# -- memory --------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return made


def test_no_square_of_scores_is_ever_made() -> None:
    context, chunk = 4096, 128
    loaded = tiny_loaded(max_position_embeddings=context, num_hidden_layers=1)
    with Largest() as largest:
        measured(loaded, "turboquant:bits=3", context=context, chunk_tokens=chunk)
    # Scores of one chunk of queries, all heads; a square would have 16 million.
    assert context * chunk <= largest.elements <= 4 * context * chunk


PEAK = """
import sys, torch
from tests.support.models import tiny_loaded
from turboquant.experiments.base import Watch
from turboquant.methods import parse_method
from turboquant.experiments.heads import EXPERIMENT
from turboquant.records.settings import HeadsSettings

torch.set_num_threads(1)
loaded = tiny_loaded(num_hidden_layers=2, max_position_embeddings=16384, num_key_value_heads=4)

def run(context):
    settings = HeadsSettings(context=context, chunk_tokens=256)
    methods = [parse_method(f"turboquant:bits={bits}") for bits in (4, 2)]
    return list(EXPERIMENT.run(loaded, methods, settings, Watch()))

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

run(1024)  # compiles kernels, loads what is loaded late
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
run(16384)
print(before, status("VmHWM"))
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_16k_tokens_take_model_and_full_cache_and_a_quarter() -> None:
    """And the workspace that `check_context` reckons with; a square of scores alone would be 1 GiB a head."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=240, check=True)
    before, peak = map(int, done.stdout.split())
    full = full_bytes(tiny_model("llama", num_hidden_layers=2, num_key_value_heads=4).config, "fp32", 16384)
    assert full == 16384 * 2 * 2 * 4 * 64 * 4
    assert peak - before <= 1.25 * full + WORKSPACE_BYTES
    assert peak - before > full


def test_how_many_tokens_fit_is_said() -> None:
    config = tiny_model("llama", max_position_embeddings=10**6).config
    free = WORKSPACE_BYTES + full_bytes(config, "fp32", 5000)
    assert tokens_that_fit(config, "fp32", free) == 4000
    check_context("tiny", config, 4000, "fp32", free)
    with pytest.raises(
        PromptError, match=r"a context of 4,001 tokens needs 0\.3 GiB .* 0\.3 GiB are free: 4,000 tokens fit"
    ):
        check_context("tiny", config, 4001, "fp32", free)
    with pytest.raises(PromptError, match="0 tokens fit"):
        check_context("tiny", config, 10, "fp32", -5)
    assert 2 * full_bytes(config, "4bit", 5000) == full_bytes(config, "fp32", 5000)


def test_window_layers_take_their_window() -> None:
    config = tiny_model("gemma3").config
    layer = 2 * 2 * 64 * 4
    assert full_bytes(config, "fp32", 20) == 3 * 20 * layer
    assert full_bytes(config, "fp32", 400) == (400 + 2 * 32) * layer


def test_the_cache_is_left_as_it_was_by_the_comparison() -> None:
    loaded = tiny_loaded()
    captured = captured_pass(loaded)
    cache = captured.filled(loaded, parse_method(SPECS[0]))
    before = [states.clone() for states in layer_states(cache, 1)]
    compare_attention(captured, cache, Span(10, 20), Watch())
    assert all(torch.equal(one, two) for one, two in zip(before, layer_states(cache, 1), strict=True))
