"""Any set of records as a few numbers: read them, keep the newest of each cell, average over contexts and seeds."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from turboquant.methods import parse_method
from turboquant.models.inputs import own_files
from turboquant.records.base import first_error
from turboquant.records.environment import Environment
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.files import parse_record, read_lines

CONTEXT_SETTINGS = ("context", "tokens")
AVERAGED = frozenset((*CONTEXT_SETTINGS, "seed", "seeds", "depth", "rotation_seed", "sampling_seed", "repetition"))
"""Settings over which figures are averaged; the others keep records apart."""
ROW_SETTINGS = ("dim", "bits", "batch")
"""Settings that name a row of a table beside the method."""


class ReportError(ValueError):
    """A file cannot be read, or what was asked for is not in the records."""


@dataclass(frozen=True)
class Results:
    """What was read: records with the file each came from, the newest of each cell."""

    records: tuple[tuple[ExperimentRecord, Path], ...] = ()

    def of(self, experiment: str, file: str = "") -> list[ExperimentRecord]:
        """Return the records of an experiment that did not fail, from files whose names begin so."""
        return [
            record
            for record, path in self.records
            if record.error is None and record.cell.experiment == experiment and path.name.startswith(file)
        ]


def read_results(places: Iterable[Path]) -> Results:
    """Read files of records, and folders with such files: `.jsonl` records and `evaluate`'s `.json`.

    Of several records of one cell the newest is kept, one from a CPU and one from a GPU; one that failed only where
    none succeeded.

    Raises:
        ReportError: If a place is missing or a line is neither; names file and line.
    """
    records: dict[tuple[str, bool], tuple[ExperimentRecord, Path]] = {}
    for path in _files(places):
        for found in _read_document(path) if path.suffix == ".json" else _read_lines(path):
            cell = found.cell.key, on_gpu(found)
            before = records.get(cell)
            if before is None or _rank(before[0]) <= _rank(found):
                records[cell] = (found, path)
    return Results(tuple(records.values()))


def on_gpu(record: ExperimentRecord) -> bool:
    """Whether a GPU computed it; its records are never averaged with a CPU's."""
    return record.environment.device.startswith("cuda")


def _rank(record: ExperimentRecord) -> tuple[bool, str]:
    return record.error is None, record.environment.created


def _files(places: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.suffix in (".jsonl", ".json"))
        elif place.is_file():
            found.append(place)
        elif place.exists():
            raise ReportError(f"{place} must be a file or a folder, and this is a pipe or a device")
        else:
            raise ReportError(f"{place} does not exist")
    return list(dict.fromkeys(found))


def _read_lines(path: Path) -> list[ExperimentRecord]:
    lines, torn = read_lines(path)
    found = [_read_line(line, f"line {number} of {path}") for number, line in lines]
    if torn:  # an interrupted write leaves half a line, an editor a whole one
        with contextlib.suppress(ReportError):
            found.append(_read_line(torn, ""))
    return [record for record in found if record]


def _read_line(line: bytes, where: str) -> ExperimentRecord | None:
    """Read a line; those about no experiment, which no report shows, are None."""
    try:
        json.loads(line)
        return parse_record(line)
    except ValidationError as error:
        raise ReportError(f"{where} is not an experiment record ({first_error(error)})") from None
    except (ValueError, RecursionError):
        raise ReportError(f"{where} is not JSON") from None


def _read_document(path: Path) -> list[ExperimentRecord]:
    """Return the records embedded in a JSON file, wherever they stand; other JSON has none."""
    try:
        queue: list[Any] = [json.loads(path.read_text(encoding="utf-8-sig"))]
        found = []
        while queue:
            item = queue.pop(0)
            if isinstance(item, dict) and item.get("kind") == "experiment":
                found.append(ExperimentRecord.model_validate(item))
            elif isinstance(item, (dict, list)):
                queue += item.values() if isinstance(item, dict) else item
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is broken: {str(error).splitlines()[0]}") from None
    return found


@dataclass(frozen=True)
class Summary:
    """The mean of one method's records of one model under settings that differ in context and seeds alone.

    Attributes:
        method: Without its seed.
        family: Without bits and seed: what a line of a plot follows.
        bits: Nominal bits a value of keys and values; None where a method has no such number.
        row: Settings that name a row, such as the batch.
        settings: The others that are not averaged.
        metrics: Mean over contexts of the means over everything else, by name; metrics that no record has are missing.
        by_context: The means behind it, by context.
        environments: Of all records.
    """

    experiment: str
    model: str | None
    weights: str
    method: str | None
    family: str
    bits: float | None
    row: tuple[tuple[str, Any], ...]
    settings: str
    metrics: dict[str, float]
    by_context: dict[int, dict[str, float]]
    records: int
    environments: tuple[Environment, ...] = field(repr=False)

    @property
    def contexts(self) -> tuple[int, ...]:
        """The contexts measured, ascending."""
        return tuple(sorted(self.by_context))

    @property
    def group(self) -> tuple[Any, ...]:
        """What its records have in common: equal groups are averaged together."""
        return self.experiment, self.settings, self.model, self.weights, self.method, self.row

    @property
    def base(self) -> str:
        """The method's name alone."""
        return self.family.split(":")[0]


