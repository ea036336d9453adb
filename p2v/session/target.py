"""What is connected to: a host as its user names it, and what ``~/.ssh/config`` makes of that name."""

from __future__ import annotations

import getpass
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from formats.errors import UsageError
from p2v.config import Secret

_SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
_HOST = re.compile(r"[A-Za-z0-9_.:%-]+\Z")
_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@$\\+-]*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class SshTarget:
    """A host as its user names it; None means: whatever ``~/.ssh/config`` or the default says.

    ``host`` may be an alias of ``config``. ``identity``: a private key file, tried first. ``known_hosts``: the only file host keys are
    looked up in. ``sudo_password`` defaults to ``password``: sudo asks for the same user's.
    """

    host: str
    user: str | None = None
    port: int | None = None
    identity: Path | None = None
    known_hosts: Path | None = None
    password: Secret | None = None
    sudo_password: Secret | None = None
    config: Path | None = field(default_factory=lambda: Path.home() / ".ssh" / "config")

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        identity: Path | None = None,
        known_hosts: Path | None = None,
        password: Secret | None = None,
        sudo_password: Secret | None = None,
    ) -> SshTarget:
        """The target that ``host``, ``user@host`` or ``ssh://user@host:port`` names; ``UsageError`` for anything else."""
        user, host, port = _parsed(text)
        return cls(
            host=host,
            user=user,
            port=port,
            identity=identity,
            known_hosts=known_hosts,
            password=password,
            sudo_password=sudo_password,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a connection goes, all defaults filled in. ``key_name`` is the name its host key is filed under."""

    host: str
    port: int
    user: str
    key_name: str
    identities: tuple[Path, ...]  # named by the user or the configuration, tried before the agent's
    default_keys: bool  # whether ~/.ssh/id_* are tried too
    known_hosts: tuple[Path, ...]
    password: Secret | None
    sudo_password: Secret | None
    jumps: tuple[Endpoint, ...] = ()
    proxy_command: str = ""

    @property
    def label(self) -> str:
        """``user@host``, with the port when it is not 22."""
        return f"{self.user}@{self.host}" + (f":{self.port}" if self.port != 22 else "")


def resolve(target: SshTarget) -> Endpoint:
    """Fill in what ``~/.ssh/config`` says: HostName, Port, User, IdentityFile, UserKnownHostsFile, HostKeyAlias, ProxyJump, ProxyCommand.

    What the target itself says wins. ``UsageError`` when the configuration cannot be read.
    """
    options = _configured(target)
    host = str(options.get("hostname", target.host))
    port = target.port or int(options.get("port", 22))
    user = target.user or str(options.get("user", getpass.getuser()))
    named = [Path(name).expanduser() for name in options.get("identityfile", [])]
    jump = str(options.get("proxyjump", "none"))
    return Endpoint(
        host=host,
        port=port,
        user=user,
        key_name=str(options.get("hostkeyalias", host)),
        identities=(target.identity,) if target.identity else tuple(named),
        default_keys=target.identity is None and not named,
        known_hosts=(target.known_hosts,) if target.known_hosts else _known_hosts(options),
        password=target.password,
        sudo_password=target.sudo_password,
        jumps=() if jump.lower() == "none" else _jumps(jump, target),
        proxy_command=str(options.get("proxycommand") or ""),
    )


def _configured(target: SshTarget) -> dict[str, Any]:
    if target.config is None or not target.config.is_file():
        return {}
    import paramiko

    try:
        return dict(paramiko.SSHConfig.from_path(str(target.config)).lookup(target.host))
    except (OSError, ValueError, paramiko.SSHException, ImportError) as error:
        raise UsageError(
            f"{target.config} cannot be used: {error}",
            advice="Correct the file, or name the host in full: ssh://user@host:port.",
        ) from error


def _known_hosts(options: dict[str, Any]) -> tuple[Path, ...]:
    names = str(options.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")).split()
    return (*(Path(name).expanduser() for name in names), _SYSTEM_KNOWN_HOSTS)


def _jumps(text: str, target: SshTarget) -> tuple[Endpoint, ...]:
    """The hosts of a ProxyJump, first one first. They get our keys and known hosts, never the target's passwords."""
    found: list[Endpoint] = []
    for name in text.split(","):
        user, host, port = _parsed(name.strip(), port_suffix=True)
        if host == target.host:
            raise UsageError(f"ProxyJump of {target.host} names the host itself", advice=f"Correct {target.config}.")
        step = resolve(
            SshTarget(
                host=host,
                user=user,
                port=port,
                identity=target.identity,
                known_hosts=target.known_hosts,
                config=target.config,
            )
        )
        found += [*step.jumps, step] if not found else [step]
    return tuple(found)


def _parsed(text: str, *, port_suffix: bool = False) -> tuple[str | None, str, int | None]:
    wrong = UsageError(f"{text!r} names no SSH host", advice="Write root@host or ssh://user@host:port.")
    if "://" in text or port_suffix:
        try:
            parts = urlsplit(text if "://" in text else f"ssh://{text}")
            user, host, port = parts.username, parts.hostname, parts.port
        except ValueError as error:
            raise wrong from error
        if parts.password is not None:
            raise UsageError(
                "a password in an address is visible to everyone on this computer",
                advice="Give it in P2V_SSH_PASSWORD, P2V_SSH_PASSWORD_FILE or P2V_SSH_PASSWORD_COMMAND.",
            )
        if parts.scheme != "ssh" or parts.path not in {"", "/"} or parts.query or parts.fragment:
            raise wrong
        user = unquote(user) if user else None
    else:
        name, at, host = text.rpartition("@")
        user, port = (name if at else None), None
    if host is None or not _sane(_HOST, host) or (user is not None and not _sane(_USER, user)) or port == 0:
        raise wrong
    if "://" not in text and not port_suffix and host.count(":") == 1:
        raise UsageError(f"{text!r} has a port in a place where none is read", advice=f"Write ssh://{text}.")
    return user, host, port


def _sane(pattern: re.Pattern[str], name: str) -> bool:
    # A leading dash would be an option to every program the name is shown to.
    return bool(pattern.match(name)) and not name.startswith("-")


def described(paths: Sequence[Path]) -> str:
    """Names of files for a message."""
    return ", ".join(str(path) for path in paths) or "none"
