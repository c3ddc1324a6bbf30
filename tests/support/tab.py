"""A browser tab at the level of Streamlit's protocol: protobuf messages over a real websocket to a real server.

It does what the frontend does with them: keeps the newest element at each place, sends the address and the widgets it
changed with every rerun, acts as the page's timers ask, and comes back with its session's name when its socket was cut.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

SECONDS = 60.0
OPEN_S = 300.0


class Tab:
    """One page in one tab.

    Attributes:
        session: The server's name of the session; it stays when the tab comes back.
        first_element_s: Seconds from opening the socket to the page's first element.
        first_run_s: Seconds from opening the socket to the end of the page's first run.
        runs: Script runs that have ended.
    """

    def __init__(self, address: str, page: str = "compare", **query: object) -> None:
        self._url = address.replace("http", "ws", 1) + "/_stcore/stream"
        self._page, self._query = page, urlencode(query)
        self._elements: dict[tuple[int, ...], tuple[int, Any]] = {}
        self._run = 0
        self._socket: ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._timers: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self._opened = 0.0
        self.session = ""
        self.first_element_s: float | None = None
        self.first_run_s: float | None = None
        self.runs = 0

    # --- the connection

    async def open(self) -> "Tab":
        """Connect, as the same session if there was one, and ask for the page."""
        self._opened = time.monotonic()
        names = ["streamlit", "none", self.session] if self.session else ["streamlit", "none"]
        self._socket = await connect(
            self._url,
            subprotocols=[Subprotocol(name) for name in names],
            max_size=None,
            open_timeout=OPEN_S,
            ping_interval=None,  # a browser answers pings and sends none
        )
        self._reader = asyncio.create_task(self._read(self._socket))
        await self.rerun()
        return self

    async def cut(self) -> None:
        """Lose the connection in the middle of whatever goes on, without a closing handshake."""
        assert self._socket is not None
        self._stop_timers()
        self._socket.transport.abort()
        await self._gone()

    async def close(self) -> None:
        """Close the tab."""
        self._stop_timers()
        if self._socket is not None:
            await self._socket.close()
        await self._gone()

    async def _gone(self) -> None:
        if self._reader is not None:
            with suppress(ConnectionClosed, asyncio.CancelledError):
                await self._reader

    @property
    def connected(self) -> bool:
        """Is the socket open?"""
        return self._reader is not None and not self._reader.done()

    async def _read(self, socket: ClientConnection) -> None:
        with suppress(ConnectionClosed):
            async for data in socket:
                message = ForwardMsg()
                message.ParseFromString(bytes(data) if not isinstance(data, str) else data.encode())
                self._take(message)
                async with self._changed:
                    self._changed.notify_all()
        self._stop_timers()
        async with self._changed:
            self._changed.notify_all()

    def _take(self, message: ForwardMsg) -> None:
        kind = message.WhichOneof("type")
        if kind == "new_session":
            self._run += 1
            self.session = message.new_session.initialize.session_id or self.session
            self._stop_timers()
        elif kind == "delta":
            self._draw(tuple(message.metadata.delta_path), message.delta)
        elif kind == "script_finished":
            self._end(message.script_finished)
        elif kind == "page_info_changed":
            self._query = message.page_info_changed.query_string
        elif kind == "auto_rerun":
            self._timers.append(asyncio.create_task(self._tick(message.auto_rerun)))

    def _draw(self, path: tuple[int, ...], delta: Any) -> None:
        if delta.WhichOneof("type") == "add_block":
            return
        if self.first_element_s is None:
            self.first_element_s = time.monotonic() - self._opened
        self._elements[path] = (self._run, delta.new_element)

    def _end(self, how: int) -> None:
        self.runs += 1
        if how == ForwardMsg.FINISHED_SUCCESSFULLY:
            self._elements = {path: kept for path, kept in self._elements.items() if kept[0] == self._run}
            if self.first_run_s is None:
                self.first_run_s = time.monotonic() - self._opened

    async def _tick(self, timer: Any) -> None:
        with suppress(ConnectionClosed):
            while self.connected:
                await asyncio.sleep(timer.interval)
                await self.rerun(fragment=timer.fragment_id)

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers = []

    # --- what a visitor does

    async def rerun(self, *widgets: WidgetState, fragment: str = "") -> None:
        """Ask for a run of the page with these widgets changed, or of one of its fragments."""
        message = BackMsg()
        state = message.rerun_script
        state.query_string, state.page_name = self._query, self._page
        if fragment:
            state.fragment_id, state.is_auto_rerun = fragment, True
        state.widget_states.widgets.extend(widgets)
        assert self._socket is not None
        await self._socket.send(message.SerializeToString())

    async def press(self, label: str, *widgets: WidgetState) -> None:
        """Press the button with this label, with other widgets changed before."""
        await self.rerun(*widgets, WidgetState(id=self.element("button", label).id, trigger_value=True))

    def text_area(self, label: str, text: str) -> WidgetState:
        """A text area with other text in it."""
        return WidgetState(id=self.element("text_area", label).id, string_value=text)

    def number(self, label: str, value: float) -> WidgetState:
        """A number input with another number in it."""
        return WidgetState(id=self.element("number_input", label).id, double_value=value)

    # --- what a visitor sees

    def element(self, kind: str, label: str) -> Any:
        """The first element of this kind whose label holds a text."""
        for _, element in self._elements.values():
            if element.WhichOneof("type") == kind and label in getattr(element, kind).label:
                return getattr(element, kind)
        raise LookupError(f"no {kind} {label!r} on the page; it says: {self.text[:500]}")

    def has(self, kind: str, label: str) -> bool:
        """Is there such an element?"""
        with suppress(LookupError):
            return bool(self.element(kind, label))
        return False

    @property
    def text(self) -> str:
        """The words on the page."""
        return "\n".join(str(getattr(e, str(e.WhichOneof("type")))) for _, e in self._elements.values())

    @property
    def exceptions(self) -> int:
        """How many exceptions the page shows."""
        return sum(e.WhichOneof("type") == "exception" for _, e in self._elements.values())

    async def until(self, condition: Callable[[], object], seconds: float = SECONDS) -> None:
        """Wait until the page is as it should be."""

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: condition() or not self.connected)

        try:
            await asyncio.wait_for(wait(), seconds)
        except TimeoutError:
            raise AssertionError(f"not within {seconds:.0f} s; the page says: {self.text[-1500:]}") from None
        assert condition(), f"the connection is gone; the page says: {self.text[-1500:]}"

    async def sees(self, words: str, seconds: float = SECONDS) -> None:
        """Wait until the page says something."""
        await self.until(lambda: words in self.text, seconds)
