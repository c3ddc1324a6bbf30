"""A config.json that nobody has checked, as any hub repository may have one."""

from pathlib import Path

import pytest

from turboquant.models.hub import has_weights
from turboquant.models.load import ModelError, load_model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("\x00", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "no JSON"),
        ("[1]", "no object with named fields"),
        (" " * 1_000_001, "1,000,001 bytes"),
        ('{"model_type": "qwen2", "num_hidden_layers": 1000000000000}', "num_hidden_layers must be at most 1024"),
        ('{"text_config": {"n_layer": ' + "9" * 1000 + "}}", "n_layer must be at most 1024, got 999"),
        ('{"a": [{"num_local_experts": 1000000}]}', "num_local_experts must be at most 1024"),
        (
            '{"attention_types": [[["global", "local"], 1000000000000]]}',
            "attention_types must be at most 1024",
        ),
        ('{"model_type": "llama", "num_attention_heads": 0}', "configuration that this version"),
        ('{"model_type": "llama", "num_attention_heads": NaN}', "configuration that this version"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "configuration that this version"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "it has no layers"),
        ('{"model_type": "llama", "vocab_size": -5}', "no model can be made from its configuration"),
        ('{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 1000000}', "Not enough memory"),
    ],
    ids=range(16),
)
def test_hostile_configurations_are_refused_in_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    """Before the library makes an object for each of a billion layers."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words) as refused:
        load_model(str(tmp_path), weights="fp32", device="cpu")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[" * 100_000,
        "3",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/hostname"}}',
    ],
    ids=range(9),
)
def test_an_index_that_names_no_files_of_the_folder_has_no_weights(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    assert not has_weights(folder)
