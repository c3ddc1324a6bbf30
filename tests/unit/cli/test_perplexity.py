"""The commands perplexity, needle, methods and generate-bench, in this process and as real ones."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from tests.support.models import save_tiny
from tests.support.system import at_terminal, interrupted
from turboquant import cli
from turboquant.cli.methods import usable
from turboquant.methods import parse_method, settings_of
from turboquant.records.files import read_records
from turboquant.records.pareto import pareto_front

RUNNER = CliRunner()
SHORT = ["--text", "hamlet", "--context", "260", "--prefill", "220"]
COMMANDS: dict[str, list[str]] = {
    "perplexity": ["--bits", "2", "4", *SHORT],
    "needle": [
        "--bits",
        "2",
        "4",
        "--contexts",
        "480",
        "--depths",
        "0.5",
        "--repetitions",
        "1",
        "--max-new-tokens",
        "3",
    ],
    "methods": ["--method", "full", "rtn:bits=4", "turboquant:bits=2", *SHORT],
    "generate-bench": ["--bits", "2", "--batch", "2", "--prompt-tokens", "240", "--new-tokens", "3", "--repeats", "1"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=2))


def invoke(*words: str) -> Result:
    return RUNNER.invoke(cli.app, list(words))


def last_line(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def start(model: str, output: Path, command: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "turboquant", command, "--model", model, "--output", str(output), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_a_record(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + 120
    while not (output.exists() and b"\n" in output.read_bytes()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_explains_itself_records_and_goes_on(model: str, tmp_path: Path, command: str) -> None:
    assert "Usage" in invoke(command, "--help").output
    output = tmp_path / "new folder" / "out.jsonl"
    words = [command, "--model", model, "--output", str(output), *COMMANDS[command]]
    first = invoke(*words)
    summary = last_line(first)
    records = read_records(output)
    assert summary["records"] == len(records) == len({record.cell.key for record in records}) >= 1
    assert summary["failed"] == 0
    for record in records:
        assert str(parse_method(str(record.cell.method))) in first.stdout
    held = output.read_bytes()
    again = invoke(*words)
    assert last_line(again)["records"] == len(records)
    assert f"{len(records)} of {len(records)} records are in" in again.stderr
    assert output.read_bytes() == held
    assert again.stdout.splitlines()[:-1] == first.stdout.splitlines()[:-1]  # the same table, from records
    assert last_line(invoke(*words, "--overwrite"))["records"] == len(records)
    assert len(read_records(output)) == len(records)


WRONG = [
    ("perplexity", ["--method", "nope"], "unknown method 'nope'"),
    ("perplexity", ["--bits", "9"], "bits must be a whole number from 1 to 8, got 9"),
    ("perplexity", ["--context", "100", "--prefill", "100"], "prefill must be shorter than the context of 100 tokens"),
    ("perplexity", ["--text", "nope.txt"], "the text must be one of persuasion, hamlet"),
    ("perplexity", ["--text", "LATIN"], "latin.txt is not UTF-8: byte 3 cannot be read"),
    ("perplexity", ["--text", "EMPTY"], "empty.txt is empty"),
    ("perplexity", ["--text", "hamlet", "sqlite", "hamlet"], "the text hamlet is given twice, and would count twice"),
    ("perplexity", ["--text", "TINY", "COPY"], "copy.txt are the same, which would count twice"),
    ("methods", ["--text", "hamlet", "hamlet"], "the text hamlet is given twice"),
    ("perplexity", ["--text", "TINY", "--output", "TINY", "--overwrite"], "--text and --output must be two files"),
    ("needle", ["--filler", "TINY", "--output", "TINY", "--overwrite"], "--filler and --output must be two files"),
    (
        "perplexity",
        ["--text", "TINY"],
        "has 5 tokens, too few for 1 windows of 261 from token 0",
    ),
    ("perplexity", ["--context", "600"], "tiny has a context of 512 tokens, got 600"),
    ("perplexity", ["--output", "FOLDER"], "cannot be written: Is a directory"),
    ("perplexity", ["--output", "FOREIGN"], "holds records of needle: give another --output, or --overwrite"),
    ("needle", ["--contexts", "600"], "tiny has a context of 512 tokens, got 616"),
    ("needle", ["--contexts", "50"], "a prompt with a needle has at least"),
    ("needle", ["--filler", "nope.txt"], "the text must be one of"),
    ("needle", ["--repetitions", "20000"], "--repetitions should be less than or equal to 10000, got '20000'"),
    ("needle", ["--model", "no-such-model"], "Unknown model 'no-such-model'"),
    ("methods", ["--weights", "3bit"], "Unknown weights '3bit'"),
    ("methods", ["--method", "rtn:bitz=4"], "unknown option of rtn 'bitz': did you mean 'bits'"),
    ("generate-bench", ["--prompt-tokens", "600"], "tiny has a context of 512 tokens, got 728"),
    ("generate-bench", ["--shortest", "0"], "--shortest should be greater than 0, got 0.0"),
]


@pytest.mark.parametrize(("command", "words", "message"), WRONG)
def test_wrong_use_is_one_sentence_and_code_2(
    model: str, tmp_path: Path, command: str, words: list[str], message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "tiny.txt").write_bytes(b"five!")
    (tmp_path / "copy.txt").write_bytes(b"five!")
    foreign = tmp_path / "foreign.jsonl"
    cell = {"experiment": "needle"}
    environment = {"created": "", "commit": None, "device": "", "cpu_threads": 1} | dict.fromkeys(
        ("python", "torch", "transformers"), ""
    )
    foreign.write_text(json.dumps({"cell": cell, "environment": environment}) + "\n")
    places = {"LATIN": "latin.txt", "EMPTY": "empty.txt", "TINY": "tiny.txt", "FOLDER": ".", "FOREIGN": "foreign.jsonl"}
    places["COPY"] = "copy.txt"
    words = [str(tmp_path / places[word]) if word in places else word for word in words]
    output = tmp_path / "out.jsonl"
    if "--output" not in words:
        words += ["--output", str(output)]
    if command == "perplexity" and "--context" not in words:
        words += ["--context", "260", "--prefill", "220"]
    result = invoke(command, "--model", model, *words)
    assert result.exit_code == 2, result.output
    said = result.stderr.splitlines()[-1]
    assert said.startswith("turboquant: ")
    assert message in said
    assert (tmp_path / "tiny.txt").read_bytes() == b"five!"
    assert not output.exists() or not output.read_bytes()


def test_at_a_terminal_the_line_at_the_end_is_short(model: str, tmp_path: Path) -> None:
    words = ["perplexity", "--model", model, *COMMANDS["perplexity"], "--output", str(tmp_path / "out.jsonl")]
    code, text = at_terminal(words)
    assert code == 0
    *table, last = text.splitlines()
    assert json.loads(last).keys() == {"experiment", "records", "failed", "output", "seconds"}
    piped = invoke(*words)
    assert last_line(piped)["results"].keys() == {"turboquant:bits=2", "turboquant:bits=4"}
    assert piped.stdout.splitlines()[:-1] == table


def test_what_is_asked_for_twice_counts_once(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ["--bits", "2", "2", "--method", "turboquant", "turboquant", "--repetitions", "2", "--max-new-tokens", "3"]
    words += ["--contexts", "480", "480", "--depths", "0.5", "0.50"]
    summary = last_line(invoke("needle", "--model", model, *words, "--output", str(output)))
    assert (summary["records"], len(read_records(output))) == (1, 1)


def test_a_method_that_packs_nothing_fails_and_the_others_are_recorded(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ["--method", "turboquant:residual_length=250", "rtn:bits=4", *SHORT, "--output", str(output)]
    result = invoke("perplexity", "--model", model, *words)
    assert result.exit_code == 1
    assert "packs none of 260 tokens" in result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["records"], summary["failed"]) == (2, 1)
    assert {record.cell.method: bool(record.error) for record in read_records(output)} == {
        "rtn:bits=4": False,
        "turboquant:bits=4,residual_length=250": True,
    }


def test_a_model_that_cannot_be_loaded_fails_with_code_1(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("perplexity", "--model", str(tmp_path / "empty"), "--output", str(tmp_path / "out.jsonl"))
    assert result.exit_code == 1
    assert "config.json" in result.stderr


@pytest.mark.parametrize("wrong", [["--context", "600"], ["--model", "no-such-model"], ["--text", "nope.txt"]])
def test_what_is_to_be_overwritten_stays_until_the_work_begins(model: str, tmp_path: Path, wrong: list[str]) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    result = invoke("perplexity", "--model", model, *SHORT, "--overwrite", "--output", str(output), *wrong)
    assert result.exit_code == 2, result.output
    assert output.read_text() == "precious\n"


def test_a_killed_run_goes_on_where_it_was(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ["--bits", *"2345", "--text", "hamlet", "--context", "500", "--prefill", "220", "--windows", "6"]
    process = start(model, output, "perplexity", *words)
    wait_for_a_record(process, output)
    process.kill()
    process.communicate()
    before = read_records(output)
    assert 1 <= len(before) < 4
    result = invoke("perplexity", "--model", model, "--output", str(output), *words)
    assert last_line(result)["records"] == 4
    assert f"{len(before)} of 4 records are in {output} already" in result.stderr
    after = read_records(output)
    assert after[: len(before)] == before
    assert len({record.cell.key for record in after}) == len(after) == 4


def test_ctrl_c_finishes_the_record_in_hand_and_says_how_to_go_on(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ["--bits", *"1234", "--contexts", "480", "--depths", "0", "0.3", "0.6", "1", "--repetitions", "3"]
    with interrupted(output):
        result = invoke("needle", "--model", model, "--output", str(output), *words)
    assert result.exit_code == 1, result.output
    assert "the record in hand is finished first" in result.stderr
    count = len(read_records(output))
    assert f"stopped with {count} of 16 records in {output}; the same command goes on from there" in result.stderr
    assert count % 4 == 0  # all methods of one length and depth are in hand together


def test_as_a_real_command(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = start(model, output, "generate-bench", *COMMANDS["generate-bench"])
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert json.loads(out.splitlines()[-1])["records"] == len(read_records(output))
    assert "% " in said  # progress


def test_the_table_of_methods_is_sorted_and_marks_the_front(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = invoke("methods", "--model", model, "--output", str(output), *COMMANDS["methods"])
    figures = {record.cell.method: record.metrics for record in read_records(output)}
    expected = sorted(figures, key=lambda method: figures[method]["bits_per_value"] or 0)
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method "))
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == expected
    assert set(last_line(result)["pareto_front"]) <= set(figures)
    assert "full" in last_line(result)["pareto_front"]  # nothing has less KL


def test_the_grid_is_known_and_what_cannot_run_here_is_left_out_with_its_reason() -> None:
    methods, skipped = usable([*settings_of("grid"), "not-there"])
    assert len(methods) + len(skipped) == len(settings_of("grid")) + 1
    assert len({str(method) for method in methods}) == len(methods) >= 20
    assert "unknown method 'not-there'" in skipped["not-there"]
    assert all(spec == "not-there" or "hf-" in spec for spec in skipped)


def test_methods_can_be_listed() -> None:
    result = invoke("methods", "--list")
    assert result.exit_code == 0
    assert "turboquant-paper" in result.stdout


POINTS = st.lists(st.tuples(st.integers(0, 6).map(float) | st.none(), st.integers(0, 6).map(float)), max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float | None, float]]) -> None:
    front = pareto_front(points)
    known = [(cost, loss) for cost, loss in points if cost is not None]
    for (cost, loss), on in zip(points, front, strict=True):
        if cost is None:
            assert not on
            continue
        beaten = any(a <= cost and b <= loss and (a, b) != (cost, loss) for a, b in known)
        assert on == (not beaten)
    assert any(front) == bool(known)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_on_the_front(broken: float) -> None:
    assert pareto_front([(2.0, broken), (broken, 0.1), (4.0, 0.1)]) == [False, False, True]
