"""A model whose chat template cannot be used: every command that puts prompts says so, and runs without it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.config import AppConfig
from app.needle.request import NeedleChoices, cells
from app.tab.requests import Choices
from tests.support.models import save_tiny
from turboquant import cli
from turboquant.records.comparison import Comparison
from turboquant.records.files import read_records
from turboquant.records.settings import HeadsSettings, NeedleSettings

RUNNER = CliRunner()
REFUSES = "{{ raise_exception('System role not supported') }}"
PROMPT = "The lighthouse keeper wrote down the weather every morning. " * 4
COMMANDS = {
    "compare": [PROMPT, "--max-new-tokens", "3"],
    "needle": ["--contexts", "480", "--depths", "0.5", "--repetitions", "1", "--max-new-tokens", "3", "--bits", "2"],
    "evaluate": ["--contexts", "480", "--queries", "4", "--bits", "2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", chat_template=REFUSES, num_hidden_layers=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_template_that_refuses_is_one_line_and_can_be_left_out(folder: Path, tmp_path: Path, command: str) -> None:
    words = [command, *COMMANDS[command], "--model", str(folder), "--output", str(tmp_path / "out.json")]
    refused = RUNNER.invoke(cli.app, words)
    assert refused.exit_code == 2, refused.output
    said = refused.stderr.splitlines()[-1]
    assert said.startswith("turboquant: The model's chat template cannot be used (System role not supported): ")
    assert "--no-chat-template" in said
    assert refused.stdout == ""
    done = RUNNER.invoke(cli.app, [*words, "--no-chat-template"])
    assert done.exit_code == 0, done.output


def test_a_conversation_goes_without_it_too(folder: Path) -> None:
    words = ["compare", "--chat", "--max-new-tokens", "3", "--model", str(folder)]
    refused = RUNNER.invoke(cli.app, words, input="Why?\n")
    assert refused.exit_code == 1
    assert "System role not supported" in refused.stderr
    done = RUNNER.invoke(cli.app, [*words, "--no-chat-template"], input="Why?\nAnd?\n")
    assert done.exit_code == 0
    turns = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [turn["comparison"]["chat"] for turn in turns] == [False, False]


def test_named_templates_without_a_default_are_read_from_a_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused = RUNNER.invoke(cli.app, ["compare", "Why?", "--model", str(folder)])
    assert refused.exit_code == 2
    assert "cannot be used (none of rag, tool_use is called default)" in refused.stderr.splitlines()[-1]


def test_what_was_put_stands_in_the_record(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "needle.jsonl"
    words = ["needle", *COMMANDS["needle"], "--model", str(folder), "--output", str(output)]
    assert RUNNER.invoke(cli.app, [*words, "--no-chat-template"]).exit_code == 0
    assert [record.cell.settings["chat"] for record in read_records(output)] == [False]
    words = ["compare", PROMPT, "--max-new-tokens", "3", "--model", str(folder), "--no-chat-template"]
    assert Comparison.model_validate_json(RUNNER.invoke(cli.app, words).stdout.splitlines()[-1]).chat is False


@pytest.mark.parametrize("kind", [NeedleSettings, HeadsSettings])
def test_cells_with_the_template_are_called_as_before(kind: type[NeedleSettings | HeadsSettings]) -> None:
    assert "chat" not in kind().model_dump(mode="json")
    assert "chat" not in json.loads(kind().model_dump_json())
    assert kind(chat=False).model_dump(mode="json")["chat"] is False
    assert kind.model_validate({**kind().model_dump(), "chat": False}).chat is False


def test_the_switch_of_the_app_holds_for_needles() -> None:
    with_it, without = (cells(NeedleChoices(), Choices(chat=chat), AppConfig()) for chat in (True, False))
    assert {cell.settings.get("chat") for cell in with_it} == {None}
    assert {cell.settings.get("chat") for cell in without} == {False}
