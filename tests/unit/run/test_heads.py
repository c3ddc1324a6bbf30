"""What the probe says of heads and tokens against what real caches hold and what a plain loop measures."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tests.support.models import Lossless, tiny_loaded, tokens
from turboquant.cache.build import QuantizedLayer, build_cache
from turboquant.methods import METHODS, Method, parse_method
from turboquant.models.load import LoadedModel, tiny_model
from turboquant.records.comparison import HeadMetrics, HeadScores, Settings
from turboquant.run import heads as probe
from turboquant.run.generate import CancelledError, Generation, QueryRecorder, generate_in_turn
from turboquant.run.heads import METRICS, head_metrics, token_metrics
from turboquant.run.metrics import head_agreement

PROMPT, STEPS = 70, 36
SMALL = "residual_length=8,sink_length=2"  # packs a block at 42, 74 and 106 tokens
METHODS_TO_PROBE = [
    f"turboquant:bits=3,{SMALL}",
    "turboquant:bits=4,residual_length=40,group_size=32,qjl=orthogonal",  # packs at 76 tokens, not from the start
    "turboquant-paper:bits=2",
]


def answered(loaded: LoadedModel, prompt: Tensor, steps: int = STEPS) -> Generation:
    """A finished answer with the full cache; sampled, so that it is no loop of one token."""
    settings = Settings(max_new_tokens=steps, temperature=1.0, seed=1)
    generation = Generation(
        loaded, prompt, build_cache(loaded.model.config, METHODS["full"]()), settings, QueryRecorder()
    )
    generate_in_turn([generation], lambda _: None)
    assert generation.finish == "length"
    return generation


def measured(generation: Generation, method: Method, prompt_tokens: int = PROMPT) -> HeadMetrics:
    return head_metrics(generation.cache, generation.recorder, method, prompt_tokens)


def kept(generation: Generation, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer of the full cache at the end of the answer."""
    layer: Any = generation.cache.layers[layer_idx]
    return layer.keys, layer.values


def replay(generation: Generation, layer_idx: int, method: Method, prompt_tokens: int) -> Iterator[QuantizedLayer]:
    """A real compressed layer fed with one layer's keys and values call by call, as it is after each call."""
    keys, values = kept(generation, layer_idx)
    layer = QuantizedLayer(method, layer_idx)
    end = keys.shape[2]
    for start, stop in zip([0, *range(prompt_tokens, end)], range(prompt_tokens, end + 1), strict=True):
        layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        layer.compress()
        yield layer


def scores(query: Tensor, keys: Tensor) -> Tensor:
    """Inner products (heads, tokens) of one query (1, heads, 1, dim), each with the keys of its KV head."""
    groups = query.shape[1] // keys.shape[1]
    return torch.einsum("hd,htd->ht", query[0, :, 0], keys[0].repeat_interleave(groups, dim=0))


