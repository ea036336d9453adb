"""QMP, QEMU's control protocol, for code that is not asynchronous.

QEMU's own client (qemu.qmp) runs in an event loop of its own thread; the thread also starts QEMU, because QEMU is killed when the
thread that started it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from p2v.errors import EmulatorError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

_T = TypeVar("_T")

EVENT_LIMIT = 10_000
"""Events beyond this number are dropped: a guest can cause any number of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something QEMU reported; ``time`` is of the monotonic clock, in seconds."""

    name: str
    data: Mapping[str, object]
    time: float


class Monitor:
    """A QMP connection over a socket pair; ``peer`` is the end that QEMU gets."""

    def __init__(self) -> None:
        self._socket, self.peer = socket.socketpair()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="qemu-monitor", daemon=True)
        self._client: QMPClient | None = None
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._thread.start()

    def call(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` in the monitor's thread, which lives until ``close``."""

        async def run() -> _T:
            return work()

        return self._await(run(), timeout=60)

    def connect(self, timeout: float = 60) -> None:
        """Wait for QEMU's greeting; ``EmulatorError`` when it does not come."""
        self._await(self._connect(), timeout=timeout)

    def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 60) -> Any:
        """Run one QMP command and return its result; ``EmulatorError`` when QEMU refuses or does not answer."""
        from qemu.qmp import QMPError

        if self._client is None:
            raise EmulatorError("QEMU's monitor is not connected", advice="start the machine first")
        try:
            return self._await(self._client.execute(command, dict(arguments) if arguments else None), timeout=timeout)
        except QMPError as error:
            raise EmulatorError(f"QEMU refused {command}: {error}", advice="see QEMU's own messages") from error

    def human(self, line: str) -> str:
        """Run one command of the human monitor and return its text."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def events(self) -> tuple[Event, ...]:
        """All events so far, oldest first."""
        with self._lock:
            return tuple(self._events)

    def close(self) -> None:
        """End the connection and the thread; idempotent."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(EmulatorError):
            self._await(self._disconnect(), timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()
        for end in (self._socket, self.peer):
            end.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _await(self, work: Coroutine[Any, Any, _T], *, timeout: float) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except TimeoutError as error:
            future.cancel()
            raise EmulatorError(
                "QEMU does not answer on its monitor", advice="the host may be overloaded: try again"
            ) from error

    async def _connect(self) -> None:
        import logging

        from qemu.qmp import EventListener, QMPClient, QMPError

        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # a disconnect is no error of the user's
        client = QMPClient("p2v")
        listener = EventListener()
        client.register_listener(listener)
        try:
            await client.connect(self._socket)
        except (QMPError, OSError) as error:
            raise EmulatorError(f"QEMU's monitor does not answer: {error}", advice="see QEMU's own messages") from error
        self._client = client
        self._watcher = asyncio.ensure_future(self._watch(listener))

    async def _watch(self, listener: Any) -> None:
        async for message in listener:
            event = Event(name=str(message["event"]), data=dict(message.get("data", {})), time=time.monotonic())
            with self._lock:
                if len(self._events) < EVENT_LIMIT:
                    self._events.append(event)

    async def _disconnect(self) -> None:
        from qemu.qmp import QMPError

        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._client is not None:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await self._client.disconnect()
        self._client = None
