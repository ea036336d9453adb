"""Questions to a machine that has come up: does what it is there for work?

A probe is asked again until it is answered well or its time is over. A wrong answer fails the verdict, no answer leaves it unproven:
nothing was seen that says either. All network probes go through forwards from 127.0.0.1; the machine reaches nothing.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from p2v.config import Secret
from p2v.emulator import guarded
from p2v.emulator.console import plain
from p2v.errors import EmulatorError
from p2v.target.verdict import Finding, Result, Severity, Signal

PROBE_SECONDS = 120.0
"""How long a probe may take when nothing else is said."""

_TEXT = 200  # characters of an answer that are shown
_BODY = 1 << 20  # bytes of an answer that are looked at
_PAUSE = 1.0  # seconds between two attempts
_ATTEMPT = 20.0  # seconds that one attempt may take


class State(Enum):
    """What an attempt came to."""

    GOOD = "good"
    WRONG = "wrong"  # it answered, not as it should
    SILENT = "silent"  # no answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outcome of one attempt. ``final``: asking again would not change it."""

    state: State
    detail: str
    final: bool = False


class Guest(Protocol):
    """What probes may do with a running machine."""

    def port(self, guest_port: int) -> int:
        """The port on 127.0.0.1 that leads to the machine's; ``EmulatorError`` where there is none."""
        ...

    def connected(self, guest_port: int) -> bool:
        """Whether a connection there was taken by the machine itself."""
        ...

    def type(self, text: str) -> None:
        """Type on the serial console."""
        ...

    def printed(self) -> str:
        """The latest output of the serial console, at most 64 KiB."""
        ...

    @property
    def agent(self) -> socket.socket | None:
        """Our end of the guest agent's channel."""
        ...