def replayed(generation: Generation, method: Method) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Agreement (layer, head, step) as served and over packed positions, from replayed layers; packed counts."""
    indices = [i for i, layer in enumerate(generation.cache.layers) if type(layer) is DynamicLayer]
    shape = (len(indices), generation.recorder.queries[indices[0]][0].shape[1], STEPS)
    served, packed = ({name: torch.full(shape, torch.nan) for name in METRICS} for _ in range(2))
    counts: list[int] = []
    for row, layer_idx in enumerate(indices):
        counts = []
        keys, _ = kept(generation, layer_idx)
        for step, layer in enumerate(replay(generation, layer_idx, method, PROMPT)):
            query = generation.recorder.queries[layer_idx][step]
            pair = scores(query, keys[:, :, : PROMPT + step]), scores(query, layer.dense()[0])
            counts.append(layer.packed_length)
            places = slice(method.sink_length, method.sink_length + counts[-1])
            for target, part in ((served, slice(None)), (packed, places)):
                full, compressed = (side[:, None, part] for side in pair)
                if full.shape[-1]:
                    visible = torch.ones(1, full.shape[-1], dtype=torch.bool)
                    result = head_agreement(full, compressed, visible, generation.recorder.scoring[layer_idx].scaling)
                    for name in METRICS:
                        target[name][row, :, step] = result[name][:, 0]
    return served, packed, counts


def assert_same(actual: HeadScores, expected: dict[str, Tensor]) -> None:
    for name in METRICS:
        values = expected[name]
        for axis, means in (("head", values.nanmean(dim=2)), ("step", values.flatten(0, 1).nanmean(dim=0))):
            given = getattr(actual, f"per_{axis}_{name}")
            flat = given if axis == "step" else [value for row in given for value in row]
            assert [value is None for value in flat] == means.isnan().flatten().tolist()
            filled = torch.tensor([torch.nan if value is None else value for value in flat])
            assert torch.allclose(filled, means.flatten(), atol=2e-6, equal_nan=True), f"{axis} {name}"
    for name in ("cosine_scores", "cosine_weights"):
        assert getattr(actual, name) == pytest.approx(float(expected[name].nanmean()), abs=2e-6)
    for name in ("top1", "top5"):
        assert getattr(actual, f"{name}_match_pct") == pytest.approx(100 * float(expected[name].nanmean()), abs=1e-3)
    assert actual.heads_at_risk_pct == pytest.approx(100 - 100 * float(expected["top1"].nanmean()), abs=1e-3)


@pytest.fixture(scope="module", params=["llama", "qwen2", "phi", "gemma3"])
def run(request: pytest.FixtureRequest) -> Generation:
    with torch.no_grad():
        return answered(tiny_loaded(request.param), tokens(1, PROMPT))


@pytest.fixture(scope="module")
def llama_run() -> Generation:
    with torch.no_grad():
        return answered(tiny_loaded(), tokens(1, PROMPT))


@pytest.mark.parametrize("spec", METHODS_TO_PROBE)
def test_head_metrics_are_those_of_a_layer_that_was_fed_call_by_call(run: Generation, spec: str) -> None:
    method = parse_method(spec)
    served, packed, counts = replayed(run, method)
    metrics = measured(run, method)
    assert len(set(counts)) > 1
    assert metrics.packed_tokens == counts
    assert metrics.positions == list(range(PROMPT - 1, PROMPT - 1 + STEPS))
    kinds = [type(layer).__name__ for layer in run.cache.layers]
    assert metrics.layer_indices == [i for i, kind in enumerate(kinds) if kind == "DynamicLayer"]
    assert len(metrics.layer_indices) == (1 if "DynamicSlidingWindowLayer" in kinds else 3)
    assert_same(metrics.served, served)
    assert_same(metrics.packed, packed)
    assert metrics.served.cosine_scores is not None
    assert metrics.served.cosine_scores < 0.9999  # something was compressed, so the agreement above says something


@pytest.mark.parametrize("spec", METHODS_TO_PROBE)
def test_compressed_scores_are_those_of_the_keys_the_cache_holds(
    run: Generation, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Score by score: the same packing, the same centre, the same codes."""
    seen: list[tuple[Tensor, Tensor]] = []  # for each run of steps: as served, then the packed positions if any

    def spy(full: Tensor, compressed: Tensor, visible: Tensor, scaling: float) -> dict[str, Tensor]:
        seen.append((full, compressed))
        return head_agreement(full, compressed, visible, scaling)

    monkeypatch.setattr(probe, "head_agreement", spy)
    method = parse_method(spec)
    metrics = measured(run, method)
    served = iter(seen)
    for layer_idx in metrics.layer_indices:
        step = 0
        layers = replay(run, layer_idx, method, PROMPT)
        keys, _ = kept(run, layer_idx)
        while step < STEPS:
            full, compressed = next(served)
            for row in range(full.shape[1]):
                layer = next(layers)
                query = run.recorder.queries[layer_idx][step]
                tokens_held = PROMPT + step
                held = scores(query, layer.dense()[0])
                assert torch.allclose(compressed[:, row, :tokens_held], held, atol=1e-4 * float(held.abs().max()))
                exact = scores(query, keys[:, :, :tokens_held])
                assert torch.allclose(full[:, row, :tokens_held], exact, atol=1e-4 * float(exact.abs().max()))
                step += 1
            if layer.packed_length:
                assert next(served)[0].shape[-1] == layer.packed_length
    assert next(served, None) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi", "phi3", "gemma3"])
def test_queries_are_the_models_own(architecture: str) -> None:
    """With the cached keys they give the attention weights that the library's eager attention reports."""
    loaded = tiny_loaded(architecture)
    generation = answered(loaded, tokens(1, 40), steps=6)
    eager = tiny_model(architecture, 4)
    eager.set_attn_implementation("eager")
    fed = torch.cat([tokens(1, 40), torch.tensor([generation.tokens[:-1]])], dim=1)
    attentions = eager(fed, output_attentions=True).attentions
    compared = 0
    for layer_idx, layer in enumerate(generation.cache.layers):
        if type(layer) is not DynamicLayer:
            continue
        queries, (cached, _) = generation.recorder.queries[layer_idx], kept(generation, layer_idx)
        assert len(queries) == 6
        for step, query in enumerate(queries):
            assert query.shape == (1, eager.config.num_attention_heads, 1, cached.shape[-1])
            raw = scores(query, cached[:, :, : 40 + step]) * generation.recorder.scoring[layer_idx].scaling
            expected = attentions[layer_idx][0, :, 39 + step, : 40 + step]
            assert torch.allclose(raw.softmax(-1), expected, atol=1e-5)
            compared += 1
    assert compared == 6 * (1 if architecture == "gemma3" else 3)


