"""The shipped texts, and reading a user's own."""

import hashlib
import tomllib
from pathlib import Path

import pytest

from turboquant import texts
from turboquant.texts import TEXTS, read_text, reading

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(texts.__file__).parent


def test_every_shipped_text_is_listed_and_packaged() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(TEXTS)
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert packaged["turboquant.texts"] == ["*.txt"]


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_clean(name: str) -> None:
    text = read_text(name)
    assert 40_000 < len(text) < 100_000
    assert text == text.strip() + "\n"
    assert not set("\r\t\ufeff\ufffd\xa0") & set(text)
    assert not any(line != line.rstrip() for line in text.split("\n"))
    assert all((text_note := TEXTS[name]).__dict__.values()), text_note
    assert "public domain" in TEXTS[name].licence


def test_texts_are_of_different_kinds() -> None:
    assert len({text.kind for text in TEXTS.values()}) == len(TEXTS)
    assert sum(len(read_text(name)) for name in TEXTS) < 600_000


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve text\n")
    assert read_text(path) == read_text(str(path)) == "naïve text\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", r"is not UTF-8: byte 3 cannot be read"),
        (b" \n\t", r"is empty"),
        (None, r"must be one of persuasion, .* or a file, got '.*own.txt'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(path)


def test_a_folder_is_not_a_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_line_ends_of_all_kinds_are_newlines(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(path) == "one\ntwo\nthree\n"


def test_a_text_is_read_once_within_a_block_and_its_bytes_are_known(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n")
    with reading() as texts:
        assert not texts
        assert read_text(path) == "first\n"
        assert texts[str(path)].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        path.write_text("second\n")
        with reading() as inner:
            assert read_text(str(path)) == "first\n"
            assert read_text("sqlite")
        assert inner is texts
        assert set(texts) == {str(path), "sqlite"}
        path.unlink()
        assert read_text(path) == "first\n"
    with pytest.raises(ValueError, match="or a file"):
        read_text(path)
    with reading(texts):
        assert read_text(path) == "first\n"


def test_what_cannot_be_read_is_tried_again_in_a_block(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    with reading() as texts:
        with pytest.raises(ValueError, match="or a file"):
            read_text(path)
        path.write_text("there now")
        assert read_text(path) == "there now"
        assert set(texts) == {str(path)}


def test_a_text_can_be_given_in_place_of_a_file() -> None:
    with reading(given={"typed in": "my words"}) as texts:
        assert read_text("typed in") == "my words"
        assert texts["typed in"].sha256 == hashlib.sha256(b"my words").hexdigest()
