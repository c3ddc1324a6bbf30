"""Runs: comparisons with an identity, kept for a visitor, shipped as recordings, exported and imported.

A run file is JSON: `{"id": ..., "origin": ..., "comparison": {...}}`; a bare comparison, as the command line writes it,
is read as well. Whatever is imported is marked as imported: a file cannot claim to have been measured here.
"""

import csv
import io
import json
import math
import uuid
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from app.tab.verdict import facts, provenance, verdict
from turboquant.records.base import Record
from turboquant.records.comparison import Comparison, HeadMetrics
from turboquant.records.heads import AttentionDetail

RECORDED_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "runs"
MAX_IMPORT_BYTES = 20_000_000
MAX_TOGETHER = 2
Origin = Literal["measured", "recorded", "imported"]


class RunError(ValueError):
    """A file is not a run; the message says what is wrong in one sentence."""


class Run(Record):
    """A comparison with an identity and where it comes from.

    Runs of one `group` were asked for together: other settings of one prompt, or prompts of one set. `cached` says that
    an earlier measurement of the same settings was shown again.
    """

    id: str = Field(default_factory=lambda: uuid.uuid4().hex[:8], pattern=r"^[\w.-]{1,64}$")
    origin: Origin = "measured"
    group: str | None = Field(None, pattern=r"^[\w.-]{1,64}$")
    cached: bool = False
    comparison: Comparison

    @property
    def packed(self) -> bool:
        """Was any token compressed? Without that no quality or memory figure means anything."""
        return self.comparison.compressed.report.compressed_tokens > 0

    @property
    def complete(self) -> bool:
        """Did both answers end by themselves?"""
        return "cancelled" not in (self.comparison.original.finish, self.comparison.compressed.finish)

    @property
    def where(self) -> str:
        """When, on what and with which code it was measured."""
        env = self.comparison.environment
        return f"{env.created[:10]} · {env.device} · commit {env.commit or 'unknown'}"

    @property
    def tag(self) -> str:
        """Where the numbers come from, for people."""
        return f"{self.origin.capitalize()} {self.where}"

    @property
    def label(self) -> str:
        """One line for a list of runs."""
        prompt = " ".join(self.comparison.prompt.split())
        short = prompt if len(prompt) <= 40 else prompt[:39] + "…"
        return f"{self.comparison.compressed.method} · {self.comparison.model.name} · {short}"

    def to_json(self) -> str:
        """The run as JSON text."""
        return self.model_dump_json(indent=1)

    def to_markdown(self) -> str:
        """The run as a report to read."""
        c = self.comparison
        rows = [f"| {name} | {value} |" for name, value in facts(c)]
        parts = [
            f"# Comparison {self.id}",
            f"{self.tag}.",
            f"**{_escape(verdict(c))}**",
            "| Figure | Value |\n| --- | --- |\n" + "\n".join(rows),
            f"## Prompt\n\n{fenced(c.prompt)}",
            f"## Original: full KV cache\n\n{fenced(c.original.text)}\n\n{provenance(c, 'original')}",
            f"## Compressed: {c.compressed.method}\n\n{fenced(c.compressed.text)}\n\n{provenance(c, 'compressed')}",
            *(["## Notes\n\n" + "\n".join(f"- {_escape(note)}" for note in c.notes)] if c.notes else []),
        ]
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """One line a token: both answers, and the teacher-forced measurements of the original answer's tokens."""
        c = self.comparison
        steps = c.heads.packed if c.heads else None
        head = ["index", "original", "compressed", "original_cache_bytes", "compressed_cache_bytes", "kl_nats"]
        head += ["same_top", "probability_full", "probability_compressed", "cosine_scores_packed", "top1_packed"]
        lines = []
        for i in range(max(len(c.original.token_ids), len(c.compressed.token_ids))):
            sides = [_at(c.original.token_texts, i), _at(c.compressed.token_texts, i)]
            held = [_at(c.original.cache_bytes, i), _at(c.compressed.cache_bytes, i)]
            forced = [None] * 4
            if t := c.tokens:
                forced = [_at(part, i) for part in (t.kl, t.same_top, t.probability_full, t.probability_compressed)]
            step = [_at(steps.per_step_cosine_scores, i), _at(steps.per_step_top1, i)] if steps else [None, None]
            lines.append([i, *sides, *held, *forced, *step])
        return csv_text(head, lines)

    def heads_csv(self) -> str:
        """One line a layer and query head."""
        heads = self.comparison.heads
        names = ["cosine_scores", "cosine_weights", "top1", "top5"]
        head = ["layer", "head", *(f"{name}_{part}" for part in ("served", "packed") for name in names)]
        if heads is None:
            return csv_text(head, [])
        tables = [getattr(part, f"per_head_{name}") for part in (heads.served, heads.packed) for name in names]
        return csv_text(
            head,
            [
                [layer, h, *(table[row][h] for table in tables)]
                for row, layer in enumerate(heads.layer_indices)
                for h in range(len(tables[0][row]))
            ],
        )


