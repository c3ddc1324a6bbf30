"""What the name of a model stands for: fingerprints that show when its files have changed.

A model of the hub is its commit, and the built-in one the SHA-256 of the file that it comes from. A local folder or
GGUF file is the content of its files. Of weights beyond `WHOLE` bytes that is the name, the size, the header and
samples of the data of each file; the dates of these files stand beside it, since samples do not show every change.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from turboquant.models import embedded, hub
from turboquant.models.registry import ModelSpec, find_spec, is_embedded, is_local

WEIGHTS = (".safetensors", ".gguf")
FILES = (
    *hub.WANTED,
    *(f"*{end}" for end in WEIGHTS),
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*",
)
"""What loading a folder may read."""
WHOLE = 2**26
SAMPLES, SAMPLE_BYTES = 16, 2**12
MOST_HEADER_BYTES = 2**24
_FOLDER, _COMMIT, _SOURCE, _DATES = "folder ", "commit ", "gguf ", " dates "


def fingerprint(name: str) -> str | None:
    """Return what a model's name stands for now; asks no network.

    None where that cannot be told: there is no such model, or no copy of it on this machine.
    """
    try:
        spec = find_spec(name)
        if spec.revision and re.fullmatch("[0-9a-f]{40}", spec.revision):
            return commit(spec.revision)
        folder = Path(spec.hub_id) if spec.revision is None else hub.cached_folder(spec)
        return None if folder is None else fingerprint_of(spec, folder)
    except (OSError, RuntimeError, ValueError):  # a ModelError is a RuntimeError
        return None


def fingerprint_of(spec: ModelSpec, folder: Path) -> str | None:
    """Return the fingerprint of a model that is loaded from a folder or GGUF file.

    Raises:
        OSError: If a file of a local folder cannot be read.
    """
    if is_embedded(spec):
        source = embedded.source_sha256()
        return None if source is None else _SOURCE + source
    if not is_local(spec):
        return commit(folder.name)
    return content_fingerprint({folder.name: folder}) if folder.is_file() else folder_fingerprint(folder)


def commit(revision: str) -> str:
    """Return the fingerprint of a model of the hub."""
    return _COMMIT + revision


def unchanged(before: str | None, now: str | None) -> bool:
    """Return whether a name stands for what it did.

    What was not known before is taken to be the same. So are the commit of a hub model and the built-in model of which
    there is no copy here now: there is nothing that says otherwise, and what they were cannot change.
    """
    return before is None or before == now or (now is None and not before.startswith(_FOLDER))


def is_current(name: str, before: str | None) -> bool:
    """Return whether a name still stands for what had this fingerprint."""
    return before is None or unchanged(before, fingerprint(name))


def same_content(one: str, other: str | None) -> bool:
    """Return whether two fingerprints differ in the dates of files at most."""
    return other is not None and one.partition(_DATES)[0] == other.partition(_DATES)[0]


def folder_digest(fingerprint: str) -> str | None:
    """Return the digest in the fingerprint of a local folder or file; None of other models."""
    return fingerprint.partition(_DATES)[0].removeprefix(_FOLDER) if fingerprint.startswith(_FOLDER) else None


def folder_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a local folder; only files that loading a model may read count.

    Raises:
        OSError: If one of them cannot be read.
    """
    found = {path.relative_to(folder).as_posix(): path for pattern in FILES for path in folder.glob(pattern)}
    return content_fingerprint(found)


def content_fingerprint(found: Mapping[str, Path]) -> str:
    """Return the fingerprint of files by name.

    Raises:
        OSError: If one of them cannot be read.
    """
    content, dates = hashlib.sha256(), hashlib.sha256()
    dated, room = False, WHOLE
    for name, path in sorted(found.items()):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content.update(f"{name}\0{status.st_size}\0".encode())
            are_weights = path.suffix in WEIGHTS
            if status.st_size <= (room if are_weights else WHOLE):
                content.update(hashlib.file_digest(file, "sha256").digest())
                room -= status.st_size * are_weights
                continue
            for part in _samples(file, status.st_size):
                content.update(part)
            dates.update(f"{name}\0{status.st_mtime_ns}\0".encode())
            dated = True
    return _FOLDER + content.hexdigest() + (_DATES + dates.hexdigest()[:16] if dated else "")


def _samples(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the header of a large file of weights, or the start of a GGUF file, then pieces from all over it."""
    start = file.read(8)
    header = int.from_bytes(start, "little")  # its length, in a safetensors file
    yield start + file.read(min(header, MOST_HEADER_BYTES))
    for number in range(SAMPLES):
        file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
        yield file.read(SAMPLE_BYTES)
