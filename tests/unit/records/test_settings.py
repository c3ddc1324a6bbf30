"""The settings of experiments: said once, in words, and known before anything heavy is imported."""

import inspect
import subprocess
import sys
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from turboquant import cli
from turboquant.cli.options import takes
from turboquant.experiments.kernel_speed import SHAPES
from turboquant.experiments.model_speed import MODELS
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.quant.rotation import ROTATIONS
from turboquant.records import settings
from turboquant.records.names import COMMANDS, RECORDED, recorded, word
from turboquant.records.settings import ModelShape, NeedleSettings, Shape, TheorySettings


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_setting_of_an_experiment_says_what_it_is(name: str) -> None:
    for field in EXPERIMENTS[name].settings.model_fields.values():
        assert field.description
        assert field.description.endswith((".", "token."))


def test_names_that_settings_offer_are_those_that_there_are() -> None:
    assert set(get_args(Shape)) == set(SHAPES)
    assert set(get_args(ModelShape)) == set(MODELS)
    assert set(get_args(TheorySettings.model_fields["rotation"].annotation)) == set(ROTATIONS)


def test_records_and_the_command_line_need_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, turboquant.records as records, turboquant.cli\n"
        "for one in pkgutil.iter_modules(records.__path__): importlib.import_module(f'turboquant.records.{one.name}')\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def ask(*words: str) -> tuple[int, list[Any], str]:
    """What a command with some options of the needle's gets."""
    app, got = typer.Typer(), []

    @app.command()
    @takes(
        NeedleSettings,
        several={"context": (1024, 2048), "depth": (0.0, 1.0)},
        flags={"context": "--contexts"},
        without=("chunk_tokens", "chat", "needle", "question", "answer"),
    )
    def command(*, model: str = "m", asked: Any) -> None:
        got.extend(asked.grid(chat=False))

    result = CliRunner(env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"}).invoke(app, list(words))
    return result.exit_code, got, result.output


def test_several_values_make_a_grid_and_nothing_given_the_usual_one() -> None:
    code, found, _ = ask()
    assert code == 0
    assert [(one.context, one.depth, one.chat) for one in found] == [
        (1024, 0.0, False),
        (1024, 1.0, False),
        (2048, 0.0, False),
        (2048, 1.0, False),
    ]
    code, found, _ = ask("--contexts", "300", "--contexts", "300", "--depth", "0.5", "--seed", "7")
    assert [(one.context, one.depth, one.seed, one.repetitions) for one in found] == [(300, 0.5, 7, 5)]


def test_options_have_the_settings_bounds_defaults_and_words() -> None:
    code, _, text = ask("--help")
    assert code == 0
    words = " ".join(text.replace("│", " ").split())
    assert "Needles for each length and depth. [default: 5]" in words
    assert "one or several, default 1024 2048." in words
    assert "1<=x<=10000" in words
    assert "--chunk-tokens" not in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repetitions", "0"], "than or equal to 1"),
        (["--seed", "-1"], "than or equal to 0"),
        (["--depth", "2"], "to 1"),
    ],
)
def test_values_out_of_bounds_are_refused(words: list[str], message: str) -> None:
    code, found, text = ask(*words)
    assert (code, found) == (2, [])
    assert message in " ".join(text.replace("│", " ").split())


def test_what_a_command_offers_stands_in_the_settings_alone() -> None:
    """No command of an experiment has an option of its own that is also a setting."""
    commands = {name: one for name, one in typer.main.get_command(cli.app).commands.items()}  # type: ignore[attr-defined]
    named = {param.name for param in commands["perplexity"].params}
    assert {"context", "prefill", "windows", "texts", "chunk_tokens"} <= named
    signature = inspect.signature(inspect.unwrap(commands["perplexity"].callback.__wrapped__))
    assert not set(signature.parameters) & set(settings.PerplexitySettings.model_fields)


@pytest.mark.parametrize(("old", "now"), COMMANDS.items())
def test_older_names_of_commands_work_and_are_not_listed(old: str, now: str) -> None:
    wide = CliRunner(env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"})
    first, second = (wide.invoke(cli.app, [name, "--help"]) for name in (old, now))
    assert first.exit_code == second.exit_code == 0
    assert first.output.splitlines()[2:] == second.output.splitlines()[2:]
    listed = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert now in listed
    assert old not in listed


def test_words_stand_for_the_names_in_records() -> None:
    assert {recorded(one) for one in RECORDED} <= set(EXPERIMENTS)
    assert [word(recorded(one)) for one in (*RECORDED, "needle")] == [*RECORDED, "needle"]
    assert all(recorded(one) == one for one in EXPERIMENTS)
