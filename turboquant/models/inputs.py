"""What records were made from, and whether they are still about what is asked.

A cell names a model and texts, and what stands behind a name can change: a file is edited, a folder holds other
weights, the same words are said in another folder. So a record keeps the fingerprint of the model and the SHA-256 of
every text that was read for it, and is used again only where its names stand for the same now. Whoever goes on with
records asks `reusable`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from turboquant.models.fingerprint import commit, fingerprint, folder_digest, same_content, unchanged
from turboquant.records.environment import code
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.texts import TEXTS, ReadText, read_text, reading

MODEL, TEXT, CODE = "model", "text ", "the program"
DIGITS = 8
"""Of a fingerprint, where it is shown to people."""
_WORDS = "words "  # of older records: the sum of a text, not of the file's bytes
_NAMED_TEXTS = ("texts", "text", "filler")  # settings of older records that name texts
_NO_FILES = ("sentences", *TEXTS)

CHANGED = "{name} has changed since {made}"
NEW_DATES = "the weights in {name} have new dates since {made}"
GONE = "{name} could be read when {made}, and cannot now"
NOT_NOTED = "{made} before it was noted what {name} held"
Model = Callable[[str], str | None]
Change = tuple[str, str]


def inputs(model: str | None, texts: Mapping[str, ReadText], program: str | None = None) -> dict[str, str]:
    """Return what a record keeps of a loaded model's fingerprint, of the texts that were read, and of the program."""
    known = {name: value for name, value in ((MODEL, model), (CODE, program)) if value is not None}
    return known | {TEXT + name: text.sha256 for name, text in texts.items()}


@dataclass(frozen=True)
class Reusable:
    """What of some records can be used again.

    Attributes:
        records: The newest good one of each cell, by its key.
        changes: Cells that only have records about something else, by what has changed.
    """

    records: dict[str, ExperimentRecord]
    changes: Counter[Change]

    def lines(self, so: str = "measured again") -> list[str]:
        """Say for each change what has changed, and what therefore becomes of the records."""
        found = []
        for (text, name), count in self.changes.items():
            made, they = ("1 record was made", "it is") if count == 1 else (f"{count} records were made", "they are")
            found.append(f"{text.format(name=name, made=made)}: {they} {so}")
        return found


def reusable(records: Iterable[ExperimentRecord], cells: Iterable[Cell], model: Model = fingerprint) -> Reusable:
    """Find the records of cells that did not fail and are about what the cells name now.

    Args:
        records: The oldest first.
        cells: What is asked for.
        model: Returns what a model's name stands for.
    """
    wanted, model = {cell.key for cell in cells}, cache(model)
    good: dict[str, ExperimentRecord] = {}
    other: dict[str, Change] = {}
    with reading():
        for record in records:
            key = record.cell.key
            if record.error is not None or key not in wanted:
                continue
            if change := _change(record, model):
                other[key] = change
            else:
                good[key] = record
    return Reusable(good, Counter(change for key, change in other.items() if key not in good))


def as_here(record: ExperimentRecord, model: Model = fingerprint) -> ExperimentRecord:
    """Return a record that another machine has made, with the dates that its model's files have here.

    A copy of a folder has dates of its own; where nothing else differs, it is the same model.
    """
    before, here = record.inputs.get(MODEL), model(record.cell.model or "")
    if before is None or here is None or not same_content(before, here):
        return record
    return record.model_copy(update={"inputs": {**record.inputs, MODEL: here}})


def disagreement(records: Iterable[ExperimentRecord]) -> str | None:
    """Return a name that did not stand for the same in all records that use it; None where there is none."""
    seen: dict[tuple[str, str | None], str] = {}
    for record in records:
        for name, found in record.inputs.items():
            model = record.cell.model if name == MODEL else None
            if seen.setdefault((name, model), found) != found:
                return model or name.removeprefix(TEXT)
    return None


def own_files(record: ExperimentRecord) -> tuple[str | None, dict[str, str]]:
    """Return the first digits of the fingerprints of a local model folder and of each text that is a file."""
    noted = _noted(record)
    folder = folder_digest(noted.get(MODEL) or "")
    texts = {name.partition(" ")[2]: v for name, v in noted.items() if name not in (MODEL, CODE) and v is not None}
    files = {name: value[:DIGITS] for name, value in texts.items() if name not in TEXTS}
    return None if folder is None else folder[:DIGITS], files


def _change(record: ExperimentRecord, model: Model) -> Change | None:
    for name, before in _noted(record).items():
        if name == MODEL:
            named, text = record.cell.model or "", _of_model(before, model(record.cell.model or ""))
        elif name == CODE:
            named, text = name, None if before == code() else CHANGED
        else:
            kind, _, named = name.partition(" ")
            text = _of_text(before, named, old=kind + " " == _WORDS)
        if text is not None:
            return text, named
    return None


def _of_model(before: str | None, now: str | None) -> str | None:
    if before is None:
        return NOT_NOTED
    if unchanged(before, now):
        return None
    return NEW_DATES if same_content(before, now) else CHANGED if now is not None else GONE


def _of_text(before: str | None, name: str, old: bool) -> str | None:
    if before is None:
        return NOT_NOTED
    try:
        with reading() as texts:
            words = read_text(name)
            now = hashlib.sha256(words.encode()).hexdigest() if old else texts[name].sha256
    except ValueError:
        return GONE
    return None if before == now else CHANGED


def _noted(record: ExperimentRecord) -> dict[str, str | None]:
    """Return a record's inputs; None for a folder or file of which an older record does not say what it held.

    Shipped texts and the built-in model come with the program, and a hub model was noted with its commit before.
    """
    found: dict[str, str | None] = {**(record.inputs or _texts_of_old(record))}
    model = record.model
    if MODEL not in found and model is not None and model.revision is not None:
        found[MODEL] = commit(model.revision)
    elif MODEL not in found and model is not None and Path(model.hub_id).is_absolute():
        found[MODEL] = None
    return found


def _texts_of_old(record: ExperimentRecord) -> dict[str, str | None]:
    values, sums = [record.cell.settings.get(name) for name in _NAMED_TEXTS], record.detail.get("sha256")
    named = [name for value in values for name in (value if isinstance(value, list | tuple) else [value])]
    found = {_WORDS + name: None for name in named if isinstance(name, str) and name not in _NO_FILES}
    return found | ({_WORDS + name: str(value) for name, value in sums.items()} if isinstance(sums, dict) else {})
