"""The generation benchmark: its loop generates what generate() does, and its figures are of this very run."""

import statistics
import time
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.support.models import Lossless, tiny_loaded
from turboquant.cache.build import NothingCompressedError, build_cache, cache_bytes
from turboquant.cache.layer import QuantizedLayer
from turboquant.experiments.base import Measurement, Watch
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.experiments.speed import EXPERIMENT, PeakMemory, Prompts, build_prompts, generate_batch
from turboquant.methods import METHODS, Method, parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.settings import SpeedSettings
from turboquant.run.generate import CancelledError

SMALL = SpeedSettings(context=260, new_tokens=12, batch=3, repeats=2)
FULL = METHODS["full"]()


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return tiny_loaded("llama", num_hidden_layers=2)


def measure(loaded: LoadedModel, methods: list[Method], chosen: SpeedSettings = SMALL) -> dict[Method, Any]:
    return dict(EXPERIMENT.run(loaded, methods, chosen, Watch()))


@pytest.fixture(scope="module")
def found(tiny: LoadedModel) -> dict[Method, Measurement]:
    return measure(tiny, [FULL, parse_method("turboquant:bits=2"), parse_method("rtn:bits=4")])


@pytest.mark.parametrize("spec", ["full", "turboquant:bits=2"])
@pytest.mark.parametrize("shortest", [1.0, 0.4])
def test_tokens_are_those_of_generate(tiny: LoadedModel, spec: str, shortest: float) -> None:
    prompts = build_prompts(tiny, SMALL.model_copy(update={"shortest": shortest}))
    mask = torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask.long()
    assert (prompts.mask is None) == (shortest == 1.0)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    method = parse_method(spec)
    expected = tiny.model.generate(  # type: ignore[operator]
        prompts.ids,
        attention_mask=mask,
        generation_config=config,
        past_key_values=build_cache(tiny.model.config, method),
    )
    run = generate_batch(tiny, prompts, build_cache(tiny.model.config, method), 12, Watch())
    assert torch.equal(run.tokens, expected[:, -12:])


def test_rows_do_not_see_each_other_or_their_padding(tiny: LoadedModel) -> None:
    prompts = build_prompts(tiny, SMALL.model_copy(update={"shortest": 0.5}))
    assert prompts.mask is not None
    assert prompts.mask.sum(dim=1).tolist() == [248, 186, 124]
    together = generate_batch(tiny, prompts, build_cache(tiny.model.config, Lossless()), 12, Watch()).tokens
    for row in range(3):
        alone = Prompts(prompts.ids[row : row + 1, ~prompts.mask[row].logical_not()], None)
        tokens = generate_batch(tiny, alone, build_cache(tiny.model.config, FULL), 12, Watch()).tokens
        assert torch.equal(together[row : row + 1], tokens)


def test_rows_read_different_places(tiny: LoadedModel) -> None:
    ids = build_prompts(tiny, SMALL).ids
    assert ids.shape == (3, 248)
    assert len({tuple(row.tolist()) for row in ids}) == 3


def test_bytes_at_every_step_are_those_of_the_cache(tiny: LoadedModel, found: dict[Method, Measurement]) -> None:
    method = parse_method("turboquant:bits=2")
    detail = found[method].detail
    assert len(detail["cache_bytes"]) == len(detail["full_cache_bytes"]) == 12
    prompts = build_prompts(tiny, SMALL)
    cache = build_cache(tiny.model.config, method)
    generate_batch(tiny, prompts, cache, 12, Watch())
    assert detail["cache_bytes"][-1] == cache_bytes(cache) == found[method].metrics["cache_bytes"]
    values = 2 * 2 * 2 * 64  # keys and values, layers, heads, dims
    assert detail["full_cache_bytes"] == [3 * tokens * values * 4 for tokens in range(248, 260)]
    assert detail["cache_bytes"][-1] < detail["full_cache_bytes"][-1]


