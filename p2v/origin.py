"""What a SOURCE on the command line means."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from formats.capture import Origin
from formats.errors import ImageUnsupportedError, UsageError
from p2v.config import FREEZE_SECONDS, secret

if TYPE_CHECKING:
    from p2v.console import Console
    from p2v.session import Session, SshTarget

_SSH = re.compile(r"(?:ssh://)?(?:[^@/\s]+@)(?:\[[0-9A-Fa-f:.]+\]|[^:/\s]+)(?::\d+)?/?")
_LATER = ("vsphere://", "libvirt://", "qmp:")


class OpenOrigin(Origin, Protocol):
    """An origin that also cleans up after killed runs. ``session`` reaches into the live machine; None where there is none."""

    @property
    def adapted(self) -> bool:
        """Whether the machine is known to have been fitted to any hardware already."""
        ...

    @property
    def session(self) -> Session | None:
        """The connection to the live machine."""
        ...

    def cleanup(self) -> list[str]:
        """Remove what killed runs left there and say what that was."""
        ...


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        return False


@contextlib.contextmanager
def open_origin(
    source: str,
    identity: Path | None,
    known_hosts: Path | None,
    console: Console,
    *,
    disk_format: str = "",
    freeze_limit: int = FREEZE_SECONDS,
) -> Iterator[OpenOrigin]:
    """Open what ``source`` names; notices go to ``console``. ``UsageError`` when it names nothing that can be opened.

    ``freeze_limit``: the most seconds, 5 to 3600, that a running machine's file systems may stay frozen.
    """
    if not 5 <= freeze_limit <= 3600:
        raise UsageError(f"a freeze cannot be limited to {freeze_limit} s", advice="Take 5 to 3600 seconds.")
    if source.startswith(_LATER):
        scheme = source.split(":", 1)[0]
        raise ImageUnsupportedError(
            f"{scheme} sources cannot be read yet", advice="Use SSH into the machine, or its disk image."
        )
    if "://" not in source and _exists(source):
        from p2v.collect.files import FileOrigin

        yield FileOrigin(Path(source), disk_format=disk_format or None)
        return
    if not _SSH.fullmatch(source):
        shown = (
            "what was given" if ":" in source.rpartition("@")[0].removeprefix("ssh://") else f"{source[:200]!r}"
        )  # may hold a password
        raise UsageError(
            f"{shown} is neither a file nor a host",
            advice="Name a host as root@HOST or ssh://USER@HOST:PORT, or the path of an image.",
        )
    from p2v.collect.ssh import SshOrigin

    target = ssh_target(source, identity, known_hosts)
    with SshOrigin(target, notice=console.notice, freeze=freeze_limit) as origin:
        yield origin


def ssh_target(text: str, identity: Path | None, known_hosts: Path | None) -> SshTarget:
    """The host that ``text`` names, with the passwords that the environment gives; raises what ``SshTarget.parse`` raises."""
    from p2v.session import SshTarget

    return SshTarget.parse(
        text,
        identity=identity,
        known_hosts=known_hosts,
        password=secret("P2V_SSH_PASSWORD"),
        sudo_password=secret("P2V_SUDO_PASSWORD"),
    )
