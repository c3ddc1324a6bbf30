"""What a model's name stands for."""

from pathlib import Path

from tests.helpers import save_tiny
from turboquant.models import MODELS, load_model
from turboquant.registry import EMBEDDED, find_spec


def test_a_folder_called_like_the_built_in_model_is_itself(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / EMBEDDED, num_hidden_layers=2)
    assert find_spec(str(folder)) != MODELS[EMBEDDED]
    loaded = load_model(str(folder), device="cpu")
    assert loaded.model.config.num_hidden_layers == 2