def test_queries_of_phi_are_rotated_in_part_and_queries_are_no_keys() -> None:
    """By hand from the model's weights: the first 40 % of each head turn with the position, the rest does not."""
    loaded = tiny_loaded("phi")
    generation = answered(loaded, tokens(1, 40), steps=2)
    block = loaded.model.model.layers[0]
    hidden = block.input_layernorm(loaded.model.model.embed_tokens(tokens(1, 40)))
    plain = block.self_attn.q_proj(hidden)[0, -1].view(4, 80)
    frequencies = 39 / 1e4 ** (torch.arange(0, 32, 2) / 32)
    cos, sin = frequencies.cos(), frequencies.sin()
    low, high = plain[:, :16], plain[:, 16:32]
    expected = torch.cat([low * cos - high * sin, high * cos + low * sin, plain[:, 32:]], dim=-1)
    recorded = generation.recorder.queries[0][0][0, :, 0]
    assert torch.allclose(recorded, expected, atol=1e-4)
    keys = kept(generation, 0)[0][0, :, 39].repeat_interleave(2, dim=0)
    assert (recorded - keys).abs().max() > 0.1


@pytest.mark.parametrize("method", [Lossless(), Lossless(residual_length=0, sink_length=0)], ids=str)
def test_without_loss_every_head_agrees(run: Generation, method: Method) -> None:
    metrics = measured(run, method)
    assert metrics.packed_tokens[-1] > 0
    for part in (metrics.served, metrics.packed):
        assert part.top1_match_pct == 100
        assert part.top5_match_pct == 100
        assert part.heads_at_risk_pct == 0
        assert part.cosine_scores == pytest.approx(1, abs=1e-5)
        assert part.cosine_weights == pytest.approx(1, abs=1e-5)


def test_fewer_bits_agree_less(llama_run: Generation) -> None:
    eight, four, two = (measured(llama_run, parse_method(f"turboquant-paper:bits={b}")).served for b in (8, 4, 2))
    for name in ("cosine_scores", "cosine_weights", "top1_match_pct", "top5_match_pct"):
        assert getattr(two, name) < getattr(four, name) <= getattr(eight, name), name
    assert two.heads_at_risk_pct is not None
    assert eight.heads_at_risk_pct is not None
    assert two.heads_at_risk_pct > 3 * eight.heads_at_risk_pct


def test_the_exact_window_flatters_what_is_served(llama_run: Generation) -> None:
    metrics = measured(llama_run, parse_method("turboquant:bits=2,residual_length=30,group_size=32"))
    assert metrics.packed.cosine_scores is not None
    assert metrics.served.cosine_scores is not None
    assert metrics.packed.cosine_scores < metrics.served.cosine_scores


def test_where_nothing_is_packed_there_is_no_packed_figure(llama_run: Generation) -> None:
    metrics = measured(llama_run, parse_method("turboquant:bits=2,residual_length=200"))
    assert metrics.packed_tokens == [0] * STEPS
    assert metrics.served.top1_match_pct == 100
    assert metrics.served.cosine_scores == pytest.approx(1, abs=1e-6)
    assert metrics.packed.per_step_top1 == [None] * STEPS
    assert metrics.packed.per_head_cosine_scores == [[None] * 4] * 3
    figures = (metrics.packed.cosine_scores, metrics.packed.cosine_weights, metrics.packed.top1_match_pct)
    assert figures == (None, None, None)
    assert metrics.packed.heads_at_risk_pct is None


def test_a_step_before_the_first_packing_has_no_packed_figure(llama_run: Generation) -> None:
    method = parse_method("turboquant:bits=4,residual_length=50,group_size=32")  # packs at 86 tokens
    metrics = measured(llama_run, method)
    before = 86 - PROMPT
    assert metrics.packed_tokens == [0] * before + [32] * (STEPS - before)
    assert metrics.packed.per_step_top1[:before] == [None] * before
    assert all(value is not None for value in metrics.packed.per_step_top1[before:])
    assert metrics.packed.top1_match_pct is not None


def test_progress_ends_at_one_and_a_cancel_ends_the_measurement(llama_run: Generation) -> None:
    method, recorder = parse_method("turboquant-paper"), llama_run.recorder
    fractions: list[float] = []
    head_metrics(llama_run.cache, recorder, method, PROMPT, fractions.append)
    assert fractions == pytest.approx([1 / 3, 2 / 3, 1.0])
    for layers in (0, 1):
        answers = iter([False] * layers + [True])
        stopping = QueryRecorder(partial(next, answers), queries=recorder.queries, scoring=recorder.scoring)
        fractions.clear()
        with pytest.raises(CancelledError):
            head_metrics(llama_run.cache, stopping, method, PROMPT, fractions.append)
        assert len(fractions) == layers


