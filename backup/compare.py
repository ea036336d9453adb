"""In what two stored states of a disk differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backup.manifest import SPAN, Entry, Tree, differing
from backup.reader import StoredDisk
from backup.repository import Point, Repository
from formats.block import Extent, Kind, merged
from formats.compare import differences


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDifference:
    """How a disk differs between two points; a size is None where the point does not hold the disk."""

    id: str
    old_size: int | None
    new_size: int | None
    ranges: tuple[Extent, ...] = ()

    @property
    def changed(self) -> int:
        """Bytes of the blocks that differ."""
        return sum(extent.length for extent in self.ranges)

    @property
    def same(self) -> bool:
        """Whether the disk is the same in both."""
        return self.old_size == self.new_size and not self.ranges


def compare(repository: Repository, old: Point, new: Point) -> Iterator[DiskDifference]:
    """Compare all disks of two points; only what is not stored once for both is read."""
    for disk_id in dict.fromkeys(disk.id for point in (old, new) for disk in point.disks):
        before, after = old.disk(disk_id), new.disk(disk_id)
        ranges: tuple[Extent, ...] = ()
        if before is not None and after is not None:
            where = suspects(repository.tree(before), repository.tree(after))
            ranges = tuple(differences(StoredDisk(repository, before), StoredDisk(repository, after), where))
        yield DiskDifference(
            id=disk_id,
            old_size=before.size if before is not None else None,
            new_size=after.size if after is not None else None,
            ranges=ranges,
        )


def suspects(old: Tree, new: Tree) -> Iterator[Extent]:
    """Where ``new`` is made of other chunks than ``old``: ascending, merged, DATA or ZERO. All else is the same in both.

    Bytes past the old size are among them. Reads pages only, and none that both share. A range that was cut at other places may
    be equal after all.
    """
    return merged(_suspects(old, new))


def _suspects(old: Tree, new: Tree) -> Iterator[Extent]:
    for number in differing(old, new):
        base = number * SPAN
        before = old.entries(number) if base < old.size else []
        yield from (Extent(base + start, length, kind) for start, length, kind in _unlike(before, new.entries(number)))


def _unlike(old: list[Entry], new: list[Entry]) -> Iterator[tuple[int, int, Kind]]:
    """The parts of a span that are not made of the same chunks at the same place."""
    known = {}
    zeroes, position = [], 0
    for length, chunk in old:
        if chunk is None:
            zeroes.append((position, position + length))
        else:
            known[position] = (length, chunk)
        position += length
    position = 0
    for length, chunk in new:
        if chunk is not None:
            if known.get(position) != (length, chunk):
                yield position, length, Kind.DATA
        else:
            at, end = position, position + length
            for low, high in zeroes:
                if high <= at or low >= end:
                    continue
                if low > at:
                    yield at, low - at, Kind.ZERO
                at = min(high, end)
            if at < end:
                yield at, end - at, Kind.ZERO
        position += length
