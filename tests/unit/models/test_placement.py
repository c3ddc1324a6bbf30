"""Where the weights go when they do not fit on one device; free memory is what the tests say it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map

from tests.support.models import save_tiny, tokens
from turboquant.cache.build import build_cache, cache_report
from turboquant.methods import parse_method
from turboquant.models import checks, placement
from turboquant.models import load as models
from turboquant.models.checks import skeleton_of
from turboquant.models.load import ModelError, load_model, tiny_model
from turboquant.models.registry import ModelSpec, find_spec

GIB = 2**30
FIRST, SECOND, CPU = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
SPEC = ModelSpec("large", "test/large", None, "")
SIZES = {"fp32": 28 * GIB, "bf16": 14 * GIB, "8bit": 8 * GIB, "4bit": 5 * GIB}
Free = Callable[..., None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Sets the free memory of devices, in GiB."""

    def set_free(first: float = 0, second: float = 0, cpu: float = 0) -> None:
        sizes = {FIRST: first, SECOND: second, CPU: cpu}
        monkeypatch.setattr(checks, "free_bytes", lambda device: int(sizes[device] * GIB))

    return set_free


def place(weights: str, devices: tuple[torch.device, ...] = (FIRST, SECOND, CPU)) -> list[torch.device]:
    return placement.find_place(SIZES, weights, devices, SPEC, 7 * 10**9)


def test_one_gpu_is_taken_where_the_weights_fit_on_one(free: Free) -> None:
    free(first=17, second=80, cpu=80)
    assert place("bf16") == [FIRST]
    free(first=16, second=17, cpu=80)
    assert place("bf16") == [SECOND]
    free(first=17)
    assert place("bf16", (FIRST,)) == [FIRST]
    free(cpu=40)
    assert place("fp32", (CPU,)) == [CPU]


def test_else_all_devices_share_them(free: Free) -> None:
    free(first=10, second=10, cpu=0)
    assert place("bf16") == [FIRST, SECOND, CPU]
    free(first=4, second=0, cpu=13)
    assert place("bf16") == [FIRST, SECOND, CPU]
    found = placement.options([FIRST, SECOND, CPU], packed=False)
    limits = {key: value / GIB for key, value in found["max_memory"].items()}
    assert found["device_map"] == "auto"
    assert limits == pytest.approx({0: 4 / 1.15, 1: 0, "cpu": 13 / 1.15}, abs=1e-6)


def test_packed_weights_stay_on_gpus(free: Free) -> None:
    free(first=3, second=3, cpu=80)
    assert place("4bit") == [FIRST, SECOND]
    with pytest.raises(ModelError, match=r"8bit needs 9\.2 GiB .* 6\.0 GiB are free; choose weights=4bit, or"):
        place("8bit")


def test_what_fits_is_said(free: Free) -> None:
    free(cpu=17)
    with pytest.raises(ModelError, match=r"needs 32\.2 GiB on cpu, 17\.0 GiB .*; choose weights=bf16 or 8bit or 4bit"):
        place("fp32", (CPU,))
    free(first=2, cpu=1)
    with pytest.raises(ModelError, match=r"bf16 needs .* 3\.0 GiB .* about 2\.4 billion parameters fit as 4bit"):
        place("bf16", (FIRST, CPU))


def test_a_single_device_is_named_only_where_it_must_be() -> None:
    assert placement.options([CPU], packed=False) == {}
    assert placement.options([CPU], packed=True) == {"device_map": {"": "cpu"}}
    assert placement.options([SECOND], packed=False) == {"device_map": {"": "cuda:1"}}


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placement.devices_of(FIRST, "auto") == [FIRST, SECOND, CPU]
    assert placement.devices_of(FIRST, "cuda") == [FIRST]
    assert placement.devices_of(CPU, "auto") == [CPU]


def test_words() -> None:
    """Of maps as accelerate makes them from limits."""
    model: Any = skeleton_of(tiny_model("llama", num_hidden_layers=8).config, SPEC)
    assert placement.placement(model) == "meta"
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    limits = {0: 4 * layer, 1: int(3.5 * layer), "cpu": GIB}
    model.hf_device_map = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=["LlamaDecoderLayer"])
    assert set(model.hf_device_map.values()) == {0, 1, "cpu"}
    assert placement.placement(model) == "2 layers on cuda:0, 3 on cuda:1, 3 on cpu"
    model.hf_device_map = {"": "cuda:0"}
    assert placement.placement(model) == "cuda:0"
    model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers": "disk"}
    with pytest.raises(ModelError, match="do not divide over the devices"):
        placement.check_nothing_on_disk(model, SPEC)


def test_a_model_whose_layers_are_fetched_as_they_are_needed_answers_the_same() -> None:
    """What accelerate does with layers on the CPU beside a GPU: their weights come for the time of their call."""
    model, spread = tiny_model("llama", num_hidden_layers=4), tiny_model("llama", num_hidden_layers=4)
    for layer in spread.model.layers[2:]:
        cpu_offload(layer, execution_device=CPU)
    assert spread.model.layers[3].mlp.up_proj.weight.is_meta
    assert checks.read_weights(spread) == "fp32"
    ids = tokens(2, 200)
    answers = []
    for one in (model, spread):
        cache = build_cache(one.config, parse_method("turboquant:bits=4"))
        logits = [one(part, past_key_values=cache).logits for part in (ids[:, :190], ids[:, 190:])]
        assert cache_report(cache).compressed_tokens > 0
        answers.append(torch.cat(logits, dim=1))
    assert torch.equal(*answers)


def test_layers_that_would_stay_on_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate leaves there what is larger than the room on each device, though together they would have enough."""
    folder = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr(checks, "free_bytes", lambda device: 500_000)
    source = models._source(find_spec(str(folder)), CPU, lambda fraction, text: None)
    with pytest.raises(ModelError, match="layers of tiny do not divide over the devices here"):
        models._load_weights(source, "fp32", [CPU, CPU], find_spec(str(folder)))


def test_loading_names_one_device_on_this_machine(tmp_path: Path) -> None:
    loaded = load_model(str(save_tiny(tmp_path / "tiny")), device="cpu")
    assert (loaded.device, loaded.placement) == ("cpu", "")
