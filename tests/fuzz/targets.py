"""What is fuzzed: each target takes bytes and raises only if the code under test broke its word.

The word is the same everywhere: what a stranger hands in is understood or refused in one short sentence.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from app.compare.request import compare_request
from app.config import AppConfig
from app.tab.requests import Choices, RequestError, query, read_choices
from app.tab.runs import RunError, import_run
from turboquant.methods import METHODS, parse_method
from turboquant.sizing import ModelConfigError, SizingError, kv_bytes, read_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = AppConfig(max_prompt_chars=2000)
FULL, PACKED = parse_method("full"), parse_method("turboquant:bits=3")


def sentence(error: Exception, longest: int = 600) -> None:
    """Check the words of a refusal."""
    words = str(error)
    assert words
    assert len(words) <= longest, f"{len(words)} characters: {words[:80]}"
    assert "\n" not in words, repr(words)


def method(data: bytes) -> None:
    """A method's string, as in URLs, on the command line and in files."""
    try:
        found = parse_method(data.decode(errors="replace"))
    except ValueError as error:
        return sentence(error)
    assert parse_method(str(found)) == found


def run_file(data: bytes) -> None:
    """An uploaded run."""
    try:
        run = import_run(data)
    except RunError as error:
        return sentence(error)
    for make in (run.to_markdown, run.to_csv, run.heads_csv):
        assert make().encode()
    text = run.to_json()
    assert import_run(text).to_json() == text  # not the objects: scores that are not there are NaN


def model_config(data: bytes) -> None:
    """A pasted config.json."""
    try:
        shape = read_config(data)
    except ModelConfigError as error:
        return sentence(error)
    assert kv_bytes(shape, FULL, 1000).bytes > 0
    try:
        assert kv_bytes(shape, PACKED, 1000).bytes > 0
    except SizingError as error:
        sentence(error)


def _typed(name: str, text: str) -> object:
    """A parameter of an address as a widget hands it on: of the setting's own type where the text is of that type."""
    kind = type(getattr(Choices(), name))
    try:
        return text.lower() == "true" if kind is bool else kind(text)
    except (ValueError, OverflowError):
        return text


def address(data: bytes) -> None:
    """The query string of the Compare page."""
    try:
        given = dict(parse_qsl(data.decode(errors="replace"), keep_blank_values=True, max_num_fields=50))
    except ValueError:
        return
    names = {field.name for field in fields(Choices)}
    choices = read_choices({name: _typed(name, given[name]) for name in names & given.keys()}, CONFIG)
    try:
        request = compare_request(choices, given.get("prompt", "hello"), CONFIG)
    except RequestError as error:
        return sentence(error)
    assert 1 <= request.settings.max_new_tokens <= CONFIG.max_new_tokens
    assert all(str(parse_method(text)) == text for text in request.methods)
    link = dict(parse_qsl(query(choices, request.prompt, CONFIG), keep_blank_values=True))
    again = read_choices({name: _typed(name, link[name]) for name in names & link.keys()}, CONFIG)
    assert compare_request(again, request.prompt, CONFIG) == request, "a link opens the same request"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "method": method,
    "run_file": run_file,
    "model_config": model_config,
    "address": address,
}


def _small_run() -> bytes:
    from tests.support.attention_factory import explained

    return json.dumps({"comparison": explained().model_dump(mode="json")}).encode()


def seeds(name: str) -> list[bytes]:
    """Inputs that are understood, to begin with."""
    if name == "method":
        named = [f"{method}:bits=3,residual_length=8,seed=5" for method in METHODS]
        return [text.encode() for text in (*named, "full", "turboquant:bits=3,layers=0+2-3:2+5-999:4/3,center=false")]
    if name == "run_file":
        return [_small_run()]
    if name == "model_config":
        presets: list[dict[str, Any]] = [
            json.loads(path.read_text())["config"] for path in sorted((ROOT / "assets" / "models").glob("*.json"))
        ]
        presets.append({"model_type": "llama"})  # all else is left to transformers' defaults
        return [json.dumps(preset).encode() for preset in presets]
    links = ["bits=2&key_bits=3&value_bits=same&recipe=kivi&tokens=64&seed=1&temperature=0.7&chat=false"]
    links += ["model=org/name&residual=0&sinks=4&rotation=7&weights=bf16&second=rtn:bits=4&prompt=what+is+it%3F"]
    return [link.encode() for link in links]


def words(name: str) -> list[str]:
    """Words that a fuzzer would hardly come upon by itself."""
    if name == "method":
        options = {field.name for method in METHODS.values() for field in fields(method)}
        return [*METHODS, *(f"{option}=" for option in sorted(options)), "hadamard", "true", "none", "unbiased"]
    if name == "address":
        return [f"{field.name}=" for field in fields(Choices)] + ["%00", "NaN", "-1", "1e999", "same", "turboquant"]
    found: set[str] = set()
    for seed in seeds(name):
        waiting: list[Any] = [json.loads(seed)]
        while waiting:
            part = waiting.pop()
            if isinstance(part, dict):
                found |= set(part)
            waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [*(json.dumps(word) for word in sorted(found)), "null", "NaN", "Infinity", "1e999", "true", "[[", "{}"]
