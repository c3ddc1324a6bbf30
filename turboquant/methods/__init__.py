"""Methods: each is a frozen dataclass that is its own configuration and prints as the string that reads it back.

``turboquant:bits=4,residual_length=128`` names a method everywhere: on the command line, in URLs, in records and in
chart labels. A new method is one new file in this folder; importing the package finds it.
"""

import importlib
import pkgutil

from turboquant.methods.base import (
    METHODS,
    BitsMethod,
    Method,
    NoSuchLayerError,
    check_choice,
    check_count,
    check_length,
    in_order,
    parse_method,
    settings_of,
)

__all__ = [
    "METHODS",
    "BitsMethod",
    "Method",
    "NoSuchLayerError",
    "check_choice",
    "check_count",
    "check_length",
    "in_order",
    "parse_method",
    "settings_of",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
