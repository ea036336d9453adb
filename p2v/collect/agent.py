"""The disk agent: a script piped to the source's own Python, and this side of its protocol.

Nothing is installed or written on the source; the agent leaves when its standard input closes or stays silent. Each channel is an agent
process on an SSH connection of its own. Many requests are in flight on each; zero pages stay on the source; data is compressed there
while the link is slower than compressing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from types import TracebackType
from typing import Any, Literal, Self

from formats.errors import Notice, ReadError, ToolkitError
from p2v.collect import remote_agent as wire
from p2v.collect.blockdev import RemoteDisk, buffered_read
from p2v.errors import CommandError, DiskVanishedError, HostError, LinkLostError, PrivilegeError, PythonMissingError
from p2v.session import RemoteProcess, Session
from p2v.session.interpreter import NO_PYTHON, python_command

_SLOTS = 64  # requests in flight on one channel; the other side takes MAX_QUEUE
_MAX_REPLY = wire.MAX_READ + 4 + 8 * (wire.MAX_READ // wire.PAGE + 1)
_NOISE = 64 << 10  # bytes that a login script may print before the agent speaks
_LEAVE_SECONDS = 5.0


class Request:
    """One question to the agent, and its answer once ``wait`` returns."""

    __slots__ = ("_done", "buffer", "error", "flags", "label", "payload")

    def __init__(self, label: str, buffer: memoryview | None = None) -> None:
        self.label = label
        self.buffer = buffer  # a READ fills it; None for all others
        self.payload = b""
        self.flags = 0
        self.error: BaseException | None = None
        self._done = threading.Event()

    def finish(self, error: BaseException | None = None) -> None:
        """The answer is there, or will never come."""
        self.error = error
        self._done.set()

    def wait(self) -> None:
        """Return when the answer is there; raises what went wrong. It ends: a silent channel fails all its requests."""
        self._done.wait()
        if self.error is not None:
            raise self.error


class Channel:
    """One agent process and the thread that reads its answers."""

    def __init__(self, process: RemoteProcess, host: str) -> None:
        self.process, self.host = process, host
        self.bytes_received = 0
        self.compressed_replies = 0
        self.outstanding = 0  # bytes asked for and not answered
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._slots = threading.Semaphore(_SLOTS)
        self._pending: dict[int, Request] = {}
        self._failure: BaseException | None = None
        self._closing = False
        self._reader: threading.Thread | None = None

    def greet(self) -> dict[str, Any]:
        """Wait for the agent's greeting; ``PythonMissingError`` when the host has no Python that will do."""
        seen = bytearray()
        while not seen.endswith(wire.MAGIC):
            piece = self.process.read(1)
            seen += piece
            if not piece:
                self._never_started()
            if len(seen) > _NOISE:
                raise HostError(
                    f"the login scripts of {self.host} print without end",
                    advice="Make them silent for non-interactive logins.",
                    subject=self.host,
                )
        _, _, _, size = self._header()
        facts = json.loads(self._exactly(size))
        if not isinstance(facts, dict):
            raise self._nonsense("its greeting")
        self._reader = threading.Thread(target=self._read, name="agent-reader", daemon=True)
        self._reader.start()
        return facts

    def _never_started(self) -> None:
        if self.process.wait(30.0) == NO_PYTHON:
            raise PythonMissingError(
                f"{self.host} has no python3",
                advice="Install python3 there for a faster copy; dd is used without it.",
                subject=self.host,
            )
        raise CommandError(
            f"the disk agent did not start on {self.host}: {self.process.stderr_tail()[-500:] or 'it said nothing'}",
            advice="Run `python3 -V` on the host to see whether its Python works.",
            subject=self.host,
        )

    def send(
        self, request: Request, op: int, device: int, *, offset: int = 0, length: int = 0, extra: bytes = b""
    ) -> None:
        """Ask; waits while too many requests are in flight."""
        self._slots.acquire()
        with self._lock:
            if self._failure is not None:
                self._slots.release()
                raise self._failure
            number = next(self._numbers) & 0xFFFFFFFF
            self._pending[number] = request
            self.outstanding += len(request.buffer) if request.buffer is not None else 0
        frame = wire.REQUEST.pack(op, number, device, offset, length, len(extra)) + extra
        try:
            with self._write_lock:
                self.process.write(frame)
        except ToolkitError as error:
            self._fail(error)
            raise

    def ping(self) -> None:
        """Say that we live and ask for the same."""
        with self._lock:
            if self._failure is not None or self._closing:
                return
            number = next(self._numbers) & 0xFFFFFFFF
        try:
            with self._write_lock:
                self.process.write(wire.REQUEST.pack(wire.PING, number, 0, 0, 0, 0))
        except ToolkitError as error:
            self._fail(error)

    def _read(self) -> None:
        try:
            while True:
                self._reply(*self._header())
        except BaseException as error:
            self._fail(error)

    def _header(self) -> tuple[int, int, int, int]:
        status, flags, number, size = wire.REPLY.unpack(self._exactly(wire.REPLY.size))
        if size > _MAX_REPLY:
            raise self._nonsense(f"a reply of {size} bytes")
        return status, flags, number, size

    def _reply(self, status: int, flags: int, number: int, size: int) -> None:
        with self._lock:
            request = self._pending.get(number)
        if request is None:  # the answer to a ping
            if size:
                raise self._nonsense("an answer that nobody asked for")
            return
        error: BaseException | None = None
        request.flags = flags
        if status != wire.OK:
            error = _failure(status, self._exactly(size), request.label)
        elif request.buffer is not None:
            self._data(request.buffer, flags, size)
        else:
            request.payload = self._exactly(size)
        with self._lock:
            mine = self._pending.pop(number, None) is not None  # else a failing sender has settled it meanwhile
            self.outstanding -= len(request.buffer) if request.buffer is not None else 0
        if mine:
            self._slots.release()
            request.finish(error)

    def _data(self, buffer: memoryview, flags: int, size: int) -> None:
        """Receive runs straight into the asker's buffer, checking each against it, and zero what lies between."""
        (count,) = struct.unpack(">I", self._exactly(4))
        if 4 + 8 * count > size or count > len(buffer) // wire.PAGE + 2:
            raise self._nonsense(f"{count} runs of data")
        runs = list(struct.iter_unpack(">II", self._exactly(8 * count)))
        rest = size - 4 - 8 * count
        total = sum(length for _, length in runs)
        content = memoryview(b"")
        if flags & wire.COMPRESSED:
            self.compressed_replies += 1
            content = memoryview(self._unpacked(self._exactly(rest), total))
        elif total != rest:
            raise self._nonsense("runs that do not add up")
        position = taken = 0
        for start, length in runs:
            if start < position or start + length > len(buffer):
                raise self._nonsense("runs outside the request")
            _zero(buffer, position, start)
            position = start + length
            if flags & wire.COMPRESSED:
                buffer[start:position] = content[taken : taken + length]
                taken += length
            else:
                self._fill(buffer[start:position])
        _zero(buffer, position, len(buffer))

    def _unpacked(self, packed: bytes, total: int) -> bytes:
        engine = zlib.decompressobj()
        try:
            content = engine.decompress(packed, total + 1)
        except zlib.error as error:
            raise self._nonsense("damaged compressed data") from error
        if len(content) != total or not engine.eof:
            raise self._nonsense("compressed data of another size")
        return content

    def _exactly(self, size: int) -> bytes:
        piece = bytearray(size)
        self._fill(memoryview(piece))
        return bytes(piece)

    def _fill(self, buffer: memoryview) -> None:
        got = self.process.readinto(buffer)
        self.bytes_received += got
        if got < len(buffer):
            raise CommandError(
                f"the disk agent on {self.host} ended: {self.process.stderr_tail()[-500:] or 'it said nothing'}",
                advice="See whether something there kills processes (out of memory?), then run the command again.",
                subject=self.host,
            )

    def _nonsense(self, what: str) -> HostError:
        return HostError(
            f"the disk agent on {self.host} answers nonsense: {what}", advice="Report this as a bug.", subject=self.host
        )

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = error
            pending, self._pending = list(self._pending.values()), {}
        for request in pending:
            self._slots.release()
            request.finish(self._failure)

    def close(self) -> None:
        """Let the agent leave; requests in flight fail. One that cannot hear us leaves by itself."""
        with self._lock:
            self._closing = True
        self._fail(ValueError("the agent is closed"))
        self.process.close_input()
        if not isinstance(self._failure, LinkLostError):
            with contextlib.suppress(TimeoutError, ToolkitError):
                self.process.wait(_LEAVE_SECONDS)
        self.process.kill()
        if self._reader is not None:
            self._reader.join(5.0)


