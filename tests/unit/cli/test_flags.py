"""Options that take several values after one flag, and how --method and --bits go together."""

from typing import Annotated

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from turboquant.cli.app import read_methods
from turboquant.cli.flags import Commands, spread

values = st.lists(st.from_regex(r"[a-z0-9:=,/.]{1,8}", fullmatch=True), min_size=1, max_size=5)


@given(values, values)
def test_several_values_are_as_the_flag_repeated(first: list[str], second: list[str]) -> None:
    short = ["--a", *first, "--one", "x", "--b", *second]
    long = [word for value in first for word in ("--a", value)]
    long += ["--one", "x", *(word for value in second for word in ("--b", value))]
    assert list(spread(short, {"--a", "--b"})) == long
    assert list(spread(long, {"--a", "--b"})) == long


@pytest.mark.parametrize("words", [[], ["--a"], ["--a", "--b"], ["x", "y"], ["--one", "1", "2"], ["--a=1", "2"]])
def test_what_is_no_list_is_left_alone(words: list[str]) -> None:
    assert list(spread(words, {"--a", "--b"})) == words


app = Commands()


@app.command()
def several(contexts: Annotated[list[int] | None, typer.Option()] = None, seed: int = 0) -> None:
    typer.echo(f"{contexts} {seed}")


@app.command()
def positional(text: str, method: Annotated[list[str] | None, typer.Option()] = None) -> None:
    typer.echo(f"{text} {method}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["several", "--contexts", "1", "2", "3", "--seed", "4"], "[1, 2, 3] 4"),
        (["several", "--seed", "4", "--contexts", "1", "--contexts", "2", "3"], "[1, 2, 3] 4"),
        (["several", "--contexts=1", "--contexts", "2"], "[1, 2] 0"),
        (["several", "--contexts", "1", "-2", "--seed", "-3"], "[1, -2] -3"),
        (["several"], "None 0"),
        (["positional", "--method", "a", "text"], "text ['a']"),  # a value would swallow the argument
    ],
)
def test_commands_take_lists(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.output.strip()) == (0, said)


@pytest.mark.parametrize("words", [["--contexts"], ["--contexts", "--seed", "1"], ["--contexts", "1", "x"], ["5"]])
def test_a_flag_without_a_number_is_wrong_use(words: list[str]) -> None:
    assert CliRunner().invoke(app, ["several", *words]).exit_code == 2


@pytest.mark.parametrize(
    ("specs", "bits", "expected"),
    [
        (None, None, ["turboquant:bits=4"]),
        (None, [2, 3], ["turboquant:bits=2", "turboquant:bits=3"]),
        (["turboquant-paper"], [3, 3], ["turboquant-paper:bits=3"]),
        (["full", "turboquant:residual_length=8"], [2], ["full", "turboquant:bits=2,residual_length=8"]),
        (["turboquant:key_bits=4,value_bits=2", "full"], None, ["turboquant:key_bits=4,value_bits=2", "full"]),
    ],
)
def test_methods_and_bits(specs, bits, expected: list[str]) -> None:
    assert [str(method) for method in read_methods(specs, ["turboquant:bits=4"], bits)] == expected


@pytest.mark.parametrize(
    ("specs", "bits", "message"),
    [
        (["turboquant:bits=4"], [3], "bits are given twice, by --method turboquant:bits=4 and by --bits 3"),
        (["turboquant:key_bits=4"], [3], "bits are given twice"),
        (None, [9], "bits must be a whole number from 1 to 8, got 9"),
        (["nope"], [3], "unknown method 'nope'"),
    ],
)
def test_wrong_methods_are_refused(specs, bits, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left:
        read_methods(specs, ["full"], bits)
    assert left.value.exit_code == 2
    assert message in capsys.readouterr().err
