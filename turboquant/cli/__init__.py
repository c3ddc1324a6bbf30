"""The command line: `turboquant` and `python -m turboquant`.

Exit codes: 0 done, 1 the run failed or was stopped, 2 wrong use. Long work shows its progress on standard error, keeps
each finished record, goes on where it stopped when it is run again, and ends with one JSON line on standard output.
Each module of this package holds some commands; importing it registers them.
"""

import importlib
import pkgutil
import sys

from turboquant.cli.app import app, say

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line.

    A full disk ends it with one line and code 1, whatever was being written; a method for other layers than the
    model's, which only the loaded model tells, with code 2.
    """
    try:
        app()
    except ValueError as error:
        from turboquant.methods import NoSuchLayerError

        if not isinstance(error, NoSuchLayerError):
            raise
        say(f"turboquant: {error}")
        sys.exit(2)
    except OSError as error:
        from turboquant.faults import out_of_disk

        if not out_of_disk(error):
            raise
        where = error.filename or "the output"
        say(f"turboquant: {where} cannot be written: {error.strerror}; what was finished before is kept")
        sys.exit(1)