class Probe(Protocol):
    """One question. ``ports`` are TCP ports of the machine that it needs, ``timeout`` is in seconds."""

    @property
    def name(self) -> str:
        """What it is called in the verdict."""
        ...

    @property
    def timeout(self) -> float:
        """Seconds until it must have been answered well."""
        ...

    @property
    def ports(self) -> tuple[int, ...]:
        """TCP ports of the machine that have to be forwarded."""
        ...

    @property
    def kind(self) -> str:
        """``tcp``, ``http``, ``ssh``, ``marker``, ``serial``, ``agent`` or ``script``."""
        ...

    def attempt(self, guest: Guest, seconds: float) -> Answer:
        """Ask once, in at most this time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpProbe:
    """A server takes connections on ``port``; with ``expect`` (a regular expression) its first words match."""

    name: str
    port: int
    expect: str = ""
    timeout: float = PROBE_SECONDS
    kind: str = "tcp"

    @property
    def ports(self) -> tuple[int, ...]:
        """Its own."""
        return (self.port,)

    def attempt(self, guest: Guest, seconds: float) -> Answer:
        """Connect; without ``expect`` it is the emulated network that knows whether the machine took the connection."""
        with contextlib.closing(_connect(guest, self.port, seconds)) as link:
            deadline = time.monotonic() + seconds
            link.settimeout(0.5)
            said = b""
            while time.monotonic() < deadline:
                try:
                    piece = link.recv(4096)
                except TimeoutError:
                    piece = None
                if piece == b"":
                    return (
                        _wrong_text(said) if said else Answer(state=State.SILENT, detail="the connection was refused")
                    )
                said += piece or b""
                if self.expect and re.search(self.expect, said.decode("utf-8", "replace")):
                    return Answer(state=State.GOOD, detail=_shown(said))
                if not self.expect and (said or guest.connected(self.port)):
                    return Answer(state=State.GOOD, detail=_shown(said) or f"port {self.port} takes connections")
                if len(said) > _BODY:
                    break
        return _wrong_text(said) if said else Answer(state=State.SILENT, detail=f"nothing was said on port {self.port}")


def _wrong_text(said: bytes) -> Answer:
    return Answer(state=State.WRONG, detail=f"it says {_shown(said)!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpProbe:
    """A GET of ``path`` is answered with one of ``status`` and, with ``contains``, that text in the first MiB.

    ``tls``: HTTPS; the certificate is not verified, as it is for another address. ``host``: the Host header.
    """

    name: str
    port: int = 80
    path: str = "/"
    host: str = "localhost"
    status: tuple[int, ...] = (200,)
    contains: str = ""
    tls: bool = False
    timeout: float = PROBE_SECONDS
    kind: str = "http"

    @property
    def ports(self) -> tuple[int, ...]:
        """Its own."""
        return (self.port,)

    def attempt(self, guest: Guest, seconds: float) -> Answer:
        """One request; redirects are answers, they are not followed."""
        port = guest.port(self.port)
        if self.tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            link: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", port, timeout=seconds, context=context
            )
        else:
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
        with contextlib.closing(link):
            try:
                link.request("GET", self.path, headers={"Host": self.host, "Connection": "close"})
                answer = link.getresponse()
                body = answer.read(_BODY)
            except (http.client.RemoteDisconnected, http.client.IncompleteRead, OSError) as error:
                return Answer(state=State.SILENT, detail=f"no answer: {_short(error)}")
            except http.client.HTTPException as error:
                return Answer(state=State.WRONG, detail=f"it does not speak HTTP: {_short(error)}")
        if answer.status not in self.status:
            return Answer(state=State.WRONG, detail=f"status {answer.status} instead of {_numbers(self.status)}")
        if self.contains and self.contains.encode() not in body:
            return Answer(
                state=State.WRONG, detail=f"status {answer.status}, but the text {self.contains!r} is not there"
            )
        return Answer(state=State.GOOD, detail=f"status {answer.status}, {len(body)} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class SshProbe:
    """``command`` ends with exit code 0 and, with ``expect`` (a regular expression), prints that.

    The login is by the key ``identity`` alone: no password is ever sent to a machine that a drill has started, and its host key, which
    has come out of the backup, is not asked about.
    """

    name: str
    command: str
    user: str
    identity: Path
    port: int = 22
    expect: str = ""
    timeout: float = PROBE_SECONDS
    kind: str = "ssh"

    @property
    def ports(self) -> tuple[int, ...]:
        """SSH's."""
        return (self.port,)

    def attempt(self, guest: Guest, seconds: float) -> Answer:
        """Run the command once."""
        code, out = self.run(guest, self.command, seconds)
        if code is None:
            return Answer(state=State.SILENT, detail=out)
        if code:
            return Answer(state=State.WRONG, detail=f"exit code {code}: {_shown(out.encode())}")
        if self.expect and not re.search(self.expect, out):
            return Answer(state=State.WRONG, detail=f"it prints {_shown(out.encode())!r}")
        return Answer(state=State.GOOD, detail=_shown(out.encode()) or "exit code 0")

    def run(self, guest: Guest, command: str, seconds: float) -> tuple[int | None, str]:
        """Exit code and output; None and the reason when there was no login."""
        options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "IdentitiesOnly=yes"]
        options += ["GlobalKnownHostsFile=/dev/null", "LogLevel=ERROR", f"ConnectTimeout={max(1, int(seconds))}"]
        argv = ["ssh", "-F", "none", "-T", "-i", str(self.identity), "-p", str(guest.port(self.port)), "-l", self.user]
        argv += [word for option in options for word in ("-o", option)]
        code, out = _output([*argv, "127.0.0.1", command], seconds)
        # ssh(1): 255 when an error of its own occurred.
        if code in (None, 255):
            return None, f"no login: {_shown(out)}" if out else "no login and no end in time"
        return code, out.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkerProbe:
    """The file ``path`` has this SHA-256; it is asked for over SSH."""

    name: str
    path: str
    sha256: str
    user: str
    identity: Path
    port: int = 22
    timeout: float = PROBE_SECONDS
    kind: str = "marker"

    @property
    def ports(self) -> tuple[int, ...]:
        """SSH's."""
        return (self.port,)

    def attempt(self, guest: Guest, seconds: float) -> Answer:
        """Hash the file there."""
        way = SshProbe(name=self.name, command="", user=self.user, identity=self.identity, port=self.port)
        code, out = way.run(guest, f"sha256sum -- {shlex.quote(self.path)}", seconds)
        if code is None:
            return Answer(state=State.SILENT, detail=out)
        found = re.match(r"\\?([0-9a-f]{64})\b", out)
        if code or found is None:
            return Answer(state=State.WRONG, detail=f"{self.path}: {_shown(out.encode())}")
        if found[1] != self.sha256.lower():
            return Answer(state=State.WRONG, detail=f"{self.path} has SHA-256 {found[1]}", final=True)
        return Answer(state=State.GOOD, detail=f"{self.path} is as it was marked")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptProbe:
    """A program of the administrator's own, here on this computer, ends with exit code 0.

    Its environment has ``P2V_DRILL_PORT_N`` for each of ``ports``: the port on 127.0.0.1 that leads to the machine's port N.
    """

    name: str
    command: tuple[str, ...]
    ports: tuple[int, ...] = ()
    timeout: float = PROBE_SECONDS
    kind: str = "script"

    def attempt(self, guest: Guest, seconds: float) -> Answer:  # noqa: ARG002 - a script has all the probe's time
        """Run it once, with all the time of the probe."""
        environment = {f"P2V_DRILL_PORT_{port}": str(guest.port(port)) for port in self.ports}
        code, out = _output(self.command, self.timeout, environment)
        if code is None:
            return Answer(state=State.SILENT, detail=f"it did not end: {_shown(out)}", final=True)
        if code:
            return Answer(state=State.WRONG, detail=f"exit code {code}: {_shown(out)}")
        return Answer(state=State.GOOD, detail=_shown(out) or "exit code 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentProbe:
    """QEMU's guest agent answers (guest-sync-delimited, guest-info of its reference manual)."""

    name: str = "guest agent"
    timeout: float = PROBE_SECONDS
    ports: tuple[int, ...] = ()
    kind: str = "agent"

    def attempt(self, guest: Guest, seconds: float) -> Answer:
        """Synchronise, then ask for its version."""
        channel = guest.agent
        if channel is None:
            return Answer(state=State.SILENT, detail="the machine has no channel for it", final=True)
        channel.settimeout(seconds)
        number = secrets.randbelow(1 << 31)
        try:
            sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
            channel.sendall(b"\xff" + json.dumps(sync).encode() + b"\n")
            while _line(channel).get("return") != number:
                pass
            channel.sendall(b'{"execute":"guest-info"}\n')
            facts = _line(channel).get("return")
        except (OSError, ValueError) as error:
            return Answer(state=State.SILENT, detail=f"no answer: {_short(error)}")
        version = facts.get("version") if isinstance(facts, dict) else None
        if not isinstance(version, str):
            return Answer(state=State.WRONG, detail="it does not tell its version")
        return Answer(state=State.GOOD, detail=f"version {_shown(version.encode())}")


def _line(channel: socket.socket) -> dict[str, object]:
    data = bytearray()
    while not data.endswith(b"\n"):
        piece = channel.recv(1)
        if not piece or len(data) > 65536:
            raise ValueError("the channel was closed" if not piece else "an answer without end")
        data += piece
    answer = json.loads(data.rpartition(b"\xff")[2])
    return answer if isinstance(answer, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialProbe:
    """``command`` ends with exit code 0 in a login on the serial console, where ``user`` has a shell of Bourne's kind."""

    name: str
    command: str
    user: str
    password: Secret | None = None
    expect: str = ""
    timeout: float = PROBE_SECONDS
    ports: tuple[int, ...] = ()
    kind: str = "serial"

    def attempt(self, guest: Guest, seconds: float) -> Answer:
        """Log in, run the command between two marks, log out."""
        deadline = time.monotonic() + seconds
        guest.type("\n")
        if not _await(guest, r"login: ?$", deadline):
            return Answer(state=State.SILENT, detail="no login prompt came on the serial console")
        guest.type(f"{self.user}\n")
        if self.password is not None:
            if not _await(guest, r"(?i)password: ?$", deadline):
                return Answer(state=State.SILENT, detail="no password was asked for")
            guest.type(f"{self.password.reveal()}\n")
        if not _await(guest, r"[$#%>] ?$", deadline):
            return Answer(state=State.WRONG, detail="the login was refused, or no prompt of a shell came")
        # The command travels encoded: no quoting, and its echo holds no mark. base64(1) is part of coreutils and busybox.
        mark = secrets.token_hex(8)
        script = f'echo "{mark}<"; ( {self.command}\n); echo "{mark}>$?"'
        encoded = base64.b64encode(script.encode()).decode()
        guest.type(f"echo {encoded} | base64 -d | sh; exit\n")
        found = _await(guest, rf"(?s){mark}<\s*(.*?)\s*{mark}>(\d+)", deadline)
        if not found:
            return Answer(state=State.SILENT, detail="the command did not end")
        out, code = found[1], int(found[2])
        if code:
            return Answer(state=State.WRONG, detail=f"exit code {code}: {_shown(out.encode())}")
        if self.expect and not re.search(self.expect, out):
            return Answer(state=State.WRONG, detail=f"it prints {_shown(out.encode())!r}")
        return Answer(state=State.GOOD, detail=_shown(out.encode()) or "exit code 0")


def _await(guest: Guest, pattern: str, deadline: float) -> re.Match[str] | None:
    while time.monotonic() < deadline:
        if found := re.search(pattern, plain(guest.printed()).rstrip("\n")):
            return found
        time.sleep(0.2)
    return None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How one probe came out, and when; seconds since the machine's start."""

    probe: Probe
    answer: Answer
    seconds: float

    def signal(self) -> Signal | None:
        """What a good answer is in the verdict."""
        if self.answer.state is not State.GOOD:
            return None
        stream = {"serial": "serial", "agent": "agent"}.get(self.probe.kind, "network")
        text = f"{self.probe.name}: {self.answer.detail}"
        return Signal(code=f"probe-{self.probe.kind}", stream=stream, seconds=self.seconds, text=text)

    def finding(self) -> Finding | None:
        """What another answer is in the verdict."""
        if self.answer.state is State.GOOD:
            return None
        wrong = self.answer.state is State.WRONG
        return Finding(
            code="probe-failed" if wrong else "probe-unanswered",
            severity=Severity.ERROR,
            message=f"the probe {self.probe.name} ({self.probe.kind}) {'failed' if wrong else 'was not answered'}",
            fix="see whether the service starts by itself, and whether it waits for others that a drill cuts off; or give it more time",
            evidence=self.answer.detail[:_TEXT],
        )

    @property
    def result(self) -> Result:
        """What it means for the verdict."""
        return {State.GOOD: Result.PASS, State.WRONG: Result.FAIL, State.SILENT: Result.UNPROVEN}[self.answer.state]


@dataclass(slots=True)
class Probing:
    """Asks probes, one after the other, in a thread of its own; all are asked even when one fails."""

    probes: Sequence[Probe]
    guest: Guest
    clock: Callable[[], float]  # seconds since the machine's start
    outcomes: list[Outcome] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; harmless when it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="probes", daemon=True)
            self._thread.start()

    @property
    def done(self) -> bool:
        """Whether every probe has its outcome."""
        return len(self.outcomes) == len(self.probes)

    def stop(self) -> None:
        """Ask no further probe; those that were not asked are unanswered."""
        self._over.set()
        silent = Answer(state=State.SILENT, detail="the time was over before it was asked")
        for probe in self.probes[len(self.outcomes) :]:
            self.outcomes.append(Outcome(probe=probe, answer=silent, seconds=self.clock()))

    def _run(self) -> None:
        for probe in self.probes:
            answer = self._ask(probe)
            if self._over.is_set():
                return
            self.outcomes.append(Outcome(probe=probe, answer=answer, seconds=self.clock()))

    def _ask(self, probe: Probe) -> Answer:
        deadline = time.monotonic() + probe.timeout
        best = Answer(state=State.SILENT, detail="no answer")
        while True:
            left = deadline - time.monotonic()
            try:
                answer = probe.attempt(self.guest, max(0.5, min(left, _ATTEMPT)))
            except (OSError, EmulatorError) as error:
                answer = Answer(state=State.SILENT, detail=_short(error))
            if answer.state is not State.SILENT or best.state is State.SILENT:
                best = answer
            if answer.state is State.GOOD or answer.final or time.monotonic() >= deadline:
                return best
            if self._over.wait(_PAUSE):
                return best


def _connect(guest: Guest, port: int, seconds: float) -> socket.socket:
    return socket.create_connection(("127.0.0.1", guest.port(port)), timeout=seconds)


def _output(argv: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int | None, bytes]:
    """Exit code (None: it did not end in time and was killed) and the first MiB that it printed; it dies with this process."""
    program = shutil.which(argv[0])
    if program is None:
        raise FileNotFoundError(f"{argv[0]} is not there, or is no program")
    process = guarded([program, *argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, environment=environment)
    kept = bytearray()

    def drain() -> None:
        with contextlib.suppress(OSError, ValueError):
            while process.stdout is not None and (piece := os.read(process.stdout.fileno(), 65536)):
                kept.extend(piece[: max(0, _BODY - len(kept))])

    reader = threading.Thread(target=drain, name="probe-output", daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own: what it has started goes too
        process.wait()
        reader.join(1)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()
    return code, bytes(kept)


def _shown(said: bytes) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in said[: 4 * _TEXT].decode("utf-8", "replace"))
    return " ".join(text.split())[:_TEXT]


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:_TEXT]


def _numbers(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
