"""A host over SSH: commands, processes that are talked to, root, and connections of their own for bulk data.

A ``Session`` is one host seen as one user: commands run to their end (``run``), processes that are talked to (``start``), both as
that user or as root. Lane 0 is the connection that every short command shares; other lanes are connections of their own, made on
demand, for bulk data (two fill two cores: one connection is decrypted by one thread).

Host keys are verified against OpenSSH's known_hosts files and never added. Secrets go to the SSH login and to sudo's standard
input, never to an argument list, a log or an error.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from p2v.errors import AuthenticationError, CommandError, HostError, HostKeyError, LinkLostError, PrivilegeError
from p2v.session.target import Endpoint, SshTarget, resolve

if TYPE_CHECKING:
    import paramiko

    from p2v.config import Secret

_ANSWER_SECONDS = 20.0  # opening a channel, asking for root
_OUTPUT_LIMIT = 64 << 20
_STDERR_LIMIT = 256 << 10
_SESSIONS = 6  # commands at once on one connection; OpenSSH's MaxSessions is 10, and long-lived processes count too
_CHUNK = 256 << 10  # a read that joins more pieces costs more in fresh memory than it saves
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# TERM, and KILL for what is still there a second later.
_END = """\
for s in TERM KILL; do
  n=
  for p in /proc/[0-9]*; do
    grep -qsF {token} "$p/environ" && kill -s $s "${{p#/proc/}}" && n=1
  done
  [ -n "$n" ] || break
  sleep 1
done 2>/dev/null"""


@dataclass(frozen=True, slots=True)
class _Way:
    """How a command is run as somebody: what comes before it, and what sudo reads first from standard input."""

    prefix: str
    password: bytes = field(repr=False)


_AS_USER = _Way("", b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """What a command did: ``command`` as it was asked for, its exit code (-1: ended by a signal), all output, wall seconds.

    ``stderr`` is its last 256 KiB.
    """

    command: str
    exit_code: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def text(self) -> str:
        """Standard output as text; bytes that are no UTF-8 are replaced."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def error_text(self) -> str:
        """Standard error as text, stripped."""
        return self.stderr.decode("utf-8", "replace").strip()


