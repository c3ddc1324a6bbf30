"""How a command ends when something is wrong: with one line on standard error and an exit code, never a traceback."""

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from turboquant.records.names import COMMANDS

INTERRUPTED = 130
"""What typer makes of Ctrl-C."""
LONGEST = 650
"""Characters of a message; a longer one repeats what was given and is cut in its middle."""
SHOWN_CHARS = 60
"""Characters of a wrong argument that an error repeats."""


def say(text: str) -> None:
    """Print a line for people, on standard error."""
    typer.echo(text, err=True)


def fail(error: Exception | str, code: int) -> NoReturn:
    """Say what is wrong in one line and leave with this exit code: 1 the run failed, 2 wrong use."""
    text = " ".join(line.strip() for line in str(error).splitlines())
    say(f"turboquant: {text if len(text) <= LONGEST else f'{text[:300]} ... {text[-300:]}'}")
    raise typer.Exit(code)


class Program(TyperGroup):
    """The whole command line: what the user or the machine does wrong ends it with one line."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name, or by one that it had before."""
        return super().get_command(ctx, COMMANDS.get(cmd_name, cmd_name))

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **options: Any
    ) -> Any:
        """Run a command and leave with its exit code; an error of the program itself is raised as it is."""
        words = sys.argv[1:] if args is None else list(args)
        if not standalone_mode:
            return super().main(words, standalone_mode=False, **options)
        _let_streams_take_any_text()
        try:
            code = self._run(words, options)
        except typer.Exit as left:
            code = left.exit_code
        sys.exit(code)

    def _run(self, words: Sequence[str], options: dict[str, Any]) -> int:
        _check_arguments(words)
        try:
            code = super().main(words, standalone_mode=False, **options)
        except (Exception, KeyboardInterrupt) as error:
            if (found := _sentence(error)) is None:
                raise
            fail(*found)
        if code == INTERRUPTED:
            fail("stopped", 1)
        return int(code or 0)


def _let_streams_take_any_text() -> None:
    """Escape what a terminal cannot show, write UTF-8 to a pipe or a file, and read bytes that are no text.

    Those bytes become lone surrogates, which no prompt may have. A stream that was closed is an empty one.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="backslashreplace")


def _check_arguments(words: Sequence[str]) -> None:
    """Leave with code 2 where an argument is not text."""
    for word in words:
        surrogate = any("\ud800" <= character <= "\udfff" for character in word)
        if surrogate or "\0" in word:
            shown = word if len(word) <= SHOWN_CHARS else f"{word[:SHOWN_CHARS]}..."
            rule = "valid UTF-8" if surrogate else "text without null characters"
            fail(f"arguments must be {rule}, got {shown!r}".replace("\\udc", "\\x"), 2)


def _sentence(error: Any) -> tuple[str, int] | None:
    """Return in words what is wrong, and the exit code; None for an error of the program itself."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "stopped", 1
    if hasattr(error, "format_message"):
        return _wrong_use(error), error.exit_code
    if isinstance(error, OSError):
        return _fault_of_files(error), 2 if error.errno == errno.ENAMETOOLONG else 1
    if isinstance(error, MemoryError | RuntimeError):
        from turboquant.records.faults import NO_MEMORY, out_of_memory

        return (NO_MEMORY, 1) if out_of_memory(error) else None
    if isinstance(error, ValueError):
        from turboquant.methods import NoSuchLayerError

        return (str(error), 2) if isinstance(error, NoSuchLayerError) else None  # only the loaded model tells
    return None


def _wrong_use(error: Any) -> str:
    """Return what typer found wrong: the option, the rule and the value, and where help is."""
    from pydantic import ValidationError

    from turboquant.records.base import first_error

    text = error.format_message().strip().rstrip(".")
    if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed, except where typer has no rich
        if text:
            say(text)
        raise typer.Exit(error.exit_code)
    if isinstance(error.__cause__, ValidationError):
        text = first_error(error.__cause__, error.param.opts[-1])
    context = getattr(error, "ctx", None)
    return f"{text}; see `{context.command_path} --help`" if context else text


def _fault_of_files(error: OSError) -> str:
    from turboquant.records.faults import out_of_disk

    reason = error.strerror or str(error)
    if out_of_disk(error):
        return f"{error.filename or 'the output'} cannot be written: {reason}; what was finished before is kept"
    return f"{error.filename}: {reason}" if error.filename else reason
