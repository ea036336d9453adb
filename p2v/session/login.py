"""Reaching a host, knowing that it is the one, and logging in."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import shlex
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from p2v.errors import AuthenticationError, HostError, HostKeyError
from p2v.session.target import Endpoint, described

if TYPE_CHECKING:
    import paramiko

CONNECT_SECONDS = 20.0
"""How long a host may take to answer, and again to log in."""

SILENCE_SECONDS = 30.0
"""Sent bytes that the host's kernel does not acknowledge for this long mean that the link is cut."""

_KEEPALIVE_SECONDS = 10  # something is sent at least this often, so that silence is noticed
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")  # fastest first: one pass, in hardware
_DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
_READ_AHEAD = 256 << 10
_PACKET = 256 << 10  # largest SSH packet asked for: the cost of the Python path is per packet
_WINDOW = 2 << 20  # paramiko's default; larger windows were slower at the sending side


class BufferedSocket:
    """A socket that reads ahead, as paramiko asks the kernel twice for each packet; counts what it ``received``."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self._buffer = bytearray(_READ_AHEAD)
        self._start = self._end = 0
        self.received = 0

    def recv(self, size: int) -> bytes:
        """Up to ``size`` bytes; empty at the end."""
        if self._start == self._end:
            if size >= _READ_AHEAD:
                piece = cast(bytes, self._socket.recv(size))
                self.received += len(piece)
                return piece
            self._end, self._start = self._socket.recv_into(self._buffer), 0
            self.received += self._end
        piece = bytes(memoryview(self._buffer)[self._start : min(self._end, self._start + size)])
        self._start += len(piece)
        return piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def open_channel(transport: paramiko.Transport, *, timeout: float) -> paramiko.Channel:
    """A session channel for bulk data: large packets, and a buffer that keeps them as they came.

    paramiko's own buffer is one growing array: two copies and an allocation for each read, a third of the cost of receiving.
    """
    from paramiko.buffered_pipe import BufferedPipe, PipeTimeout

    class Pieces(BufferedPipe):  # type: ignore[type-arg]  # generic in its stubs alone
        """A ``BufferedPipe`` of pieces; its reader is one thread, and asks for more than a packet holds."""

        def __init__(self) -> None:
            self._ready = threading.Condition()
            self._pieces: deque[bytes] = deque()
            self._ended = False

        def feed(self, data: bytes | str) -> None:
            with self._ready:
                self._pieces.append(data.encode() if isinstance(data, str) else data)
                self._ready.notify()

        def read(self, nbytes: int, timeout: float | None = None) -> bytes:
            with self._ready:
                if not self._ready.wait_for(lambda: self._pieces or self._ended, timeout):
                    raise PipeTimeout
                if not self._pieces:
                    return b""
                if len(self._pieces[0]) > nbytes:
                    piece = self._pieces[0]
                    self._pieces[0] = piece[nbytes:]
                    return piece[:nbytes]
                taken = [self._pieces.popleft()]
                size = len(taken[0])
                while self._pieces and (size := size + len(self._pieces[0])) <= nbytes:
                    taken.append(self._pieces.popleft())
                return taken[0] if len(taken) == 1 else b"".join(taken)

        def read_ready(self) -> bool:
            return bool(self._pieces)

        def close(self) -> None:
            with self._ready:
                self._ended = True
                self._ready.notify_all()

        def __len__(self) -> int:
            with self._ready:
                return sum(map(len, self._pieces))

    channel = transport.open_session(window_size=_WINDOW, max_packet_size=_PACKET, timeout=timeout)
    channel.in_buffer = Pieces()
    return channel


def log_in(endpoint: Endpoint) -> paramiko.Transport:
    """A connection to ``endpoint``: its host key verified, logged in, kept alive.

    Raises ``HostError``, ``HostKeyError`` or ``AuthenticationError``, each with what to check.
    """
    below: list[paramiko.Transport] = []
    try:
        for jump in endpoint.jumps:
            below.append(_connected(jump, _socket(jump, below)))
        transport = _connected(endpoint, _socket(endpoint, below))
    except BaseException:
        for step in reversed(below):
            step.close()
        raise
    if below:
        threading.Thread(target=_close_after, args=(transport, below), name="ssh-jump", daemon=True).start()
    return transport


def _close_after(transport: paramiko.Transport, below: list[paramiko.Transport]) -> None:
    transport.join()
    for step in reversed(below):
        step.close()


def _socket(endpoint: Endpoint, below: list[paramiko.Transport]) -> Any:
    """A byte stream to the endpoint's SSH port: directly, or through the last of the jump hosts, or a proxy command."""
    import paramiko

    place = (endpoint.host, endpoint.port)
    try:
        if below:
            return below[-1].open_channel("direct-tcpip", place, ("127.0.0.1", 0), timeout=CONNECT_SECONDS)
        if endpoint.proxy_command:
            return paramiko.ProxyCommand(endpoint.proxy_command)
        sock = socket.create_connection(place, timeout=CONNECT_SECONDS)
    except (OSError, paramiko.SSHException, UnicodeError) as error:
        raise _unreachable(endpoint, error) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_SECONDS * 1000))
    return BufferedSocket(sock)


