"""The serial console of the emulated machine: logged to a file of bounded size, read as text, written to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from pathlib import Path

LOG_LIMIT = 16 << 20
"""Bytes of console output that are logged; a guest can print without end."""

_CURSOR = re.compile(r"\x1b\[[0-9;?]*[A-HJKSTdfhlsu]")  # moves, erases, modes: what follows is not the same line
_ESCAPE = re.compile(r"\x1b(?:\[[0-9;:<=>?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def plain(text: str) -> str:
    """Console output without terminal control: sequences that move the cursor end a line, all others vanish (ECMA-48)."""
    text = _CURSOR.sub("\n", text)
    text = _ESCAPE.sub("", text)
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


class SerialConsole:
    """One serial port. ``peer`` is the end that QEMU gets; a thread drains our end, so the guest never waits for a reader."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._socket, self.peer = socket.socketpair()
        self._file = log.open("wb")
        self._pending = bytearray()
        self._total = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drain, name="serial-console", daemon=True)
        self._thread.start()

    @property
    def total(self) -> int:
        """Bytes that the guest has printed."""
        return self._total

    def take(self) -> str:
        """What was printed since the last call, as it came. A sequence cut at the end stays for the next call."""
        with self._lock:
            data = bytes(self._pending)
            cut = _whole(data)
            del self._pending[:cut]
        return data[:cut].decode("utf-8", "replace")

    def send(self, data: bytes) -> None:
        """Type on the console."""
        with contextlib.suppress(OSError):
            self._socket.sendall(data)

    def close(self) -> None:
        """Stop reading, and finish the log; idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()
        self.peer.close()
        self._file.close()

    def _drain(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            room = LOG_LIMIT - self._total
            self._total += len(data)
            if room > 0:
                with contextlib.suppress(OSError):  # a full disk must not stop the guest
                    self._file.write(data[:room])
                    self._file.flush()
            with self._lock:
                self._pending += data
                del self._pending[:-LOG_LIMIT]


def _whole(data: bytes) -> int:
    # Length of the part that ends in no half escape sequence and no half UTF-8 character.
    escape = data.rfind(b"\x1b", max(0, len(data) - 32))
    if escape >= 0 and not re.match(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[^\[])", data[escape:]):
        return escape
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0xC0:
            need = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if need > back else len(data)
        if byte & 0xC0 != 0x80:
            break
    return len(data)
