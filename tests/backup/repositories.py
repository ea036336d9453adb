"""Small repositories for tests."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from backup.chunk import Chunker, FixedGrid
from backup.engine import Backup
from backup.keys import Kdf
from backup.lock import LEASES
from backup.reader import StoredCapture
from backup.repository import Point, Repository
from backup.store.base import Store
from formats.block import Extent
from p2v.config import Secret
from tests.fakes.tracked_origin import TrackedOrigin

PASSWORD = Secret("correct horse")
QUICK = Kdf(memory_kib=64, iterations=1, lanes=1)
MIB = 1 << 20


def new_repository(store: Store) -> Repository:
    """A repository whose password costs nothing to check."""
    return Repository.create(store, PASSWORD, kdf=QUICK)


def opened(store: Store) -> Repository:
    """As another process sees it."""
    return Repository.open(store, PASSWORD)


class Clock:
    """A day goes by with each look."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self.now = start

    def __call__(self) -> datetime:
        self.now += timedelta(days=1)
        return self.now


CLOCK = Clock()


def back_up(
    store: Store,
    origin: TrackedOrigin,
    parent: Point | None = None,
    *,
    threads: int = 2,
    audit: int = 4,
    chunker: Chunker | None = None,
    changes: bool = True,
) -> Point:
    """One run, as another process."""
    repository = opened(store)
    marks = {d.id: d.mark for d in parent.disks if d.mark is not None} if parent and changes else {}
    run = Backup(repository, chunker or FixedGrid(), threads=threads, clock=CLOCK, audit=audit)
    with run, origin.capture(marks) as capture:
        return run.store(capture, parent=parent)


def restored(store: Store, point: Point, holes: Mapping[str, list[Extent]] | None = None) -> dict[str, bytes]:
    """All disks of a point, as another process reads them."""
    found = {}
    with StoredCapture(opened(store), point, holes=holes) as capture:
        for disk_id, disk in capture.disks.items():
            buffer = bytearray(disk.source.size)
            disk.source.readinto(memoryview(buffer), 0)
            found[disk_id] = bytes(buffer)
    return found


def contents(origin: TrackedOrigin) -> dict[str, bytes]:
    """What the origin's disks hold now."""
    return {disk_id: bytes(content) for disk_id, content in origin.content.items()}


def machine(seed: int = 1, sizes: Mapping[str, int] | None = None) -> TrackedOrigin:
    """Two disks, the larger of 18 MiB and a bit, so that it has two spans and a short end."""
    generator = random.Random(seed)
    origin = TrackedOrigin(sizes or {"large": 18 * MIB + 5 * 512, "small": MIB})
    for disk_id, content in origin.content.items():
        for _ in range(6):
            length = min(len(content), generator.randrange(1, 300_000))
            origin.write(disk_id, generator.randbytes(length), generator.randrange(len(content) - length + 1))
    return origin


def scribble(origin: TrackedOrigin, seed: int, count: int = 4) -> None:
    """Change a few places on every disk, one of them to zeroes."""
    generator = random.Random(seed)
    for disk_id, content in origin.content.items():
        for number in range(count):
            length = min(len(content), generator.choice([1, 512, 4096, 70_000]))
            data = bytes(length) if number == 0 else generator.randbytes(length)
            origin.write(disk_id, data, generator.randrange(len(content) - length + 1))


def bury(store: Store) -> None:
    """Take away what dead processes hold, as is done for those of this computer."""
    for prefix in (LEASES, "locks/"):
        for stored in list(store.list(prefix)):
            store.delete(stored.name)
