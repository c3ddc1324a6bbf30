"""The machine and the versions that a record was made with."""

import hashlib
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from turboquant.records.base import Record

if TYPE_CHECKING:
    import torch


class Environment(Record):
    """Where a number was measured."""

    created: str
    commit: str | None
    device: str
    cpu_threads: int
    python: str
    torch: str
    transformers: str
    triton: str | None = None
    driver: str | None = None


@cache
def _commit() -> str | None:
    """The commit of the source tree (with `-dirty` where it was changed), or None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        root = Path(__file__).resolve().parents[2]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TURBOQUANT_COMMIT") or None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@cache
def _processor() -> str:
    """The processor's name; Python itself knows only the architecture on Linux."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def device_name(device: "torch.device | str | None" = None) -> str:
    """Return a device as records name it, such as "cuda: NVIDIA H200"; None for the GPU where there is one."""
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return f"{device.type}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()}"


def openmp_spins() -> int | None:
    """Return how long GCC's OpenMP was told to spin; None where nobody has told it."""
    told = os.environ.get("GOMP_SPINCOUNT", "")
    return int(told) if told.isdecimal() else None


@cache
def code() -> str:
    """Return what tells this program from an older one: the SHA-256 of its sources, whatever a commit says of them."""
    sources = Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        found.update(f"{path.relative_to(sources)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def environment(device: "torch.device | str" = "cpu") -> Environment:
    """Describe this machine and these library versions for a record."""
    import torch

    device = torch.device(device)
    return Environment(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        device=device_name(device),
        cpu_threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=_version("torch"),
        transformers=_version("transformers"),
        triton=_version("triton") if device.type == "cuda" else None,
        driver=_driver() if device.type == "cuda" else None,
    )


@cache
def _driver() -> str | None:
    """Version of NVIDIA's driver, as its own tool prints it; None where there is no such tool."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
