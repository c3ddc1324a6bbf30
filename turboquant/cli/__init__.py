"""The command line: `turboquant` and `python -m turboquant`.

Exit codes: 0 done, 1 the run failed or was stopped, 2 wrong use. Long work shows its progress on standard error, keeps
each finished record, goes on where it stopped when it is run again, and ends with one JSON line on standard output.
Each module of this package holds some commands; importing it registers them.
"""

import importlib
import pkgutil

from turboquant.cli.app import app
from turboquant.run.threads import settle_threads

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    settle_threads()
    app()
