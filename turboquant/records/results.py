"""Records of what was measured: plain pydantic models that travel as JSON.

One comparison (`Comparison`) is what the Compare page shows, what the exports contain and what a recorded run in
`assets/runs/` holds. Every number in it was measured in that run; fields that could not be measured are None.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
from codecs import BOM_UTF8
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from filelock import FileLock
from pydantic import Field, ValidationError

from turboquant.records.base import Matrix, Record, first_error
from turboquant.records.heads import AttentionDetail


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


class ModelInfo(Record):
    """The model as it was really loaded."""

    name: str
    hub_id: str
    revision: str | None
    weights: str
    device: str
    dtype: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


class CacheReport(Record):
    """What a cache holds, summed over the storages reachable from it (no formula except `payload_ratio`).

    All sizes are bytes. `full_precision_bytes` is the 16-bit baseline: 2 bytes a cached value whatever dtype the run
    uses. `bits_per_value` is everything held, divided by the number of cached values. `misread_vectors` are keys and
    values (of one head and token each) that are read back as something else, since an outlier shares their range.
    """

    cache_class: str
    tokens: int
    compressed_tokens: int
    exact_tokens: int
    layers: int
    compressed_layers: int
    bytes: int
    key_bytes: int
    value_bytes: int
    scale_bytes: int
    exact_bytes: int
    spare_bytes: int
    shared_bytes: int
    full_precision_bytes: int
    bits_per_value: float
    compression_ratio: float
    payload_ratio: float | None
    misread_vectors: int = 0


class SideResult(Record):
    """One of the two answers: its text, timing and memory."""

    method: str
    text: str
    token_ids: list[int]
    token_texts: list[str]
    finish: Literal["stop", "length", "cancelled"]
    time_to_first_token_ms: float | None
    tokens_per_second: float | None
    step_ms: list[float]
    cache_bytes: list[int]
    report: CacheReport


class Divergence(Record):
    """The first position where the two answers differ; a token text is None where that answer had ended."""

    index: int
    original: str | None
    compressed: str | None


class HeadScores(Record):
    """Agreement of attention under the full and the compressed keys.

    `per_head` values are [layer][query head], averaged over the measured query positions; `per_step` values are one
    number a query position, averaged over layers and query heads. Cosines are -1 to 1, matches are fractions 0 to 1.
    """

    per_head_cosine_scores: Matrix
    per_head_cosine_weights: Matrix
    per_head_top1: Matrix
    per_head_top5: Matrix
    per_step_cosine_scores: list[float | None]
    per_step_cosine_weights: list[float | None]
    per_step_top1: list[float | None]
    per_step_top5: list[float | None]
    cosine_scores: float | None
    cosine_weights: float | None
    top1_match_pct: float | None
    top5_match_pct: float | None
    heads_at_risk_pct: float | None


class HeadMetrics(Record):
    """Head agreement as the cache serves attention, and over the packed positions only.

    `positions` are the measured query positions: the last prompt token, then every generated token of the original
    answer that was fed back to the model (the very last one is not). `layer_indices` names the compressed layers, one
    a row of the per-head matrices.
    """

    positions: list[int]
    packed_tokens: list[int]
    layer_indices: list[int]
    served: HeadScores
    packed: HeadScores


class TokenMetrics(Record):
    """Teacher forcing of the original answer through a fresh compressed cache; one entry a token of that answer.

    `kl` is KL(full || compressed) of the next-token distribution in nats.
    """

    kl: list[float]
    same_top: list[bool]
    probability_full: list[float]
    probability_compressed: list[float]
    mean_kl: float
    same_top_pct: float


class Settings(Record):
    """Sampling settings, the same for both answers. Temperature 0 is greedy."""

    max_new_tokens: int = Field(128, ge=1, le=65536)
    temperature: float = Field(0.0, ge=0.0, le=5.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, le=2**63 - 1)
    stop: tuple[str, ...] = ()


class Comparison(Record):
    """One prompt answered twice: with the full cache (`original`) and with a compressed one (`compressed`).

    `attention` explains the heads at risk; it is there only where it was asked for.
    """

    schema_version: Literal[1] = 1
    environment: Environment
    model: ModelInfo
    prompt: str
    chat: bool
    prompt_tokens: int
    settings: Settings
    original: SideResult
    compressed: SideResult
    divergence: Divergence | None
    heads: HeadMetrics | None
    tokens: TokenMetrics | None
    attention: AttentionDetail | None = None
    notes: list[str] = Field([])


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


def environment(device: torch.device | str = "cpu") -> Environment:
    """Describe this machine and these library versions for a record."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return Environment(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        device=f"{device.type}: {name}",
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


class Spread(Record):
    """Median and 20th and 80th percentile of repeated timings."""

    median: float
    p20: float
    p80: float


