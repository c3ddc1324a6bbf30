import re
from pathlib import Path

import pytest

from app import config as config_module
from app.config import AppConfig, ConfigError, load_config

ROOT = Path(__file__).resolve().parents[2]


def test_defaults() -> None:
    assert load_config({}) == AppConfig()


def test_values_are_read() -> None:
    config = load_config(
        {
            "TURBOQUANT_MODELS": "a, b",
            "TURBOQUANT_ALLOW_ANY_MODEL": "off",
            "TURBOQUANT_WEIGHTS": "4bit",
            "TURBOQUANT_MAX_NEW_TOKENS": "64",
            "TURBOQUANT_DISCONNECT_GRACE_S": "1.5",
        }
    )
    assert config.models == ("a", "b")
    assert config.default_model == "a"
    assert not config.allow_any_model
    assert (config.weights, config.max_new_tokens, config.disconnect_grace_s) == ("4bit", 64, 1.5)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("TURBOQUANT_ALLOW_ANY_MODEL", "maybe", "must be 1 or 0, got 'maybe'"),
        ("TURBOQUANT_WEIGHTS", "3bit", "must be one of auto"),
        ("TURBOQUANT_MAX_NEW_TOKENS", "0", "from 1 to 65536, got '0'"),
        ("TURBOQUANT_MAX_NEW_TOKENS", "ten", "whole number"),
        ("TURBOQUANT_MAX_PROMPT_CHARS", "-3", "whole number"),
        ("TURBOQUANT_MAX_QUEUE", "9" * 30, "whole number"),
        ("TURBOQUANT_DISCONNECT_GRACE_S", "nan", "number of seconds"),
    ],
)
def test_a_bad_value_gives_one_sentence(name: str, value: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        load_config({name: value})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_locked_model_is_the_only_one_on_offer() -> None:
    config = load_config({"TURBOQUANT_LOCK_MODEL": "1", "TURBOQUANT_MODELS": "a,b", "TURBOQUANT_DEFAULT_MODEL": "b"})
    assert config.models == ("b",)
    assert not config.allow_any_model


def test_every_setting_stands_in_the_table_and_in_the_operators_guide_with_its_default() -> None:
    read = set(re.findall(r'"(TURBOQUANT_\w+)"', Path(config_module.__file__).read_text()))
    table = set(re.findall(r"^\| (TURBOQUANT_\w+) \|", str(config_module.__doc__), flags=re.MULTILINE))
    guide = (ROOT / "docs" / "operator.md").read_text()
    shown = dict(re.findall(r"^\| `(TURBOQUANT_\w+)` \| .+ \| (.+) \|$", guide, flags=re.MULTILINE))
    assert read == table
    assert read <= set(shown)
    for name in read - {"TURBOQUANT_MODELS"}:
        default = getattr(AppConfig(), name.removeprefix("TURBOQUANT_").lower())
        assert shown[name] == (default if isinstance(default, str) else f"{default:g}"), name


def test_the_default_model_must_be_on_offer() -> None:
    with pytest.raises(ConfigError, match="one of TURBOQUANT_MODELS"):
        load_config({"TURBOQUANT_MODELS": "a", "TURBOQUANT_DEFAULT_MODEL": "b"})
