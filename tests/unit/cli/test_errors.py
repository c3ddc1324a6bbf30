"""What is wrong ends a command with one line and an exit code: arguments, streams, Ctrl-C, a reader that goes away."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turboquant import cli

RUNNER = CliRunner()
PROGRAM = [sys.executable, "-m", "turboquant"]


def run(*words: str | bytes, shell: str = "", stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the program in a process of its own; `shell` is put behind its words."""
    command = ["sh", "-c", f'"$@" {shell}', "sh", *PROGRAM, *words] if shell else [*PROGRAM, *words]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", b"abc\xff"], "arguments must be valid UTF-8, got 'abc\\xff'"),
        (["perplexity", "--text", b"caf\xe9.txt"], "arguments must be valid UTF-8, got 'caf\\xe9.txt'"),
        ([b"\xff\xfe"], "arguments must be valid UTF-8, got '\\xff\\xfe'"),
    ],
)
def test_an_argument_that_is_no_text_is_wrong_use(words: list[str | bytes], said: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"turboquant: {said}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "x", "--seed", "9" * 20], f"--seed should be less than or equal to {2**63 - 1}, got {'9' * 20}"),
        (["compare", "x", "--max-new-tokens", "100000"], "--max-new-tokens should be less than or equal to 65536"),
        (["compare", "x", "--seed", "-1"], "--seed should be greater than or equal to 0, got '-1'"),
        (["compare", "x", "--seed", "1.5"], "--seed should be a valid integer, got '1.5'"),
        (["compare", "x", "--temperature", "nan"], "--temperature should be"),
        (["compare", "x", "--top-p", "inf"], "--top-p should be less than or equal to 1, got 'inf'"),
        (["compare", "x", "--rows", str(2**64)], "--rows should be less than or equal to"),
        (["variance", "--rotation-seeds", str(10**12)], "--rotation-seeds should be less than or equal to 10000"),
        (["variance", "--sampling-seeds", str(10**12)], "--sampling-seeds should be less than or equal to 10000"),
        (["needle", "--max-new-tokens", "100000"], "--max-new-tokens should be less than or equal to 65536"),
        (["bench", "attention", "--context", str(2**63)], "--context should be less than or equal to 16777216"),
        (["bench", "scores", "--batch", "0"], "--batch should be greater than or equal to 1, got '0'"),
        (["bench", "encode", "--tokens", "-9"], "--tokens should be greater than or equal to 1, got '-9'"),
        (["bench", "metrics", "--head-dim", str(2**31)], "--head-dim should be less than or equal to 4096"),
        (["bench", "decode", "--repeats", str(2**31)], "--repeats should be less than or equal to 10000"),
        (["sweep", "--engine", "x"], "--engine: 'x' is not one of 'local', 'ray'; see"),
        (["sweep", "--workers", str(2**40)], "--workers should be less than or equal to 10000"),
        (["compare", "--bogus"], "No such option: --bogus"),
        (["compare", "one", "two"], "Got unexpected extra argument"),
        (["recommend"], "Missing argument 'model'; see `turboquant recommend --help`"),
        (["nope"], "No such command 'nope'; see `turboquant --help`"),
        (["compare", "x", "--method", f"turboquant:seed={'x' * 5000}"], "seed must be a whole number"),
        (["compare", "x", "--output", "/tmp/" + "n" * 300], "cannot be written: File name too long"),
        (["compare", "x", "--output", "/dev/null"], "/dev/null must be a file that can be read again"),
        (["compare", "x", "--output", __file__], "line 1 of "),
        (["perplexity", "--output", f"{__file__}/below"], f"cannot be written: {__file__} is not a folder"),
        (["compare", "x", "--model", "n" * 300], "File name too long"),
        (["compare", "x", "--output", "."], "the output . cannot be written: Is a directory"),
        (["compare", "a\0b"], "arguments must be text without null characters, got 'a\\x00b'"),
        (["evaluate", "--output", "one.json", "--records", "./one.json"], "--output and --records must be two files"),
        (["report", "--results", ".", "--html", "one", "--markdown", "one"], "--markdown and --html must be two files"),
    ],
)
def test_wrong_use_is_one_line_that_names_option_rule_and_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(cli.app, words, prog_name="turboquant")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("turboquant: ")
    assert said in line
    assert len(line) < 700


@pytest.mark.parametrize("kind", ["pipe", "link to nowhere", "link to itself"])
def test_an_output_that_cannot_be_read_again_is_refused_before_the_work(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    if kind == "pipe":
        os.mkfifo(output)
    else:
        output.symlink_to(tmp_path / "nowhere" if kind == "link to nowhere" else output)
    result = RUNNER.invoke(cli.app, ["validate", "--dims", "4", "--bits", "1", "--output", str(output)])
    assert result.exit_code == 2
    assert str(output) in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = run("methods", "--list", shell="| head -1")
    assert done.stdout == b"full\n"
    assert done.stderr == b""


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-"])
def test_a_stream_that_is_closed_is_no_error(closed: str) -> None:
    done = run("models", shell=closed)
    assert done.returncode == 0
    assert (b"smollm2-135m" in done.stdout) == (closed != ">&-")


def test_a_prompt_from_a_closed_stream_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as left:
        cli.app(["compare", "-", "--model", "no-such-model"])
    assert left.value.code == 2


def test_ctrl_c_says_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where no work is in hand: here the prompt is awaited."""
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(SystemExit) as left:
            cli.app(["compare", "-"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(writing)
    assert left.value.code == 1
    assert capsys.readouterr().err == "turboquant: stopped\n"


def test_a_prompt_that_is_no_text_is_refused_before_the_model_loads() -> None:
    """No such model is there: it would be what is wrong."""
    for given in (b"caf\xe9", b" \n"):
        result = RUNNER.invoke(cli.app, ["compare", "-", "--model", "no-such-model"], input=given)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("turboquant: The prompt ")
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('filler="\\ud800"', "--set takes text in UTF-8"),
        ("texts=" + "[" * 100_000, "texts should be a valid tuple"),
        ("start=" + "9" * 5000, "start: Unable to parse input string as an integer, exceeded maximum size"),
        ("start=NaN", "start should be a finite number"),
    ],
)
def test_values_of_settings_are_read_or_refused(value: str, said: str) -> None:
    names = ["needle"] if value.startswith("filler") else ["perplexity"]
    result = RUNNER.invoke(cli.app, ["sweep", "--experiment", *names, "--set", value, "--dry-run"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_table_goes_into_a_pipe_of_any_encoding() -> None:
    done = subprocess.run(
        [*PROGRAM, "--help"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False
    )
    assert done.returncode == 0
    assert "╭─ Commands" in done.stdout.decode()


def test_memory_that_runs_out_is_one_line(tmp_path: Path) -> None:
    words = ["bench", "metrics", "--tokens", str(2**24), "--heads", "1", "--kv-heads", "1", "--head-dim", "4096"]
    words += ["--output", str(tmp_path / "bench.jsonl")]
    result = RUNNER.invoke(cli.app, words)
    assert result.exit_code == 1
    assert result.stderr.startswith("failed: metrics-speed ")
    assert result.stderr.endswith(": the machine has too little free memory for this\n")