class Agent:
    """The agents of one host; a context manager. Thread-safe.

    ``report`` is told what a result must tell, as devices that refuse O_DIRECT.
    """

    def __init__(
        self,
        session: Session,
        channels: Sequence[Channel],
        facts: dict[str, Any],
        silence: float,
        report: Callable[[Notice], None],
    ) -> None:
        self.host = session.host
        self.facts = facts
        self.report = report
        self._channels = channels
        self._devices = itertools.count(1)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pinger = threading.Thread(target=self._ping, args=(silence / 4,), name="agent-ping", daemon=True)
        self._pinger.start()

    @classmethod
    def start(
        cls,
        session: Session,
        *,
        root: bool = True,
        channels: int = 2,
        workers: int = 3,
        compress: Literal["auto", "always", "off"] = "auto",
        silence: float = 60.0,
        report: Callable[[Notice], None] = lambda _: None,
    ) -> Agent:
        """Start the agent on ``channels`` connections of the session, with ``workers`` threads each.

        ``PythonMissingError`` when the host has no Python >= 3.4 (then ``DdDisk`` is the way), ``PrivilegeError`` when root cannot be had.
        After ``silence`` seconds without a sign of life either side gives up: here with ``LinkLostError``.
        """
        script = _script()
        command = python_command(len(script), f"{silence:g} {workers} {compress}", gentle=True)
        started: list[Channel] = []
        facts: dict[str, Any] = {}
        try:
            for number in range(channels):
                process = session.start(command, root=root, lane=number + 1, silence=silence)
                started.append(Channel(process, session.host))
                process.write(script)
            for channel in started:  # they start side by side
                facts = channel.greet()
        except BaseException:
            for channel in started:
                channel.close()
            raise
        return cls(session, started, facts, silence, report)

    def _ping(self, interval: float) -> None:
        while not self._stopped.wait(interval):
            for channel in self._channels:
                channel.ping()

    def disk(self, path: str, *, direct: bool = True) -> RemoteDisk:
        """Open a block device or file of the host, read-only; a device with O_DIRECT unless it refuses (a notice).

        ``DiskVanishedError`` when there is none, ``PrivilegeError`` when it may not be read, ``ReadError`` for any other reason.
        """
        number = next(self._devices)
        requests = []
        for channel in self._channels:
            request = Request(f"{self.host}:{path}")
            channel.send(request, wire.OPEN, number, offset=int(direct), extra=path.encode("utf-8", "surrogateescape"))
            requests.append(request)
        for request in requests:
            request.wait()
        facts = [json.loads(request.payload) for request in requests]
        size = facts[0].get("size")
        if not isinstance(size, int) or not 0 <= size < 1 << 63 or any(other.get("size") != size for other in facts):
            raise DiskVanishedError(f"{self.host}:{path} has no steady size", subject=path)
        disk = RemoteDisk(self, number, path, facts[0])
        if direct and disk.is_block and not disk.direct:
            self.report(buffered_read(path, self.host))
        return disk

    def ask(
        self,
        label: str,
        op: int,
        device: int,
        offset: int,
        length: int,
        *,
        buffer: memoryview | None = None,
        extra: bytes = b"",
    ) -> Request:
        """Send one request on the channel with the least to do."""
        request = Request(label, buffer)
        channel = min(self._channels, key=lambda channel: channel.outstanding)
        channel.send(request, op, device, offset=offset, length=length, extra=extra)
        return request

    def tell_all(self, op: int, device: int) -> None:
        """Send a request on all channels and wait; a channel that is gone needs none."""
        for channel in self._channels:
            try:
                request = Request(self.host)
                channel.send(request, op, device)
                request.wait()
            except (ToolkitError, ValueError):
                continue

    @property
    def bytes_on_wire(self) -> int:
        """Bytes that the agents have sent, before SSH's own."""
        return sum(channel.bytes_received for channel in self._channels)

    @property
    def compressed_replies(self) -> int:
        """Number of answers that came compressed."""
        return sum(channel.compressed_replies for channel in self._channels)

    def close(self) -> None:
        """Let the agents leave; idempotent."""
        self._stopped.set()
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _script() -> bytes:
    """The text of the agent."""
    return resources.files("p2v.collect").joinpath("remote_agent.py").read_bytes()


