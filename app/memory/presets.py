"""Models whose config.json ships with the app, so that sizes can be computed without a download."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from turboquant.sizing import KVShape, read_config

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "models"


@dataclass(frozen=True)
class Preset:
    """A model whose config.json ships with the app.

    Attributes:
        name: As in the address.
        title: As in the list.
        source: Where the numbers come from.
        config: The fields of its config.json that decide sizes.
        parameters: Number of weights, to order the list by without making the models.
    """

    name: str
    title: str
    source: str
    config: Mapping[str, Any]
    parameters: int

    @property
    def shape(self) -> KVShape:
        """What its cache keeps; the first call takes a second."""
        return read_config(self.config)


@cache
def presets() -> Mapping[str, Preset]:
    """The shipped models by name, smallest first."""
    found = [Preset(name=path.stem, **json.loads(path.read_text())) for path in FOLDER.glob("*.json")]
    return {one.name: one for one in sorted(found, key=lambda one: one.parameters)}
