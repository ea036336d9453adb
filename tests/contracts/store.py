"""What every ``Store`` must do: T1 to T8 of ``backup.store.base``, one test or more for each number.

An implementation's test module inherits ``StoreContract`` and gives the fixture ``store``: an empty store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from backup.errors import ObjectDamagedError, ObjectMissingError
from backup.store.base import NameTakenError, Store, Stored


class StoreContract:
    """Inherit, and give the fixture ``store``."""

    def test_t1_a_store_that_fails_leaves_nothing(self, store: Store) -> None:
        def breaking() -> Iterator[bytes]:
            yield b"half"
            raise RuntimeError("the writer dies")

        with pytest.raises(RuntimeError, match="dies"):
            store.store("packs/aa/one", breaking())
        assert list(store.list("")) == []
        with pytest.raises(ObjectMissingError):
            store.load("packs/aa/one")

    def test_t2_what_is_stored_is_seen_at_once(self, store: Store) -> None:
        store.store("config", [b"one ", memoryview(b"two"), b""])
        assert store.load("config") == b"one two"
        assert list(store.list("")) == [Stored("config", 7)]
        store.store("empty", [])
        assert store.load("empty") == b""

    def test_t3_a_name_is_given_once(self, store: Store) -> None:
        store.store("locks/prune", [b"first"])
        with pytest.raises(NameTakenError):
            store.store("locks/prune", [b"second"])
        assert store.load("locks/prune") == b"first"

    def test_t3_of_many_writers_one_wins(self, store: Store) -> None:
        won: list[bytes] = []
        barrier = threading.Barrier(6)

        def write(mine: bytes) -> None:
            barrier.wait()
            try:
                store.store("locks/prune", [mine])
            except NameTakenError:
                return
            won.append(mine)

        threads = [threading.Thread(target=write, args=(bytes([n]) * 1000,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.load("locks/prune") == won[0]

    def test_t4_parts(self, store: Store) -> None:
        content = bytes(range(256)) * 300
        store.store("packs/aa/one", [content])
        assert store.load("packs/aa/one", 5, 1000) == content[5:1005]
        assert store.load("packs/aa/one", 70000) == content[70000:]
        assert store.load("packs/aa/one", len(content), 0) == b""

    @pytest.mark.parametrize(("offset", "length"), [(0, 11), (5, 6), (11, 0), (1 << 40, 1), (11, None), (-1, 2)])
    def test_t4_a_part_that_is_not_there_raises(self, store: Store, offset: int, length: int | None) -> None:
        store.store("packs/aa/one", [b"0123456789"])
        with pytest.raises(ObjectDamagedError):
            store.load("packs/aa/one", offset, length)

    def test_t4_missing(self, store: Store) -> None:
        for name in ("config", "packs/aa/one"):
            with pytest.raises(ObjectMissingError):
                store.load(name)
            with pytest.raises(ObjectMissingError):
                store.load(name, 0, 1)

    def test_t5_listings_are_complete_and_exact(self, store: Store) -> None:
        names = [f"packs/{n:02x}/{n:064x}" for n in range(40)] + ["points/a", "config", "index/b"]
        for name in names:
            store.store(name, [name.encode()])
        assert sorted(store.list("")) == sorted(Stored(name, len(name)) for name in names)
        assert {found.name for found in store.list("packs/")} == set(names[:40])
        assert [found.name for found in store.list("packs/07/")] == [names[7]]
        assert list(store.list("leases/")) == []

    def test_t6_delete(self, store: Store) -> None:
        store.store("points/a", [b"x"])
        store.delete("points/a")
        store.delete("points/a")
        store.delete("nothing/there")
        assert list(store.list("")) == []
        store.store("points/a", [b"again"])
        assert store.load("points/a") == b"again"

    def test_t7_threads(self, store: Store) -> None:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(20):
                    name = f"packs/{number:02x}/{turn}"
                    store.store(name, [name.encode() * 100])
                    assert store.load(name, 3, 50) == (name.encode() * 100)[3:53]
                    if turn % 2:
                        store.delete(name)
                    list(store.list("packs/"))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(list(store.list("packs/"))) == 40

    @pytest.mark.parametrize(
        "name", ["", "/", "a/", "/a", "..", "a/../b", ".hidden", "a//b", "a/b/c/d", "A", "a\0", "a\n", "é", "x" * 81]
    )
    def test_t8_what_is_no_name_is_refused(self, store: Store, name: str) -> None:
        with pytest.raises(ValueError, match="no name"):
            store.store(name, [b"x"])
        with pytest.raises(ValueError, match="no name"):
            store.load(name)
        with pytest.raises(ValueError, match="no name"):
            store.delete(name)
        assert list(store.list("")) == []

    @pytest.mark.parametrize("prefix", ["packs", "../", "/", "a/b/c/", "."])
    def test_t8_what_is_no_prefix_is_refused(self, store: Store, prefix: str) -> None:
        with pytest.raises(ValueError, match="no prefix"):
            list(store.list(prefix))

    def test_closing_twice_is_harmless(self, store: Store) -> None:
        store.close()
        store.close()
