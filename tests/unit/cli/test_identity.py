"""Every command that goes on with records: a text or a model folder that has changed is measured again, and said."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.support.models import save_tiny
from turboquant import cli
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.files import read_records
from turboquant.report.methodology import read_document

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
    if command == "sweep":  # its workers take seconds to start
        listed = run(command, model, text, output, "--dry-run")
        assert [line.split()[0] for line in listed.stdout.splitlines()[:-1]] == ["changed"]
        assert f"{model} has changed since 1 record was made" in listed.stderr
        return
    other = run(command, model, text, output)
    assert other.exit_code == 0, other.output
    named = model.name if command == "recommend" else str(model)
    assert other.stderr.count(f"{named} has changed since") == 1
    third = held(output)
    newest = {record.cell.key: record for record in third}
    for record in second:
        assert newest[record.cell.key].inputs["model"] != record.inputs["model"] or command == "recommend"

    replace_weights(model, saved[4])  # as it was: the records of the second state are there, but for evaluate's
    if command != "evaluate":
        last = run(command, model, text, output)
        assert last.exit_code == 0
        assert "already (measured at" in last.stderr
        assert "has changed" not in last.stderr
        assert len(held(output)) == len(third)


def test_the_file_of_evaluate_holds_one_state_of_things(model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"

    def evaluate(*more: str) -> Result:
        words = [*BITS, "--queries", "8", "--filler", str(text), "--output", str(output), "--contexts", *more]
        return RUNNER.invoke(cli.app, ["evaluate", "--model", str(model), *words])

    assert evaluate("480").exit_code == 0
    before = output.read_bytes()
    text.write_text(TEXT.replace("keeper", "sailor"))
    more = evaluate("500")
    assert more.exit_code == 2
    assert more.stderr.splitlines()[-1] == (
        f"turboquant: {text} has changed since 1 record was made: it is not asked for and would stay in {output} "
        "beside new ones: give another --output, or --overwrite"
    )
    assert output.read_bytes() == before
    assert evaluate("480", "500").exit_code == 0
    assert len(held(output)) == 2
    assert len({record.inputs[f"text {text}"] for record in held(output)}) == 1
    text.write_text(TEXT)
    assert evaluate("500", "--overwrite").exit_code == 0
    assert len(held(output)) == 1


def test_what_a_stopped_run_shows_is_of_one_state_of_things(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before the first new record: nothing of what was measured on the text before is shown."""
    output = tmp_path / "out.jsonl"
    assert run("variance", model, text, output).exit_code == 0

    def interrupted(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("turboquant.models.load.load_model", interrupted)
    text.write_text(TEXT.replace("keeper", "sailor"))
    stopped = run("variance", model, text, output)
    assert stopped.exit_code == 1
    assert "stopped with 0 of 2 records" in stopped.stderr
    assert "records show:" not in stopped.stderr
    text.write_text(TEXT)
    again = run("variance", model, text, output, "--sampling-seeds", "2")
    assert "what 2 of 3 records show:" in again.stderr


def test_a_text_or_folder_that_has_gone_is_not_what_it_was(model: Path, text: Path, tmp_path: Path) -> None:
    for command in ("perplexity", "evaluate"):
        output = tmp_path / ("out.json" if command == "evaluate" else f"{command}.jsonl")
        assert run(command, model, text, output).exit_code == 0
        count = len(held(output))
        text.rename(tmp_path / "away")
        gone = run(command, model, text, output)
        assert gone.exit_code == 2
        assert f"or a file, got '{text}'" in gone.stderr
        (tmp_path / "away").rename(text)
        assert f"{count} of {count} records are in" in run(command, model, text, output).stderr
    shutil.rmtree(model)
    gone = run("perplexity", model, text, tmp_path / "perplexity.jsonl")
    assert gone.exit_code == 2
    assert f"There is no folder {model} on this machine" in gone.stderr
