"""An origin with change tracking, in memory: what a hypervisor's will be, so that the waist is not shaped by plain hosts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from formats.block import Extent, Kind, merged
from formats.capture import CapturedDisk, Changed, Consistency, Mark, Unknown
from formats.errors import Notice
from formats.machine import Disk, Machine
from formats.memory import MemoryDisk

GRAIN = 4096


class TrackedOrigin:
    """Disks that remember, by grain, in which generation each was last written; a generation ends with each capture."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.content = {key: bytearray(size) for key, size in sizes.items()}
        self.written: dict[str, dict[int, int]] = {key: {} for key in sizes}
        self.epoch = dict.fromkeys(sizes, 0)
        self.generation = 1
        self.open_captures = 0
        self.retired: list[Mark] = []

    def write(self, key: str, data: bytes, offset: int) -> None:
        self.content[key][offset : offset + len(data)] = data
        for grain in range(offset // GRAIN, -(-(offset + len(data)) // GRAIN)):
            self.written[key][grain] = self.generation

    def grow(self, key: str, size: int) -> None:
        self.content[key].extend(bytes(size - len(self.content[key])))

    def add(self, key: str, size: int) -> None:
        self.content[key], self.written[key], self.epoch[key] = bytearray(size), {}, 0

    def lose_tracking(self, key: str) -> None:
        """As when a host crashed: older marks mean nothing any more."""
        self.epoch[key] += 1

    def inspect(self) -> Machine:
        return Machine(name="tracked", disks=tuple(Disk(id=key, size=len(data)) for key, data in self.content.items()))

    def capture(self, since: Mapping[str, Mark] | None = None) -> TrackedCapture:
        capture = TrackedCapture(self, dict(since or {}))
        self.generation += 1
        self.open_captures += 1
        return capture

    def retire(self, marks: Sequence[Mark]) -> None:
        self.retired.extend(marks)


class TrackedCapture:
    def __init__(self, origin: TrackedOrigin, since: Mapping[str, Mark]) -> None:
        self._origin, self._since = origin, since
        self.machine = origin.inspect()
        self.notices: list[Notice] = []
        self._written = {key: dict(grains) for key, grains in origin.written.items()}
        self._epoch = dict(origin.epoch)
        self.disks = {
            key: CapturedDisk(
                source=MemoryDisk(len(data), bytes(data)),
                mark=Mark(json.dumps([key, origin.epoch[key], origin.generation, len(data)])),
                consistency=Consistency.FILESYSTEM,
            )
            for key, data in origin.content.items()
        }
        self._left = False

    def changes(self, disk_id: str) -> Changed | Unknown:
        if disk_id not in self._since:
            return Unknown(reason="no mark was given")
        try:
            key, epoch, generation, size = json.loads(self._since[disk_id])
        except ValueError:
            return Unknown(reason="the mark is none of ours")
        if key != disk_id or epoch != self._epoch[disk_id]:
            return Unknown(reason="change tracking was reset since the mark")
        end = self.disks[disk_id].source.size
        grains = {grain for grain, when in self._written[disk_id].items() if when > generation}
        grains |= set(range(size // GRAIN, -(-end // GRAIN)) if end > size else ())
        extents = merged(
            Extent(g * GRAIN, min(GRAIN, end - g * GRAIN), Kind.DATA) for g in sorted(grains) if g * GRAIN < end
        )
        return Changed(extents=tuple(extents))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._left:
            self._left = True
            self._origin.open_captures -= 1
