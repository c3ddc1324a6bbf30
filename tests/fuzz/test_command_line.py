"""Every option of every command is handed what it cannot take: one line says so, and there is never a traceback.

Commands and options are those of the program itself, so a new one is covered without a change here. Most lines name a
model that is not there, so that nothing heavy runs; what needs no model is kept small.
"""

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support.models import save_tiny
from turboquant import cli

RESULTS = Path(__file__).resolve().parents[2] / "results"
RUNNER = CliRunner()
FEW = settings(max_examples=250, deadline=None, suppress_health_check=[*HealthCheck])
MANY = settings(FEW, max_examples=20_000, derandomize=False, database=None, print_blob=True)
FREE_BYTES = 3 * 2**30
"""What a command may take beside what the process holds: a size without a limit ends here, not with the machine."""

NUMBERS = ["0", "1", "2", "3", "-1", "1.5", "0.5", "-0", "1e3", "1_0", "٣", " 1", "0x10", "nan", "inf", "-inf", "1e999"]
NUMBERS += [str(2**power + more) for power in (31, 32, 63, 64, 200) for more in (-1, 0)] + ["9" * 5000]
WORDS = [
    "",
    " ",
    "\t",
    "\n",
    "-",
    "--",
    "a\nb",
    "a\0b",
    "\udcff",
    "\ud800",
    "e\u0301\u200b\u202e",
    "\x1b[31m",
    "x" * 5000,
]
WORDS += ["true", "null", "{}", "[]", "auto", "fp32", "4bit", "full", "turboquant", "turboquant:bits=9", "rtn:bits=3,"]
WORDS += [
    "kivi:group_size=0",
    "turboquant:seed=-1",
    "turboquant:layers=99:2",
    "turboquant-paper:bits=2",
    "hf-fp8",
    "qr",
]
WORDS += ["perplexity", "needle", "attention", "nope", "smollm2-13", "llama-3.1-8b", "persuasion", "sentences", "cpu"]
WORDS += [
    "size=1",
    "=",
    "context=",
    "chat=2",
    'texts=["a","a"]',
    'filler="a\\u0000"',
    'texts=["\\ud800"]',
    "windows=1e9",
]
WORDS += ["seed=1", "windows=NaN", "depth=Infinity", "chunk_tokens=[]", "context=3", "temperature=-1", "text={}"]
FILES = ["missing", "folder", "loop", "binary", "empty", "text.txt", "utf16.txt", "nul.jsonl", "records.jsonl"]
FILES += [
    "torn.jsonl",
    "missing/below",
    "text.txt/below",
    "twice/../text.txt",
    "/proc/none/x",
    "/dev/null",
    "/dev/full",
]
FILES += ["n" * 300, "deep/" * 900, "pipe", "."]

READ = ["--text", "hamlet", "--context", "260", "--prefill", "220"]
SMALL = {
    "compare": ["--max-new-tokens", "3"],
    "heads": ["--contexts", "480", "--queries", "4", "--bits", "2"],
    "perplexity": ["--bits", "2", *READ],
    "needle": ["--contexts", "480", "--depths", "0.5", "--repetitions", "1", "--max-new-tokens", "3", "--bits", "2"],
    "speed": ["--bits", "2", "--batch", "1", "--prompt-tokens", "240", "--new-tokens", "3", "--repeats", "1"],
    "methods": ["--bits", "2", *READ],
    "recommend": ["--text", "hamlet", "--context", "280", "--recipe", "turboquant", "--no-layers"],
    "sweep": ["--dry-run", "--bits", "2"],
    "seeds": ["--bits", "2", "--rotation-seeds", "2", "--sampling-seeds", "1", "--new-tokens", "4", *READ],
    "decode": ["--prompt-tokens", "150", "--new-tokens", "4", "--repeats", "1"],
    "theory": ["--dims", "4", "--bits", "1", "--seeds", "3", "--vectors", "2"],
    "attention": ["--context", "200", "--bits", "2", "--repeats", "1"],
    "scores": ["--context", "200", "--bits", "2", "--repeats", "1"],
    "encode": ["--tokens", "200", "--bits", "2", "--repeats", "1"],
    "metrics": ["--tokens", "40", "--queries", "2", "--repeats", "1"],
}
"""What keeps a command short."""
NOWHERE = ["--output", "folder"]
"""What ends one that needs no model before it begins."""


