"""Captured decode steps against the model's own calls: interpreted kernels on a CPU, a CUDA graph on a GPU."""

import copy
import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from turboquant import attach
from turboquant.cache.build import build_cache, cache_report
from turboquant.cache.roomy import RollingLayer, roomy
from turboquant.hf_attention import observe_queries, steps
from turboquant.hf_attention.steps import capture_steps, no_graphs
from turboquant.methods import parse_method
from turboquant.models.tiny import tiny_model
from turboquant.run.generate import QueryRecorder

pytest.importorskip("triton")

from turboquant.kernels.triton import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16
TOLERANCE = 2e-2
SPEC = "turboquant:bits=4,group_size=32,residual_length=32,sink_length=4"
PROMPT, STEPS = 4 + 32 + 64 + 31, 3  # the second step fills the window
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the attention kernels serve CPU tensors too, and steps there be replayed by calls."""
    if DEVICE == "cpu":
        monkeypatch.setattr(
            "turboquant.kernels.attention.usable", lambda _, name: attention if name == "attention" else None
        )
        monkeypatch.setattr(steps, "_on_gpu", lambda _: True)


@pytest.fixture
def model() -> PreTrainedModel:
    made = tiny_model("llama", num_hidden_layers=1).to(DEVICE, DTYPE)
    capture_steps(made)
    return made


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 256, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def started(model: PreTrainedModel, rows: int = 1, mask: torch.Tensor | None = None) -> Any:
    cache = build_cache(model.config, parse_method(SPEC))
    model(input_ids=prompt(rows), attention_mask=mask, past_key_values=cache)
    return cache


@torch.no_grad()
def test_replayed_steps_are_those_of_calls_across_packings(model: PreTrainedModel) -> None:
    captured, plain = started(model), started(model)
    packed = captured.layers[0].packed_length
    token = prompt()[:, :1]
    for count in range(STEPS):
        logits = model(input_ids=token, past_key_values=captured).logits
        with no_graphs():
            expected = model(input_ids=token, past_key_values=plain).logits
        assert captured.replay is not None
        assert plain.replay is None
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
        token = expected[:, -1].argmax(dim=-1, keepdim=True)
        assert captured.get_seq_length() == plain.get_seq_length() == PROMPT + count + 1
    assert captured.layers[0].packed_length == plain.layers[0].packed_length > packed
    # Several tokens at once are no step: the cache is given back, and goes on where it was.
    more = prompt()[:, :5]
    logits = model(input_ids=more, past_key_values=captured).logits
    assert captured.replay is None
    expected = model(input_ids=more, past_key_values=plain).logits
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("padded", [0, 7], ids=["", "padded"])
def test_generate_says_the_same_as_call_by_call(model: Any, padded: int, sampled: bool) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long, device=DEVICE)
    mask[1, :padded] = 0
    answers, caches = [], list[Any]()
    blocks: tuple[Any, ...] = (no_graphs(), torch.no_grad())
    for block in blocks:
        cache = build_cache(model.config, parse_method(SPEC))
        torch.manual_seed(0)
        with block:
            answers.append(
                model.generate(
                    prompt(2), attention_mask=mask, past_key_values=cache, do_sample=sampled, temperature=0.7,
                    max_new_tokens=6, min_new_tokens=6, pad_token_id=0,
                )
            )  # fmt: skip
        caches.append(cache)
    assert torch.equal(*answers)
    assert caches[0].replay is None
    assert caches[1].replay is not None
    reports = [cache_report(cache) for cache in caches]
    assert reports[0].compressed_tokens == reports[1].compressed_tokens


@torch.no_grad()
def test_calls_by_position_and_modes_between_steps(model: Any) -> None:
    """A step in inference mode, one without, several tokens given by position, and a step again."""
    captured, plain = started(model), started(model)
    token, more = prompt()[:, :1], prompt()[:, 5:9]
    for count in range(4):
        mode = torch.inference_mode() if count == 0 else torch.no_grad()
        ids = more if count == 2 else token
        with mode:
            logits = model(ids, past_key_values=captured).logits.clone()
        assert (captured.replay is None) == (count == 2)
        with no_graphs():
            expected = model(ids, past_key_values=plain).logits
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert captured.get_seq_length() == plain.get_seq_length()


@torch.no_grad()
def test_another_model_that_goes_on_with_a_cache_is_asked_itself(model: Any) -> None:
    other: Any = tiny_model("llama", seed=7, num_hidden_layers=1).to(DEVICE, DTYPE)
    capture_steps(other)
    token, captured, plain = prompt()[:, :1], started(model), started(model)
    for turn in (model, other, model):
        logits = turn(input_ids=token, past_key_values=captured).logits
        assert captured.replay.model is turn
        with no_graphs():
            expected = turn(input_ids=token, past_key_values=plain).logits
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_beams_which_choose_rows_anew_are_soon_left_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    answers = []
    begin = steps.Replay.__init__

    def counted(self: steps.Replay, *args: Any) -> None:
        made.append(1)
        begin(self, *args)

    monkeypatch.setattr(steps.Replay, "__init__", counted)
    options = {"num_beams": 2, "max_new_tokens": 6, "pad_token_id": 0}
    blocks: tuple[Any, ...] = (no_graphs(), torch.no_grad())
    for block in blocks:
        cache = build_cache(model.config, parse_method(SPEC))
        with block:
            answers.append(model.generate(prompt(), past_key_values=cache, **options))
    assert torch.equal(*answers)
    assert len(made) == steps.TRIES + 1


@torch.no_grad()
def test_a_mask_that_hides_more_than_pads_is_not_replayed(model: PreTrainedModel) -> None:
    cache, plain = started(model), started(model)
    mask = torch.ones(1, PROMPT + 1, dtype=torch.long, device=DEVICE)
    for hole in (None, 50, None):
        mask[0, 50] = hole is None
        call = {"input_ids": prompt()[:, :1], "attention_mask": mask}
        logits = model(**call, past_key_values=cache).logits
        assert (cache.replay is None) == (hole is not None)
        with no_graphs():
            expected = model(**call, past_key_values=plain).logits
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "reorder", "reset", "copy"])
def test_a_cache_that_was_changed_between_steps_is_read_as_it_is(model: PreTrainedModel, change: str) -> None:
    token = prompt(2)[:, :1]
    caches = [started(model, 2), started(model, 2)]
    for cache in caches:
        model(input_ids=token, past_key_values=cache)
    found = []
    blocks: tuple[Any, ...] = (torch.no_grad(), no_graphs())
    for cache, block in zip(caches, blocks, strict=True):
        used = cache
        if change == "crop":
            cache.crop(-1)
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
        elif change == "reset":
            cache.reset()
            model(input_ids=prompt(2), past_key_values=cache)
        else:
            used = copy.deepcopy(cache)
            assert used.replay is None
        with block:
            found.append(model(input_ids=token, past_key_values=used).logits)
    torch.testing.assert_close(*found, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_what_is_not_a_step_of_such_a_cache_goes_to_the_model(model: Any) -> None:
    token = prompt()[:, :1]
    short: Any = build_cache(model.config, parse_method(SPEC))
    model(input_ids=token, past_key_values=short)
    model(input_ids=token, past_key_values=short)
    assert short.replay is not None
    cache = started(model)
    states = model(input_ids=token, past_key_values=cache, output_hidden_states=True).hidden_states
    assert states is not None
    assert cache.replay is None
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    model(input_ids=token, past_key_values=cache)
    assert cache.replay is None
    handle.remove()
    model(input_ids=token, past_key_values=cache)
    assert cache.replay is not None


@torch.no_grad()
def test_what_cannot_be_captured_runs_call_by_call_with_one_warning(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, plain, token = started(model), started(model), prompt()[:, :1]
    model(input_ids=token, past_key_values=cache)
    model(input_ids=token, past_key_values=plain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: (_ for _ in ()).throw(RuntimeError("not permitted")))
    with pytest.warns(RuntimeWarning, match="run call by call.*not permitted"):
        logits = model(input_ids=token, past_key_values=cache).logits
    assert cache.replay is None
    with no_graphs():
        expected = model(input_ids=token, past_key_values=plain).logits
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
    model(input_ids=token, past_key_values=cache)  # without a second warning
    assert cache.replay is None


def test_the_hook_is_put_once_keeps_the_signature_and_leaves_other_hooks_alone() -> None:
    model: Any = tiny_model("llama")
    signature = inspect.signature(model.forward)
    attach(model)
    hooked = model.forward
    assert hooked.__func__ is not type(model).forward
    attach(model)
    assert model.forward is hooked
    assert inspect.signature(model.forward) == signature
    other = copy.deepcopy(model)
    assert other.forward.__self__ is other
    accelerated: Any = tiny_model("llama")
    accelerated.forward = own = lambda *_, **__: None
    capture_steps(accelerated)
    assert accelerated.forward is own


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unpacked", "uncompressed"])
def test_steps_before_anything_is_packed_and_of_an_uncompressed_cache_are_replayed(model: Any, kind: str) -> None:
    ids = prompt()[:, :60]  # the first block is packed at 68 tokens
    caches: list[Any] = []
    for _ in range(2):
        cache = build_cache(model.config, parse_method(SPEC if kind == "unpacked" else "full"))
        caches.append(cache if kind == "unpacked" else roomy(cache, model.config))
        model(input_ids=ids, past_key_values=caches[-1])
    token = ids[:, :1]
    for _ in range(10):
        logits = model(input_ids=token, past_key_values=caches[0]).logits
        with no_graphs():
            expected = model(input_ids=token, past_key_values=caches[1]).logits
        assert caches[0].replay is not None
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
        token = expected[:, -1].argmax(dim=-1, keepdim=True)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 70
    if kind == "unpacked":
        assert caches[0].layers[0].packed_length == caches[1].layers[0].packed_length == 32


SLIDING = ["gemma3", "mistral", "sinks"]


def sliding_model(kind: str, window: int = 40) -> Any:
    """A layer with a window in front of one that keeps all tokens, all layers with a window, and learned sinks."""
    if kind == "sinks":
        config = GptOssConfig(
            num_hidden_layers=2, sliding_window=window, hidden_size=64, intermediate_size=64,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            vocab_size=256, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        torch.manual_seed(0)
        made: Any = GptOssForCausalLM(config).eval().requires_grad_(False)
        for layer in made.model.layers:
            layer.self_attn.sinks.fill_(2.0)
        attach(made)
    else:
        made = tiny_model(kind, num_hidden_layers=2, sliding_window=window)
    # On a GPU torch multiplies by a mixture of experts in bfloat16 without waiting for the device, and in nothing else.
    made = made.to(DEVICE, torch.bfloat16 if kind == "sinks" and DEVICE == "cuda" else DTYPE)
    capture_steps(made)
    return made


@torch.no_grad()
@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "uncompressed"])
@pytest.mark.parametrize("kind", SLIDING)
@pytest.mark.parametrize("held", [20, 131], ids=["filling", "full"])
def test_steps_over_layers_with_a_window_are_replayed(
    kind: str, compressed: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the window is full to behind it, with room made anew on the way."""
    monkeypatch.setattr(steps, "AHEAD", 8)
    model = sliding_model(kind)
    tolerance = 2.5 * TOLERANCE if model.dtype == torch.bfloat16 else TOLERANCE
    caches: list[Any] = []
    for _ in range(2):
        cache = build_cache(model.config, parse_method(SPEC if compressed and kind != "mistral" else "full"))
        caches.append(roomy(cache, model.config) if type(cache) is DynamicCache else cache)
        model(input_ids=prompt()[:, :held], past_key_values=caches[-1])
    token = prompt()[:, :1]
    for _ in range(26 if held < 40 else 4):
        logits = model(input_ids=token, past_key_values=caches[0]).logits
        with no_graphs():
            expected = model(input_ids=token, past_key_values=caches[1]).logits
        assert caches[0].replay is not None
        assert any(isinstance(layer, RollingLayer) for layer in caches[0].layers)
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
        token = expected[:, -1].argmax(dim=-1, keepdim=True)
    assert cache_report(caches[0]).exact_bytes == cache_report(caches[1]).exact_bytes
    caches[0].release()
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.get_seq_length() == other.get_seq_length()
        if type(other) is DynamicSlidingWindowLayer:
            assert type(one) is DynamicSlidingWindowLayer
            assert one.get_mask_sizes(3) == other.get_mask_sizes(3)
            torch.testing.assert_close(one.keys, other.keys, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(one.values, other.values, atol=tolerance, rtol=tolerance)
    more = prompt()[:, :5]  # and several tokens at once behind them
    found = [model(input_ids=more, past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)


def test_generate_with_pads_over_a_window_says_the_same_as_call_by_call() -> None:
    model = sliding_model("gemma3", window=120)
    mask = torch.ones(2, PROMPT, dtype=torch.long, device=DEVICE)
    mask[1, : PROMPT - 80] = 0  # the window still sees some
    answers, blocks = list[Any](), list[Any]([no_graphs(), torch.no_grad()])
    for block in blocks:
        cache = build_cache(model.config, parse_method(SPEC))
        with block:
            answers.append(
                model.generate(
                    prompt(2), attention_mask=mask, past_key_values=cache, do_sample=False, output_logits=True,
                    max_new_tokens=6, min_new_tokens=6, pad_token_id=0, return_dict_in_generate=True,
                )
            )  # fmt: skip
    assert cache.replay is not None  # type: ignore[attr-defined]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    for one, other in zip(answers[0].logits, answers[1].logits, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "reset", "copy"])
def test_a_cache_with_windows_that_was_changed_between_steps_is_read_as_it_is(change: str) -> None:
    model, found = sliding_model("gemma3"), []
    changed = {
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0], device=DEVICE)),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1], device=DEVICE)),
        "reset": lambda cache: (cache.reset(), model(input_ids=prompt(2), past_key_values=cache)),
        "copy": copy.deepcopy,
    }
    rows = {"repeat": 4, "select": 1}.get(change, 2)
    blocks: tuple[Any, ...] = (torch.no_grad(), no_graphs())
    for block in blocks:
        cache = started(model, 2)
        with block:
            model(input_ids=prompt(2)[:, :1], past_key_values=cache)
            other = changed[change](cache)
            used = other if change == "copy" else cache
            found.append(model(input_ids=prompt(rows)[:, :1], past_key_values=used).logits)
    torch.testing.assert_close(*found, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("held", [60, PROMPT], ids=["unpacked", "packed"])
def test_the_room_of_captured_steps_is_given_back(model: Any, held: int) -> None:
    captured, plain = (build_cache(model.config, parse_method(SPEC)) for _ in range(2))
    for cache in (captured, plain):
        model(input_ids=prompt()[:, :held], past_key_values=cache)
    token = prompt()[:, :1]
    model(input_ids=token, past_key_values=captured)
    with no_graphs():
        model(input_ids=token, past_key_values=plain)
    roomy_report, expected = cache_report(captured), cache_report(plain)
    assert roomy_report.spare_bytes > 2 * expected.spare_bytes
    captured.shrink()  # type: ignore[attr-defined]
    assert captured.replay is None  # type: ignore[attr-defined]
    assert captured.given_up == 0  # type: ignore[attr-defined]
    report = cache_report(captured)
    assert report.spare_bytes == 0
    assert report.bytes <= expected.bytes
    assert (report.compressed_tokens, report.exact_bytes) == (expected.compressed_tokens, expected.exact_bytes)
    for count in (1, 5):
        more = prompt()[:, :count]
        logits = model(input_ids=more, past_key_values=captured).logits
        with no_graphs():
            again = model(input_ids=more, past_key_values=plain).logits
        torch.testing.assert_close(logits, again, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no graph on a CPU")
@torch.no_grad()
def test_the_memory_of_a_captured_step_is_counted_beside_the_cache(model: Any) -> None:
    cache = started(model)
    assert cache_report(cache).graph_bytes == 0
    held = cache_report(cache).bytes
    for _ in range(3):
        model(input_ids=prompt()[:, :1], past_key_values=cache)
    assert cache.replay.graph is not None
    assert 0 < cache_report(cache).graph_bytes < 2**26
    assert cache_report(cache).bytes < held + 2**20
    cache.reset()
    assert cache_report(cache).graph_bytes == 0


@torch.no_grad()
def test_queries_of_replayed_steps_are_seen(model: Any) -> None:
    token, found = prompt()[:, :1], []
    for block in (nullcontext(), no_graphs()):
        cache, recorder = started(model), QueryRecorder()
        with block, observe_queries(recorder):
            for _ in range(3):
                model(input_ids=token, past_key_values=cache)
        found.append(recorder)
    captured, plain = found
    assert captured.queries.keys() == plain.queries.keys() == {0}
    for layer in (0,):
        assert captured.scoring[layer].scaling == plain.scoring[layer].scaling
        for one, other in zip(captured.queries[layer], plain.queries[layer], strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)
