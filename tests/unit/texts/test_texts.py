"""The shipped texts, and reading a user's own."""

import hashlib
import os
import tomllib
from pathlib import Path

import pytest

from turboquant import texts
from turboquant.texts import TEXTS, read_text, read_texts, reading

ROOT = Path(__file__).resolve().parents[3]
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
        (b"\xff\xfea\x00\n\xd8", r"is not UTF-16-LE: byte 4 cannot be read"),
        ("no mark".encode("utf-16-le"), r"must be UTF-8 or have a byte order mark: character 1 is null"),
        (b"a text and then\0\0\0", r"character 15 is null"),
        (bytes(range(256)), r"character 0 is null|is not UTF-8: byte 128"),
        (None, r"must be one of persuasion, .* or a file, got '.*own.txt'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_is_read_whatever_wrote_it(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(f"naïve 文{end}two{end}".encode(encoding))
    assert read_text(path) == "naïve 文\ntwo\n"


@pytest.mark.parametrize("name", ["persuasion and then more words " * 20, "x" * 300, "a\0b"])
def test_a_text_given_in_place_of_a_name_is_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of persuasion|cannot be read: File name too long"):
        read_text(name)


def test_a_pipe_is_refused_since_it_could_be_read_only_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe must be a file, and this is a pipe or a device"):
        read_text(tmp_path / "pipe")


def test_one_text_twice_is_refused_under_whatever_name(tmp_path: Path) -> None:
    for name in ("one.txt", "copy.txt"):
        (tmp_path / name).write_text("the same words\n")
    (tmp_path / "link.txt").symlink_to("one.txt")
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfthe same words\r\n")
    one = str(tmp_path / "one.txt")
    assert read_texts(["persuasion", one]) == {"persuasion": read_text("persuasion"), one: "the same words\n"}
    for other in ("copy.txt", "link.txt", "windows.txt", f"../{tmp_path.name}/one.txt"):
        with pytest.raises(ValueError, match=r"the texts .*one.txt and .* are the same, which would count twice"):
            read_texts([one, "persuasion", f"{tmp_path}/{other}"])
    with pytest.raises(ValueError, match="the text persuasion is given twice, and would count twice"):
        read_texts(["persuasion", "sqlite", "persuasion"])


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
