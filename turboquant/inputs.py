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

from turboquant.fingerprint import commit, fingerprint, same_content, unchanged
from turboquant.results import Cell, ExperimentRecord
from turboquant.texts import TEXTS, ReadText, read_text, reading

MODEL, TEXT = "model", "text "
_WORDS = "words "  # of older records: the sum of a text, not of the file's bytes
_NAMED_TEXTS = ("texts", "text", "filler")  # settings of older records that name texts
_NO_FILES = ("sentences", *TEXTS)

CHANGED = "{name} has changed since {made}"
NEW_DATES = "the weights in {name} have new dates since {made}"
GONE = "{name} could be read when {made}, and cannot now"
NOT_NOTED = "{made} before it was noted what {name} held"
Model = Callable[[str], str | None]
Change = tuple[str, str]


def inputs(model: str | None, texts: Mapping[str, ReadText]) -> dict[str, str]:
    """Return what a record keeps of a loaded model's fingerprint and of the texts that were read."""
    known = {} if model is None else {MODEL: model}
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


def disagreement(records: Iterable[ExperimentRecord]) -> str | None:
    """Return a name that did not stand for the same in all records that use it; None where there is none."""
    seen: dict[tuple[str, str | None], str] = {}
    for record in records:
        for name, found in record.inputs.items():
            model = record.cell.model if name == MODEL else None
            if seen.setdefault((name, model), found) != found:
                return model or name.removeprefix(TEXT)
    return None


def _change(record: ExperimentRecord, model: Model) -> Change | None:
    for name, before in (record.inputs or _inputs_of_old(record)).items():
        if name == MODEL:
            named, text = record.cell.model or "", _of_model(before, model(record.cell.model or ""))
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


def _inputs_of_old(record: ExperimentRecord) -> dict[str, str | None]:
    """Return what a record from before there were inputs says of them: None where a file or folder was not noted.

    Shipped texts and the built-in model come with the program, and a hub model was noted with its commit.
    """
    settings, sums = record.cell.settings, record.detail.get("sha256") or {}
    named = [settings[name] for name in _NAMED_TEXTS if isinstance(settings.get(name), str | list | tuple)]
    texts = {text for one in named for text in ([one] if isinstance(one, str) else one)}
    files = texts.difference(_NO_FILES)
    found: dict[str, str | None] = {_WORDS + name: sums.get(name) for name in sorted(files.union(sums))}
    if record.model is not None and record.model.revision is not None:
        found[MODEL] = commit(record.model.revision)
    elif record.model is not None and Path(record.model.hub_id).is_absolute():
        found[MODEL] = None
    return found
