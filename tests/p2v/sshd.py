"""A real OpenSSH server on loopback for tests: own keys, own users, nothing of this computer's configuration touched.

As root it runs in a mount namespace of its own, with copies of passwd, shadow, group
and sudoers bound over the real ones; so it can have users with passwords and sudo rules. Otherwise it serves the current user alone.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from p2v.config import Secret
from p2v.session import SshTarget
from tests.requirement import needs

needs_sshd = needs("sshd", "ssh-keygen", "unshare")

_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {host_key}
AuthorizedKeysFile {authorized}
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication yes
MaxStartups 100
LogLevel VERBOSE
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A user of the server; ``sudo`` is the tail of a sudoers line, as ``ALL=(ALL) NOPASSWD: ALL``, or empty."""

    name: str
    password: str = ""
    sudo: str = ""


PLAIN = User(name="p2vplain", password="plain pass'word")
SUDOER = User(name="p2vsudoer", password='sudo "secret" $x', sudo="ALL=(ALL) ALL")
FREE = User(name="p2vfree", sudo="ALL=(ALL) NOPASSWD: ALL")


@dataclass(slots=True, kw_only=True)
class SshServer:
    """A running server. ``identity`` logs in every user; ``known_hosts`` holds its key; ``log`` is what sshd wrote."""

    port: int
    identity: Path
    known_hosts: Path
    folder: Path
    log: Path
    users: Mapping[str, User] = field(default_factory=dict)
    process: subprocess.Popen[bytes]

    def target(
        self, user: str | None = None, *, port: int | None = None, key: bool = True, **options: object
    ) -> SshTarget:
        """What connects to it as ``user`` (default: the one who runs the tests), through ``port`` when a proxy is in between."""
        if port is not None and port != self.port:
            known = self.folder / f"known_hosts-{port}"
            known.write_text(self.known_hosts.read_text().replace(f":{self.port} ", f":{port} "))
        else:
            known = self.known_hosts
        values: dict[str, object] = {
            "host": "127.0.0.1",
            "user": user or pwd.getpwuid(os.geteuid()).pw_name,
            "port": port or self.port,
            "identity": self.identity if key else None,
            "known_hosts": known,
            "config": None,
            **options,
        }
        return SshTarget(**values)  # type: ignore[arg-type]

    def password(self, user: str) -> Secret:
        """The password of ``user``."""
        return Secret(self.users[user].password)


@contextmanager
def ssh_server(users: tuple[User, ...] = (), config: str = "") -> Iterator[SshServer]:
    """Run a server with ``users`` (needs root) and further lines of ``config``; it is gone when the context is left."""
    folder = Path(tempfile.mkdtemp(prefix="p2v-sshd-"))
    folder.chmod(0o755)
    process: subprocess.Popen[bytes] | None = None
    try:
        server_key, identity = _key(folder, "host_key"), _key(folder, "identity")
        port = _free_port()
        authorized, known = folder / "authorized", folder / "known_hosts"
        shutil.copy(identity.with_suffix(".pub"), authorized)
        authorized.chmod(0o644)
        kind, blob, *_ = server_key.with_suffix(".pub").read_text().split()
        known.write_text(f"[127.0.0.1]:{port} {kind} {blob}\n")
        path = folder / "sshd_config"
        path.write_text(config + _CONFIG.format(port=port, host_key=server_key, authorized=authorized))
        log = folder / "log"
        sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:" + os.environ.get("PATH", "")) or "sshd"
        command = [sshd, "-D", "-e", "-f", str(path)]
        if os.geteuid() == 0:
            command = [
                "unshare",
                "-m",
                "--propagation",
                "private",
                "sh",
                "-ec",
                _namespace(folder, users),
                "sh",
                *command,
            ]
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        _wait_for(lambda: _listens(port), process, log)
        yield SshServer(
            port=port,
            identity=identity,
            known_hosts=known,
            folder=folder,
            log=log,
            users={user.name: user for user in users},
            process=process,
        )
    finally:
        if process is not None:
            process.terminate()
            process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _namespace(folder: Path, users: tuple[User, ...]) -> str:
    """The script that binds our account files over the system's and runs sshd; made files lie in ``folder``."""
    lines = [f"mkdir -p {folder}/run/sshd", f"mount --bind {folder}/run /run"]
    (folder / "run" / "sshd").mkdir(parents=True)
    if not users:
        return "\n".join([*lines, 'exec "$@"'])
    for name, mode in (("passwd", 0o644), ("shadow", 0o640), ("group", 0o644)):
        text = Path("/etc", name).read_text()
        for number, user in enumerate(users, 61001):
            text += {
                "passwd": f"{user.name}:x:{number}:{number}::/tmp:/bin/sh\n",
                "shadow": f"{user.name}:{_hashed(user.password)}:19000:0:99999:7:::\n",
                "group": f"{user.name}:x:{number}:\n",
            }[name]
        _made(folder / name, text, mode)
        lines.append(f"mount --bind {folder}/{name} /etc/{name}")
    if Path("/etc/sudoers").exists():
        rules = "Defaults !lecture\n" + "".join(f"{user.name} {user.sudo}\n" for user in users if user.sudo)
        _made(folder / "sudoers", rules, 0o440)
        lines.append(f"mount --bind {folder}/sudoers /etc/sudoers")
    return "\n".join([*lines, 'exec "$@"'])


def _made(path: Path, text: str, mode: int) -> None:
    path.write_text(text)
    path.chmod(mode)


def _hashed(password: str) -> str:
    if not password:
        return "*"
    made = subprocess.run(
        ["openssl", "passwd", "-6", "-stdin"], input=password.encode(), capture_output=True, check=True
    )
    return made.stdout.decode().strip()


def _key(folder: Path, name: str) -> Path:
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if condition():
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"sshd does not come up: {log.read_text()}")
