"""The server's log: one event a line on stderr, as JSON or as text, without anything that a visitor wrote.

An event of this app is a name with fields (`event`); what libraries log keeps its message. Of an exception the log
names the type and where it was raised, not its message, which may quote a prompt: messages stand in it at the level
`debug` only.
"""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime

from app.config import AppConfig

log = logging.getLogger("turboquant.app")


def event(name: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: object) -> None:
    """Log an event; fields that are None are left out. `error` adds where an exception was raised."""
    known = {key: value for key, value in fields.items() if value is not None}
    log.log(level, name, exc_info=error, extra={"event": name, "fields": known})


class _Formatter(logging.Formatter):
    """What both formats share: which parts a line has."""

    def __init__(self, *, messages: bool) -> None:
        super().__init__()
        self._messages = messages

    def parts(self, record: logging.LogRecord) -> dict[str, object]:
        """Time, level, event and its fields, or the logger's name and message; then the traceback, if there is one."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        parts: dict[str, object] = {"time": when, "level": record.levelname.lower()}
        name = getattr(record, "event", None)
        if name is not None:
            parts |= {"event": name, **getattr(record, "fields", {})}
        else:
            parts |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            parts["error"] = type(record.exc_info[1]).__name__
            parts["traceback"] = "".join(_lines(record.exc_info[1], messages=self._messages)).rstrip()
        return parts


class JsonLines(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        return json.dumps(self.parts(record), ensure_ascii=False, default=str)


class TextLines(_Formatter):
    """`time LEVEL event key=value ...` for people; a traceback follows on its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        parts = self.parts(record)
        stack = parts.pop("traceback", None)
        head = [parts.pop("time"), str(parts.pop("level")).upper(), parts.pop("event", None) or parts.pop("logger")]
        message = [parts.pop("message")] if "message" in parts else []
        line = " ".join(map(str, [*head, *message, *(f"{key}={value}" for key, value in parts.items())]))
        return line if stack is None else f"{line}\n{stack}"


def _lines(error: BaseException, *, messages: bool) -> Iterator[str]:
    """A traceback as Python prints it, each exception's message left out unless `messages`."""
    if messages:
        yield from traceback.format_exception(error)
        return
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _lines(before, messages=False)
        yield "\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__name__}\n"


def set_up(config: AppConfig) -> None:
    """Write the log of this app, of Streamlit and of the web server to stderr in the format that was asked for.

    Streamlit gives each of its loggers a handler of its own, so each handler that is there takes the format.
    """
    messages = config.log == "debug"
    formatter = JsonLines(messages=messages) if config.log_format == "json" else TextLines(messages=messages)
    logging.captureWarnings(True)
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler(sys.stderr))
    log.setLevel(config.log.upper())
    for name in (None, *logging.root.manager.loggerDict):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                handler.setFormatter(formatter)
