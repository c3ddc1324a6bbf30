"""Work on its way through the engine: what was asked, what is there already, how far it is.

A `Job` is written by the worker thread and read by any number of page runs; a page may attach late, detach and attach
again, and always sees everything that has happened so far.
"""

import itertools
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

if TYPE_CHECKING:
    from app.tab.results import Results
    from turboquant.run.compare import Event

State = Literal["queued", "loading", "running", "done", "stopped", "failed"]
FINAL: tuple[State, ...] = ("done", "stopped", "failed")
_ids = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Request(ABC):
    """What a visitor asked for, already checked: what it is, how it is run, and where its results belong.

    It is one or more items, computed one after the other, each with one result. Short work goes before long work, which
    lets it by between two items.

    Attributes:
        model: Name of the model.
        weights: How its weights are loaded.
        private: The items whose results follow from something that a visitor wrote: no other visitor is given them. It
            is said where the visitor's text is read and has no default, so that no kind of request can forget it.
        methods: Those under which caches are compressed; none where the work is to find one.
        title: What it is called.
        page: The page that shows it.
        short: Is it short work?
        resumes: Does it go on where it was stopped?
    """

    model: str
    weights: str
    private: frozenset[int]
    methods: tuple[str, ...]
    title: str
    page: str
    short: ClassVar[bool] = False
    resumes: ClassVar[bool] = False

    @property
    def items(self) -> int:
        """How many results there will be."""
        return 1

    @property
    def sides(self) -> int:
        """How many answers are streamed at once."""
        return 0

    @abstractmethod
    def key(self, item: int) -> str | None:
        """What names an item's result: equal keys, equal results. None where it must be computed each time."""

    @abstractmethod
    def run(self, loaded: Any, job: "Job", cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        """Work on the job's pending items with the loaded model, and add a result for each (worker thread)."""

    @abstractmethod
    def keep(self, tab: "Results", job: "Job", item: int) -> str | None:
        """Put a result where the tab keeps such; return the id of a run that is to be shown, if there is one."""

    def prompt_tokens(self, result: Any) -> int:
        """Tokens of the prompt that a result tells of."""
        del result
        return 0


def key_of(*parts: object) -> str:
    """Return a text that names these parts."""
    return json.dumps([part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts])


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
    """A job as a page draws it: a snapshot that does not change under the reader.

    `sides` are the answers now being written: the original first. `fraction` is that of the present phase.
    """

    state: State
    sides: tuple[SideView, ...] = ()
    phase: str = ""
    fraction: float | None = None
    error: str | None = None


@dataclass
class Job:
    """A request with everything the worker has reported about it.

    `results` are by item and grow while it runs; `cached` names those that were there before; `fingerprint` is that of
    the model they come from. `stop_reason` says why it stopped when nobody asked it to; `generated` counts the tokens
    that were generated, over all sides.
    """

    session: str
    request: Request
    id: int = field(default_factory=lambda: next(_ids))
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    results: dict[int, Any] = field(default_factory=dict)
    cached: frozenset[int] = frozenset()
    fingerprint: str | None = None
    stop_reason: str | None = None
    passed: int = 0
    worked_s: float = 0.0
    generated: int = 0

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._view = View("queued", self._blank())
        self._cancelled = threading.Event()
        self._units = 0.0
        self._turn: float | None = None

    def _blank(self) -> tuple[SideView, ...]:
        return (SideView(),) * self.request.sides

    # --- for pages

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

    @property
    def pending(self) -> list[int]:
        """The items without a result, in order."""
        return [item for item in range(self.request.items) if item not in self.results]

    @property
    def fraction(self) -> float:
        """How much of all items is done, 0 to 1."""
        return min(1.0, max(self._units, float(len(self.results))) / max(self.request.items, 1))

    @property
    def running_s(self) -> float:
        """Seconds of work so far, without waiting."""
        return self.worked_s + (time.monotonic() - self._turn if self._turn is not None else 0.0)

    @property
    def remaining_s(self) -> float | None:
        """Seconds of work that are left, by the speed so far; None before that can be said."""
        there = len(self.cached) / max(self.request.items, 1)
        done = self.fraction - there
        return None if done <= 0.01 else self.running_s / done * (1.0 - self.fraction)

    def stream(self, poll: float = 0.25, pause: float = 0.1) -> Iterator[View]:
        """Yield the job's view whenever it has changed, and at least every `poll` seconds, until the job ends.

        The repeated view is a heartbeat: the reader can be interrupted there. `pause` is the shortest time between two
        views in seconds.
        """
        seen = None
        while True:
            with self._changed:
                if self.live and self._view is seen:
                    self._changed.wait(poll)
                seen = self._view
            yield seen
            if seen.state in FINAL:
                return
            time.sleep(pause)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the job has ended; False when `timeout` seconds pass before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.live, timeout)

    # --- for the engine and the worker thread

    def request_cancel(self, reason: str | None = None) -> None:
        """Ask the job to stop. A page calls `Engine.cancel` instead, which also takes it off the queue."""
        if not self._cancelled.is_set():
            self.stop_reason = reason
        self._cancelled.set()

    def begin_turn(self) -> None:
        """The worker turns to this job."""
        self._turn, self.passed = time.monotonic(), 0

    def end_turn(self) -> None:
        """The worker turns away from it."""
        if self._turn is not None:
            self.worked_s, self._turn = self.running_s, None

    def begin_item(self, item: int, phase: str = "") -> None:
        """Start an item: its answers are blank again."""
        with self._changed:
            self._units = max(self._units, float(len(self.results)))
            self._view = replace(self._view, sides=self._blank(), phase=phase, fraction=None)
            self._changed.notify_all()
        del item

    def add(self, item: int, result: object) -> None:
        """Keep the result of an item."""
        with self._changed:
            self.results = {**self.results, item: result}
            self._units = float(len(self.results))
            self._view = replace(self._view)
            self._changed.notify_all()

    def progress(self, units: float, text: str) -> None:
        """Say how many items are done, parts of one included, and what is being done."""
        with self._changed:
            self._units = units
            self._view = replace(self._view, phase=text)
            self._changed.notify_all()

    def publish(self, event: "Event") -> None:
        """Record one event of the running comparison."""
        with self._changed:
            if event.kind == "phase":
                self._view = replace(self._view, phase=event.text, fraction=event.fraction)
            elif event.side is not None:
                self._apply(event)
            self._changed.notify_all()

    def _apply(self, event: "Event") -> None:
        index = 0 if event.side == "original" else 1 + event.number
        side = self._view.sides[index]
        if event.kind == "prefill":
            side = replace(side, prefilled=True, cache_bytes=event.cache_bytes or side.cache_bytes)
        elif event.kind == "token":
            self.first_token = self.first_token or time.monotonic()
            self.generated += event.tokens - side.tokens
            side = replace(side, text=event.text, tokens=event.tokens, cache_bytes=event.cache_bytes, prefilled=True)
        else:
            side = replace(side, done=True)
        sides = self._view.sides
        self._view = replace(self._view, sides=(*sides[:index], side, *sides[index + 1 :]))

    def advance(self, state: State, phase: str = "", fraction: float | None = None) -> None:
        """Move to `state`, or within it to another phase. A finished job stays finished."""
        with self._changed:
            if not self.live:
                return
            if state != "queued" and self.started is None:
                self.started = time.monotonic()
            self._view = replace(self._view, state=state, phase=phase, fraction=fraction)
            self._changed.notify_all()

    def finish(self, state: State, error: str | None = None) -> bool:
        """End the job once: later calls change nothing. Returns whether this one did."""
        with self._changed:
            if not self.live:
                return False
            self.ended = time.monotonic()
            self._view = replace(self._view, state=state, phase="", fraction=None, error=error)
            self._changed.notify_all()
            return True