class RemoteProcess:
    """A running command of the host: its standard streams, and its end.

    One thread may read while another writes. Every wait is bounded by ``silence`` seconds (None: by the link alone) and then
    raises ``LinkLostError``; so does a link that is cut. A process that merely ends gives end of file.
    """

    def __init__(
        self,
        channel: paramiko.Channel,
        transport: paramiko.Transport,
        label: str,
        *,
        end: Callable[[], None],
        silence: float | None = None,
    ) -> None:
        self._channel, self._transport, self._label, self._end = channel, transport, label, end
        self._silent = False
        self._rest = memoryview(b"")
        self._stderr: deque[bytes] = deque()
        self._stderr_size = 0
        channel.settimeout(silence)
        self._collector = threading.Thread(target=self._collect_stderr, name="ssh-stderr", daemon=True)
        self._collector.start()

    def _collect_stderr(self) -> None:
        # Both streams share one window: a stream that nobody reads would stop the other.
        while True:
            try:
                piece = self._channel.recv_stderr(65536)
            except TimeoutError:
                continue
            if not piece:
                return
            self._stderr.append(piece)
            self._stderr_size += len(piece)
            while self._stderr_size - len(self._stderr[0]) >= _STDERR_LIMIT:
                self._stderr_size -= len(self._stderr.popleft())

    def write(self, data: bytes | memoryview) -> None:
        """Send all of ``data`` to standard input; ``LinkLostError`` when the link is cut, ``CommandError`` when the process is gone."""
        try:
            self._channel.sendall(bytes(data))
        except TimeoutError as error:
            raise self._lost("it takes no more data") from error
        except (OSError, EOFError) as error:
            self._raise_if_cut()
            raise CommandError(
                f"a process on {self._label} ended while data was sent to it: {self._last_words()}", subject=self._label
            ) from error

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes of standard output; empty at its end."""
        if not self._rest:
            self._rest = memoryview(self._receive())
        piece = self._rest[:size].tobytes()
        self._rest = self._rest[size:]
        return piece

    def readinto(self, buffer: memoryview) -> int:
        """Fill ``buffer`` from standard output; returns less than its length only at the end of the stream."""
        done, wanted = 0, len(buffer)
        while done < wanted:
            if not self._rest:
                self._rest = memoryview(self._receive())
                if not self._rest:
                    break
            step = min(len(self._rest), wanted - done)
            buffer[done : done + step] = self._rest[:step]
            self._rest = self._rest[step:]
            done += step
        return done

    def _receive(self) -> bytes:
        try:
            piece = self._channel.recv(_CHUNK)
        except TimeoutError as error:
            raise self._lost("it sent nothing") from error
        if not piece:
            self._raise_if_cut()
        return piece

    def close_input(self) -> None:
        """Give the process end of file on its standard input. A link that is cut has done so already."""
        with contextlib.suppress(OSError, EOFError):
            self._channel.shutdown_write()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code (-1: ended by a signal); ``TimeoutError`` after ``timeout`` seconds."""
        if not self._channel.status_event.wait(timeout):
            raise TimeoutError(f"a process on {self._label} did not end within {timeout:g} s")
        self._raise_if_cut()
        self._collector.join(1.0)
        return self._channel.exit_status

    def kill(self) -> None:
        """End the process and its children if they still run, and close its streams; harmless when it has ended.

        Where the link is cut nothing can be done from here: the process loses its streams.
        """
        running = not self._channel.closed and not self._channel.exit_status_ready()
        if running and not self._silent and self._transport.is_active():
            with contextlib.suppress(HostError):
                self._end()
        with contextlib.suppress(OSError, EOFError):
            self._channel.close()

    def stderr_tail(self) -> str:
        """The last 256 KiB of standard error so far, as text."""
        return b"".join(tuple(self._stderr)).decode("utf-8", "replace").strip()

    def stderr_bytes(self) -> bytes:
        """The last 256 KiB of standard error so far."""
        return b"".join(tuple(self._stderr))

    def settimeout(self, silence: float | None) -> None:
        """Bound every later wait for the process by ``silence`` seconds."""
        self._channel.settimeout(silence)

    def forgive(self) -> None:
        """Take silence for the command's own, not for a lost link, so that ``kill`` tries to end it."""
        self._silent = False

    def _raise_if_cut(self) -> None:
        if self._channel.exit_status_ready() and self._channel.exit_status >= 0:
            return
        # The transport closes its channels a moment before it calls itself dead.
        if self._channel.closed and not self._channel.eof_received:
            self._transport.join(1.0)
        if not self._transport.is_active():
            raise self._lost("the connection broke")

    def _lost(self, what: str) -> LinkLostError:
        self._silent = True
        return _link_lost(self._label, what)

    def _last_words(self) -> str:
        return self.stderr_tail()[-500:] or "it said nothing"


