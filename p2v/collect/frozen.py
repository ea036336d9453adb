"""The capture of a live host: disks composed from what was copied aside under a freeze, from snapshots and from what nobody changes.

Inside a physical volume the metadata is that from *before* the snapshots, so that the copy never knew of them; each run of extents is
read from its volume's snapshot, at the place where the metadata says it lies. Over the composition lies a map of the used blocks,
made from the same frozen bytes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from formats.block import BlockSource, Extent, Kind, check_range, digest_of
from formats.capture import CapturedDisk, Unknown
from formats.errors import Notice, ReadError
from formats.images.raw import RawFile, RawSink
from formats.layers import Mapped, Segment, UsedOnly
from formats.layouts import ext, lvm
from formats.layouts.disk import used_of_disks
from formats.layouts.window import Window
from formats.machine import Machine
from formats.memory import MemoryDisk
from formats.transfer import copy, fingerprint
from p2v.collect.consistency import DiskPlan, Plan, Region, Treatment
from p2v.collect.guard import Guard
from p2v.errors import ConsistencyError, DiskVanishedError, LinkLostError

_REST_MOST = 16 << 20  # space outside partitions is copied aside up to this size; larger gaps hold nothing that changes
_METADATA_MOST = 256 << 20
_TRIES = 5
_COPY_THREADS = 4

Opener = Callable[[str], BlockSource]


class Watched:
    """A snapshot's device: once the snapshot is lost, reading raises ``ConsistencyError`` instead of what the device says; and when one of
    the disks ``below`` is gone, what that disk says.
    """

    def __init__(self, source: BlockSource, guard: Guard, below: Sequence[BlockSource] = ()) -> None:
        self._source, self._guard, self._below = source, guard, below

    @property
    def size(self) -> int:
        """Bytes of the snapshot."""
        return self._source.size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Read; a failure is the snapshot's if it no longer stands."""
        if self._guard.failure:
            raise self._guard.error()
        try:
            self._source.readinto(buffer, offset)
        except (ReadError, DiskVanishedError, ValueError):
            self._guard.check()
            for disk in self._below:
                disk.readinto(memoryview(bytearray(min(disk.size, 4096))), 0)
            raise
        if self._guard.failure:
            raise self._guard.error()

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """As the device says: DATA."""
        return self._source.extents(start, length)

    def digest(self, start: int, length: int) -> bytes | None:
        """As the device says, unless the snapshot is lost."""
        if self._guard.failure:
            raise self._guard.error()
        found = digest_of(self._source, start, length)
        if self._guard.failure:
            raise self._guard.error()
        return found

    def close(self) -> None:
        """Close the device, without which the snapshot cannot be removed."""
        self._source.close()


