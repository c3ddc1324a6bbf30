"""Options that take several values after one flag: `--contexts 2048 4096 8192`, `--bits 2 3 4`, `--method a b`.

Every command registered on a `Commands` has this for the options that may be repeated (those annotated as lists).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand


def spread(arguments: Sequence[str], flags: Collection[str]) -> Iterator[str]:
    """Repeat a flag before each of the values that follow it, up to the next word that begins like a flag.

    Example:
        >>> list(spread(["--bits", "2", "3", "--seed", "0"], {"--bits"}))
        ['--bits', '2', '--bits', '3', '--seed', '0']
    """
    flag = None
    waiting = False  # the flag has been passed on and has no value yet
    for word in arguments:
        if word.startswith("-") and not word[1:2].isdigit():
            flag, waiting = (word, True) if word in flags else (None, False)
        elif flag and not waiting:
            yield flag
        else:
            waiting = False
        yield word


class SeveralValues(TyperCommand):
    """A command whose repeatable options take several values; one with positional arguments is left as it is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        if not any(param.param_type_name == "argument" for param in self.params):
            flags = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
            args = list(spread(args, flags))
        return super().parse_args(ctx, args)


class Commands(typer.Typer):
    """A group of commands of this kind."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """Register a command, as `typer.Typer.command` does."""
        return super().command(name, **{"cls": SeveralValues, **options})
