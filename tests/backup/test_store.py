"""The stores against their contract, and what is particular to each."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from backup.errors import StoreError
from backup.store.base import NameTakenError, Store
from backup.store.layers import Faulty, ReadOnly, Retrying
from backup.store.local import LocalStore
from backup.store.memory import MemoryStore
from formats.errors import NoSpaceError, UsageError
from tests.contracts.store import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path)

    def test_a_writer_that_is_killed_leaves_nothing_that_is_listed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """P1: killed between the flush and the link."""
        store = LocalStore(tmp_path)

        def die(*_: object) -> None:
            raise SystemExit

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", die)
            patch.setattr(Path, "unlink", die)
            with pytest.raises(SystemExit):
                store.store("points/a", [b"content"])
        assert list((tmp_path / ".unfinished").iterdir())
        assert list(store.list("")) == []
        store.sweep()
        assert list((tmp_path / ".unfinished").iterdir()) == []

    def test_everything_is_flushed_before_it_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """P2: the file before its name, its folder and every new folder's parent after it."""
        events: list[tuple[str, str]] = []
        real_sync, real_link, real_mkdir = os.fsync, os.link, Path.mkdir

        def sync(descriptor: int) -> None:
            events.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
            real_sync(descriptor)

        def link(source: Path, target: Path) -> None:
            events.append(("link", str(target)))
            real_link(source, target)

        def mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
            events.append(("mkdir", str(path)))
            real_mkdir(path, mode, parents, exist_ok)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "link", link)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        LocalStore(tmp_path).store("packs/aa/one", [b"content"])
        linked = events.index(("link", str(tmp_path / "packs/aa/one")))
        assert any(kind == "sync" and "/.unfinished/" in path for kind, path in events[:linked])
        assert ("sync", str(tmp_path / "packs/aa")) in events[linked:]
        made = events.index(("mkdir", str(tmp_path / "packs/aa")))
        assert ("sync", str(tmp_path / "packs")) in events[made:linked]
        assert ("sync", str(tmp_path)) in events[made:linked]

    def test_files_are_private(self, tmp_path: Path) -> None:
        LocalStore(tmp_path).store("keys/a", [b"x"])
        assert (tmp_path / "keys/a").stat().st_mode & 0o077 == 0

    def test_what_is_no_object_is_not_listed(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.store("points/a", [b"x"])
        (tmp_path / "points/link").symlink_to("/etc/passwd")
        (tmp_path / ".hidden").write_bytes(b"")
        assert [found.name for found in store.list("")] == ["points/a"]

    @pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, NoSpaceError), (errno.EIO, StoreError)])
    @pytest.mark.parametrize("call", ["fsync", "link"])
    def test_failures_are_translated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception], call: str
    ) -> None:
        """P10: a full disk is said as such, wherever it shows."""
        store = LocalStore(tmp_path)

        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(expected):
                store.store("index/a", [b"x"])
        assert not (tmp_path / ".unfinished").exists() or list((tmp_path / ".unfinished").iterdir()) == []


class TestRetrying(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return Retrying(MemoryStore(), sleep=lambda _: None)

    def test_it_tries_again_and_says_how_long_it_waits(self) -> None:
        below, waits, left = MemoryStore(), list[float](), [3]

        def fault(operation: str, name: str, when: str) -> None:
            if when == "before" and left[0]:
                left[0] -= 1
                raise StoreError("the link is down")

        store = Retrying(Faulty(below, fault), sleep=waits.append)
        store.store("points/a", [b"x"])
        assert (below.objects, waits) == ({"points/a": b"x"}, [1.0, 2.0, 4.0])

    def test_it_gives_up(self) -> None:
        def fault(operation: str, name: str, when: str) -> None:
            raise StoreError("the link is down")

        with pytest.raises(StoreError, match="down"):
            Retrying(Faulty(MemoryStore(), fault), sleep=lambda _: None).load("points/a")

    def test_a_lost_answer_is_no_taken_name(self) -> None:
        lost = [True]

        def fault(operation: str, name: str, when: str) -> None:
            if operation == "store" and when == "after" and lost.pop():
                lost.append(False)
                raise StoreError("the answer was lost")

        below = MemoryStore()
        store = Retrying(Faulty(below, fault), sleep=lambda _: None)
        store.store("points/a", [b"x"])
        with pytest.raises(NameTakenError):
            store.store("points/a", [b"x"])


def test_read_only() -> None:
    below = MemoryStore()
    below.store("points/a", [b"x"])
    store = ReadOnly(below)
    assert store.load("points/a") == b"x"
    with pytest.raises(UsageError):
        store.delete("points/a")
    with pytest.raises(UsageError):
        store.store("points/b", [b"x"])
    assert set(below.objects) == {"points/a"}