def commands(command: Any, words: Sequence[str] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the words of every command below this one, and its options by flag (an argument's is its name)."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))
    if not hasattr(command, "commands"):
        yield tuple(words), {param.opts[-1]: param for param in command.params}


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of all kinds."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("folder", "twice"):
        (folder / name).mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    (folder / "empty").touch()
    (folder / "text.txt").write_text("The sea was calm and the sky was grey. " * 200)
    (folder / "utf16.txt").write_text("The sea was calm. " * 200, encoding="utf-16")
    (folder / "nul.jsonl").write_bytes(b'{"kind":"experiment"' + b"\0" * 4096)
    (folder / "records.jsonl").write_bytes((RESULTS / "generation.jsonl").read_bytes())
    (folder / "torn.jsonl").write_bytes((RESULTS / "needle.jsonl").read_bytes()[:-99])
    os.mkfifo(folder / "pipe")
    return folder


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process take only so much more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + FREE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def beginning(words: tuple[str, ...], model: str, quick: bool = False) -> list[str]:
    """The words of a command with what it needs and what keeps it short."""
    params = COMMANDS[words]
    named = ["--model", model] if "--model" in params else [model] if "model" in params else []
    nowhere = NOWHERE if quick and not named and "--output" in params else []
    return [*words, *SMALL.get(words[-1], []), *nowhere, *named]


@st.composite
def command_lines(draw: st.DrawFn, model: str, quick: bool) -> list[str]:
    """A command with some options, most of which it cannot take."""
    words = draw(st.sampled_from(sorted(COMMANDS)))
    params, line = COMMANDS[words], beginning(words, model, quick)
    free = st.text(st.characters(exclude_characters="/"), max_size=12)
    hostile = st.one_of(*(st.sampled_from(values) for values in (NUMBERS, WORDS, FILES)), free)
    for name in draw(st.lists(st.sampled_from([*sorted(params), "--help"]), max_size=4)):
        param = params.get(name)
        if getattr(param, "is_flag", param is None):
            line.append(draw(st.sampled_from([*getattr(param, "opts", [name]), *getattr(param, "secondary_opts", [])])))
        elif name.startswith("-"):
            line += [name, *draw(st.lists(hostile, min_size=1, max_size=3 if param.multiple else 1))]
        else:
            line.append(draw(hostile))
    return line


def check(line: list[str], place: Path) -> None:
    """Run a command in this process, and hold it to its word."""
    before = Path.cwd()
    os.chdir(place)
    try:
        with little_memory():
            result = RUNNER.invoke(cli.app, line, input="hello\n", prog_name="turboquant", catch_exceptions=False)
    finally:
        os.chdir(before)
    lines = result.stderr.splitlines()
    said = [text for text in lines if text.startswith("turboquant: ")]
    assert result.exit_code in (0, 1, 2), line
    assert "Traceback" not in result.output, line
    assert len(said) <= (result.exit_code > 0), (line, result.stderr)
    assert said or result.exit_code != 2 or "Usage" in result.output, (line, result.stderr)
    assert not said or lines[-1] == said[0], (line, result.stderr)
    assert all(len(text) < 700 for text in said), line


def fuzz(profile: settings, place: Path, model: str = "no-such-model", quick: bool = False) -> None:
    """Run as many lines as the profile says."""

    @profile
    @given(command_lines(model, quick))
    def one_line_and_a_code(line: list[str]) -> None:
        check(line, place)

    one_line_and_a_code()


def test_anything_is_done_or_refused_in_one_line(place: Path) -> None:
    fuzz(FEW, place, quick=True)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_much_more_is_done_or_refused_in_one_line(place: Path) -> None:
    fuzz(MANY, place)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_takes_or_refuses_every_value(place: Path, words: tuple[str, ...]) -> None:
    for name, param in COMMANDS[words].items():
        for value in () if getattr(param, "is_flag", False) else (*NUMBERS, *WORDS, *FILES):
            check(
                [*beginning(words, "no-such-model", quick=True), *([name] if name.startswith("-") else []), value],
                place,
            )


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_a_model_that_is_there_makes_no_difference(place: Path) -> None:
    fuzz(settings(MANY, max_examples=2000), place, str(save_tiny(place / "tiny")))
