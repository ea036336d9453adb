"""A block device of another host, to write: for a machine that is brought back to metal.

The host is one that is started from a rescue medium, say: any Linux with SSH and Python. A small script of the standard library is piped to
its Python (``p2v.remote_writer``); nothing is installed there.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
import struct
import threading
from hashlib import blake2b
from importlib import resources
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from formats.block import BlockSource, check_range, data_bytes
from formats.errors import NoSpaceError, ToolkitError, UsageError, WriteError
from formats.images.raw import Untouched
from formats.progress import Progress
from formats.transfer import copy
from p2v import remote_writer as wire
from p2v.collect.blockdev import RemoteDisk
from p2v.errors import CommandError, DiskVanishedError, PrivilegeError, PythonMissingError
from p2v.session import RemoteProcess, Session
from p2v.session.interpreter import NO_PYTHON, python_command

_SILENCE = 120.0  # seconds that a device may take for one step before the link counts as lost
_NOISE = 64 << 10  # bytes that a login script may print before the writer speaks
_TEXT = 4096  # bytes of an error's text


def parse_device(text: str) -> tuple[str, str]:
    """What ``ssh://USER@HOST:PORT/dev/X`` names: the host, as ``SshTarget.parse`` takes it, and the path.

    ``UsageError`` for anything else.
    """
    parts = urlsplit(text)
    plain = text.isprintable() and parts.path.startswith("/dev/") and ".." not in parts.path.split("/")
    if parts.scheme != "ssh" or not parts.hostname or not plain or parts.query or parts.fragment or parts.password:
        raise UsageError(
            "a device of another host is named ssh://USER@HOST:PORT/dev/NAME",
            advice="Passwords come from P2V_SSH_PASSWORD; `lsblk` on the host lists its devices.",
        )
    return f"ssh://{parts.netloc}", parts.path


class DeviceSink:
    """A ``BlockSink`` over a block device of a host; a context manager. Writes are sent without waiting for an answer.

    What goes wrong there is raised by a later call, at the latest by ``flush``, which returns when everything is on stable storage. The
    device may be larger than ``size``; what lies behind is left alone, and what nobody wrote is zeroed by ``flush`` (K4). Safe from several
    threads. A device in use (mounted, or held by LVM or md) is refused. The session stays the caller's.
    """

    random_access = True

    def __init__(self, process: RemoteProcess, label: str, size: int) -> None:
        check_range(size, 0, size)
        self._process, self._label, self._size = process, label, size
        self._untouched = Untouched(size)
        self._sending = threading.Lock()
        self._flushed = threading.Semaphore(0)
        self._error: ToolkitError | None = None
        self._closed = False
        self._reader = threading.Thread(target=self._listen, name="device-replies", daemon=True)

    @classmethod
    def open(cls, session: Session, path: str, size: int) -> DeviceSink:
        """Open the device ``path`` of the session's host for a disk of ``size`` bytes.

        ``NoSpaceError`` when it is smaller, ``DiskVanishedError`` when there is none, ``WriteError`` when it is in use or no block device,
        ``PrivilegeError`` without root, ``PythonMissingError`` without Python.
        """
        script = resources.files("p2v").joinpath("remote_writer.py").read_bytes()
        label = f"{session.host}:{path}"
        process = session.start(python_command(len(script), shlex.quote(path)), root=True, lane=1, silence=_SILENCE)
        sink = cls(process, label, size)
        try:
            process.write(script)
            sink._greet()
        except BaseException:
            process.kill()
            raise
        sink._reader.start()
        return sink

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def write(self, data: memoryview, offset: int) -> None:
        """Send ``data``."""
        self._check(offset, len(data))
        self._untouched.touch(offset, len(data), self._clear)
        for start in range(0, len(data), wire.MOST):
            piece = data[start : start + wire.MOST]
            self._send(wire.WRITE, offset + start, len(piece), piece)

    def zero(self, start: int, length: int) -> None:
        """Let the host's kernel zero the range."""
        self._check(start, length)
        self._untouched.touch(start, length, self._clear)
        self._clear(start, length)

    def _clear(self, start: int, length: int) -> None:
        for position in range(start, start + length, wire.STEP):
            self._send(wire.ZERO, position, min(wire.STEP, start + length - position))

    def flush(self) -> None:
        """Return when all is on stable storage; what nobody wrote is zeroed first, once."""
        self._check(0, 0)
        self._untouched.finish(self._clear)
        self._send(wire.FLUSH, 0, 0)
        self._flushed.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let the writer leave."""
        if not self._closed:
            self._closed = True
            self._process.close_input()
            with contextlib.suppress(TimeoutError, ToolkitError):
                self._process.wait(5.0)
            self._process.kill()
            self._reader.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self._size, start, length)
        if self._error is not None:
            raise self._error

    def _send(self, op: int, offset: int, length: int, data: bytes | memoryview = b"") -> None:
        try:
            with self._sending:
                self._process.write(wire.REQUEST.pack(op, offset, length))
                if data:
                    self._process.write(data)
        except CommandError:
            self._reader.join(5.0)  # it may have said why it ended
            raise self._error or self._ended() from None

    def _greet(self) -> None:
        seen = bytearray()
        while not seen.endswith(wire.MAGIC):
            piece = self._process.read(1)
            seen += piece
            if not piece and self._process.wait(30.0) == NO_PYTHON:
                raise PythonMissingError(
                    f"{self._label}: the host has no python3, which is needed to write devices there",
                    advice="Install python3 there, or start the host from a rescue medium that has it.",
                    subject=self._label,
                )
            if not piece or len(seen) > _NOISE:
                raise self._ended()
        held = struct.unpack(">Q", self._reply(8))[0]
        if held < self._size:
            raise NoSpaceError(
                f"{self._label} holds {held} bytes, the disk has {self._size}",
                advice="Choose a device that is at least as large as the disk.",
                subject=self._label,
            )

    def _reply(self, length: int) -> bytes:
        """The text of an OK of ``length`` bytes; raises what an ERROR says."""
        status, size = wire.REPLY.unpack(self._exactly(wire.REPLY.size))
        if size > _TEXT or (status == wire.OK and size != length) or (status != wire.OK and size < 4):
            raise self._ended()
        text = self._exactly(size)
        if status != wire.OK:
            raise _translated(struct.unpack(">I", text[:4])[0], text[4:].decode("utf-8", "replace"), self._label)
        return text

    def _exactly(self, size: int) -> bytes:
        buffer = bytearray(size)
        if self._process.readinto(memoryview(buffer)) < size:
            raise self._ended()
        return bytes(buffer)

    def _listen(self) -> None:
        try:
            while True:
                self._reply(0)
                self._flushed.release()
        except ToolkitError as error:
            self._error = error
        self._flushed.release()

    def _ended(self) -> CommandError:
        return CommandError(
            f"the writer on {self._label} ended: {self._process.stderr_tail()[-500:] or 'it said nothing'}",
            advice="See whether something there kills processes (out of memory?), then run the command again.",
            subject=self._label,
        )


def verify(source: BlockSource, disk: RemoteDisk, progress: Progress) -> int:
    """Read back what ``source`` holds, by digests made on the host, and return the bytes compared.

    ``WriteError`` names the first difference that is found.
    """
    return copy(source, _Proof(disk), progress=progress, total=data_bytes(source)).written


class _Proof:
    """A sink that compares what it is given with what is there."""

    random_access = True

    def __init__(self, disk: RemoteDisk) -> None:
        self._disk = disk
        self.size = disk.size

    def write(self, data: memoryview, offset: int) -> None:
        """Compare."""
        theirs = self._disk.digest(offset, len(data))
        if theirs is None:  # a Python without BLAKE2b
            there = memoryview(bytearray(len(data)))
            self._disk.readinto(there, offset)
            same = there == data
        else:
            same = theirs == blake2b(data, digest_size=32).digest()
        if not same:
            raise WriteError(
                f"{self._disk.path} reads back differently within {len(data)} bytes at {offset}",
                advice="The device or its cable may be failing: see `dmesg` and `smartctl -a` on the host.",
                subject=self._disk.path,
            )

    def zero(self, start: int, length: int) -> None:
        """Nothing: a blank sink is never asked to."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """The disk is closed by its owner."""


def _translated(number: int, text: str, label: str) -> ToolkitError:
    message = f"{label} cannot be written: {text}"
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return DiskVanishedError(message, advice="`lsblk` on the host lists its devices.", subject=label)
    if number in (errno.EACCES, errno.EPERM):
        return PrivilegeError(message, advice="Log in as root, or allow sudo.", subject=label)
    if number == errno.ENOSPC:
        return NoSpaceError(message, advice="Choose a larger device.", subject=label)
    advice = {
        errno.EBUSY: "The device is in use there (mounted, or part of LVM or RAID): release it first.",
        errno.ENOTBLK: "Name a block device of the host, as /dev/sda.",
    }.get(number, "The disk may be failing: see `dmesg` and `smartctl -a` on the host.")
    return WriteError(message, advice=advice, subject=label)