class DecodeBench(Record):
    """Decode speed of two caches in one process, sides alternated. `ratio` compares medians, method over full.

    `busy_processes` spun meanwhile, on a machine otherwise idle. `openmp_spins` is how long PyTorch's threads spun
    before they slept (`run.threads`); None where their OpenMP was left as it is. The worst steps are the longest of all
    runs.
    """

    kind: Literal["bench-decode"] = "bench-decode"
    environment: Environment
    model: ModelInfo
    method: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    full_tokens_per_second: Spread
    tokens_per_second: Spread
    ratio: float
    full_prefill_ms: Spread
    prefill_ms: Spread
    full_worst_step_ms: float | None = None
    worst_step_ms: float | None = None
    busy_processes: int = 0
    openmp_spins: int | None = None
    report: CacheReport

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for records of the same case on the same device, made under the same conditions."""
        return (*self.case, self.busy_processes, self.openmp_spins)

    @property
    def case(self) -> tuple[object, ...]:
        """Equal for records that differ only in what other processes did and how long threads spun."""
        return (self.model.name, self.method, self.prompt_tokens, self.new_tokens, self.environment.device)


class Cell(Record):
    """What an experiment measures once, in the words of who asks: records of one cell and equal inputs are alike.

    `model` and `weights` are as asked for, `method` is `str(method)`, `settings` are the experiment's own (context,
    seed, text ...). Synthetic experiments have no model.
    """

    experiment: str
    model: str | None = None
    weights: str = "auto"
    method: str | None = None
    settings: dict[str, Any] = Field({})

    @property
    def key(self) -> str:
        """One text a cell; equal cells have equal keys."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def __str__(self) -> str:
        named = [f"{name}={_short(value)}" for name, value in self.settings.items()]
        return " ".join(filter(None, (self.experiment, self.model, self.method, *named)))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class ExperimentRecord(Record):
    """One finished cell: what was measured, what the cache held, how long it took, where; or its `error` alone.

    `metrics` are the headline numbers by name (percentages end in `_pct`, milliseconds in `_ms`, bytes in `_bytes`),
    None where one could not be had; `timing` is in seconds; `detail` is the experiment's own (per layer, per head ...).
    """

    kind: Literal["experiment"] = "experiment"
    schema_version: Literal[1] = 1
    cell: Cell
    model: ModelInfo | None = None
    metrics: dict[str, float | None] = Field({})
    cache: CacheReport | None = None
    timing: dict[str, float] = Field({})
    detail: dict[str, Any] = Field({})
    inputs: dict[str, str] = Field({})  # what the cell's names stood for: fingerprints, see `turboquant.models.inputs`
    environment: Environment
    error: str | None = None


BLANK = b" \t\r\0"  # what may stand around a record in its line


class RecordFileError(ValueError):
    """A file of records cannot be used; `records` are the good ones that were read from it."""

    def __init__(self, message: str, records: "list[ExperimentRecord]") -> None:
        super().__init__(message)
        self.records = records


def append_record(record: Record, path: Path) -> None:
    """Append one record as a JSON line, whole or not at all; folders are made where they are missing.

    The line goes out under a lock, so that several processes may append to one file, and is on the disk when this
    returns. What an interrupted write left at the end of the file (the start of a record, NULs) is cut off first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = record.model_dump_json().encode() + b"\n"
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("ab+") as file:
        _mend(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _mend(file: BinaryIO) -> None:
    """Make a file opened with "ab+" end with a line end: cut off NULs and half a record, complete anything else."""
    end = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail:
        step = min(start, 2**16)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    kept = torn.rstrip(b"\0")
    if kept.lstrip(BLANK).startswith(b"{"):
        try:
            json.loads(kept.lstrip(BLANK))
        except (ValueError, RecursionError):
            kept = b""
    file.truncate(end - len(torn) + len(kept))
    if kept:
        file.write(b"\n")


def read_lines(path: Path) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return the lines of a file of records with their numbers, and a record that was begun behind the last line end.

    Blank lines are left out; a byte order mark, and NULs around a line (what a crash leaves), are cut off.
    """
    lines = [line.strip(BLANK) for line in path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")]
    torn = lines.pop() if lines[-1].startswith(b"{") else b""
    return [(number, line) for number, line in enumerate(lines, start=1) if line], torn


def read_records(path: Path) -> list[ExperimentRecord]:
    """Read a file of experiment records, oldest first; an empty or missing file has none.

    A last line without its line end is what an interrupted write leaves; it is passed over.

    Raises:
        RecordFileError: If a line is not such a record. It names the first such line and carries the good records.
    """
    if not path.exists():
        return []
    lines, torn = read_lines(path)
    records: list[ExperimentRecord] = []
    broken: list[str] = []
    for number, line in lines:
        try:
            records.append(ExperimentRecord.model_validate_json(line))
        except ValidationError as error:
            broken.append(f"line {number} of {path} is not an experiment record ({first_error(error)})")
    if torn:  # complete records are kept even without their line end
        with contextlib.suppress(ValidationError):
            records.append(ExperimentRecord.model_validate_json(torn))
    if broken:
        more = f"; {len(broken) - 1} more are broken" if len(broken) > 1 else ""
        raise RecordFileError(broken[0] + more, records)
    return records