def _zero(buffer: memoryview, start: int, end: int) -> None:
    if start < end:
        buffer[start:end] = bytes(end - start)


def _failure(status: int, payload: bytes, label: str) -> ToolkitError:
    """The error that the agent reports; the text is the host's own."""
    if status == wire.VANISHED or len(payload) < 12:
        return DiskVanishedError(
            f"{label} vanished or changed its size while it was read: {payload.decode('utf-8', 'replace')[:300]}",
            advice="See the kernel log of the host (`dmesg`), then run the command again.",
            subject=label,
        )
    number, offset = struct.unpack(">IQ", payload[:12])
    return disk_error(number, f"{label}: {payload[12:].decode('utf-8', 'replace')[:300]}", offset, label)


_DISK_ERRORS: dict[int, Callable[[str, str], ToolkitError]] = {
    2: lambda text, label: DiskVanishedError(text, advice="`p2v inspect` lists the disks of a host.", subject=label),
    13: lambda text, label: PrivilegeError(
        text, advice="Reading disks needs root; log in as root or allow sudo.", subject=label
    ),
}


def disk_error(number: int, text: str, offset: int, label: str) -> ToolkitError:
    """The error of the tree for an errno of Linux that opening or reading a disk ended with."""
    made = _DISK_ERRORS.get(number)
    if made is not None:
        return made(text, label)
    return ReadError(
        f"{text} (at byte {offset})",
        advice="The disk may be failing: see `dmesg` and `smartctl -a` on the host.",
        subject=label,
    )


__all__ = ["Agent", "LinkLostError", "Request", "disk_error"]
