"""Work on its way through the engine: what was asked, what is there already, how far it is.

A `Job` is written by the worker thread and read by any number of page runs; a page may attach late, detach and attach
again, and always sees everything that has happened so far.
"""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from app.compare.examples import name_of
from turboquant.records.results import Cell, Settings

if TYPE_CHECKING:
    from app.session.conversation import Conversation
    from turboquant.run.compare import Event

State = Literal["queued", "loading", "running", "done", "stopped", "failed"]
FINAL: tuple[State, ...] = ("done", "stopped", "failed")
_ids = itertools.count(1)


class Request(Protocol):
    """What a visitor asked for, already checked.

    It is one or more items, computed one after the other, each with one result. Short work goes before long work, which
    lets it by between two items. `title` and `page` say what it is and on which page it is shown; `sides` is the number
    of answers that are streamed.
    """

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def weights(self) -> str: ...  # noqa: D102
    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def page(self) -> str: ...  # noqa: D102
    @property
    def short(self) -> bool: ...  # noqa: D102
    @property
    def sides(self) -> int: ...  # noqa: D102
    @property
    def items(self) -> int: ...  # noqa: D102

    def key(self, item: int) -> str | None:
        """What names an item's result: equal keys, equal results. None where it must be computed each time."""

    def public(self, item: int) -> bool:
        """Does the result follow from nothing that a visitor wrote? Then other visitors may be given it too."""


@dataclass(frozen=True)
class CompareRequest:
    """One prompt answered with the full cache and with one or two methods; the result is a tuple of Comparisons."""

    model: str
    weights: str
    prompt: str
    methods: tuple[str, ...]
    settings: Settings
    chat: bool = True
    title: ClassVar[str] = "Compare"
    page: ClassVar[str] = "compare"
    short: ClassVar[bool] = True
    items: ClassVar[int] = 1

    @property
    def sides(self) -> int:
        """The original and one for each method."""
        return 1 + len(self.methods)

    def key(self, item: int) -> str | None:
        """Everything the answers depend on."""
        del item
        return _key("compare", self.model, self.weights, self.prompt, self.methods, self.settings, self.chat)

    def public(self, item: int) -> bool:
        """Is the prompt one of the examples?"""
        del item
        return name_of(self.prompt) is not None


@dataclass(frozen=True)
class PromptsRequest:
    """A set of prompts, each answered with the full cache and with one method; each result is a Comparison."""

    model: str
    weights: str
    prompts: tuple[str, ...]
    method: str
    settings: Settings
    chat: bool = True
    title: ClassVar[str] = "Prompts"
    page: ClassVar[str] = "prompts"
    short: ClassVar[bool] = False
    sides: ClassVar[int] = 2

    @property
    def items(self) -> int:
        """One a prompt."""
        return len(self.prompts)

    def key(self, item: int) -> str | None:
        """Everything one pair of answers depends on."""
        prompt = self.prompts[item]
        return _key("prompt", self.model, self.weights, prompt, self.method, self.settings, self.chat)

    def public(self, item: int) -> bool:
        """Is the prompt one of the examples?"""
        return name_of(self.prompts[item]) is not None


@dataclass(frozen=True)
class CellsRequest:
    """Cells of experiments; each result is an ExperimentRecord, those that failed with their error.

    `private` says that the settings hold something the visitor wrote.
    """

    model: str
    weights: str
    cells: tuple[Cell, ...]
    title: str
    page: str
    private: bool = False
    short: ClassVar[bool] = False
    sides: ClassVar[int] = 0

    @property
    def items(self) -> int:
        """One a cell."""
        return len(self.cells)

    def key(self, item: int) -> str | None:
        """The cell's identity."""
        return self.cells[item].key

    def public(self, item: int) -> bool:
        """Are the cells made of shipped texts and numbers alone?"""
        del item
        return not self.private


@dataclass(frozen=True)
class TurnRequest:
    """The next turn of a conversation held in both caches; the result is a Turn."""

    model: str
    weights: str
    conversation: "Conversation"
    prompt: str
    settings: Settings
    title: ClassVar[str] = "Session"
    page: ClassVar[str] = "session"
    short: ClassVar[bool] = True
    sides: ClassVar[int] = 2
    items: ClassVar[int] = 1

    def key(self, item: int) -> str | None:
        """A turn depends on what the caches hold, so it is computed each time."""
        del item
        return None

    def public(self, item: int) -> bool:
        """A conversation is the visitor's own."""
        del item
        return False


def _key(*parts: object) -> str:
    return json.dumps([part.model_dump(mode="json") if isinstance(part, Settings) else part for part in parts])


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