def _options(method: str) -> tuple[str, list[str]]:
    """Return a method's name and its options, the seed left out."""
    name, _, rest = method.partition(":")
    return name, [item for item in rest.split(",") if item and not item.startswith("seed=")]


def family_of(method: str) -> str:
    """Return a method without bits and seed: what shares a line or a colour."""
    name, options = _options(method)
    fixed = [item for item in options if not re.match(r"(bits|key_bits|value_bits|layers)=", item)]
    if "key_bits=" in method or "value_bits=" in method:
        fixed.insert(0, "keys and values apart")
    if "layers=" in method:
        fixed.insert(0, "layers apart")
    return ":".join(filter(None, (name, ",".join(fixed))))


def _split(method: str | None, row: dict[str, Any]) -> tuple[str | None, str, float | None]:
    """Return a method without its seed, its family and its nominal bits."""
    if method is None:
        return None, "", row.get("bits")
    name, options = _options(method)
    bits = None
    try:
        if (parsed := parse_method(method)).name != "full":
            bits = parsed.payload_bits
    except ValueError:
        pass  # a record of a method that is no more
    return ":".join(filter(None, (name, ",".join(options)))), family_of(method), bits


def summarize(records: Iterable[ExperimentRecord]) -> list[Summary]:
    """Average records over contexts and seeds; failed ones are passed over.

    Records of a text or a model folder of the user's stand apart from those of other contents under the same name.

    Returns:
        One summary for each experiment, settings, model, weights and method, in this order.
    """
    found: dict[tuple[Any, ...], list[ExperimentRecord]] = {}
    for record in records:
        if record.error is None:
            cell, settings = record.cell, record.cell.settings
            row = {name: settings[name] for name in ROW_SETTINGS if name in settings}
            fixed = {k: v for k, v in sorted(settings.items()) if k not in AVERAGED and k not in row and v is not None}
            folder, files = own_files(record)
            model = f"{cell.model}, {folder}" if folder else cell.model
            key = (
                cell.experiment,
                _text(fixed | {f"SHA-256 of {name}": digits for name, digits in files.items()}),
                f"{model} on a GPU" if model and on_gpu(record) else model,
                cell.weights,
                *_split(cell.method, row),
                tuple(row.items()),
            )
            found.setdefault(key, []).append(record)
    summaries = []
    for (experiment, settings, model, weights, method, family, bits, row), group in found.items():
        by_context = {c: _means(m) for c, m in _collect(group, _context).items()}
        summaries.append(
            Summary(
                experiment=experiment,
                model=model,
                weights=weights,
                method=method,
                family=family,
                bits=bits,
                row=row,
                settings=settings,
                metrics=_means(list(by_context.values())),
                by_context=by_context,
                records=len(group),
                environments=tuple(record.environment for record in group),
            )
        )
    return sorted(summaries, key=_order)


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in settings.items())


def _order(one: Summary) -> tuple[Any, ...]:
    place = (one.experiment, one.settings, one.model or "", one.weights, one.row)
    return (*place, one.base != "full", one.family, -(one.bits or 0.0), one.method or "")


def _context(record: ExperimentRecord) -> int:
    found = next((record.cell.settings[name] for name in CONTEXT_SETTINGS if name in record.cell.settings), 0)
    return found if isinstance(found, int) else 0


def _collect(
    records: Iterable[ExperimentRecord], key: Callable[[ExperimentRecord], int]
) -> dict[int, list[dict[str, float]]]:
    found: dict[int, list[dict[str, float]]] = {}
    for record in records:
        held = record.cache
        sizes = (
            {}
            if held is None
            else {
                "bits_per_value": held.bits_per_value,
                "compression_ratio": held.compression_ratio,
                "bytes_per_token": held.bytes / max(1, held.tokens),
                "full_precision_bytes_per_token": held.full_precision_bytes / max(1, held.tokens),
            }
        )
        own = {name: value for name, value in record.metrics.items() if value is not None}
        found.setdefault(key(record), []).append({**sizes, **own})
    return found


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure; ends of intervals, whose mean bounds nothing, only where there is one row."""
    names = dict.fromkeys(name for row in rows for name in row)
    if len(rows) > 1:
        names = {name: None for name in names if not re.search(r"_(low|high)(_|$)", name)}
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def measured_on(environments: Iterable[Environment]) -> str:
    """Say on which machines, when and with which commits something was measured."""
    every = list(environments)
    days = sorted({one.created[:10] for one in every})
    machines = sorted({f"{one.device}, {one.cpu_threads} thread{'s' * (one.cpu_threads != 1)}" for one in every})
    commits = sorted({one.commit or "no commit" for one in every})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Measured {when} on {'; '.join(machines)}, commit {', '.join(commits)}."
