"""The file that `evaluate` writes: the methodology's schema, with the record of every context embedded in it.

One method: ``{"model", "bits", "by_context": {"2048": {"seq_len", "compression_ratio", "cosine_similarity",
"top1_match_pct", "top5_match_pct", ...}}}``. Several methods: ``{"model", "runs": [the same for each]}``.
`compression_ratio` is measured; the methodology's formula stands beside it as `payload_ratio`. Whatever else was
measured, per layer and head too, is in each context's `record` (an `ExperimentRecord`), from which all of it is made.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from turboquant.methods import parse_method
from turboquant.records.base import first_error
from turboquant.records.experiment import Cell, ExperimentRecord

EXPERIMENT = "attention"
SCHEMA = ("seq_len", "compression_ratio", "cosine_similarity", "top1_match_pct", "top5_match_pct")


class EvaluationFileError(ValueError):
    """A file is not an output of `evaluate`, or one of something else."""


def document(records: Sequence[ExperimentRecord]) -> dict[str, Any]:
    """Return what the file holds for the records of one model, in the order of methods and contexts.

    Args:
        records: At least one, none failed; for each method and context one.
    """
    by_method: dict[str, list[ExperimentRecord]] = {}
    for record in records:
        by_method.setdefault(record.cell.method or "", []).append(record)
    runs = [_run(method, found) for method, found in by_method.items()]
    return runs[0] if len(runs) == 1 else {"model": runs[0]["model"], "runs": runs}


def _context(record: ExperimentRecord) -> int:
    return int(record.cell.settings["context"])


def _run(method: str, records: list[ExperimentRecord]) -> dict[str, Any]:
    ordered = sorted(records, key=_context)
    return {
        "model": records[0].cell.model,
        "bits": getattr(parse_method(method), "bits", None),
        "method": method,
        "by_context": {str(_context(record)): _entry(record) for record in ordered},
    }


def _entry(record: ExperimentRecord) -> dict[str, Any]:
    values = {"seq_len": _context(record), **record.metrics}
    first = {name: values.pop(name) for name in SCHEMA}
    return {**first, **values, "record": record.model_dump(mode="json")}


def write_document(records: Sequence[ExperimentRecord], path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        OSError: If it cannot be written; the file that was there stays as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(document(records), file, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_document(path: Path) -> list[ExperimentRecord]:
    """Return the records embedded in a file that `evaluate` wrote; a missing or empty file has none.

    Raises:
        EvaluationFileError: If it is something else or is broken; says what and where.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise EvaluationFileError(f"{path} is not an output of evaluate: it is not text") from error
    except json.JSONDecodeError as error:
        raise EvaluationFileError(f"{path} is not JSON ({error.msg} in line {error.lineno})") from error
    except (ValueError, RecursionError) as error:
        raise EvaluationFileError(f"{path} is not JSON that can be read ({error})") from error
    runs = content.get("runs", [content]) if isinstance(content, dict) else None
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "by_context" in run for run in runs):
        raise EvaluationFileError(f"{path} is not an output of evaluate: it has no by_context")
    try:
        entries = [entry["record"] for run in runs for entry in run["by_context"].values()]
        return [ExperimentRecord.model_validate(entry) for entry in entries]
    except ValidationError as error:
        raise EvaluationFileError(f"{path} holds a broken record ({first_error(error)})") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise EvaluationFileError(f"{path} is not an output of evaluate: a context of it has no record") from error


def difference(records: Iterable[ExperimentRecord], cell: Cell) -> str | None:
    """Say in what the records differ from what a cell asks for, beyond method and context; None if in nothing.

    Records that differ do not belong into the same file.
    """

    def asked(one: Cell) -> dict[str, Any]:
        settings = {name: value for name, value in one.settings.items() if name != "context"}
        return {"experiment": one.experiment, "model": one.model, "weights": one.weights, **settings}

    wanted = asked(cell)
    for record in records:
        held = asked(record.cell)
        for name in {**wanted, **held}:
            if held.get(name) != wanted.get(name):
                there, here = (one.get(name, "as by default") for one in (held, wanted))
                return f"{name} {there}, not {here}"
    return None