class RunStore:
    """The runs of one visitor, newest first; beyond `limit` the oldest go. A group counts as one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._runs: dict[str, Run] = {}

    def add(self, run: Run) -> Run:
        """Keep a run; one whose id is taken by another gets a new id."""
        if run.id in self._runs and self._runs[run.id] != run:
            run = run.model_copy(update={"id": uuid.uuid4().hex[:8]})
        self._runs[run.id] = run
        while len({kept.group or kept.id for kept in self._runs.values()}) > self._limit:
            oldest = next(iter(self._runs.values()))
            self.remove(oldest.id, whole_group=True)
        return run

    def remove(self, run_id: str, *, whole_group: bool = False) -> None:
        """Forget a run, or everything that was asked for together with it."""
        run = self._runs.pop(run_id, None)
        if run is not None and run.group and whole_group:
            self._runs = {key: kept for key, kept in self._runs.items() if kept.group != run.group}

    def get(self, run_id: str) -> Run | None:
        """The run of that id, if it is still kept."""
        return self._runs.get(run_id)

    def all(self) -> list[Run]:
        """Every run, newest first."""
        return list(reversed(self._runs.values()))


def together(run: Run, runs: Collection[Run]) -> list[Run]:
    """The runs to show beside this one: those of other settings that share its original answer, in the order asked."""
    mine = run.comparison
    found = [
        other
        for other in runs
        if run.group is not None
        and other.group == run.group
        and other.comparison.compressed.method != mine.compressed.method
        and (other.comparison.prompt, other.comparison.original.token_ids) == (mine.prompt, mine.original.token_ids)
    ]
    kept = {other.id for other in (run, *found[: MAX_TOGETHER - 1])}
    return [other for other in runs if other.id in kept] if found else [run]


def zipped(runs: Iterable[Run]) -> bytes:
    """A zip file with one JSON file a run."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for run in runs:
            archive.writestr(f"comparison-{run.id}.json", run.to_json())
    return out.getvalue()


def import_run(data: str | bytes) -> Run:
    """Read a run or a bare comparison from JSON.

    Raises:
        RunError: The text is too large, is no JSON, or is no run.
    """
    if len(data) > MAX_IMPORT_BYTES:
        raise RunError(f"The file is too large: {len(data):,} bytes, the limit is {MAX_IMPORT_BYTES:,}.")
    if data[:4] in (b"PK\x03\x04", "PK\x03\x04"):
        raise RunError("The file is a zip, which is not opened here; unpack it and import one JSON file of it.")
    run = _read(data)
    return run.model_copy(update={"origin": "imported", "cached": False})


def _read(data: str | bytes) -> Run:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise RunError("The file is not JSON.") from None
    if not isinstance(content, dict):
        raise RunError("The file is JSON, but no run: it must be an object with a comparison in it.")
    _check_numbers(content)
    try:
        if "comparison" in content:
            run = Run.model_validate_json(json.dumps(content))
        else:
            run = Run(comparison=Comparison.model_validate_json(json.dumps(content)))
    except (ValidationError, ValueError) as error:
        raise RunError(_first_error(error)) from None
    except RecursionError:
        raise RunError("The file is JSON, but no run: it is nested too deeply.") from None
    _check(run.comparison)
    return run


