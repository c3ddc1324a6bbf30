"""Stopping the server: the first signal lets the run at work end, the second ends the process at once."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from app.engine.engine import Engine
from app.engine.logs import event

SHOW_S = 3.0
"""How long the pages have to show how their run ended before the connections close, in seconds."""
CLOSE_S = 5.0
"""How long the connections have to close before the process ends without them, in seconds."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], object]


@contextmanager
def graceful(engine: Engine, seconds: float) -> Iterator[None]:
    """Within this block, SIGINT and SIGTERM stop the engine before the web server.

    At the first signal the engine takes no new run, stops those that wait, and gives the one at work `seconds` to end
    before it is stopped with what it has. The pages stay connected meanwhile. Then the web server is told, by the
    handlers that were there before, and has `CLOSE_S` seconds. A second signal ends the process at once.

    Does nothing outside the main thread, where Python delivers no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    told = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # the first process of a container: the kernel keeps the signal from it
        told.set()
        name = signal.Signals(number).name
        handler = handlers[signal.Signals(number)]
        threading.Thread(target=_stop, args=(engine, seconds, name, number, handler), daemon=True).start()

    for number in _SIGNALS:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        if not told.is_set():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _stop(engine: Engine, seconds: float, name: str, number: int, handler: object) -> None:
    event("server_stopping", signal=name, waiting=engine.status().waiting, seconds=seconds)
    try:
        if engine.drain(seconds):
            time.sleep(SHOW_S)
    except BaseException as error:
        event("drain_failed", level=logging.ERROR, error=error)
    finally:
        if callable(handler):
            handler(number, None)
        time.sleep(CLOSE_S)
        event("connections_left", level=logging.WARNING)
        os.kill(os.getpid(), number)
