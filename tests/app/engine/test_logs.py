"""Lines of the log: what is in them, and what is not."""

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from app.config import AppConfig
from app.engine import logs
from app.engine.logs import JsonLines, TextLines

QUOTED = " ".join(["what", "the", "visitor", "wrote"])


def failure(level: int = logging.ERROR) -> logging.LogRecord:
    """A record of an exception whose message, and that of the one behind it, quotes a prompt."""
    try:
        try:
            raise KeyError(QUOTED)
        except KeyError as error:
            raise ValueError(f"cannot read {QUOTED}") from error
    except ValueError:
        return logging.LogRecord("a.library", level, __file__, 1, "it %s", ("failed",), sys.exc_info())


def test_an_event_is_a_json_object_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=logs.log.name):
        logs.event("job_done", job=3, methods=["turboquant:bits=4"], reason=None)
    line = json.loads(JsonLines(messages=False).format(caplog.records[-1]))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "event": "job_done", "job": 3, "methods": ["turboquant:bits=4"]}
    text = TextLines(messages=False).format(caplog.records[-1])
    assert text.endswith(" INFO job_done job=3 methods=['turboquant:bits=4']")


def test_an_exception_is_its_place_and_type_without_its_message() -> None:
    for formatter in (JsonLines(messages=False), TextLines(messages=False)):
        text = formatter.format(failure())
        assert QUOTED not in text
        assert "KeyError" in text
        assert "ValueError" in text
        assert "Traceback" in text
        assert "test_logs.py" in text
    line = json.loads(JsonLines(messages=False).format(failure()))
    assert (line["logger"], line["message"], line["error"]) == ("a.library", "it failed", "ValueError")
    assert f"ValueError: cannot read {QUOTED}" in JsonLines(messages=True).format(failure())


@pytest.fixture
def restored() -> Iterator[None]:
    """Handlers, formats and levels as they were."""
    root = logging.getLogger()
    before, level = list(root.handlers), logs.log.level
    formats = [(handler, handler.formatter) for handler in before]
    yield
    root.handlers[:] = before
    logs.log.setLevel(level)
    logging.captureWarnings(False)
    for handler, formatter in formats:
        handler.setFormatter(formatter)


@pytest.mark.usefixtures("restored")
def test_every_handler_that_writes_to_the_console_takes_the_format() -> None:
    other = logging.getLogger("somebody.elses")
    other.addHandler(handler := logging.StreamHandler())
    logs.set_up(AppConfig(log="warning", log_format="text"))
    assert isinstance(handler.formatter, TextLines)
    assert logs.log.level == logging.WARNING
    other.removeHandler(handler)
