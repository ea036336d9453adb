"""One SSH server for all tests of p2v, with its users where the tests run as root."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.p2v.sshd import FREE, PLAIN, SUDOER, SshServer, ssh_server
from tests.requirement import missing


@pytest.fixture(scope="session")
def sshd() -> Iterator[SshServer]:
    """A real sshd on loopback; as root it has the users PLAIN, SUDOER and FREE."""
    if absent := missing("sshd", "ssh-keygen", "unshare"):
        pytest.skip(f"not installed: {', '.join(absent)}")
    with ssh_server((PLAIN, SUDOER, FREE) if os.geteuid() == 0 else ()) as server:
        yield server
