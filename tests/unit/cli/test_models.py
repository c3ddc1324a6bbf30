"""`turboquant models`: the list, and the check of families."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turboquant import cli
from turboquant.experiments import families
from turboquant.models.registry import MODELS
from turboquant.records.files import read_records

RUNNER = CliRunner()


def invoke(*arguments: str):
    return RUNNER.invoke(cli.app, ["models", *arguments])


def test_the_models_that_have_a_name_are_listed() -> None:
    result = invoke()
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(MODELS)


def test_families_are_checked_recorded_and_not_checked_again(tmp_path: Path) -> None:
    output = tmp_path / "models.jsonl"
    result = invoke("--check", "smollm3", "mamba", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert "smollm3              works, 4 of 4 layers; logits differ by" in result.stderr
    assert "mamba                refused: none of its layers keeps keys and values of all tokens" in result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["outcomes"] == last["own_models"] == {"works": 1, "refused": 1}
    works, refused = read_records(output)
    assert works.metrics["lossless_same_tokens_pct"] == 100
    assert works.cache is not None
    assert works.cache.compressed_tokens > 0
    assert works.environment.transformers[0].isdigit()
    assert refused.detail["reason"]
    assert "layers" not in refused.metrics
    before = output.read_bytes()
    again = invoke("--check", "smollm3", "mamba", "--output", str(output))
    assert "2 of 2 records are in" in again.stderr
    assert output.read_bytes() == before


def test_what_neither_works_nor_is_refused_ends_with_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "LIMIT", -1.0)
    result = invoke("--check", "smollm3", "--output", str(tmp_path / "models.jsonl"))
    assert result.exit_code == 1
    assert "smollm3              WRONG: logit error, full: " in result.stderr


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    result = invoke("--check", "llama-9", "--output", str(tmp_path / "models.jsonl"))
    assert result.exit_code == 2
    assert "there is no family 'llama-9': choose from all, top, llama-3" in result.stderr