# -- tokens ------------------------------------------------------------------------------------------------------


def one_by_one(loaded: LoadedModel, prompt: Tensor, answer: list[int], method: Method) -> dict[str, list[float]]:
    """Teacher forcing token by token through a fresh cache, in float64."""
    rows: dict[str, list[float]] = {"kl": [], "same_top": [], "probability_full": [], "probability_compressed": []}
    caches = build_cache(loaded.model.config, METHODS["full"]()), build_cache(loaded.model.config, method)
    pieces = [prompt, *(torch.tensor([[token]]) for token in answer[:-1])]
    for piece, target in zip(pieces, answer, strict=True):
        p, q = (loaded.model(piece, past_key_values=cache).logits[0, -1].double().softmax(-1) for cache in caches)
        rows["kl"].append(float((p * (p / q).log()).sum()))
        rows["same_top"].append(float(p.argmax() == q.argmax()))
        rows["probability_full"].append(float(p[target]))
        rows["probability_compressed"].append(float(q[target]))
    return rows


@pytest.mark.parametrize(
    "spec",
    [
        "turboquant-paper:bits=2",
        "turboquant-paper:bits=3,residual_length=5",
        f"turboquant:bits=2,{SMALL}",
        "turboquant:bits=2,residual_length=40,group_size=32",
        "turboquant:bits=1,residual_length=0,sink_length=0",
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_token_metrics_are_those_of_decoding_one_by_one(architecture: str, spec: str) -> None:
    loaded, prompt, method = tiny_loaded(architecture), tokens(1, PROMPT), parse_method(spec)
    answer = tokens(1, STEPS, seed=5)[0].tolist()
    expected = one_by_one(loaded, prompt, answer, method)
    metrics = token_metrics(loaded, prompt, answer, method)
    assert metrics.kl == pytest.approx(expected["kl"], abs=2e-6, rel=1e-3)
    assert metrics.same_top == [bool(value) for value in expected["same_top"]]
    for name in ("probability_full", "probability_compressed"):
        assert getattr(metrics, name) == pytest.approx(expected[name], abs=1e-5)
    assert metrics.mean_kl == pytest.approx(sum(expected["kl"]) / STEPS, abs=2e-6, rel=1e-3)
    assert metrics.mean_kl > 1e-4
    assert metrics.same_top_pct == pytest.approx(100 * sum(expected["same_top"]) / STEPS, abs=1e-3)


def test_the_first_token_follows_a_prompt_that_attends_exactly() -> None:
    loaded, answer = tiny_loaded(), tokens(1, 12, seed=5)[0].tolist()
    metrics = token_metrics(loaded, tokens(1, PROMPT), answer, parse_method("turboquant-paper:bits=1"))
    assert metrics.kl[0] == 0
    assert metrics.probability_full[0] == metrics.probability_compressed[0]
    assert min(metrics.kl[1:]) > 1e-5


@pytest.mark.parametrize("method", [Lossless(), Lossless(residual_length=0)], ids=["window", "none"])
def test_without_loss_there_is_no_divergence(method: Method) -> None:
    loaded, answer = tiny_loaded(), tokens(1, STEPS, seed=5)[0].tolist()
    metrics = token_metrics(loaded, tokens(1, PROMPT), answer, method)
    assert max(metrics.kl) < 1e-6
    assert metrics.same_top_pct == 100
    assert metrics.probability_compressed == pytest.approx(metrics.probability_full, abs=1e-5)


def test_divergence_grows_as_bits_go_away() -> None:
    loaded, answer = tiny_loaded(), tokens(1, STEPS, seed=5)[0].tolist()
    eight, four, two = (
        token_metrics(loaded, tokens(1, PROMPT), answer, parse_method(f"turboquant-paper:bits={bits}")).mean_kl
        for bits in (8, 4, 2)
    )
    assert 0 < 10 * eight < four
    assert 2 * four < two


def test_an_answer_of_one_token_is_measured_from_the_prompt_alone() -> None:
    loaded = tiny_loaded()
    fractions: list[float] = []
    metrics = token_metrics(loaded, tokens(1, PROMPT), [7], parse_method("turboquant-paper"), fractions.append)
    assert (metrics.kl, metrics.same_top, fractions) == ([0.0], [True], [1.0])
    logits = loaded.model(tokens(1, PROMPT)).logits[0, -1]
    assert metrics.probability_full == pytest.approx([float(logits.softmax(-1)[7])], abs=1e-6)


def test_a_cancel_is_heard_between_layers() -> None:
    loaded, asked = tiny_loaded(), []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) == 9  # 3 layers, 2 caches: in the second piece

    with pytest.raises(CancelledError):
        token_metrics(loaded, tokens(1, 80), [5] * 9, parse_method("turboquant-paper"), cancelled=cancelled)
    assert len(asked) == 9