def test_figures_belong_together(found: dict[Method, Measurement]) -> None:
    for method, one in found.items():
        figures: dict[str, Any] = one.metrics
        speeds = one.detail["tokens_per_second"]
        assert len(speeds) == 2
        assert figures["tokens_per_second"] == statistics.median(speeds)
        assert min(speeds) <= figures["p20_tokens_per_second"] <= figures["p80_tokens_per_second"] <= max(speeds)
        assert figures["speed_ratio"] == pytest.approx(figures["tokens_per_second"] / figures["full_tokens_per_second"])
        assert figures["time_to_first_token_ms"] > 0
        assert one.detail["peak_memory"].startswith("resident")
        assert len(one.detail["first_difference"]) == 3
        assert (figures["encode_step_ms"] is None) == (method == FULL)
        for side in ("", "full_"):
            assert figures[f"{side}attention_prompt_ms"] > 0
            assert figures[f"{side}attention_step_ms"] > 0
    assert found[FULL].metrics["speed_ratio"] == 1
    assert found[FULL].metrics["same_tokens_pct"] == 100
    lossy: dict[str, Any] = found[parse_method("turboquant:bits=2")].metrics
    assert lossy["same_tokens_pct"] < 100
    assert lossy["encode_prompt_ms"] > lossy["encode_step_ms"] > 0
    assert lossy["compressed_tokens"] > 0


def test_attention_is_timed_without_the_packing_after_it(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = QuantizedLayer.compress

    def slow(self: QuantizedLayer, visible: torch.Tensor | None = None, pads: bool = True) -> None:
        time.sleep(0.2)
        pack(self, visible, pads)

    monkeypatch.setattr(QuantizedLayer, "compress", slow)
    settings = SMALL.model_copy(update={"new_tokens": 2, "repeats": 1})
    figures = measure(tiny, [parse_method("turboquant:bits=2")], settings)[parse_method("turboquant:bits=2")].metrics
    assert figures["encode_prompt_ms"] > 400  # both layers
    assert 0 < figures["attention_prompt_ms"] < 400
    assert 0 < figures["attention_step_ms"] < 400


def test_sides_take_turns(tiny: LoadedModel) -> None:
    order: list[str] = []
    handle = tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: order.append(type(kwargs["past_key_values"]).__name__), with_kwargs=True
    )
    try:
        measure(tiny, [parse_method("turboquant:bits=2")], SMALL.model_copy(update={"new_tokens": 2}))
    finally:
        handle.remove()
    # A warm-up, then each side with instruments, then two rounds.
    assert order[::2] == ["DynamicCache", *["DynamicCache", "CompressedCache"] * 3]


def test_memory_that_grows_and_goes_is_seen() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        held = torch.ones(50_000_000)
        held.sum()
        del held
    assert 190e6 < memory.peak_bytes < 400e6


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"context": 513}, "tiny-llama has a context of 512 tokens, got 513"),
        ({"text": "nope"}, "the text must be one of"),
    ],
)
def test_what_cannot_be_generated_is_refused(tiny: LoadedModel, update: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EXPERIMENT.check(tiny, SMALL.model_copy(update=update))


def test_a_batch_that_does_not_fit_is_refused(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboquant.experiments.speed.free_bytes", lambda device: 2**28 + 2 * 2**20)
    with pytest.raises(ValueError, match=r"64 rows of 500 tokens do not fit into the free memory: [\d,]+ tokens do"):
        EXPERIMENT.check(tiny, SpeedSettings(context=500, batch=64))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="new_tokens must be fewer than the context's 100, got 100"):
        SpeedSettings(context=100, new_tokens=100)


def test_a_method_that_packs_nothing_has_no_figure_and_the_others_have(tiny: LoadedModel) -> None:
    methods = [parse_method("turboquant:residual_length=250"), parse_method("rtn:bits=4")]
    measured = EXPERIMENT.run(tiny, methods, SMALL, Watch())
    assert next(measured)[0] == methods[1]
    with pytest.raises(NothingCompressedError, match="packed none of 260 tokens"):
        next(measured)
    assert EXPERIMENTS["generation"] is EXPERIMENT


def test_cancelling_stops(tiny: LoadedModel) -> None:
    with pytest.raises(CancelledError):
        list(EXPERIMENT.run(tiny, [parse_method("rtn")], SMALL, Watch(cancelled=lambda: True)))