def _unreachable(endpoint: Endpoint, error: Exception) -> HostError:
    place = f"{endpoint.host} port {endpoint.port}"
    if isinstance(error, socket.gaierror | UnicodeError):
        return HostError(
            f"the name {endpoint.host!r} is not known",
            advice="Check the spelling, the DNS of this computer, and `Host` entries in ~/.ssh/config.",
            subject=endpoint.label,
        )
    if isinstance(error, ConnectionRefusedError):
        return HostError(
            f"{place} refuses connections",
            advice="Check that sshd runs there (`systemctl status ssh` on the host) and that the port is right.",
            subject=endpoint.label,
        )
    what = "does not answer" if isinstance(error, TimeoutError) else f"cannot be reached: {error}"
    return HostError(
        f"{place} {what}",
        advice="Check that the host is up, the network between, and firewalls.",
        subject=endpoint.label,
    )


def _connected(endpoint: Endpoint, sock: Any) -> paramiko.Transport:
    import paramiko

    known = KnownHosts(endpoint)
    transport: paramiko.Transport | None = None
    try:
        transport = paramiko.Transport(cast(Any, sock))
        transport.banner_timeout = transport.handshake_timeout = CONNECT_SECONDS
        transport.auth_timeout = CONNECT_SECONDS
        options = transport.get_security_options()
        offered = tuple(options.ciphers)
        options.ciphers = tuple(c for c in _CIPHERS if c in offered) + tuple(c for c in offered if c not in _CIPHERS)
        options.key_types = known.preferred(tuple(options.key_types))
        transport.start_client(timeout=CONNECT_SECONDS)
        known.verify(transport.get_remote_server_key())
        _authenticate(transport, endpoint)
        transport.set_keepalive(_KEEPALIVE_SECONDS)
    except (paramiko.SSHException, OSError, EOFError) as error:
        _close(transport, sock)
        raise _no_ssh(endpoint, error) from error
    except BaseException:
        _close(transport, sock)
        raise
    return transport


def _close(transport: paramiko.Transport | None, sock: Any) -> None:
    with contextlib.suppress(Exception):
        (transport or sock).close()


def _no_ssh(endpoint: Endpoint, error: Exception) -> HostError:
    import paramiko

    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return HostError(
            f"{endpoint.label} and this computer have no SSH algorithm in common: {error}",
            advice="Allow a current algorithm in the host's sshd_config (for example Ciphers +aes128-gcm@openssh.com).",
            subject=endpoint.label,
        )
    return HostError(
        f"no SSH session with {endpoint.label}: {error or 'the connection was closed'}",
        advice="Check that an SSH server listens on that port, and its log (it may limit connections: MaxStartups, fail2ban, hosts.deny).",
        subject=endpoint.label,
    )


class KnownHosts:
    """The host keys on file for one endpoint, in OpenSSH's format; nothing is ever added.

    Lines marked ``@revoked`` refuse their key; ``@cert-authority`` lines are not read: such a host counts as unknown.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        import paramiko

        self._endpoint = endpoint
        name, port = endpoint.key_name, endpoint.port
        self._name = name if port == 22 else f"[{name}]:{port}"
        self._keys: dict[str, list[bytes]] = {}
        self._revoked: set[bytes] = set()
        for path in endpoint.known_hosts:
            if not path.is_file():
                continue
            for line in _lines(path):
                if line.startswith("@"):
                    self._revoked |= _revoked(line)
                    continue
                with contextlib.suppress(paramiko.SSHException):
                    entry = paramiko.hostkeys.HostKeyEntry.from_line(line)
                    if entry is not None and entry.key is not None and self._is_mine(entry.hostnames):
                        self._keys.setdefault(entry.key.get_name(), []).append(entry.key.asbytes())

    def _is_mine(self, names: list[str] | None) -> bool:
        """Whether a line's names, which may be hashed (``|1|salt|hash``), include this endpoint's; patterns are not read."""
        import paramiko

        return any(
            name == (paramiko.HostKeys.hash_host(self._name, name) if name.startswith("|1|") else self._name)
            for name in names or ()
        )

    def preferred(self, offered: tuple[str, ...]) -> tuple[str, ...]:
        """Signature algorithms, those of known keys first, so that the host shows a key that can be verified."""

        def is_known(algorithm: str) -> bool:
            return algorithm in self._keys or (algorithm.startswith("rsa-sha2-") and "ssh-rsa" in self._keys)

        return tuple(sorted(offered, key=lambda algorithm: not is_known(algorithm)))

    def verify(self, key: paramiko.PKey) -> None:
        """Return when ``key`` is on file; else ``HostKeyError`` with its fingerprint and the command that files it."""
        mine = key.asbytes()
        shown = "SHA256:" + base64.b64encode(hashlib.sha256(mine).digest()).decode().rstrip("=")
        kind = key.get_name()
        if mine in self._revoked:
            raise self._error(
                f"the {kind} key {shown} of {self._endpoint.host} is marked as revoked", "Do not connect to this host."
            )
        if mine in self._keys.get(kind, []):
            return
        file = self._endpoint.known_hosts[0]
        scan = f"ssh-keyscan -p {self._endpoint.port} -t {_scan_type(kind)} {self._endpoint.host} >> {shlex.quote(str(file))}"
        ask = "Compare the fingerprint with the one that `ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub` prints on the host itself"
        if self._keys.get(kind):
            raise self._error(
                f"the {kind} key of {self._endpoint.host} HAS CHANGED: it is now {shown}. Somebody may be in between",
                f"{ask}. Only when it is the same: ssh-keygen -R {shlex.quote(self._name)} -f {shlex.quote(str(file))} && {scan}",
            )
        raise self._error(
            f"the {kind} key {shown} of {self._endpoint.host} is not known (looked in {described(self._endpoint.known_hosts)})",
            f"{ask}. Only when it is the same: {scan}",
        )

    def _error(self, message: str, advice: str) -> HostKeyError:
        return HostKeyError(message, advice=advice, subject=self._endpoint.label)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            text = line.strip()
            if text and not text.startswith("#"):
                yield text


def _revoked(line: str) -> set[bytes]:
    """The key that a ``@revoked`` line names. For which hosts it says so does not matter: nobody's revoked key is to be trusted."""
    fields = line.split()
    if fields[0] != "@revoked" or len(fields) < 4:
        return set()
    try:
        return {base64.b64decode(fields[3], validate=True)}
    except ValueError:
        return set()


