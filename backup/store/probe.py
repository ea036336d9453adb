"""Does a storage keep what repositories rely on? Asked of the storage itself, before anything is entrusted to it.

Network file systems, FUSE mounts and half-made SFTP servers differ in what they do when two write one name, in how soon a listing shows
an object, in whether a deleted name is gone. What cannot be asked from outside is whether flushed bytes survive a power cut.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from backup.errors import ObjectDamagedError, ObjectMissingError, StoreError
from backup.store.base import NameTakenError, Store

_LARGE = (20 << 20) + 4321  # bytes: longer than a pack
_MANY = 300  # objects in one listing
_WRITERS = 8  # of one name at once
_ROUNDS = 5  # of such races


class Broken(NamedTuple):
    """A guarantee of ``backup.store.base`` that the storage does not keep, and what was seen."""

    guarantee: str
    seen: str


class _Probe:
    """The questions. Everything is written below one name of its own and deleted in the end."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root = f"probe-{secrets.token_hex(6)}"

    def name(self, text: str) -> str:
        return f"{self._root}/{text}"

    def t1_a_failed_write_leaves_nothing(self) -> str:
        def breaking() -> Iterator[bytes]:
            yield b"half"
            raise _WriterDiedError

        with suppress(_WriterDiedError):
            self._store.store(self.name("half"), breaking())
        if any(True for _ in self._store.list(f"{self._root}/")):
            return "an object whose writing failed is listed"
        return "" if self._load("half") is None else "an object whose writing failed can be read"

    def t2_what_is_stored_is_seen_at_once(self) -> str:
        content = os.urandom(1000)
        self._store.store(self.name("seen"), [content])
        if self._load("seen") != content:
            return "an object reads differently, or not at all, right after it was stored"
        listed = {stored.name: stored.size for stored in self._store.list(f"{self._root}/")}
        return (
            ""
            if listed.get(self.name("seen")) == 1000
            else "a listing does not show an object right after it was stored"
        )

    def t3_a_name_is_given_once(self) -> str:
        self._store.store(self.name("taken"), [b"first"])
        try:
            self._store.store(self.name("taken"), [b"second"])
        except NameTakenError:
            return (
                ""
                if self._load("taken") == b"first"
                else "an object was overwritten although the second writer was refused"
            )
        return "a second writer of a name was not refused: an object was overwritten"

    def t3_of_many_writers_one_wins(self) -> str:
        for turn in range(_ROUNDS):
            won = self._race(self.name(f"race-{turn}"))
            if len(won) != 1:
                return f"of {_WRITERS} writers of one name at the same time {len(won)} were told that they had it"
            if self._load(f"race-{turn}") != won[0]:
                return "after a race of writers the object is not that of the winner"
        return ""

    def _race(self, name: str) -> list[bytes]:
        won: list[bytes] = []
        failed: list[BaseException] = []
        barrier = threading.Barrier(_WRITERS)

        def write(mine: bytes) -> None:
            barrier.wait()
            try:
                self._store.store(name, [mine])
            except NameTakenError:
                return
            except BaseException as error:
                failed.append(error)
                return
            won.append(mine)

        threads = [threading.Thread(target=write, args=(bytes([n]) * 5000,), daemon=True) for n in range(_WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return won

    def t4_parts_are_exact(self) -> str:
        content = os.urandom(_LARGE)
        self._store.store(self.name("large"), [memoryview(content)[:7], memoryview(content)[7:]])
        for offset, length in ((0, None), (12345, 4096), (_LARGE - 5, 5), (8 << 20, 3 << 20), (_LARGE, 0)):
            end = _LARGE if length is None else offset + length
            if self._store.load(self.name("large"), offset, length) != content[offset:end]:
                return f"{end - offset} bytes at {offset} of an object of {_LARGE} read differently"
        with suppress(ObjectDamagedError):
            self._store.load(self.name("large"), _LARGE - 5, 6)
            return "a range that goes past the end of an object is not refused"
        return ""

    def t4_what_is_missing_is_said_to_be(self) -> str:
        return "" if self._load("nothing") is None else "an object can be read that was never stored"

    def t5_listings_are_complete(self) -> str:
        names = {self.name(f"{n % 7:02x}/{n:064x}") for n in range(_MANY)}
        for name in names:
            self._store.store(name, [name.encode()])
        found = [stored for stored in self._store.list(f"{self._root}/") if stored.name.count("/") == 2]
        if len({stored.name for stored in found}) != len(found):
            return "a listing names an object twice"
        missing = names - {stored.name for stored in found}
        if missing:
            return f"a listing lacks {len(missing)} of {_MANY} objects"
        return "" if all(stored.size == len(stored.name) for stored in found) else "a listing states wrong sizes"

    def t6_what_is_deleted_is_gone(self) -> str:
        name = self.name("gone")
        self._store.store(name, [b"x"])
        self._store.delete(name)
        self._store.delete(name)
        if self._load("gone") is not None:
            return "an object can be read after it was deleted"
        if any(stored.name == name for stored in self._store.list(f"{self._root}/")):
            return "a listing shows an object after it was deleted"
        self._store.store(name, [b"again"])
        return "" if self._load("gone") == b"again" else "a name that was deleted and stored again reads as before"

    def _load(self, text: str) -> bytes | None:
        try:
            return self._store.load(self.name(text))
        except ObjectMissingError:
            return None

    @contextmanager
    def cleaned(self) -> Iterator[None]:
        """Delete all that was written, whatever happens within."""
        try:
            yield
        finally:
            for stored in list(self._store.list(f"{self._root}/")):
                self._store.delete(stored.name)


class _WriterDiedError(Exception):
    """Thrown into a write."""


def probe(store: Store) -> list[Broken]:
    """Ask ``store`` for T1 to T6, and return what it breaks. It writes some 21 MiB, and leaves nothing.

    Raises what the storage fails with where it fails outright.
    """
    asked = _Probe(store)
    questions: list[Callable[[], str]] = [
        asked.t1_a_failed_write_leaves_nothing,
        asked.t2_what_is_stored_is_seen_at_once,
        asked.t3_a_name_is_given_once,
        asked.t3_of_many_writers_one_wins,
        asked.t4_parts_are_exact,
        asked.t4_what_is_missing_is_said_to_be,
        asked.t5_listings_are_complete,
        asked.t6_what_is_deleted_is_gone,
    ]
    broken: list[Broken] = []
    with asked.cleaned():
        for question in questions:
            number = question.__name__.partition("_")[0].upper()
            try:
                seen = question()
            except (ObjectDamagedError, ObjectMissingError, NameTakenError) as error:
                seen = error.message
            if seen:
                broken.append(Broken(number, seen))
    return broken


def require(store: Store) -> None:
    """``StoreError`` that names everything a repository relies on and the storage does not keep."""
    broken = probe(store)
    if broken:
        raise StoreError(
            "this storage does not keep what a repository relies on: " + "; ".join(seen for _, seen in broken),
            advice="Use another storage, or mount this one with other options (no caching of attributes; hard links must work).",
        )


__all__ = ["Broken", "probe", "require"]
