"""Records on disk: whole lines from many processes, half lines survived, foreign lines named."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant.records.environment import environment
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.files import RecordFileError, append_record, read_records

ROOT = Path(__file__).resolve().parents[3]


def record(number: int = 0, **more) -> ExperimentRecord:
    cell = Cell(experiment="size", model="tiny", method="full", settings={"seed": number})
    return ExperimentRecord(cell=cell, metrics={"value": float(number)}, environment=environment(), **more)


def seeds(records: list[ExperimentRecord]) -> list[int]:
    return [one.cell.settings["seed"] for one in records]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.jsonl"
    written = [record(1, detail={"per_layer": [[0.5, None]]}, timing={"elapsed": 0.25}), record(2, error="too big")]
    for one in written:
        append_record(one, path)
    assert read_records(path) == written
    assert path.read_text().count("\n") == 2


def test_what_is_not_a_number_travels_as_null(tmp_path: Path) -> None:
    append_record(
        record(1).model_copy(update={"metrics": {"a": float("nan"), "b": float("inf")}}), tmp_path / "a.jsonl"
    )
    assert read_records(tmp_path / "a.jsonl")[0].metrics == {"a": None, "b": None}


def test_a_missing_or_empty_file_holds_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == []
    (tmp_path / "empty.jsonl").write_bytes(b"\n  \n")
    assert read_records(tmp_path / "empty.jsonl") == []


def test_many_processes_append_without_losing_or_mixing_lines(tmp_path: Path) -> None:
    path, writers, each = tmp_path / "a.jsonl", 3, 40
    code = """
        import sys
        from pathlib import Path
        from turboquant.records.environment import environment
        from turboquant.records.experiment import Cell, ExperimentRecord
        from turboquant.records.files import append_record
        writer, each, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
        where = environment()
        for i in range(each):
            cell = Cell(experiment="size", settings={"seed": writer * each + i})
            detail = {"filling": "x" * (20_000 if i % 5 == 0 else 10)}
            append_record(ExperimentRecord(cell=cell, environment=where, detail=detail), path)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    running = [subprocess.Popen([*command, str(i), str(each), str(path)], cwd=ROOT) for i in range(writers)]
    assert [one.wait(timeout=120) for one in running] == [0] * writers
    assert sorted(seeds(read_records(path))) == list(range(writers * each))


def test_half_a_line_at_the_end_is_passed_over_and_gone_after_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_record(record(1), path)
    append_record(record(2, detail={"filling": "x" * 100_000}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-70_000])  # the write of the second was cut short
    assert seeds(read_records(path)) == [1]
    append_record(record(3), path)
    assert seeds(read_records(path)) == [1, 3]
    path.write_bytes(whole[:50])  # nothing but half a line
    append_record(record(4), path)
    assert seeds(read_records(path)) == [4]


@given(cut=st.integers(0, 2000))
def test_a_write_cut_anywhere_costs_that_record_alone(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    append_record(record(1), path)
    first = path.stat().st_size
    append_record(record(2), path)
    size = path.stat().st_size
    os.truncate(path, min(size, first + cut))
    append_record(record(3), path)
    assert seeds(read_records(path)) == ([1, 2, 3] if first + cut >= size - 1 else [1, 3])


@given(cut=st.integers(0, 2000), nulls=st.sampled_from([1, 3, 4096, 2**17]), seen=st.booleans())
def test_nulls_behind_a_cut_are_gone_after_the_next_record(
    tmp_path_factory: pytest.TempPathFactory, cut: int, nulls: int, seen: bool
) -> None:
    """A machine that crashes leaves a file at its new length, filled with NULs where data did not reach the disk."""
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    append_record(record(1), path)
    first = path.stat().st_size
    append_record(record(2), path)
    size = path.stat().st_size
    os.truncate(path, min(size, first + cut))
    with path.open("ab") as file:
        file.write(b"\0" * nulls)
    whole = first + cut >= size - 1
    assert not seen or seeds(read_records(path)) == ([1, 2] if whole else [1])
    append_record(record(3), path)
    assert seeds(read_records(path)) == ([1, 2, 3] if whole else [1, 3])
    assert b"\0" not in path.read_bytes()


def test_nulls_in_front_of_a_record_and_line_ends_of_windows_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [record(seed).model_dump_json().encode() for seed in (1, 2, 3)]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n" + b"\0" * 99 + lines[1] + b"\r\n\0\0\n\r\n" + lines[2])
    assert seeds(read_records(path)) == [1, 2, 3]
    append_record(record(4), path)
    assert seeds(read_records(path)) == [1, 2, 3, 4]


@pytest.mark.parametrize("start", [b'{"a":' * 100_000, b'{"a":' + b"9" * 5000])
def test_what_looks_like_half_a_record_is_cut_off_however_deep(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(start)
    append_record(record(1), path)
    assert seeds(read_records(path)) == [1]


def test_a_whole_record_without_its_line_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_record(record(1), path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert seeds(read_records(path)) == [1]
    append_record(record(2), path)
    assert seeds(read_records(path)) == [1, 2]


def test_text_of_another_kind_is_never_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("two lines\nof a person")
    with pytest.raises(RecordFileError, match=r"^line 1 of .*notes\.txt is not an experiment record .*1 more"):
        read_records(path)
    path.write_text("one line of a person")
    with pytest.raises(RecordFileError, match=r"^line 1 of .*notes\.txt is not an experiment record"):
        read_records(path)
    path.write_text("two lines\nof a person")
    append_record(record(1), path)
    assert path.read_text().startswith("two lines\nof a person\n{")


def test_broken_and_foreign_lines_are_named_and_the_good_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_record(record(1), path)
    with path.open("ab") as file:
        file.write(b'{"kind":"bench-decode"}\n\xff\xfe not text\n')
    append_record(record(2), path)
    with pytest.raises(RecordFileError, match=r"^line 2 of .*a\.jsonl is not an experiment record .*1 more") as caught:
        read_records(path)
    assert seeds(caught.value.records) == [1, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"cell": {"model": "tiny"}}, "cell.experiment"),
        ({"surprise": 1}, "surprise"),
        ({"metrics": {"value": "high"}}, "metrics.value"),
    ],
)
def test_a_record_of_another_shape_is_refused_by_the_field(tmp_path: Path, change: dict, named: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(json.loads(record(1).model_dump_json()) | change) + "\n")
    with pytest.raises(RecordFileError, match=rf"line 1 .*{named}"):
        read_records(path)


def test_a_cell_is_the_same_in_any_order_of_its_settings(tmp_path: Path) -> None:
    one = Cell(experiment="size", model="tiny", method="full", settings={"a": 1, "b": [2, 3]})
    two = Cell(experiment="size", model="tiny", method="full", settings={"b": [2, 3], "a": 1})
    assert one.key == two.key
    others = ({"experiment": "x"}, {"model": "y"}, {"weights": "fp32"}, {"method": "rtn"}, {"settings": {"a": 1}})
    assert len({one.key, *(one.model_copy(update=change).key for change in others)}) == 6
    assert Cell.model_validate_json(one.model_dump_json()).key == one.key
    assert str(one) == "size tiny full a=1 b=[2, 3]"
