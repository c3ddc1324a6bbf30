"""One comparison on its way through the engine: its request, its events, its state.

A `Job` is written by the worker thread and read by any number of page runs; a page may attach late, detach and attach
again, and always sees everything that has happened so far.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from turboquant.results import Comparison, Settings

if TYPE_CHECKING:
    from turboquant.comparison import Event

State = Literal["queued", "loading", "running", "done", "stopped", "failed"]
FINAL: tuple[State, ...] = ("done", "stopped", "failed")
_ids = itertools.count(1)


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, already checked. `method` is the text that `parse_method` reads."""

    model: str
    weights: str
    prompt: str
    method: str
    settings: Settings
    chat: bool = True


@dataclass(frozen=True)
class SideView:
    """How far one answer is."""

    text: str = ""
    tokens: int = 0
    cache_bytes: int = 0
    prefilled: bool = False
    done: bool = False


@dataclass(frozen=True)
class View:
    """A job as a page draws it: a snapshot that does not change under the reader."""

    state: State
    original: SideView
    compressed: SideView
    phase: str = ""
    fraction: float | None = None
    error: str | None = None


@dataclass
class Job:
    """A request with everything the worker has reported about it.

    Only the newest token event of a side carries that side's text, so that the buffer stays small however long the
    answer grows.
    """

    session: str
    request: Request
    id: int = field(default_factory=lambda: next(_ids))
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    result: Comparison | None = None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._newest: dict[str, int] = {}
        self._view = View("queued", SideView(), SideView())
        self._cancelled = threading.Event()

    @property
    def view(self) -> View:
        """The state of the job now."""
        return self._view

    @property
    def live(self) -> bool:
        """Is the job waiting or at work?"""
        return self._view.state not in FINAL

    @property
    def cancelled(self) -> bool:
        """Has anybody asked this job to stop?"""
        return self._cancelled.is_set()

    def request_cancel(self) -> None:
        """Ask the job to stop. A page calls `Engine.cancel` instead, which also takes it off the queue."""
        self._cancelled.set()

    def publish(self, event: "Event") -> None:
        """Record one event of the running comparison (worker thread)."""
        with self._changed:
            if event.kind == "phase":
                self._view = replace(self._view, phase=event.text, fraction=event.fraction)
            elif event.side is not None:
                self._apply(event)
            self._events.append(event)
            self._changed.notify_all()

    def _apply(self, event: "Event") -> None:
        """Update one side's snapshot and drop the text of that side's event before this one."""
        assert event.side is not None
        side: SideView = getattr(self._view, event.side)
        if event.kind == "prefill":
            side = replace(side, prefilled=True, cache_bytes=event.cache_bytes or side.cache_bytes)
        elif event.kind == "token":
            if self.first_token is None:
                self.first_token = time.monotonic()
            if (before := self._newest.get(event.side)) is not None:
                self._events[before] = replace(self._events[before], text="")
            self._newest[event.side] = len(self._events)
            side = replace(side, text=event.text, tokens=event.tokens, cache_bytes=event.cache_bytes, prefilled=True)
        else:
            side = replace(side, done=True)
        if event.side == "original":
            self._view = replace(self._view, original=side)
        else:
            self._view = replace(self._view, compressed=side)

    def advance(self, state: State, phase: str = "", fraction: float | None = None) -> None:
        """Move to `state`, or within it to another phase (worker thread). A finished job stays finished."""
        with self._changed:
            if not self.live:
                return
            if state != "queued" and self.started is None:
                self.started = time.monotonic()
            self._view = replace(self._view, state=state, phase=phase, fraction=fraction)
            self._changed.notify_all()

    def finish(self, state: State, result: Comparison | None = None, error: str | None = None) -> None:
        """End the job once: later calls change nothing."""
        with self._changed:
            if not self.live:
                return
            self.result, self.ended = result, time.monotonic()
            self._view = replace(self._view, state=state, phase="", fraction=None, error=error)
            self._changed.notify_all()

    def stream(self, start: int = 0, poll: float = 0.25, pause: float = 0.1) -> "Iterator[list[Event]]":
        """Yield the events from `start` on in batches until the job ends.

        An empty batch is a heartbeat: it comes after `poll` quiet seconds, or at once when the phase changed, so that
        the reader can redraw or be interrupted. `pause` is the shortest time between two batches in seconds.
        """
        seen = None
        while True:
            with self._changed:
                if len(self._events) <= start and self.live and self._view is seen:
                    self._changed.wait(poll)
                batch, seen, ended = self._events[start:], self._view, not self.live
            start += len(batch)
            yield batch
            if ended:
                return
            time.sleep(pause)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the job has ended; False when `timeout` seconds pass before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.live, timeout)
