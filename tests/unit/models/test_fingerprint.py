"""What a model's name stands for: every change of its files is noticed, and a model in memory stays what was loaded."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.models import save_tiny
from turboquant.models import embedded, fingerprint, hub
from turboquant.models import load as models
from turboquant.models.load import MODELS, ModelError, load_model
from turboquant.models.registry import EMBEDDED, ModelSpec, find_spec

COMMIT, OTHER = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=2)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


def now(folder: Path) -> str:
    found = fingerprint.fingerprint(str(folder))
    assert found is not None
    return found


def flip(path: Path, place: int = -1) -> None:
    """Change one byte of a file in place and give it its old dates."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_changed_byte_of_any_file_is_noticed_whatever_the_dates(folder: Path) -> None:
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(names) == 7
    before = now(folder)
    for name in names:
        flip(folder / name)
        assert now(folder) != before, name
        flip(folder / name)
        assert now(folder) == before


def test_what_is_no_part_of_the_model_does_not_count(folder: Path) -> None:
    before = now(folder)
    for name in ("README.md", "results.jsonl", "evaluate.json", ".model.safetensors.lock", "training_args.bin"):
        (folder / name).write_text("{}")
    (folder / "tokenizer").mkdir()
    for path in folder.iterdir():
        path.touch()
    assert now(folder) == before
    (folder / "added_tokens.json").write_text("{}")
    assert now(folder) != before


@pytest.fixture
def large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose weights are too large to be read as a whole."""
    monkeypatch.setattr(fingerprint, "WHOLE", 100_000)
    assert (folder / "model.safetensors").stat().st_size > 1_000_000
    return folder


def test_large_weights_are_not_read_as_a_whole(large: Path) -> None:
    before, weights = now(large), large / "model.safetensors"
    assert " dates " in before
    weights.touch()
    touched = now(large)
    assert touched != before
    assert fingerprint.same_content(before, touched)
    flip(weights, 200_000)  # between the samples
    assert now(large) == touched
    for place in (10, -1):  # in the header and in the last sample
        flip(weights, place)
        assert not fingerprint.same_content(before, now(large))


def test_weights_in_many_small_files_are_not_read_as_a_whole_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").unlink()
    for number in range(5):
        (folder / f"model-{number}.safetensors").write_bytes(bytes(8) + bytes([number]) * 4_000)
    assert " dates " not in now(folder)
    monkeypatch.setattr(fingerprint, "WHOLE", 10_000)
    before = now(folder)
    assert " dates " in before
    (folder / "model-1.safetensors").touch()  # read as a whole, like all that is no weights
    (folder / "tokenizer.json").touch()
    assert now(folder) == before
    (folder / "model-3.safetensors").touch()
    assert fingerprint.same_content(before, now(folder))
    assert now(folder) != before
    flip(folder / "model-4.safetensors", 2_000)
    assert not fingerprint.same_content(before, now(folder))


def test_other_weights_of_the_same_size_and_dates_are_noticed(large: Path, tmp_path: Path) -> None:
    status, before = (large / "model.safetensors").stat(), now(large)
    other = save_tiny(tmp_path / "other", num_hidden_layers=2, seed=5) / "model.safetensors"
    assert other.stat().st_size == status.st_size
    shutil.copyfile(other, large / "model.safetensors")
    os.utime(large / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not fingerprint.same_content(before, now(large))


def test_a_name_stands_for_what_it_leads_to(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save_tiny(tmp_path / "elsewhere" / "tiny", seed=5)
    link = tmp_path / "current"
    link.symlink_to(folder)
    assert now(link) == now(folder) != now(other)
    link.unlink()
    link.symlink_to(other)
    assert now(link) == now(other)
    monkeypatch.chdir(tmp_path)
    assert fingerprint.fingerprint("tiny") == now(folder)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert fingerprint.fingerprint("tiny") == now(other)
    shutil.rmtree(other)
    assert fingerprint.fingerprint("tiny") is None
    assert fingerprint.fingerprint(str(other)) is None


def test_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"org/new": tmp_path / COMMIT}
    monkeypatch.setattr(hub, "cached_folder", lambda spec: found.get(spec.name))
    assert fingerprint.fingerprint("org/new") == f"commit {COMMIT}"
    assert fingerprint.fingerprint("org/not-here") is None
    pinned = MODELS["qwen3-0.6b"].revision
    assert fingerprint.fingerprint("qwen3-0.6b") == fingerprint.fingerprint("Qwen/Qwen3-0.6B") == f"commit {pinned}"


def test_when_a_name_stands_for_what_it_did() -> None:
    assert fingerprint.unchanged("folder a", "folder a")
    assert not fingerprint.unchanged("folder a", "folder b")
    assert not fingerprint.unchanged("folder a", None)
    assert not fingerprint.unchanged("folder a", f"commit {COMMIT}")
    assert not fingerprint.unchanged(f"commit {COMMIT}", f"commit {OTHER}")
    assert fingerprint.unchanged(f"commit {COMMIT}", None)
    assert fingerprint.unchanged(None, "folder a")


@pytest.mark.skipif(not embedded.is_available(), reason="the wheel with the built-in model is not installed")
def test_the_built_in_model_is_the_file_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = embedded._gguf()
    assert gguf is not None
    named = fingerprint.fingerprint(EMBEDDED)
    assert named == f"gguf {hashlib.sha256(gguf.read_bytes()).hexdigest()}"
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path))
    copy = tmp_path / EMBEDDED
    copy.mkdir()
    record = {"format": embedded.FORMAT, "source": embedded._source(gguf), "files": {}}
    (copy / embedded.CHECKSUMS).write_text(json.dumps({**record, "source_sha256": named[5:]}))
    assert embedded._is_intact(copy)
    (copy / embedded.CHECKSUMS).write_text(json.dumps({**record, "source_sha256": "0" * 64}))
    assert not embedded._is_intact(copy)  # of the same size and version, and yet another file
    monkeypatch.setattr(embedded, "_recorded_sha256", lambda: None)
    assert fingerprint.fingerprint(EMBEDDED) == f"gguf {'0' * 64}"
    shutil.rmtree(copy)
    assert fingerprint.fingerprint(EMBEDDED) is None


def test_a_folder_called_like_the_built_in_model_is_itself(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / EMBEDDED, num_hidden_layers=2)
    assert find_spec(str(folder)) != MODELS[EMBEDDED]
    loaded = load_model(str(folder), device="cpu")
    assert loaded.model.config.num_hidden_layers == 2
    assert loaded.fingerprint == now(folder)


def test_weights_in_memory_do_not_follow_the_file(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu")
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # as `cp` writes over a file
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert all(map(torch.equal, before, loaded.model.parameters()))
    with weights.open("r+b") as file:
        file.truncate(100)
    assert all(map(torch.equal, before, loaded.model.parameters()))
    assert loaded.fingerprint != now(folder)


def test_a_folder_that_changes_while_it_is_loaded_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = models._tokenizer

    def changing(place: Path, spec: ModelSpec) -> object:
        flip(place / "model.safetensors")
        return real(place, spec)

    monkeypatch.setattr(models, "_tokenizer", changing)
    with pytest.raises(ModelError, match="tiny was changed while it was loaded: load it again"):
        load_model(str(folder), device="cpu")
