"""`turboquant compare`: one prompt, prompts from a pipe, a conversation, a terminal, Ctrl-C."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.models import save_tiny
from tests.support.system import at_terminal, file_system
from turboquant import cli
from turboquant.cli.compare import _spaced
from turboquant.records.comparison import Comparison
from turboquant.records.verdict import cache_size
from turboquant.run.chat import Turn

RUNNER = CliRunner()
LONG = "The lighthouse keeper wrote down the weather every morning, and then he lit the lamp and put the kettle on. "
LONG += "The sea was calm, the sky was grey, and nobody came by; so he read, and slept, and wrote it down again. "
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


def invoke(folder: str, *arguments: str, text: str | None = None):
    fixed = ["compare", "--model", folder, "--max-new-tokens", "6", *arguments]
    return RUNNER.invoke(cli.app, fixed, input=text)


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_one_shot_prints_figures_and_ends_with_the_record(folder) -> None:
    result = invoke(folder, "--prompt", LONG, "--method", "turboquant:bits=2")
    assert result.exit_code == 0, result.output
    record = Comparison.model_validate_json(result.stdout.splitlines()[-1])
    lines = result.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if line.lstrip().startswith("step"))
    above = " ".join(lines[header - 2 : header + 1]).split()
    assert {"step", "cosine", "top-1", "top-5", "KL,", "bytes", "full"} <= set(above)
    first = lines[header + 1].split()
    assert record.tokens is not None
    assert record.heads is not None
    assert first[0] == "1"
    assert float(first[1]) == pytest.approx(record.heads.served.per_step_cosine_scores[0], abs=1e-4)
    assert float(first[4]) == pytest.approx(record.tokens.kl[0], abs=1e-4)
    assert len(record.compressed.cache_bytes) == 6
    assert f"{record.compressed.report.compressed_tokens} of them packed" in result.stdout
    assert f", {cache_size(record.compressed.report)}\n" in result.stdout
    assert "mean KL" in result.stdout
    assert lines[-2].startswith(("Identical", "Different"))


def test_a_prompt_too_short_to_pack_has_no_figures(folder) -> None:
    result = invoke(folder, "hello")
    assert result.exit_code == 0
    assert "No token was packed" in result.stdout
    assert "Nothing was packed" in result.stdout
    assert "mean KL" not in result.stdout
    assert "held for" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["hi", "--prompt", "ho"], 2, "the prompt is given twice"),
        (["--prompt", " "], 2, "The prompt is empty"),
        (["--prompt", "x" * 600], 2, "has a context of 512 tokens"),
        (["--prompt", "hi", "--method", "nope"], 2, "unknown method 'nope'"),
        (["--prompt", "hi", "--output", "/proc/nowhere/x.jsonl"], 2, "x.jsonl cannot be written"),
    ],
)
def test_wrong_use_is_one_sentence(folder, arguments: list[str], code: int, message: str) -> None:
    result = invoke(folder, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_each_line_of_a_pipe_is_a_prompt_and_records_are_kept(folder, tmp_path: Path) -> None:
    output = tmp_path / "compare.jsonl"
    lines = f"{LONG}\n\n/help\n/reset\n/dance\nhello\n/exit\nnever\n"
    result = invoke(folder, "--output", str(output), text=lines)
    assert result.exit_code == 0, result.output
    found = records(result.stdout)
    assert [record["prompt"] for record in found] == [LONG, "hello"]
    assert [Comparison.model_validate_json(line).prompt for line in output.read_text().splitlines()] == [LONG, "hello"]
    assert "/reset needs a conversation" in result.stderr
    assert "unknown command '/dance'" in result.stderr
    assert "Ctrl-C stops the answer in hand" in result.stderr

    more = invoke(folder, "--output", str(output), text="again\n")
    assert more.exit_code == 0
    assert len(output.read_text().splitlines()) == 3
    refused = invoke(folder, "--chat", "--output", str(output), text="again\n")
    assert refused.exit_code == 2
    assert "is not a turn of a conversation" in refused.stderr
    assert len(output.read_text().splitlines()) == 3
    assert invoke("no-such-model", "--overwrite", "--output", str(output), text="again\n").exit_code == 2
    assert len(output.read_text().splitlines()) == 3
    assert invoke(folder, "--chat", "--overwrite", "--output", str(output), text="again\n").exit_code == 0
    assert Turn.model_validate_json(output.read_text()).index == 0


def test_a_file_that_a_crash_left_is_gone_on_with(folder, tmp_path: Path) -> None:
    output = tmp_path / "compare.jsonl"
    assert invoke(folder, "hello", "--output", str(output)).exit_code == 0
    whole = output.read_bytes()
    for left in (whole + b"\0" * 4096, whole + whole[:99] + b"\0" * 9, b"\xef\xbb\xbf" + whole[:-1] + b"\r\n"):
        output.write_bytes(left)
        assert invoke(folder, "again", "--output", str(output)).exit_code == 0
        lines = output.read_text(encoding="utf-8-sig").splitlines()
        assert [Comparison.model_validate_json(line).prompt for line in lines] == ["hello", "again"]


def test_a_refused_prompt_does_not_end_the_loop_and_shows_in_the_exit_code(folder) -> None:
    result = invoke(folder, text=f"{'x' * 600}\nhello\n")
    assert result.exit_code == 1
    assert "has a context of 512 tokens" in result.stderr
    assert [record["prompt"] for record in records(result.stdout)] == ["hello"]


def test_prompts_of_other_systems_are_read_or_refused(folder) -> None:
    """A byte order mark and line ends of Windows are no part of a prompt; UTF-16 is no text here."""
    words = ["compare", "--model", folder, "--max-new-tokens", "2"]
    lines = RUNNER.invoke(cli.app, words, input=b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert [record["prompt"] for record in records(lines.stdout)] == ["one", "two"]
    words.append("-")
    assert records(RUNNER.invoke(cli.app, words, input=b"\xef\xbb\xbfone").stdout)[0]["prompt"] == "one"
    for given in ("one\n".encode("utf-16"), "one\n".encode("utf-16-le")):
        refused = RUNNER.invoke(cli.app, words, input=given)
        assert refused.exit_code == 2
        assert "The prompt must be text" in refused.stderr


def test_a_conversation_keeps_its_caches_from_turn_to_turn(folder) -> None:
    result = invoke(folder, LONG, "--chat", text="And then?\n/fork compressed\nWhat else?\n/reset\nhello\n")
    assert result.exit_code == 0, result.output
    turns = [Turn.model_validate(record) for record in records(result.stdout)]
    assert [turn.index for turn in turns] == [0, 1, 2, 0]
    assert turns[1].original.reused_tokens >= len(LONG)
    assert turns[1].original.fed_tokens < 30
    assert turns[2].same_history
    assert turns[3].original.reused_tokens == 0
    assert "turn 2, original:" in result.stdout
    assert "both sides go on from the compressed conversation" in result.stderr


@pytest.mark.parametrize("words", [[], ["--output"], ["--chat"], ["--json"]])
def test_at_a_terminal_the_verdict_is_last(folder, tmp_path: Path, words: list[str]) -> None:
    output = tmp_path / "compare.jsonl"
    words = [*words, str(output)] if words == ["--output"] else words
    code, text = at_terminal(["compare", LONG, "--model", folder, "--max-new-tokens", "4", *words])
    assert code == 0
    *_, last = text.splitlines()
    if words == ["--json"]:
        assert Comparison.model_validate_json(last).prompt == LONG
        return
    assert last.startswith(("Identical", "Different"))
    assert "{" not in text
    if words:
        assert words == ["--chat"] or Comparison.model_validate_json(output.read_text()).prompt == LONG


def test_at_a_terminal_a_record_that_cannot_be_kept_is_printed(folder, tmp_path: Path) -> None:
    """The disk is full by the time the record is there; it was not when the file was tried."""
    with file_system(tmp_path / "small", "8k") as place:
        (place / "filling").write_bytes(b"x" * 4096)
        output = str(place / "compare.jsonl")
        code, text = at_terminal(["compare", LONG, "--model", folder, "--max-new-tokens", "4", "--output", output])
    assert code == 1
    assert Comparison.model_validate_json(text.splitlines()[-1]).prompt == LONG


def test_a_reader_that_goes_away_does_not_cost_the_record(folder, tmp_path: Path) -> None:
    output = tmp_path / "compare.jsonl"
    words = ["compare", "--model", folder, "--max-new-tokens", "4", "--output", str(output)]
    done = subprocess.run(
        ["sh", "-c", '"$@" | true', "sh", sys.executable, "-m", "turboquant", *words],
        input=f"{LONG}\n".encode(),  # the prompt comes through a pipe
        capture_output=True,
        env=ENV,
        timeout=120,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert Comparison.model_validate_json(output.read_text()).prompt == LONG


def read_until(terminal: int, wanted: str, seconds: float = 90) -> str:
    text, end = "", time.monotonic() + seconds
    while wanted not in text:
        assert time.monotonic() < end, text[-2000:]
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
    return text


def test_ctrl_c_at_a_terminal_stops_the_answer_and_not_the_session(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "long", max_position_embeddings=100_000)
    ours, theirs = pty.openpty()
    arguments = ["--model", str(folder), "--chat", "--max-new-tokens", "50000", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "turboquant", "compare", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**ENV, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        read_until(ours, "Ctrl-D ends")
        os.write(ours, b"hello there\n")
        read_until(ours, "compressed")  # the two texts are being drawn
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        text = read_until(ours, '"kept":true}')
        assert "stopping this answer" in text
        assert '"finish":"cancelled"' in text
        os.write(ours, b"/reset\n")
        read_until(ours, "both caches empty")
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_in_one_shot_prints_what_there_is_and_fails(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "long", max_position_embeddings=100_000)
    arguments = ["--model", str(folder), "--prompt", LONG, "--max-new-tokens", "50000"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "generating" in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert Comparison.model_validate_json(out.splitlines()[-1]).original.finish == "cancelled"


# Says when the first token is there, so that the test need not guess.
START = """
import sys
from turboquant.run import compare as comparison
from turboquant.cli import app
emit = comparison._emit_step
said = []
def step(*arguments):
    emit(*arguments)
    if not said:
        said.append(print("generating", file=sys.stderr, flush=True))
comparison._emit_step = step
app(["compare", *sys.argv[1:]])
"""


@pytest.mark.parametrize(("count", "rows", "expected"), [(3, 12, [0, 1, 2]), (5, 0, [0, 1, 2, 3, 4]), (9, 1, [0])])
def test_steps_are_spaced(count: int, rows: int, expected: list[int]) -> None:
    assert _spaced(count, rows) == expected
    assert _spaced(100, 5) == [0, 25, 50, 74, 99]
