"""Probes against real servers: on this computer for every answer there is, and on a real machine for those that need one."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from p2v.config import Secret
from p2v.emulator import Accelerator, Hardware
from p2v.errors import EmulatorError
from p2v.target.boots import BootDisk, boot
from p2v.target.evidence import Patience
from p2v.target.hardware import platform_hardware
from p2v.target.probe import (
    AgentProbe,
    HttpProbe,
    MarkerProbe,
    Probe,
    Probing,
    ScriptProbe,
    SerialProbe,
    SshProbe,
    State,
    TcpProbe,
)
from p2v.target.verdict import Result
from tests.machines.builder import BuiltMachine
from tests.p2v.boot_sector import boot_disk
from tests.p2v.sshd import needs_sshd, ssh_server
from tests.requirement import needs


class Here:
    """This computer in place of a machine: each port leads to itself, the console and the agent are what a test makes of them."""

    def __init__(self, agent: socket.socket | None = None, reply: Callable[[str], str] = lambda _: "") -> None:
        self.agent = agent
        self._reply, self._printed = reply, ""

    def port(self, guest_port: int) -> int:
        return guest_port

    def connected(self, guest_port: int) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", guest_port), timeout=1):
            return True
        return False

    def type(self, text: str) -> None:
        self._printed = text.replace("\n", "\r\n") + self._reply(text)

    def printed(self) -> str:
        return self._printed


@pytest.fixture
def web() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"Welcome to the shop"
            self.send_response({"/": 200, "/gone": 404}.get(self.path, 503))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def speaker(words: bytes, *, stay: bool = False) -> Iterator[int]:
    """A server that says this and hangs up, or stays."""
    listener = socket.create_server(("127.0.0.1", 0))
    links: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                link.sendall(words)
                if stay:
                    links.append(link)
                else:
                    link.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for link in links:
            link.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def asked(probe: Probe, guest: Here | None = None) -> tuple[State, str]:
    answer = Probing([probe], guest or Here(), lambda: 0.0)._ask(probe)
    return answer.state, answer.detail


@pytest.mark.parametrize(
    ("words", "expect", "state"),
    [
        (b"220 mail ESMTP\r\n", "^220 ", State.GOOD),
        (b"554 go away\r\n", "^220 ", State.WRONG),
        (b"", "^220 ", State.SILENT),
    ],
)
def test_tcp_with_a_banner(words: bytes, expect: str, state: State) -> None:
    with speaker(words) as port:
        assert asked(TcpProbe(name="t", port=port, expect=expect, timeout=1))[0] is state


def test_tcp_without_words() -> None:
    with speaker(b"", stay=True) as port:
        assert asked(TcpProbe(name="t", port=port, timeout=2))[0] is State.GOOD
    assert asked(TcpProbe(name="t", port=free_port(), timeout=0.5))[0] is State.SILENT


@pytest.mark.parametrize(
    ("probe", "state", "words"),
    [
        (HttpProbe(name="h"), State.GOOD, "status 200"),
        (HttpProbe(name="h", contains="the shop"), State.GOOD, "status 200"),
        (HttpProbe(name="h", contains="the bank", timeout=1), State.WRONG, "the bank"),
        (HttpProbe(name="h", path="/gone", timeout=1), State.WRONG, "404"),
        (HttpProbe(name="h", path="/gone", status=(200, 404)), State.GOOD, "404"),
        (HttpProbe(name="h", tls=True, timeout=1), State.SILENT, "no answer"),
    ],
)
def test_http(web: int, probe: HttpProbe, state: State, words: str) -> None:
    answer = asked(replace(probe, port=web))
    assert answer[0] is state
    assert words in answer[1]


def test_http_to_something_else() -> None:
    with speaker(b"SSH-2.0-OpenSSH_9.2\r\n") as port:
        assert asked(HttpProbe(name="h", port=port, timeout=1))[0] in (State.WRONG, State.SILENT)


@needs_sshd
def test_ssh_and_a_marker(tmp_path: Path) -> None:
    marker = tmp_path / "a marker"
    marker.write_bytes(b"written before the backup")
    marker.chmod(0o644)
    right = hashlib.sha256(b"written before the backup").hexdigest()
    with ssh_server() as server:

        def ssh(command: str, expect: str = "", user: str = "", timeout: float = 60) -> tuple[State, str]:
            name = user or getpass.getuser()
            return asked(
                SshProbe(
                    name="s", command=command, expect=expect, user=name, identity=server.identity, port=server.port,
                    timeout=timeout,
                )
            )  # fmt: skip

        assert ssh("echo hello") == (State.GOOD, "hello")
        assert ssh("echo hello", "^hello$")[0] is State.GOOD
        assert ssh("echo hello", "bye", timeout=5)[0] is State.WRONG
        assert ssh("echo broken >&2; exit 3", timeout=5) == (State.WRONG, "exit code 3: broken")
        assert ssh("true", user="nobody-of-this-name", timeout=1)[0] is State.SILENT
        for digest, state in ((right, State.GOOD), (right.upper(), State.GOOD), ("0" * 64, State.WRONG)):
            probe = MarkerProbe(
                name="m", path=str(marker), sha256=digest, user=getpass.getuser(), identity=server.identity,
                port=server.port, timeout=60,
            )  # fmt: skip
            assert asked(probe)[0] is state


def test_a_script_gets_the_ports_and_is_killed_with_its_children(tmp_path: Path) -> None:
    script = tmp_path / "look"
    script.write_text('#!/bin/sh\necho "port $P2V_DRILL_PORT_25"\nexit ${1:-0}\n')
    script.chmod(0o755)
    assert asked(ScriptProbe(name="s", command=(str(script),), ports=(25,))) == (State.GOOD, "port 25")
    assert asked(ScriptProbe(name="s", command=(str(script), "4"), timeout=0.5))[0] is State.WRONG
    pid = tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {pid}\nwait\n")
    assert asked(ScriptProbe(name="s", command=(str(script),), timeout=0.8))[0] is State.SILENT
    deadline = time.monotonic() + 10
    while (stat := Path(f"/proc/{pid.read_text().strip()}/stat")).exists() and ") Z " not in stat.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _agent(end: socket.socket) -> None:
    with contextlib.suppress(OSError), end.makefile("rwb") as stream:
        for line in stream:
            command = json.loads(line.lstrip(b"\xff"))
            if command["execute"] == "guest-sync-delimited":
                stream.write(
                    b'{"return": 1}\n\xff' + json.dumps({"return": command["arguments"]["id"]}).encode() + b"\n"
                )
            else:
                stream.write(b'{"return": {"version": "7.2.11"}}\n')
            stream.flush()


def test_the_guest_agent() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=_agent, args=(theirs,), daemon=True)
        thread.start()
        assert asked(AgentProbe(timeout=5), Here(agent=ours)) == (State.GOOD, "version 7.2.11")
        theirs.shutdown(socket.SHUT_RDWR)
        thread.join()
        assert asked(AgentProbe(timeout=0.5), Here(agent=ours))[0] is State.SILENT
    assert asked(AgentProbe(timeout=0.5))[0] is State.SILENT


def test_a_probe_that_cannot_be_asked_is_unanswered() -> None:
    class Bare(Here):
        def port(self, guest_port: int) -> int:
            raise EmulatorError("port is not forwarded", advice="")

    assert asked(HttpProbe(name="h", timeout=0.5), Bare()) == (State.SILENT, "port is not forwarded")


@pytest.mark.parametrize(
    ("command", "result", "code"),
    [
        ("true", Result.PASS, ""),
        ("false", Result.FAIL, "probe-failed"),
        ("sleep 60", Result.UNPROVEN, "probe-unanswered"),
    ],
)
@needs("qemu-system-x86_64")
def test_what_probes_are_answered_is_in_the_verdict(tmp_path: Path, command: str, result: Result, code: str) -> None:
    disk = boot_disk(tmp_path / "disk.raw", [("serial", "metal1 login: ")])
    probe = ScriptProbe(name="look", command=("/bin/sh", "-c", command), timeout=1)
    verdict = boot(
        None, [BootDisk(path=disk)], Hardware(memory=256 << 20, cpus=1), folder=tmp_path, accelerator=Accelerator.TCG,
        patience=Patience(total=30, idle=6, busy=6, early=4, settle=0.6), probes=[probe],
    )  # fmt: skip
    assert verdict.result is result
    assert [finding.code for finding in verdict.findings] == ([code] if code else [])
    assert ("probe-script" in {signal.code for signal in verdict.signals}) is (result is Result.PASS)


@pytest.mark.slow_boot
@needs("ssh")
def test_a_real_machine_answers_and_is_told_from_one_that_does_not(
    bios_plain_disk: BuiltMachine, tmp_path: Path
) -> None:
    identity = tmp_path / "key"
    identity.write_bytes(bios_plain_disk.keys.identity.read_bytes())
    identity.chmod(0o600)
    hosts = b"metal2"
    probes: list[Probe] = [
        TcpProbe(name="ssh", port=22, expect="^SSH-2.0-OpenSSH"),
        TcpProbe(name="ssh takes connections", port=22),
        SshProbe(name="state", command="hostname", user="root", identity=identity, expect="^metal2$"),
        MarkerProbe(
            name="marker", path="/etc/hostname", sha256=hashlib.sha256(hosts + b"\n").hexdigest(), user="root", identity=identity
        ),
        SerialProbe(name="serial", command="id -un", user="admin", password=Secret("admin-pw"), expect="^admin$"),
        SerialProbe(name="serial fails", command="exit 7", user="admin", password=Secret("admin-pw"), timeout=40),
        HttpProbe(name="no web server", timeout=3),
        TcpProbe(name="nothing listens", port=5432, timeout=3),
        AgentProbe(timeout=3),
    ]  # fmt: skip
    verdict = boot(
        None, [BootDisk(path=bios_plain_disk.disk)], replace(platform_hardware("qemu").hardware, nic_slot="19"),
        folder=tmp_path / "boot", accelerator=Accelerator.TCG, probes=probes,
    )  # fmt: skip
    good = [signal.text.partition(":")[0] for signal in verdict.signals if signal.code.startswith("probe-")]
    assert good == ["ssh", "ssh takes connections", "state", "marker", "serial"], [
        f.describe() for f in verdict.findings
    ]
    bad = [(finding.code, finding.message) for finding in verdict.findings if finding.code.startswith("probe-")]
    assert [code for code, _ in bad] == ["probe-failed", *["probe-unanswered"] * 3]
    assert "serial fails" in bad[0][1]
    assert verdict.result is Result.FAIL
    assert "admin-pw" not in repr(verdict)
