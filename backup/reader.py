"""A point as a capture: its disks as block sources. Every byte that comes out was verified against its id."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from backup.errors import ObjectDamagedError, ObjectMissingError
from backup.keys import CHUNK
from backup.manifest import SPAN, Entry, span_count, span_length
from backup.repository import Point, PointDisk, Repository
from formats.block import BlockSource, Extent, Kind, check_range, gaps_filled, merged
from formats.capture import CapturedDisk, Changed, Unknown
from formats.errors import Notice
from formats.machine import Machine

_CACHE = 24 << 20  # bytes of chunks kept for reads that end inside one
_LEAVES = 64  # decoded leaves that are kept


class StoredDisk:
    """A disk of a point; a ``BlockSource``. Memory: the caches above and what readers ask for.

    With ``holes`` given, a chunk that cannot be had reads as zeroes and its extent is appended there, once; otherwise its error is raised.
    ``seed`` is another state of the disk, as the device that it was on: chunks that it holds at their place are taken from there, shown by
    their ids, and counted in ``bytes_kept``. It stays the caller's.
    """

    def __init__(
        self,
        repository: Repository,
        disk: PointDisk,
        *,
        holes: list[Extent] | None = None,
        seed: BlockSource | None = None,
    ) -> None:
        self.disk, self._repository, self._holes, self._seed = disk, repository, holes, seed
        self.bytes_kept = 0
        self._tree = repository.tree(disk)
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()
        self._held = 0
        self._leaves: OrderedDict[int, list[Entry]] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.disk.size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``: the chunks of the range in as few requests as their packs allow."""
        self._check(offset, len(buffer))
        position, end = offset, offset + len(buffer)
        while position < end:
            number = position // SPAN
            stop = min(end, (number + 1) * SPAN)
            self._read_span(number, buffer[position - offset : stop - offset], position - number * SPAN)
            position = stop

    def _read_span(self, number: int, part: memoryview, inside: int) -> None:
        pieces: list[tuple[int, Entry]] = []
        position, end = 0, inside + len(part)
        for entry in self._entries(number):
            if position >= end:
                break
            if position + entry.length > inside:
                pieces.append((position, entry))
            position += entry.length
        contents = self._contents(number, pieces)
        for start, entry in pieces:
            low, high = max(start, inside), min(start + entry.length, end)
            target = part[low - inside : high - inside]
            content = None if entry.id is None else contents.get(entry.id)
            target[:] = bytes(high - low) if content is None else memoryview(content)[low - start : high - start]
        # A chunk at the range's end is likely to be asked for again by the read that goes on.
        if pieces and (last := pieces[-1][1]).id is not None and pieces[-1][0] + last.length > end:
            self._keep(last.id, contents.get(last.id))

    def _contents(self, number: int, pieces: list[tuple[int, Entry]]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        with self._lock:
            for _, entry in pieces:
                if entry.id is not None and (content := self._chunks.get(entry.id)) is not None:
                    found[entry.id] = content
        if self._seed is not None:
            found |= self._seeded(self._seed, number * SPAN, [piece for piece in pieces if piece[1].id not in found])
        wanted = [entry.id for _, entry in pieces if entry.id is not None and entry.id not in found]
        try:
            found |= self._repository.blobs(wanted, CHUNK)
        except (ObjectDamagedError, ObjectMissingError):
            if self._holes is None:
                raise
            found |= self._salvaged(number, pieces, found)
        for start, entry in pieces:
            if entry.id is not None and entry.id in found and len(found[entry.id]) != entry.length:
                raise ObjectDamagedError(
                    f"a chunk at {number * SPAN + start} has another length than its manifest says"
                )
        return found

    def _seeded(self, seed: BlockSource, base: int, pieces: list[tuple[int, Entry]]) -> dict[bytes, bytes]:
        """The chunks that the seed holds where the disk has them."""
        found: dict[bytes, bytes] = {}
        for start, (length, chunk) in pieces:
            if chunk is not None and base + start + length <= seed.size:
                content = bytearray(length)
                seed.readinto(memoryview(content), base + start)
                if self._repository.keyring.id(CHUNK, content) == chunk:
                    found[chunk] = bytes(content)
        with self._lock:
            self.bytes_kept += sum(map(len, found.values()))
        return found

    def _salvaged(self, number: int, pieces: list[tuple[int, Entry]], have: dict[bytes, bytes]) -> dict[bytes, bytes]:
        """One chunk at a time: what cannot be had is noted as a hole."""
        found: dict[bytes, bytes] = {}
        for start, entry in pieces:
            if entry.id is None or entry.id in have or entry.id in found:
                continue
            try:
                found[entry.id] = self._repository.blob(entry.id, CHUNK)
            except (ObjectDamagedError, ObjectMissingError):
                self._note(Extent(number * SPAN + start, entry.length, Kind.HOLE))
        return found

    def _note(self, hole: Extent) -> None:
        with self._lock:
            if self._holes is not None and hole not in self._holes:
                self._holes.append(hole)

    def _keep(self, chunk: bytes, content: bytes | None) -> None:
        if content is None:
            return
        with self._lock:
            if chunk not in self._chunks:
                self._chunks[chunk] = content
                self._held += len(content)
            while self._held > _CACHE:
                self._held -= len(self._chunks.popitem(last=False)[1])

    def _entries(self, number: int) -> list[Entry]:
        with self._lock:
            if (known := self._leaves.get(number)) is not None:
                self._leaves.move_to_end(number)
                return known
        try:
            entries = self._tree.entries(number)
        except (ObjectDamagedError, ObjectMissingError):
            if self._holes is None:
                raise
            length = span_length(self.size, number)
            self._note(Extent(number * SPAN, length, Kind.HOLE))
            entries = [Entry(length, None)]
        with self._lock:
            self._leaves[number] = entries
            while len(self._leaves) > _LEAVES:
                self._leaves.popitem(last=False)
        return entries

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA for chunks, ZERO elsewhere; walks the pages of the range only, and none of zero ranges."""
        self._check(start, length)
        return gaps_filled(merged(self._data(start, length)), start, length, Kind.ZERO)

    def _data(self, start: int, length: int) -> Iterator[Extent]:
        if not length:
            return
        first, last = start // SPAN, min(span_count(self.size), -(-(start + length) // SPAN))
        # Where pages may be damaged, span by span: a broken inner page must not hide what lies beside it.
        salvaging = self._holes is not None
        for number in range(first, last) if salvaging else (n for n, _ in self._tree.leaves(first, last)):
            position = number * SPAN
            for entry in self._entries(number):
                if entry.id is not None:
                    yield Extent(position, entry.length, Kind.DATA)
                position += entry.length

    def close(self) -> None:
        """Forget the caches; the repository stays the caller's."""
        self._closed = True
        with self._lock:
            self._chunks.clear()
            self._leaves.clear()

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self.size, start, length)


class StoredCapture:
    """A point as a ``Capture``: what ``emit``, ``serve`` and a drill take."""

    def __init__(
        self, repository: Repository, point: Point, *, holes: Mapping[str, list[Extent]] | None = None
    ) -> None:
        self.repository, self.point = repository, point
        self.machine: Machine = point.machine
        self._sources = {
            disk.id: StoredDisk(repository, disk, holes=None if holes is None else holes[disk.id])
            for disk in point.disks
        }
        self.disks: Mapping[str, CapturedDisk] = {
            disk.id: CapturedDisk(source=self._sources[disk.id], mark=None, consistency=disk.consistency)
            for disk in point.disks
        }
        self.notices = tuple(
            Notice(
                code="disk-missing", message=f"the point does not hold this disk: {missing.reason}", subject=missing.id
            )
            for missing in point.missing
        )

    def changes(self, disk_id: str) -> Changed | Unknown:
        """A point has no marks."""
        return Unknown(reason=f"disk {disk_id} is that of a restore point")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for source in self._sources.values():
            source.close()
