"""Models whose config.json ships with the app, so that sizes can be computed without a download."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from turboquant.sizing import KVShape, read_config

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "models"


@dataclass(frozen=True)
class Preset:
    """A model whose config.json ships with the app.

    Attributes:
        name: As in the address.
        title: As in the list.
        source: Where the numbers come from.
        shape: What the config says.
        parameters: Number of weights; estimated, or as the file says where that cannot be done.
    """

    name: str
    title: str
    source: str
    shape: KVShape
    parameters: int


@cache
def presets() -> Mapping[str, Preset]:
    """The shipped models by name, smallest first."""
    found = []
    for path in FOLDER.glob("*.json"):
        entry = json.loads(path.read_text())
        shape = read_config(entry["config"])
        parameters = entry.get("parameters") or shape.parameters
        assert parameters, f"{path.name} must say how many parameters the model has"
        found.append(Preset(path.stem, entry["title"], entry["source"], shape, parameters))
    return {one.name: one for one in sorted(found, key=lambda one: one.parameters)}