class Column:
    """What one area of a striped segment holds, taken from its logical volume."""

    def __init__(self, volume: BlockSource, base: int, *, stripe: int, width: int, column: int, size: int) -> None:
        self._volume, self._base = volume, base
        self._stripe, self._width, self._column = stripe, width, column
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of the area."""
        return self._size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Read the rows of stripes that hold the range in one go, and pick this column's."""
        check_range(self._size, offset, len(buffer))
        row = self._stripe * self._width
        done = 0
        while done < len(buffer):
            first, inside = divmod(offset + done, self._stripe)
            rows = max(1, min((4 << 20) // row, -(-(inside + len(buffer) - done) // self._stripe)))
            block = memoryview(bytearray(rows * row))
            self._volume.readinto(block, self._base + first * row)
            for number in range(rows):
                at = number * row + self._column * self._stripe + inside
                step = min(self._stripe - inside, len(buffer) - done)
                buffer[done : done + step] = block[at : at + step]
                done += step
                inside = 0

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA throughout."""
        check_range(self._size, start, length)
        if length:
            yield Extent(start, length, Kind.DATA)

    def close(self) -> None:
        """The volume is closed by its owner."""


class SshCapture:
    """One live host at one instant, as far as its plan can give that; a ``Capture``.

    ``hold`` freezes the machine for a bounded time, see ``formats.capture.Holdable``.
    """

    def __init__(
        self,
        machine: Machine,
        disks: Mapping[str, CapturedDisk],
        notices: list[Notice],
        *,
        guard: Guard | None,
        hold: Callable[[], contextlib.AbstractContextManager[Mapping[str, BlockSource]]],
        stack: contextlib.ExitStack,
        report: Callable[[Notice], None],
    ) -> None:
        self.machine = machine
        self.disks = disks
        self.notices = notices
        self._guard, self._stack, self._report = guard, stack, report
        self.hold = hold
        self._left = False

    def changes(self, disk_id: str) -> Unknown:
        """A plain host has no change tracking."""
        del disk_id
        return Unknown(reason="the host has no change tracking: everything is read and compared")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release all on the source; ``ConsistencyError`` when a snapshot was lost while the capture was open, never silently."""
        if self._left:
            return
        self._left = True
        failure: ConsistencyError | None = None
        try:
            if self._guard is not None and isinstance(error, LinkLostError):
                self._guard.abandon()
            elif self._guard is not None and kind is None:
                self._guard.check()
        except ConsistencyError as lost:
            failure = lost
        except LinkLostError:
            assert self._guard is not None  # noqa: S101 - it has raised
            self._guard.abandon()
            raise
        finally:
            self._stack.close()
        for leftover in self._guard.leftovers if self._guard is not None else ():
            self._report(
                Notice(
                    code="snapshot-left",
                    message=f"a snapshot could not be removed from the source: {leftover}",
                    advice="Run `p2v cleanup` against the source.",
                )
            )
        if failure is not None:
            raise failure


class Staging:
    """Copies regions aside while they hold still, into a scratch folder of its own, and composes disks from them."""

    def __init__(self, plan: Plan, live: Mapping[str, BlockSource], labels: Mapping[str, lvm.PhysicalLabel]) -> None:
        self._plan, self._live, self._labels = plan, live, labels
        self._folder = tempfile.TemporaryDirectory(prefix="p2v-stage-")
        self._staged: dict[tuple[str, int], BlockSource] = {}

    def close(self) -> None:
        """Remove what was copied aside; idempotent."""
        for source in self._staged.values():
            source.close()
        self._staged.clear()
        self._folder.cleanup()

    def held(self) -> Iterator[DiskPlan]:
        """The plans of the disks that are one instant."""
        return (plan for plan in self._plan.disks if not plan.reason)

    def before_snapshots(self) -> None:
        """Copy aside what lies outside partitions, and the metadata of the physical volumes."""
        for plan in self.held():
            live = self._live[plan.disk.id]
            for start, size in _outside(plan, live.size):
                if size <= _REST_MOST:
                    self._keep(plan, start, _in_memory(live, start, size))
            for region in plan.regions:
                if region.treatment is Treatment.PHYSICAL_VOLUME:
                    for start, size in self._metadata(region):
                        self._keep(plan, start, _in_memory(live, start, size))

    def frozen(self, guard: Guard) -> None:
        """Copy aside the mounted partitions: those that are frozen now, and those that cannot be."""
        for plan in self.held():
            live = self._live[plan.disk.id]
            for region in plan.regions:
                view = Window(live, region.start, region.size)
                if region.treatment is Treatment.STAGED:
                    self._keep(plan, region.start, self._stage(plan, region, view))
                elif region.treatment is Treatment.STAGED_TWICE:
                    self._keep(plan, region.start, self._stage_twice(plan, region, view, guard))

    def _keep(self, plan: DiskPlan, start: int, source: BlockSource) -> None:
        self._staged[plan.disk.id, start] = source

    def _stage(self, plan: DiskPlan, region: Region, view: BlockSource) -> BlockSource:
        used = ext.used(view) if region.content.startswith("ext") else None
        source = view if used is None else UsedOnly(view, used.extents)
        path = Path(self._folder.name) / f"{len(self._staged)}-{region.path.rsplit('/', 1)[-1]}"
        sink = RawSink(path, region.size)
        try:
            copy(source, sink, threads=_COPY_THREADS)
        finally:
            sink.close()
        del plan
        return RawFile(path)

    def _stage_twice(self, plan: DiskPlan, region: Region, view: BlockSource, guard: Guard) -> BlockSource:
        for _ in range(_TRIES):
            guard.sync()
            staged = self._stage(plan, region, view)
            if fingerprint(staged) == fingerprint(view):
                return staged
            staged.close()
        raise ConsistencyError(
            f"{region.path} ({region.mount}) cannot be frozen and changed each of the {_TRIES} times it was read",
            advice="Stop what writes there for the start of the copy.",
            subject=region.path,
        )

    def _metadata(self, region: Region) -> list[tuple[int, int]]:
        """What of a physical volume lies outside its extents, as ranges of the disk."""
        label = self._labels[region.path]
        group = label.group
        pv = _member(label)
        if group is None or pv is None:
            raise ConsistencyError(f"{region.path} is not a member of its own group", subject=region.path)
        end = pv.start + pv.count * group.extent_size
        if pv.start > _METADATA_MOST or end > region.size:
            raise ConsistencyError(f"the LVM metadata of {region.path} is out of bounds", subject=region.path)
        tail = region.size - end
        ranges = [(region.start, pv.start)]
        return [*ranges, (region.start + end, tail)] if 0 < tail <= _METADATA_MOST else ranges

    def unchanged(self, now: Mapping[str, lvm.PhysicalLabel]) -> None:
        """Raise ``ConsistencyError`` if the volumes lie elsewhere than before the snapshots: then somebody else works on the group."""
        for path, label in self._labels.items():
            after = now[path].group
            if label.group is None or after is None:
                continue
            later = {volume.uuid: volume for volume in after.logical}
            for volume in label.group.logical:
                found = later.get(volume.uuid)
                if found is None or found.segments != volume.segments:
                    raise ConsistencyError(
                        f"the logical volume {label.group.name}/{volume.name} was changed while the capture began",
                        advice="Wait until the work on the volume group is done, then run the command again.",
                        subject=path,
                    )

    def compose(self, snapshots: Mapping[tuple[str, str], BlockSource]) -> dict[str, BlockSource]:
        """The disks by id, each with its map of used blocks; ``snapshots`` are by group and volume name."""
        whole = {
            plan.disk.id: self._live[plan.disk.id] if plan.reason else self._composed(plan, snapshots)
            for plan in self._plan.disks
        }
        maps = used_of_disks(whole, {plan.disk.id: plan.disk.logical_sector for plan in self._plan.disks})
        return {key: UsedOnly(source, maps[key].extents) for key, source in whole.items()}

    def _composed(self, plan: DiskPlan, snapshots: Mapping[tuple[str, str], BlockSource]) -> Mapped:
        live = self._live[plan.disk.id]
        segments = []
        for start, size in _outside(plan, live.size):
            staged = self._staged.get((plan.disk.id, start))
            segments.append(_segment(start, size, staged, live))
        for region in plan.regions:
            if region.treatment is Treatment.PHYSICAL_VOLUME:
                segments += self._physical(plan, region, snapshots)
            else:
                staged = self._staged.get((plan.disk.id, region.start))
                segments.append(_segment(region.start, region.size, staged, live))
        return Mapped(live.size, sorted(segments, key=lambda segment: segment.start))

    def _physical(
        self, plan: DiskPlan, region: Region, snapshots: Mapping[tuple[str, str], BlockSource]
    ) -> Iterator[Segment]:
        live = self._live[plan.disk.id]
        for start, size in self._metadata(region):
            yield _segment(start, size, self._staged[plan.disk.id, start], live)
        label = self._labels[region.path]
        group, pv = label.group, _member(label)
        assert group is not None and pv is not None  # noqa: S101 - _metadata has raised else
        unit = group.extent_size
        for first, end, (volume, segment, column) in group.occupied(pv) or ():
            start, size = region.start + pv.start + first * unit, (end - first) * unit
            snapshot = snapshots.get((group.name, volume.name))
            if snapshot is None:  # swap, or not active: nothing that changes is read from it
                yield _segment(start, size, None, live)
            elif len(segment.areas) == 1:
                yield Segment(start, size, snapshot, segment.start * unit)
            else:
                source = Column(
                    snapshot,
                    segment.start * unit,
                    stripe=segment.stripe_size,
                    width=len(segment.areas),
                    column=column,
                    size=size,
                )
                yield Segment(start, size, source, 0)


def _segment(start: int, size: int, staged: BlockSource | None, live: BlockSource) -> Segment:
    return Segment(start, size, live, start) if staged is None else Segment(start, size, staged, 0)


def _member(label: lvm.PhysicalLabel) -> lvm.PhysicalVolume | None:
    return next((pv for pv in label.group.physical if pv.uuid == label.uuid), None) if label.group is not None else None


def _outside(plan: DiskPlan, size: int) -> Sequence[tuple[int, int]]:
    """The (start, size) of what no region covers."""
    gaps = []
    position = 0
    for region in plan.regions:
        if region.start > position:
            gaps.append((position, region.start - position))
        position = max(position, region.start + region.size)
    return [*gaps, (position, size - position)] if position < size else gaps


def _in_memory(live: BlockSource, start: int, size: int) -> MemoryDisk:
    content = bytearray(size)
    live.readinto(memoryview(content), start)
    return MemoryDisk(size, bytes(content))
