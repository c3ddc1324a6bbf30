"""The documentation as tests read it: pages, their fenced blocks with the mark in front of each, links and anchors.

A block of `python` is run unless the line in front of it says `<!-- not run: reason -->`. A block of `sh` says what
becomes of it: `<!-- run -->` or `<!-- not run: reason -->`. `<!-- file: path -->` names the file that a block is.
"""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOOR_PLANS = [ROOT / "turboquant" / "README.md", ROOT / "app" / "README.md"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *FLOOR_PLANS, *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"", "json", "math", "python", "sh", "text", "toml", "yaml"}
_FENCE = re.compile(r"^( *)(```+|~~~+) *([\w-]*)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- *(run|not run|file)(?:: *(.*?))? *-->\s*\Z")
_LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block. `mark` is run, not run, file or nothing, `said` what stands behind the mark's colon."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    said: str

    @property
    def where(self) -> str:
        """Page and line, for messages."""
        return f"{name_of(self.page)}, line {self.line}"

    @property
    def code(self) -> str:
        """The block behind as many empty lines as it has lines before it, so that errors name the page's lines."""
        return "\n" * self.line + self.text

    def commands(self) -> list[list[str]]:
        """The words of each command line; comments are left out, lines that end in a backslash go on."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        mark = _MARK.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        kind, said = (mark[1], mark[2] or "") if mark else ("", "")
        found.append(Block(page, line, match[3], match[4], kind, said))
    return tuple(found)


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)


def links(page: Path) -> list[str]:
    """Where a page's links and images point to."""
    return [first or second for first, second in _LINK.findall(prose(page))]


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives a page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one) is not None for one in found)
        found.append(f"{slug}-{count}" if count else slug)
    return frozenset(found)


def command_of(words: list[str]) -> list[str] | None:
    """What is given to `turboquant`, where a command line calls it; None for another program."""
    program = Path(words[0]).name
    if program == "turboquant":
        return words[1:]
    if program.startswith("python") and words[1:3] == ["-m", "turboquant"]:
        return words[3:]
    return None
