"""Storing captures: what comes back, what is read, what is stored again."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup.chunk import FixedGrid
from backup.engine import Backup
from backup.reader import StoredDisk
from backup.store.memory import MemoryStore
from formats.block import BlockSource
from formats.errors import InterruptedRunError, ReadError
from formats.memory import MemoryDisk
from tests.backup.repositories import CLOCK, MIB, back_up, contents, machine, new_repository, opened, restored, scribble
from tests.contracts.block_source import BlockSourceContract
from tests.fakes.tracked_origin import TrackedOrigin


def packed(store: MemoryStore) -> int:
    """Bytes in packs."""
    return sum(found.size for found in store.list("packs/"))


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    new_repository(store)
    return store


class TestStoredDisk(BlockSourceContract):
    """A disk of a point is a ``BlockSource`` like any other."""

    @pytest.fixture
    def source(self, content: bytes, store: MemoryStore) -> BlockSource:
        origin = TrackedOrigin({"disk": len(content)})
        origin.content["disk"][:] = content
        return StoredDisk(opened(store), back_up(store, origin).disks[0])

    @pytest.fixture
    def vast(self, store: MemoryStore) -> BlockSource:
        origin = TrackedOrigin({"disk": 1})
        run = Backup(opened(store), FixedGrid(), clock=CLOCK)
        with run, origin.capture() as capture:
            disk = MemoryDisk(1 << 42)
            disk.write(memoryview(b"first"), 0)
            disk.write(memoryview(b"last"), (1 << 42) - 4)
            capture.disks["disk"] = replace(capture.disks["disk"], source=disk)
            point = run.store(capture)
        return StoredDisk(opened(store), point.disks[0])


def test_what_is_stored_comes_back(store: MemoryStore) -> None:
    origin = machine()
    point = back_up(store, origin)
    assert restored(store, opened(store).find_point("latest")) == contents(origin)
    assert [disk.id for disk in point.disks] == ["large", "small"]
    assert list(store.list("leases/")) == []


def test_an_unchanged_machine_stores_nothing(store: MemoryStore) -> None:
    origin = machine()
    first = back_up(store, origin)
    before = packed(store)
    second = back_up(store, origin, first, changes=False)
    assert packed(store) == before
    assert [disk.root for disk in second.disks] == [disk.root for disk in first.disks]


def test_with_a_list_of_changes_only_those_are_read(store: MemoryStore) -> None:
    origin = machine()
    first = back_up(store, origin)
    origin.write("large", b"changed", 5 * MIB)
    second = back_up(store, origin, first, audit=0)
    assert second.statistics["read"] == 65536
    assert restored(store, second) == contents(origin)


def test_equal_chunks_are_stored_once(store: MemoryStore) -> None:
    block = random.Random(3).randbytes(65536)
    origin = TrackedOrigin({"a": 4 * MIB, "b": 4 * MIB})
    for number in range(64):
        origin.write("a", block, number * 65536)
        origin.write("b", block, number * 65536)
    point = back_up(store, origin, threads=4)
    assert point.statistics["new_chunks"] == 1
    assert restored(store, point) == contents(origin)


@pytest.mark.parametrize("size", [0, 1, 511, 65536, 16 * MIB, 16 * MIB + 1, 33 * MIB - 7])
def test_sizes(store: MemoryStore, size: int) -> None:
    origin = TrackedOrigin({"disk": size})
    if size:
        origin.write("disk", b"\xff", size - 1)
    point = back_up(store, origin)
    assert restored(store, point) == contents(origin)


def test_a_disk_of_zeroes_costs_nothing(store: MemoryStore) -> None:
    point = back_up(store, TrackedOrigin({"disk": 40 * MIB}))
    assert point.disks[0].root == ""
    assert packed(store) == 0


def test_a_run_that_was_stopped_commits_nothing(store: MemoryStore) -> None:
    stop = threading.Event()
    stop.set()
    run = Backup(opened(store), FixedGrid(), stop=stop)
    with pytest.raises(InterruptedRunError), run, machine().capture() as capture:
        run.store(capture)
    assert opened(store).point_names() == []
    assert list(store.list("leases/")) == []


def test_a_disk_that_cannot_be_read_commits_nothing_and_the_run_is_over(store: MemoryStore) -> None:
    class Broken(MemoryDisk):
        def readinto(self, buffer: memoryview, offset: int) -> None:
            raise ReadError("the disk is broken")

    run = Backup(opened(store), FixedGrid())
    with run, machine().capture() as capture:
        disk = Broken(MIB, b"x")
        capture.disks["small"] = replace(capture.disks["small"], source=disk)
        with pytest.raises(ReadError):
            run.store(capture)
        with pytest.raises(ValueError, match="cannot go on"):
            run.store(capture)
    assert opened(store).point_names() == []


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30), turns=st.integers(1, 4))
def test_p25_an_incremental_equals_a_full(seed: int, turns: int) -> None:
    """P25: after every incremental of a random soak, all points are what the disks were, grown and shrunk ones too."""
    store = MemoryStore()
    new_repository(store)
    generator = random.Random(seed)
    origin = machine(seed, {"disk": 17 * MIB, "other": 300_000})
    points = [back_up(store, origin)]
    expected = [contents(origin)]
    for turn in range(turns):
        scribble(origin, seed + turn)
        if generator.random() < 0.4:
            origin.grow("disk", len(origin.content["disk"]) + generator.choice([1, 4096, 70_000, 16 * MIB]))
        points.append(back_up(store, origin, points[-1]))
        expected.append(contents(origin))
    for point, content in zip(points, expected, strict=True):
        assert restored(store, point) == content


class _Lying(TrackedOrigin):
    """Change tracking that forgets the writes to every other disk-grain of 64 KiB."""

    def write(self, key: str, data: bytes, offset: int) -> None:
        before = dict(self.written[key])
        super().write(key, data, offset)
        if offset // 65536 % 2:
            self.written[key] = before


def test_p25_catches_a_list_of_changes_that_lies() -> None:
    """The planted defect of P25: without the audit the lie goes through, and the comparison of P25 sees it."""
    store = MemoryStore()
    new_repository(store)
    origin = _Lying({"disk": 17 * MIB})
    origin.write("disk", random.Random(1).randbytes(17 * MIB), 0)
    first = back_up(store, origin)
    origin.write("disk", b"lost", 65536)
    second = back_up(store, origin, first, audit=0)
    assert restored(store, second) != contents(origin)


def test_the_audit_finds_a_list_of_changes_that_lies(store: MemoryStore) -> None:
    """The whole disk is read then, and the point says so."""
    origin = _Lying({"disk": 17 * MIB})
    origin.write("disk", random.Random(1).randbytes(17 * MIB), 0)
    first = back_up(store, origin)
    origin.write("disk", b"lost", 65536)
    second = back_up(store, origin, first)
    assert [notice.code for notice in second.notices] == ["changes-wrong"]
    assert restored(store, second) == contents(origin)


def test_the_audit_goes_round(store: MemoryStore) -> None:
    """Every span is read again after some runs, though each reads only one."""
    origin = _Lying({"disk": 65 * MIB})
    origin.write("disk", random.Random(1).randbytes(65 * MIB), 0)
    point = back_up(store, origin)
    origin.write("disk", b"lost", 50 * MIB + 65536)
    for _ in range(5):
        point = back_up(store, origin, point, audit=1)
        if point.notices:
            break
    assert restored(store, point) == contents(origin)
