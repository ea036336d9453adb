"""Points of one repository taken over into another: decrypted, verified, and stored there as any capture is.

The other repository may cut, compress and encrypt as it likes. A point that is there already, in whatever generation of copies, is left
out, so that a copy that was interrupted goes on; where a neighbour in time is there, only what differs from it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from backup.compare import suspects
from backup.engine import Backup
from backup.reader import StoredCapture
from backup.repository import Point, Repository
from formats.capture import CapturedDisk, Changed, Unknown


class Copied(NamedTuple):
    """A point and its copy; ``there`` says that the copy was there already."""

    point: Point
    copy: Point
    there: bool


class _PointCapture(StoredCapture):
    """A point as a capture that knows what changed since another point of its repository."""

    def __init__(self, repository: Repository, point: Point, since: Point | None) -> None:
        super().__init__(repository, point)
        self._since = since
        marks = {disk.id: disk.mark for disk in point.disks}
        self.disks: Mapping[str, CapturedDisk] = {
            disk_id: replace(captured, mark=marks[disk_id]) for disk_id, captured in self.disks.items()
        }

    def changes(self, disk_id: str) -> Changed | Unknown:
        """What the disk is made of that it was not made of then."""
        before, now = self._since.disk(disk_id) if self._since else None, self.point.disk(disk_id)
        if before is None or now is None:
            return Unknown(reason=f"disk {disk_id} was not copied before")
        return Changed(extents=tuple(suspects(self.repository.tree(before), self.repository.tree(now))))


def copy_points(source: Repository, points: Sequence[Point], run: Backup) -> Iterator[Copied]:
    """Copy ``points`` of ``source``, oldest first, by a run on the other repository; yields each when it is committed.

    Raises what reading and storing raise: what was yielded stays.
    """
    there = {point.original: point for point in run.points}
    known = {point.original: point for point in source.points()}
    for point in sorted(points, key=lambda point: (point.when, point.name)):
        if (copy := there.get(point.original)) is not None:
            yield Copied(point, copy, there=True)
            continue
        before = _nearest(point, [known[name] for name in there if name in known])
        with _PointCapture(source, point, before) as capture:
            parent = there[before.original] if before else None
            copy = run.store(capture, source=point.source, tags=point.tags, parent=parent, original=point)
        there[copy.original] = copy
        yield Copied(point, copy, there=False)


def _nearest(point: Point, candidates: Sequence[Point]) -> Point | None:
    """The copied point of the same machine whose time is nearest."""
    mine = [other for other in candidates if other.machine.name == point.machine.name]
    return min(mine, key=lambda other: abs(other.when - point.when), default=None)
