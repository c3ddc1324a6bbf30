"""Files of records: one JSON line each, appended whole, read back in whatever state a crash left them."""

import contextlib
import json
import os
from codecs import BOM_UTF8
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock
from pydantic import ValidationError

from turboquant.records.base import Record, first_error
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.old import modern

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


def parse_record(line: bytes) -> ExperimentRecord | None:
    """Read one line; lines of older benchmarks become records of experiments, those about something else None.

    Raises:
        ValueError: If it is no JSON or no such record (pydantic's ValidationError).
    """
    if b'"kind":"bench-' not in line.replace(b" ", b""):
        return ExperimentRecord.model_validate_json(line)
    try:
        found = modern(json.loads(line))
    except (LookupError, TypeError, AttributeError, RecursionError):  # a broken line: pydantic says what it lacks
        return ExperimentRecord.model_validate_json(line)
    return None if found is None else ExperimentRecord.model_validate(found)


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
            records += filter(None, [parse_record(line)])
        except ValidationError as error:
            broken.append(f"line {number} of {path} is not an experiment record ({first_error(error)})")
    if torn:  # complete records are kept even without their line end
        with contextlib.suppress(ValidationError):
            records += filter(None, [parse_record(torn)])
    if broken:
        more = f"; {len(broken) - 1} more are broken" if len(broken) > 1 else ""
        raise RecordFileError(broken[0] + more, records)
    return records