def _scan_type(kind: str) -> str:
    """ssh-keyscan's name of a key type."""
    return "ecdsa" if kind.startswith("ecdsa") else kind.removeprefix("ssh-")


def _authenticate(transport: paramiko.Transport, endpoint: Endpoint) -> None:
    """Try what there is, in the order of how plainly the user asked for it; raise ``AuthenticationError`` telling what was tried."""
    import paramiko

    tried: list[str] = []
    try:
        transport.auth_none(endpoint.user)
    except paramiko.BadAuthenticationType as error:
        allowed = set(error.allowed_types)
    if transport.is_authenticated():
        return
    attempts = _attempts(transport, endpoint, tried)
    for method, words, attempt in attempts:
        if method not in allowed and not (method == "password" and "keyboard-interactive" in allowed):
            tried.append(f"{words}: the host takes no {method}")
            continue
        try:
            allowed = set(attempt()) or allowed
        except paramiko.BadAuthenticationType as error:
            allowed = set(error.allowed_types)
            tried.append(f"{words}: the host takes no {method}")
        except paramiko.AuthenticationException as error:
            if "timeout" in str(error).lower():  # paramiko's word for no answer at all: nobody refused anything
                raise paramiko.SSHException("it does not answer the login") from error
            tried.append(f"{words}: {'refused' if 'ailed' in str(error) else str(error).lower().rstrip('.')}")
        if transport.is_authenticated():
            return
        if not transport.is_active():
            tried.append("the host ended the login (too many attempts?)")
            break
    raise AuthenticationError(
        f"{endpoint.label} refused the login; tried: {'; '.join(tried) or 'nothing, there is no key and no password'}",
        advice="Check the user name; give a private key with --identity, load it into ssh-agent, or set P2V_SSH_PASSWORD. "
        f"The host takes: {', '.join(sorted(allowed)) or 'nothing'}.",
        subject=endpoint.label,
    )


def _attempts(
    transport: paramiko.Transport, endpoint: Endpoint, tried: list[str]
) -> Iterator[tuple[str, str, Callable[[], list[str]]]]:
    """Each attempt as (method, words for it, what makes it), lazily; keys that cannot be read are noted in ``tried``."""
    import paramiko

    def with_key(key: paramiko.PKey) -> Callable[[], list[str]]:
        return lambda: transport.auth_publickey(endpoint.user, key)

    for path in endpoint.identities:
        if (key := _key(path, tried)) is not None:
            yield "publickey", f"key {path}", with_key(key)
    if (secret := endpoint.password) is not None:
        yield "password", "password", lambda: transport.auth_password(endpoint.user, secret.reveal())
    agent = paramiko.Agent()
    try:
        for number, agent_key in enumerate(agent.get_keys()):
            yield "publickey", f"key {number + 1} of the agent", with_key(agent_key)
    finally:
        agent.close()
    for path in (Path.home() / ".ssh" / name for name in _DEFAULT_KEYS if endpoint.default_keys):
        if path.is_file() and (key := _key(path, tried)) is not None:
            yield "publickey", f"key {path}", with_key(key)


def _key(path: Path, tried: list[str]) -> paramiko.PKey | None:
    import paramiko

    try:
        return paramiko.PKey.from_path(path)
    except TypeError:  # what `cryptography` raises for an encrypted key without its passphrase
        tried.append(f"key {path}: it has a passphrase, load it into ssh-agent")
    except (OSError, ValueError, paramiko.SSHException, paramiko.pkey.UnknownKeyType) as error:
        words = (
            "it has a passphrase, load it into ssh-agent"
            if "ncrypted" in str(error)
            else f"it cannot be read ({error})"
        )
        tried.append(f"key {path}: {words}")
    return None
