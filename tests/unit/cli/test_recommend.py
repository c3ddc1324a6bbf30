"""`turboquant recommend`, with a tiny model."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.models import save_tiny
from tests.support.system import at_terminal
from turboquant import cli
from turboquant.records.files import read_records
from turboquant.records.metrics import metric

RUNNER = CliRunner()
LINES = [f"On day {i} the keeper wrote {i * 37 % 101} ships and a tide of {i * i % 89} feet.\n" for i in range(20)]
SMALL = ["--recipe", "turboquant", "--context", "280", "--min-same-top", "50", "--no-layers"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=2))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "my text.txt").write_text("".join(LINES), encoding="utf-8")
    return str(tmp_path / "my text.txt")


def invoke(*words: str) -> Result:
    return RUNNER.invoke(cli.app, ["recommend", *words])


def test_it_prints_the_method_the_evidence_and_the_memory(model: str, text: str, tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    done = invoke(model, "--text", text, "--max-kl", "0.005", *SMALL, "--output", str(output))
    assert done.exit_code == 0, done.output
    *_, said, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["method"].startswith("turboquant:")
    assert f"{found['method']} stays within the limits" in done.stdout
    assert said
    assert found["memory"][0]["measured"]
    sizes = r" (?:[1-9][\d.]+ times smaller than|larger by [\d.]+ KiB than|as large as) a 16-bit cache of [\d.]+ .iB "
    assert re.findall(rf"tokens: [\d.]+ .iB,{sizes}\((\w+)\)$", done.stdout, re.MULTILINE) == ["measured", "estimated"]
    assert f"{found['measured']} of 24 methods measured" in done.stdout
    for one in found["tried"]:
        assert metric("kl_mean").text(one["kl"]) in done.stdout
    records = read_records(output)
    assert {record.cell.experiment for record in records} == {"perplexity"}
    assert len(records) == len(found["tried"])

    again = invoke(model, "--text", text, "--max-kl", "0.005", *SMALL, "--output", str(output))
    assert again.exit_code == 0
    assert f"{len(records)} measurements were in {output} already (measured at " in again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["tried"] == found["tried"]
    assert len(read_records(output)) == len(records)

    anew = invoke(model, "--text", text, "--max-kl", "0.005", *SMALL, "--output", str(output), "--overwrite")
    assert anew.exit_code == 0
    assert len(read_records(output)) == len(records)


def test_at_a_terminal_the_sentence_is_last(model: str, text: str, tmp_path: Path) -> None:
    words = ["recommend", model, "--text", text, "--max-kl", "0.005", *SMALL, "--output", str(tmp_path / "r.jsonl")]
    code, said = at_terminal(words)
    assert code == 0
    assert "{" not in said
    assert "stays within the limits" in said
    code, again = at_terminal([*words, "--json"])
    assert again.startswith(said)
    assert json.loads(again.splitlines()[-1])["method"] in said


def test_nothing_within_the_limits_is_exit_code_1(model: str, text: str, tmp_path: Path) -> None:
    done = invoke(model, "--text", text, "--max-kl", "1e-12", *SMALL, "--output", str(tmp_path / "records.jsonl"))
    assert done.exit_code == 1
    *_, said, last = done.stdout.splitlines()
    assert said.startswith("None of 24 methods stays within the limits")
    assert json.loads(last)["method"] is None
    assert json.loads(last)["closest"] in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "nowhere.txt"], "the text must be one of"),
        (["--max-kl", "0"], "--max-kl should be greater than 0, got 0.0"),
        (["--recipe", "turboquant:bits=4"], "a recipe names no bits"),
        (["--context", "100"], "context must be at least 320 tokens"),
        (["--tokens", "99999999"], "--tokens should be less than or equal to 16777216, got 99999999"),
        (["--windows", "3", "--text", "SHORT"], "too few to choose on one half and confirm on the other"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(
    model: str, text: str, tmp_path: Path, words: list[str], message: str
) -> None:
    words = [text if word == "SHORT" else word for word in words]
    done = invoke(model, *words, "--output", str(tmp_path / "records.jsonl"))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("turboquant: ")
    assert not done.stdout