class Session:
    """One host as one user; a context manager. Safe to use from several threads.

    Leaving it closes all connections: processes that still run lose their standard streams.
    """

    def __init__(self, endpoint: Endpoint, transport: paramiko.Transport) -> None:
        self._endpoint = endpoint
        self._lanes: dict[int, paramiko.Transport] = {0: transport}
        self._lock = threading.Lock()
        self._root_lock = threading.Lock()
        self._commands = threading.BoundedSemaphore(_SESSIONS)
        self._sudo: _Way | None = None
        self._closed = False

    @classmethod
    def connect(cls, target: SshTarget) -> Session:
        """Connect, verify the host's key and log in.

        ``HostError`` when the host cannot be reached or speaks no SSH, ``HostKeyError`` when its key is not the known one,
        ``AuthenticationError`` when it takes none of our credentials.
        """
        from p2v.session.login import log_in

        _quiet()
        endpoint = resolve(target)
        return cls(endpoint, log_in(endpoint))

    @property
    def host(self) -> str:
        """The host as errors name it: ``user@host``, with the port when it is not 22."""
        return self._endpoint.label

    def run(
        self,
        command: str | Sequence[str],
        *,
        root: bool = False,
        input: bytes = b"",  # noqa: A002 - the standard library's word for it
        timeout: float = 60.0,
        check: bool = False,
        limit: int = _OUTPUT_LIMIT,
    ) -> CommandResult:
        """Run a command to its end and return what it did; a string is given to ``sh``, a sequence is quoted.

        Locale C, and the system administrator's folders on PATH. ``root``: as root (``PrivilegeError`` when that cannot be). ``check``:
        an exit code other than 0 raises ``CommandError``; so do an end later than ``timeout`` seconds and more than ``limit``
        bytes of output, always. ``LinkLostError`` when the link is cut.
        """
        asked = command if isinstance(command, str) else shlex.join(command)
        way = self._root() if root else _AS_USER
        with self._commands:
            result = self._run(asked, way, input, timeout, limit)
        if check and result.exit_code != 0:
            raise CommandError(
                f"`{asked}` ended with exit code {result.exit_code} on {self.host}: {result.error_text[-500:] or 'it said nothing'}",
                advice="Run the command on the host by hand to see what it needs.",
                subject=self.host,
            )
        return result

    def _run(self, asked: str, way: _Way, content: bytes, timeout: float, limit: int) -> CommandResult:
        started = time.monotonic()
        process = self._process(asked, way, 0, None)
        feeder = threading.Thread(target=_feed, args=(process, way.password + content), name="ssh-stdin", daemon=True)
        output = bytearray()
        try:
            feeder.start()
            while True:
                left = timeout - (time.monotonic() - started)
                process.settimeout(max(left, 0.001))
                try:
                    piece = process.read(_CHUNK)
                except LinkLostError as error:
                    if isinstance(error.__cause__, TimeoutError):
                        process.forgive()
                        raise self._too_late(asked, timeout) from error
                    raise
                if not piece:
                    break
                output += piece
                if len(output) > limit:
                    raise CommandError(f"`{asked}` wrote more than {limit} bytes on {self.host}", subject=self.host)
            try:
                exit_code = process.wait(max(timeout - (time.monotonic() - started), 1.0))
            except TimeoutError as error:
                raise self._too_late(asked, timeout) from error
            feeder.join(1.0)
        finally:
            process.kill()
        return CommandResult(
            command=asked,
            exit_code=exit_code,
            stdout=bytes(output),
            stderr=process.stderr_bytes(),
            seconds=time.monotonic() - started,
        )

    def _too_late(self, asked: str, timeout: float) -> CommandError:
        return CommandError(
            f"`{asked}` did not end within {timeout:g} s on {self.host}",
            advice="See whether the host is overloaded or a device of it hangs.",
            subject=self.host,
        )

    def start(
        self, command: str | Sequence[str], *, root: bool = False, lane: int = 0, silence: float | None = None
    ) -> RemoteProcess:
        """Start a command and return it running. ``lane`` > 0 uses a connection of its own, made on first use.

        ``silence``: seconds after which a read or write that moves no byte raises ``LinkLostError``. Use ``kill`` or ``wait`` in the end.
        """
        asked = command if isinstance(command, str) else shlex.join(command)
        way = self._root() if root else _AS_USER
        process = self._process(asked, way, lane, silence)
        if way.password:
            process.write(way.password)
        return process

    def _process(self, asked: str, way: _Way, lane: int, silence: float | None) -> RemoteProcess:
        import paramiko

        from p2v.session.login import open_channel

        transport = self._lane(lane)
        token = "P2V_RUN=" + secrets.token_hex(8)
        try:
            channel = open_channel(transport, timeout=_ANSWER_SECONDS)
            channel.exec_command((way.prefix + _shell(token, asked)).encode())
        except paramiko.ChannelException as error:
            raise HostError(
                f"{self.host} opens no more sessions on this connection: {error}",
                advice="Raise MaxSessions in the host's sshd_config (10 is its default).",
                subject=self.host,
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise _link_lost(self.host, "the connection broke") from error
        return RemoteProcess(channel, transport, self.host, end=lambda: self._end(token, way), silence=silence)

    def _end(self, token: str, way: _Way) -> None:
        """End every process that carries ``token`` in its environment: SSH itself passes no signals to root's."""
        # Not counted by the semaphore: whoever ends a command still holds its own place there.
        self._run(_END.format(token=token), way, b"", _ANSWER_SECONDS, _OUTPUT_LIMIT)

    def _lane(self, lane: int) -> paramiko.Transport:
        from p2v.session.login import log_in

        with self._lock:
            if self._closed:
                raise HostError(f"the session with {self.host} is closed", subject=self.host)
            if lane not in self._lanes:
                try:
                    self._lanes[lane] = log_in(self._endpoint)
                except (HostKeyError, AuthenticationError):
                    raise
                except HostError as error:  # the host could be reached a moment ago
                    raise _link_lost(self.host, f"no further connection can be made ({error.message})") from error
            return self._lanes[lane]

    def transport(self) -> paramiko.Transport:
        """The connection, for the other protocols of this package; it stays the session's."""
        return self._lane(0)

    def _root(self) -> _Way:
        with self._root_lock:
            if self._sudo is None:
                self._sudo = self._find_root()
            return self._sudo

    def _find_root(self) -> _Way:
        if self.run("id -u", timeout=_ANSWER_SECONDS).stdout.strip() == b"0":
            return _AS_USER
        # sudo reads a password only when it asks for one; what it leaves would reach the command. So it is settled here, once:
        # either it never asks (-n works), or it always does (-k forgets what was granted before).
        probe = self.run("sudo -n -- true", timeout=_ANSWER_SECONDS)
        if probe.exit_code == 0:
            return _Way("sudo -n -- ", b"")
        secret: Secret | None = self._endpoint.sudo_password or self._endpoint.password
        if secret is not None and probe.exit_code != 127:
            way = _Way("sudo -S -k -p '' -- ", secret.reveal().encode() + b"\n")
            probe = self._run("true", way, b"", _ANSWER_SECONDS, _OUTPUT_LIMIT)
            if probe.exit_code == 0:
                return way
        user = self._endpoint.user
        lines = probe.error_text.splitlines()
        why = "it has no sudo" if probe.exit_code == 127 else (lines[-1] if lines else "sudo refused")
        raise PrivilegeError(
            f"root is needed on {self.host}, and {user} cannot become root: {why}",
            advice=f"Log in as root, give the sudo password in P2V_SUDO_PASSWORD, or add this line to /etc/sudoers.d/p2v on the host: "
            f"{user} ALL=(ALL) NOPASSWD: ALL",
            subject=self.host,
        )

    @property
    def bytes_received(self) -> int:
        """Bytes that all connections have received, SSH's own included."""
        with self._lock:
            return sum(getattr(transport.sock, "received", 0) for transport in self._lanes.values())

    def close(self) -> None:
        """Close all connections; idempotent."""
        with self._lock:
            self._closed = True
            lanes = list(self._lanes.values())
        for transport in lanes:
            # A jump host's connection may be gone before what runs through it has said good-bye.
            with contextlib.suppress(OSError, EOFError):
                transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _quiet() -> None:
    """Keep paramiko's log, with its tracebacks, from users: what it raises is translated."""
    logger = logging.getLogger("paramiko")
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


def _shell(token: str, asked: str) -> str:
    """``asked`` for a POSIX shell, whatever the user's login shell is, marked by ``token``."""
    return f"env {token} LC_ALL=C sh -c " + shlex.quote(f"PATH=$PATH:{_PATH}; export PATH; {asked}")


def _feed(process: RemoteProcess, content: bytes) -> None:
    with contextlib.suppress(
        CommandError, LinkLostError
    ):  # a command need not read its input; a cut link shows in reading
        if content:
            process.write(content)
        process.close_input()


def _link_lost(label: str, what: str) -> LinkLostError:
    return LinkLostError(
        f"the link to {label} is lost: {what}",
        advice="See whether the host is up and the network between is stable, then run the command again.",
        subject=label,
    )