def _first_error(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return "The file is JSON, but no run."
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    count = error.error_count()
    more = f" ({count - 1} more like it)" if count > 1 else ""
    return f"The file is JSON, but no run: {where}: {first['msg'].rstrip('.')}{more}."


def _check_numbers(content: object) -> None:
    """Refuse numbers that nothing here can have counted or measured: what is not finite travels as null."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"The file is JSON, but no run: its numbers must be finite, got {value}.")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise RunError("The file is JSON, but no run: its whole numbers must be below 2**63 in size.")


def _check(c: Comparison) -> None:
    """Refuse a comparison whose parts do not fit together; pages index one by the other."""
    for name, side in (("original", c.original), ("compressed", c.compressed)):
        if len(side.token_ids) != len(side.token_texts):
            raise RunError(f"The file is no run: {name}.token_ids and {name}.token_texts differ in length.")
    if t := c.tokens:
        lengths = {len(t.kl), len(t.same_top), len(t.probability_full), len(t.probability_compressed)}
        if len(lengths) != 1 or lengths.pop() > len(c.original.token_ids):
            raise RunError("The file is no run: the lists in tokens do not fit the original answer.")
    if c.heads:
        _check_heads(c.heads)
    if c.attention:
        _check_attention(c.attention, c.heads)


def _check_heads(h: HeadMetrics) -> None:
    named = [(name, getattr(part, name)) for part in (h.served, h.packed) for name in type(part).model_fields]
    tables = [value for name, value in named if name.startswith("per_head_")]
    steps = [value for name, value in named if name.startswith("per_step_")]
    if any(len(table) != len(h.layer_indices) for table in tables):
        raise RunError("The file is no run: a per-head table does not fit heads.layer_indices.")
    if len({len(row) for table in tables for row in table}) > 1:
        raise RunError("The file is no run: the per-head tables differ in their number of heads.")
    if any(len(step) != len(h.positions) for step in steps) or len(h.packed_tokens) != len(h.positions):
        raise RunError("The file is no run: a per-step list does not fit heads.positions.")


def _check_attention(a: AttentionDetail, h: HeadMetrics | None) -> None:
    shape = [len(row) for row in h.packed.per_head_top1] if h else []
    if not h or any([len(row) for row in table] != shape for table in (a.margins, a.errors)):
        raise RunError("The file is no run: attention does not fit the tables in heads.")
    if len(a.packed) != len(a.positions) or not set(a.positions) <= set(h.positions):
        raise RunError("The file is no run: attention.positions do not fit attention.packed and heads.positions.")
    if any(packed + a.sinks > position + 1 for packed, position in zip(a.packed, a.positions, strict=True)):
        raise RunError("The file is no run: attention.packed has more tokens than a query sees.")
    seen = [position + 1 for position in a.positions]
    tables = [table for head in a.heads for table in (head.full, head.compressed)]
    if any([len(row) for row in table] != seen for table in tables) or max(seen, default=0) > len(a.tokens):
        raise RunError("The file is no run: the scores in attention.heads do not fit its positions and tokens.")
    known = {(layer, head) for layer, count in zip(h.layer_indices, shape, strict=True) for head in range(count)}
    if any((head.layer, head.head) not in known for head in a.heads):
        raise RunError("The file is no run: attention.heads names a head that the tables in heads do not have.")


def recorded_runs(folder: Path = RECORDED_FOLDER) -> list[Run]:
    """The runs that ship with the app, in the order of their file names.

    Raises:
        RunError: A shipped file is broken.
    """
    return [
        _read(path.read_bytes()).model_copy(update={"origin": "recorded"}) for path in sorted(folder.glob("*.json"))
    ]


def _at(values: Iterable[Any] | None, index: int) -> Any:
    values = list(values or [])
    return values[index] if index < len(values) else None


def csv_text(head: list[str], lines: list[list[object]]) -> str:
    """CSV in which no text can be run as a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([[_cell(value) for value in line] for line in lines])
    return out.getvalue()


def _cell(value: object) -> object:
    """Text that a spreadsheet would run as a formula is quoted with an apostrophe."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def fenced(text: str) -> str:
    """Text in a code fence that it cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _escape(text: str) -> str:
    return "".join("\\" + ch if ch in "\\`*_[]<>#|$~:" else ch for ch in text)
