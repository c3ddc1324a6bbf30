"""A run file with a hostile value somewhere: refused in one sentence, or exported and shown on every page."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from app.tab import state
from app.tab.runs import Run, RunError, import_run
from tests.support.attention_factory import explained

PAGES = ("compare", "heads", "runs")
HOSTILE: dict[str, Any] = {
    "a huge number": 10**400,
    "a number beyond 64 bits": 2**70,
    "the largest float": 1.7e308,
    "the smallest float": -5e-324,
    "a negative number": -7,
    "zero": 0,
    "NaN": float("nan"),
    "infinity": float("-inf"),
    "nothing": None,
    "an empty list": [],
    "an empty text": "",
    "true": True,
    "half a character": "\ud800",
    "control characters": "\x00\x1b[31m\u202e\r\n<script>alert(1)</script>",
    "a long text": "x" * 200_000,
    "a long list": [0.5] * 20_000,
    "lists in lists": json.loads("[" * 200 + "]" * 200),
    "objects in objects": json.loads('{"a":' * 200 + "1" + "}" * 200),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a document; of a list the first and the last."""
    if path:
        yield path
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = sorted({0, len(value) - 1} & set(range(len(value))))
    for key in keys:
        yield from places(value[key], (*path, key))


DOCUMENT = json.loads(Run(comparison=explained()).to_json())
PLACES = [*places(DOCUMENT)]


def spoiled(path: tuple[Any, ...], value: Any) -> str:
    document = json.loads(json.dumps(DOCUMENT))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document)


def accepted(path: tuple[Any, ...], value: Any) -> Run | None:
    """The run, with all its exports made; None where it was refused in words."""
    refused = ""
    try:
        run = import_run(spoiled(path, value))
    except RunError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        assert len(refused) < 500
        return None
    for make in (run.to_json, run.to_markdown, run.to_csv, run.heads_csv):
        make().encode()
    assert import_run(run.to_json()).id == run.id, "what is exported is read again"
    return run


def show(page: AppTest, monkeypatch: pytest.MonkeyPatch, run: Run, name: str) -> None:
    monkeypatch.setattr(state, "recordings", lambda: [run])
    page.switch_page(f"../pages/{name}.py").run()
    assert not page.exception, page.exception[0].message


@pytest.mark.parametrize("path", [PLACES[i] for i in range(3, len(PLACES), len(PLACES) // 12)], ids=str)
def test_a_hostile_value_is_refused_or_exported(path: tuple[Any, ...]) -> None:
    for value in HOSTILE.values():
        accepted(path, value)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", PAGES)
def test_a_hostile_value_anywhere_is_refused_or_shown(
    page: AppTest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shown, failed = 0, []
    for path in PLACES:
        for words, value in HOSTILE.items():
            run = accepted(path, value)
            if run is None or len(run.to_json()) > 10**6:
                continue
            shown += 1
            try:
                show(page, monkeypatch, run, name)
            except AssertionError as error:
                failed.append(f"{'.'.join(map(str, path))}: {words}: {error}")
    print(f"{shown} of {len(PLACES) * len(HOSTILE)} runs were read and shown on {name}")
    assert not failed, "\n".join(failed)
