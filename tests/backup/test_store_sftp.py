"""The SFTP store against its contract, on a real OpenSSH server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from backup.errors import RepositoryMissingError
from backup.place import open_store
from backup.repository import Repository
from backup.store.base import Store
from backup.store.sftp import SftpStore
from formats.errors import UsageError
from p2v.session import Session
from tests.backup.repositories import back_up, contents, machine, new_repository, restored
from tests.contracts.store import StoreContract
from tests.p2v.conftest import sshd  # noqa: F401 - a fixture
from tests.p2v.sshd import SshServer


@pytest.fixture
def opened_store(sshd: SshServer, tmp_path: Path) -> Iterator[SftpStore]:  # noqa: F811
    root = tmp_path / "objects"
    root.mkdir()
    store = SftpStore(Session.connect(sshd.target()), str(root))
    yield store
    store.close()


class TestSftpStore(StoreContract):
    @pytest.fixture
    def store(self, opened_store: SftpStore) -> Store:
        return opened_store

    def test_a_repository_lies_there(self, opened_store: SftpStore) -> None:
        new_repository(opened_store)
        origin = machine()
        point = back_up(opened_store, origin)
        assert restored(opened_store, point) == contents(origin)

    def test_files_are_private(self, opened_store: SftpStore, tmp_path: Path) -> None:
        opened_store.store("keys/a", [b"x" * 100_000])
        assert (tmp_path / "objects/keys/a").stat().st_mode & 0o077 == 0
        assert list((tmp_path / "objects/.unfinished").iterdir()) == []


def test_a_place_on_sftp(sshd: SshServer, tmp_path: Path) -> None:  # noqa: F811
    target = sshd.target()
    root = tmp_path / "repository"
    named = f"sftp://{target.user}@127.0.0.1:{sshd.port}{root}"
    connect = partial(open_store, named, identity=sshd.identity, known_hosts=sshd.known_hosts)
    with pytest.raises(RepositoryMissingError):
        connect()
    with contextlib.closing(connect(make=True)) as store:
        new_repository(store)
    with contextlib.closing(connect()) as store:
        assert Repository.require(store).version == 1
    assert (root / "config").is_file()
    for wrong in ("sftp://host", "sftp://user:password@host/x"):
        with pytest.raises(UsageError) as caught:
            open_store(wrong)
        assert "password@" not in str(caught.value)
