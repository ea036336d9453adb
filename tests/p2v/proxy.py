"""A TCP proxy for tests that stands for a bad network: slow, silent or cut."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Forwards connections to a port of this computer. ``rate``: bytes a second towards the client, None for all there is."""

    def __init__(self, port: int, rate: float | None = None) -> None:
        self._target, self.rate = port, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._flowing = threading.Event()
        self._flowing.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                # Small buffers, so that the far end feels the rate and not the memory in between.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
                server = socket.socket()
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
                server.connect(("127.0.0.1", self._target))
                self._sockets += [client, server]
                threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, self.rate), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, rate: float | None) -> None:
        with suppress(OSError):
            while data := source.recv(16384):
                self._flowing.wait()
                sink.sendall(data)
                if rate is not None:
                    time.sleep(len(data) / rate)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Let nothing through any more, and tell nobody: what a cut cable looks like."""
        self._flowing.clear()

    def cut(self) -> None:
        """Reset all connections."""
        for end in self._sockets:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        """End all of it."""
        self._listener.close()
        self.cut()
        self._flowing.set()


@contextmanager
def proxy(port: int, rate: float | None = None) -> Iterator[Proxy]:
    """A proxy in front of ``port`` while the context is open."""
    made = Proxy(port, rate)
    try:
        yield made
    finally:
        made.close()
