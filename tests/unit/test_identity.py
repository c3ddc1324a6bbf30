"""Every command that goes on with records: a text or a model folder that has changed is measured again, and said."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.helpers import save_tiny
from turboquant import cli
from turboquant.evaluation import read_document
from turboquant.results import ExperimentRecord, read_records

RUNNER = CliRunner()
TEXT = "".join(
    f"On day {i} the keeper wrote {i * 37 % 101} ships and a tide of {i * i % 89} feet.\n" for i in range(20)
)
BITS, SHORT = ["--bits", "4"], ["--context", "260", "--prefill", "220"]
MANY = ["--prompts", "1", "--prompt-tokens", "140", "--new-tokens", "3", "--rotation-seeds", "1"]
NEEDLE = ["--repetitions", "1", "--max-new-tokens", "2"]
GENERATE = ["--batch", "1", "--prompt-tokens", "200", "--new-tokens", "2", "--repeats", "1"]
SMALL = ["--recipe", "turboquant", "--context", "280", "--min-same-top", "50", "--no-layers", "--max-kl", "0.005"]
COMMANDS: dict[str, list[str]] = {
    "perplexity": [*BITS, *SHORT, "--text", "TEXT"],
    "methods": ["--method", "rtn:bits=4", *SHORT, "--text", "TEXT"],
    "needle": [*BITS, "--contexts", "480", "--depths", "0.5", *NEEDLE, "--filler", "TEXT"],
    "evaluate": [*BITS, "--contexts", "480", "--queries", "8", "--filler", "TEXT"],
    "variance": [*BITS, *SHORT, *MANY, "--sampling-seeds", "1", "--text", "TEXT"],
    "generate-bench": [*BITS, *GENERATE, "--text", "TEXT"],
    "recommend": [*SMALL, "--text", "TEXT"],
    "sweep": [*BITS, "--workers", "1", "--contexts", "260", "--set", "prefill=220", "--set", 'texts=["TEXT"]'],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("models")
    return {seed: save_tiny(root / str(seed), num_hidden_layers=2, seed=seed) for seed in (4, 5)}


@pytest.fixture
def model(saved: dict[int, Path], tmp_path: Path) -> Path:
    return shutil.copytree(saved[4], tmp_path / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "my.txt"
    path.write_text(TEXT)
    return path


def replace_weights(model: Path, other: Path) -> None:
    """Write other weights over those of a model, in place and with the dates of before."""
    weights = model / "model.safetensors"
    status = weights.stat()
    shutil.copyfile(other / "model.safetensors", weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


def run(command: str, model: Path, text: Path, output: Path, *more: str) -> Result:
    named = [str(model)] if command == "recommend" else ["--model", str(model)]
    words = [word.replace("TEXT", str(text)) for word in COMMANDS[command]]
    return RUNNER.invoke(cli.app, [command, *named, *words, "--output", str(output), *more])


def held(output: Path) -> list[ExperimentRecord]:
    return read_document(output) if output.suffix == ".json" else read_records(output)


def figures(records: list[ExperimentRecord]) -> list[Any]:
    """What cannot be the same by chance for another text or model."""
    return [(record.cell.key, record.inputs, record.detail) for record in records]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_has_changed_is_measured_again(
    command: str, model: Path, text: Path, tmp_path: Path, saved: dict[int, Path]
) -> None:
    output = tmp_path / ("out.json" if command == "evaluate" else "out.jsonl")
    assert run(command, model, text, output).exit_code == 0
    first = held(output)
    assert all(set(record.inputs) == {"model", f"text {text}"} for record in first)
    count = len(first)

    again = run(command, model, text, output)
    assert again.exit_code == 0
    assert "has changed" not in again.stderr
    assert figures(held(output)) == figures(first)

    text.write_text(TEXT.replace("keeper", "sailor"))
    records = "record was made: it is" if count == 1 else "records were made: they are"
    changed = run(command, model, text, output)
    assert changed.exit_code == 0, changed.output
    assert changed.stderr.count(f"{text} has changed since {count} {records} measured again") == 1
    second = held(output)
    newest = {record.cell.key: record for record in second}
    for record in first:
        if record.cell.key in newest:  # a search need not come by the same methods
            assert newest[record.cell.key].inputs[f"text {text}"] != record.inputs[f"text {text}"]
    assert any(newest[r.cell.key].detail != r.detail for r in first if r.cell.key in newest) or command == "recommend"

    replace_weights(model, saved[5])
    other = run(command, model, text, output)
    assert other.exit_code == 0, other.output
    named = model.name if command == "recommend" else str(model)
    assert other.stderr.count(f"{named} has changed since") == 1
    third = held(output)
    newest = {record.cell.key: record for record in third}
    for record in second:
        assert newest[record.cell.key].inputs["model"] != record.inputs["model"] or command == "recommend"


@pytest.mark.parametrize("command", ["perplexity", "recommend"])
def test_what_came_before_a_change_is_used_where_it_is_taken_back(
    command: str, model: Path, text: Path, tmp_path: Path, saved: dict[int, Path]
) -> None:
    output = tmp_path / "out.jsonl"
    run(command, model, text, output)
    replace_weights(model, saved[5])
    run(command, model, text, output)
    count = len(held(output))
    replace_weights(model, saved[4])
    last = run(command, model, text, output)
    assert last.exit_code == 0
    assert "already (measured at" in last.stderr
    assert "has changed" not in last.stderr
    assert len(held(output)) == count
