"""Sets of prompts: reading them from typed text or a file, and the request that runs them."""

import contextlib
import csv
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.config import AppConfig
from app.engine.job import Job, Request, key_of
from app.tab.examples import EXAMPLES, own
from app.tab.requests import Choices, RequestError, check_loading, method_text, sampling_settings
from app.tab.runs import Run
from turboquant.methods import parse_method
from turboquant.records.comparison import Settings
from turboquant.texts import decode_text

if TYPE_CHECKING:
    from app.tab.results import Results

MAX_BYTES = 1_000_000
SEPARATOR = "---"
SUFFIXES = ("txt", "csv", "jsonl")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SEPARATOR_LINE = re.compile(r'"?sep=([^\r\n])"?[^\r\n]*(?:\r\n|\r|\n|$)', re.IGNORECASE)
"""What spreadsheets write in front of a table."""
_Numbered = list[tuple[int, str]]


def example_set() -> tuple[str, ...]:
    """The prompts of the examples."""
    return tuple(example.prompt for example in EXAMPLES)


def read_typed(text: str, config: AppConfig) -> tuple[str, ...]:
    """Prompts from text: blocks between lines of ---; without those, between blank lines; without those, lines.

    Raises:
        RequestError: There is none, there are too many, or one is too long.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise RequestError(f"The text is larger than {MAX_BYTES:,} bytes, which is the limit.")
    return _checked(_blocks(text), config)


def read_file(data: bytes, name: str, config: AppConfig) -> tuple[str, ...]:
    """Prompts from the content of a .txt, .csv or .jsonl file.

    Raises:
        RequestError: It is too large, of another kind, no text, or breaks a rule of its kind; the message names
            the line and the rule.
    """
    if len(data) > MAX_BYTES:
        raise RequestError(f"The file has {len(data):,} bytes; the limit is {MAX_BYTES:,}.")
    readers: dict[str, Callable[[str], _Numbered]] = {"txt": _blocks, "csv": _csv_rows, "jsonl": _json_lines}
    suffix = name.rpartition(".")[2].lower()
    if suffix not in readers:
        raise RequestError(f"The file must end in .{', .'.join(SUFFIXES)}; {name[-40:]!r} does not.")
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError(
            f"Line {line}: the file must be UTF-8 text, or UTF-16 with its byte order mark, and is not."
        ) from None
    return _checked(readers[suffix](text), config)


def _blocks(text: str) -> _Numbered:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n").split("\n")
    skipped = len(text) - len(text.lstrip("\r\n"))
    if any(line.strip() == SEPARATOR for line in lines):
        return _between(lines, lambda line: line.strip() == SEPARATOR, skipped)
    if any(not line.strip() for line in lines):
        return _between(lines, lambda line: not line.strip(), skipped)
    return [(skipped + number, line.strip()) for number, line in enumerate(lines, start=1)]


def _between(lines: Sequence[str], ends: Callable[[str], bool], skipped: int) -> _Numbered:
    found: _Numbered = []
    block: list[str] = []
    start = 1
    for number, line in enumerate([*lines, None], start=1):
        if line is None or ends(line):
            if "\n".join(block).strip():
                found.append((skipped + start, "\n".join(block).strip()))
            block, start = [], number + 1
        else:
            block.append(line)
    return found


def _csv_rows(text: str) -> _Numbered:
    """The column named prompt; where every row is a single cell, each is a prompt."""
    first = _SEPARATOR_LINE.match(text)
    skipped, separator = (first[0], first[1]) if first else ("", _separator(text))
    if separator not in _SEPARATORS:
        raise RequestError(f"Line 1: the separator must be a comma, semicolon, tab or bar, got {separator!r}.")
    rows = list(_cells(text[len(skipped) :], separator, len(skipped.splitlines())))
    if not rows:
        return []
    names = _names(rows[0][1])
    if "prompt" not in names:
        _check_single(rows, separator)
        column = 0
    else:
        column = names.index("prompt")
        del rows[0]
    for line, cells in rows:
        if any(cell.strip() for cell in cells[len(names) :]):
            raise RequestError(
                f"Line {line}: the row has {len(cells)} cells and the first row {len(names)}; a prompt with "
                f"{_SEPARATORS[separator]} in it must be in quotes."
            )
        if column >= len(cells) or not cells[column].strip():
            raise RequestError(f"Line {line}: the prompt of a row must not be empty.")
    return [(line, cells[column].strip()) for line, cells in rows]


def _cells(text: str, separator: str, skipped: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, each with the number of its line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    begin = 1
    try:
        for row in reader:
            line, begin = begin, reader.line_num + 1
            if any(cell.strip() for cell in row):
                yield skipped + line, row
    except csv.Error as error:
        line = skipped + max(reader.line_num, 1)
        raise RequestError(f"Line {line}: this is no CSV ({str(error)[:80]}).") from None


def _names(row: Sequence[str]) -> list[str]:
    return [cell.strip().lower() for cell in row]


def _first_row(text: str, separator: str) -> list[str]:
    with contextlib.suppress(RequestError):
        return next((cells for _, cells in _cells(text, separator)), [])
    return []


def _separator(text: str) -> str:
    """The separator by which the first row has a column named prompt; a comma where it has none by any."""
    return next((one for one in _SEPARATORS if "prompt" in _names(_first_row(text, one))), ",")


def _check_single(rows: Sequence[tuple[int, list[str]]], separator: str) -> None:
    """Refuse rows of several columns of which none is named prompt: which one is meant is not to be guessed."""
    header = rows[0][1]
    for other in _SEPARATORS if len(header) == 1 and len(rows) > 1 else ():
        parted = [_first_row(cells[0], other) for _, cells in rows]
        if len(parted[0]) > 1 and len({len(cells) for cells in parted}) == 1:
            header, separator = parted[0], other
    if len(header) > 1:
        shown = ", ".join(repr(cell.strip()[:30]) for cell in header[:5])
        raise RequestError(
            f"Line {rows[0][0]}: no column is named prompt; the first row, parted by {_SEPARATORS[separator]}, has "
            f"{shown}. Name the column of the prompts so, or put texts with {_SEPARATORS[separator]} into quotes."
        )


def _json_lines(text: str) -> _Numbered:
    found: _Numbered = []
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise RequestError(f"Line {number}: each line must be JSON by itself, and this one is not.") from None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError(
                f'Line {number}: each line must be a text in quotes or {{"prompt": "a text"}}, and not empty, '
                f"got {reprlib.repr(value)}."
            )
        found.append((number, prompt.strip()))
    return found


def _checked(found: _Numbered, config: AppConfig) -> tuple[str, ...]:
    if not found or not any(prompt for _, prompt in found):
        raise RequestError("There is no prompt in it; write one a line.")
    if len(found) > config.max_prompts:
        raise RequestError(f"There are {len(found):,} prompts; the limit here is {config.max_prompts} in one set.")
    for line, prompt in found:
        if len(prompt) > config.max_prompt_chars:
            raise RequestError(
                f"Line {line}: the prompt has {len(prompt):,} characters; the limit is {config.max_prompt_chars:,}."
            )
        if "\x00" in prompt or any("\ud800" <= ch <= "\udfff" for ch in prompt):
            raise RequestError(f"Line {line}: the prompt must be text, without null characters or half characters.")
    return tuple(dict.fromkeys(prompt for _, prompt in found))  # what is given twice would count twice


@dataclass(frozen=True, kw_only=True)
class PromptsRequest(Request):
    """A set of prompts, each answered with the full cache and with one method; each result is a Comparison."""

    title: str = "Prompts"
    page: str = "prompts"
    prompts: tuple[str, ...]
    settings: Settings
    chat: bool = True

    @property
    def items(self) -> int:
        """One a prompt."""
        return len(self.prompts)

    @property
    def sides(self) -> int:
        """The original and the compressed one."""
        return 2

    @property
    def method(self) -> str:
        """The one of all prompts."""
        (method,) = self.methods
        return method

    def key(self, item: int) -> str | None:
        """Everything one pair of answers depends on."""
        prompt = self.prompts[item]
        return key_of("prompt", self.model, self.weights, prompt, self.method, self.settings, self.chat)

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        """Answer one prompt after the other."""
        from turboquant.run.compare import compare

        method = parse_method(self.method)
        for item in job.pending:
            job.begin_item(item)
            found = compare(
                loaded,
                self.prompts[item],
                method,
                self.settings,
                chat=self.chat,
                on_event=job.publish,
                cancelled=cancelled,
            )
            job.add(item, found)
            if cancelled() or yielding():
                return

    def keep(self, tab: "Results", job: Job, item: int) -> str | None:
        """A run of the set."""
        tab.runs.add(Run(comparison=job.results[item], group=f"set-{job.id}", cached=item in job.cached))
        return None

    def prompt_tokens(self, result: Any) -> int:
        """Those of one prompt."""
        return int(result.prompt_tokens)


def prompts_request(choices: Choices, prompts: Sequence[str], config: AppConfig) -> PromptsRequest:
    """Check every choice and every prompt once more and make the request that the engine runs.

    Raises:
        RequestError: One of them cannot be run.
    """
    checked = _checked([(number, prompt) for number, prompt in enumerate(prompts, start=1)], config)
    model, weights = check_loading(choices, config)
    return PromptsRequest(
        model=model,
        weights=weights,
        private=own(checked),
        prompts=checked,
        methods=(method_text(choices),),
        settings=sampling_settings(choices, config),
        chat=bool(choices.chat),
    )
