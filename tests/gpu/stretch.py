"""Write a copy of the built-in model whose positions are stretched (YaRN), for lengths it was not trained for.

    python -m tests.gpu.stretch FOLDER

Its answers there are worth little; its attention, time and memory are those of a real model over a long context.
"""

import json
import shutil
import sys
from pathlib import Path

from turboquant.models.embedded import embedded_folder

TRAINED, POSITIONS = 8192, 135_168


def stretch(folder: Path) -> None:
    """Copy the model to `folder` and give it `POSITIONS` positions."""
    shutil.copytree(embedded_folder(lambda *_: None), folder, dirs_exist_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    theta = config.pop("rope_theta", None) or config["rope_parameters"]["rope_theta"]
    config["max_position_embeddings"] = POSITIONS
    config["rope_parameters"] = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": POSITIONS / TRAINED,
        "original_max_position_embeddings": TRAINED,
    }
    path.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    stretch(Path(sys.argv[1]))
