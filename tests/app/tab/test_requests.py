"""The server's own check of what the widgets say."""

import importlib
import pkgutil
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import app
from app.compare.request import compare_request
from app.config import AppConfig
from app.engine.job import Request
from app.tab.examples import EXAMPLES
from app.tab.requests import (
    Choices,
    RequestError,
    check_bound,
    check_model,
    defaults,
    method_text,
    query,
    read_choices,
    recipes,
)
from turboquant.methods import parse_method

CONFIG = AppConfig(max_new_tokens=256, max_prompt_chars=100)


def test_the_start_settings_run() -> None:
    request = compare_request(defaults(CONFIG), "hello", CONFIG)
    assert request.methods == ("turboquant:bits=4",)
    assert request.settings.max_new_tokens == 128
    assert request.settings.temperature == 0


def test_the_recommended_recipe_comes_first() -> None:
    assert recipes()[:2] == ["turboquant", "turboquant-paper"]


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_gives_a_method_that_reads_back(recipe: str) -> None:
    text = method_text(replace(Choices(), recipe=recipe, key_bits="4", value_bits="2"))
    assert str(parse_method(text)) == text
    assert "key_bits=4,value_bits=2" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 9}, "bits must be a whole number from 1 to 8"),
        ({"bits": 0}, "bits must be a whole number from 1 to 8"),
        ({"key_bits": "12"}, "key_bits must be"),
        ({"recipe": "magic"}, "recipe must be one of"),
        ({"recipe": "full"}, "recipe must be one of"),
        ({"residual": -1}, "Residual must be"),
        ({"sinks": 10**9}, "Sinks must be"),
        ({"rotation": -1}, "seed must be"),
        ({"tokens": 0}, "Max new tokens must be from 1 to 256, got 0"),
        ({"tokens": 257}, "from 1 to 256, got 257"),
        ({"temperature": float("nan")}, "Temperature"),
        ({"temperature": 99.0}, "Temperature"),
        ({"seed": -5}, "Seed"),
        ({"weights": "1bit"}, "Weights must be one of"),
        ({"model": "nope"}, "no known model"),
        ({"model": "\0"}, "no known model"),
        ({"model": "a/b/c"}, "no known model"),
        ({"model": ""}, "no known model"),
        ({"model": "../name"}, "no known model"),
        ({"model": "org/.."}, "no known model"),
        ({"model": "/etc"}, "no known model"),
        ({"model": "org/a..b"}, "no known model"),
        ({"second": "magic"}, "second setting cannot be used: unknown method 'magic'"),
        ({"second": "turboquant:bits=4"}, "both compressed settings are the same|Both compressed"),
    ],
)
def test_a_choice_out_of_range_gives_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        compare_request(replace(Choices(), **change), "hello", CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "words"), [("", "Type a prompt"), (None, "Type a prompt"), ("x" * 101, "101 characters")]
)
def test_a_prompt_is_needed_and_not_too_long(prompt: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        compare_request(Choices(), prompt, CONFIG)


def test_a_second_setting_is_another_method() -> None:
    request = compare_request(replace(Choices(), second="kivi:bits=2"), "hello", CONFIG)
    assert request.methods == ("turboquant:bits=4", "kivi:bits=2")
    assert request.sides == 3


def test_hub_ids_are_typed_only_where_they_are_allowed_and_folders_never(tmp_path: Path) -> None:
    assert check_model("org/name", CONFIG) == "org/name"
    with pytest.raises(RequestError, match="no known model"):
        check_model(str(tmp_path), CONFIG)
    mine = AppConfig(models=("smollm2-135m", str(tmp_path)), allow_any_model=False)
    assert check_model(str(tmp_path), mine) == str(tmp_path)  # the operator may offer a folder
    closed = AppConfig(models=("smollm2-135m",), allow_any_model=False)
    assert check_model("smollm2-135m", closed) == "smollm2-135m"
    for name in ("org/name", str(tmp_path), "phi-2"):
        with pytest.raises(RequestError, match="not offered here; choose from smollm2-135m"):
            check_model(name, closed)


@pytest.mark.parametrize("value", [0, 6, True, None, "3", 2.0, 10**40])
def test_a_bound_is_a_bound(value: object) -> None:
    assert check_bound("Seeds", 3, 1, 5) == 3
    with pytest.raises(RequestError, match="Seeds must be a whole number from 1 to 5"):
        check_bound("Seeds", value, 1, 5)


def test_a_link_opens_the_same_choices() -> None:
    choices = replace(Choices(), bits=2, key_bits="3", temperature=0.7, chat=False, model="org/name")
    link = parse_qs(query(choices, "what is it?", CONFIG))
    assert link == {
        "bits": ["2"],
        "key_bits": ["3"],
        "temperature": ["0.7"],
        "chat": ["false"],
        "model": ["org/name"],
        "prompt": ["what is it?"],
    }
    assert query(defaults(CONFIG), "", CONFIG) == ""
    assert query(defaults(CONFIG), EXAMPLES[2].prompt, CONFIG) == "example=summary"
    assert "prompt" not in query(defaults(CONFIG), "x" * 5000, CONFIG)


loose = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Choices.__dataclass_fields__)), loose, max_size=6), st.text(max_size=20))
def test_whatever_a_browser_sends_is_run_or_refused(values: dict[str, Any], prompt: str) -> None:
    try:
        request = compare_request(read_choices(values, CONFIG), prompt, CONFIG)
    except RequestError:
        return
    assert 1 <= request.settings.max_new_tokens <= 256
    for method in request.methods:
        parse_method(method)


def kinds() -> list[type[Request]]:
    """Every kind of request that a module of the app defines."""
    for module in pkgutil.walk_packages(app.__path__, "app."):
        if module.name != "app.main":
            importlib.import_module(module.name)
    return sorted(Request.__subclasses__(), key=lambda kind: kind.__name__)


def test_no_kind_of_request_can_forget_what_is_private() -> None:
    """Whether other visitors may be given a result has no default: it is said where the visitor's text is read."""
    assert len(kinds()) >= 5
    for kind in kinds():
        (private,) = (one for one in fields(kind) if one.name == "private")
        assert private.default is MISSING, kind
        assert private.default_factory is MISSING, kind
        given = {one.name: None for one in fields(kind) if one.default is MISSING and one.name != "private"}
        with pytest.raises(TypeError, match="private"):
            kind(**given)
