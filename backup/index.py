"""Where blobs lie: sorted segments that are searched where they are, and what a run has added so far.

Memory does not grow with the repository: segments are mapped files, and a run's additions go to a segment of their own at
``_FLUSH`` entries.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from heapq import merge
from pathlib import Path

from backup.errors import ObjectDamagedError
from backup.pack import Place

MAGIC = b"P2VINDX1"
_HEAD = struct.Struct("<8sII")
_FAN = struct.Struct("<256I")
_PACK = struct.Struct("<32sI")
_ENTRY = struct.Struct("<32sIIII")
_TABLE = _HEAD.size + _FAN.size
_ENTRY_TAIL = struct.Struct("<IIII")
_PLAIN_MASK = (1 << 28) - 1
MAX_ENTRIES = 1 << 20
"""Entries of a segment that merging makes, about; 48 MiB."""


class Segment:
    """One segment, read where it lies. ``ObjectDamagedError`` when its tables do not fit its length."""

    def __init__(self, name: str, data: bytes | mmap.mmap) -> None:
        self.name = name
        self._data = data
        if len(data) < _TABLE:
            raise self._damaged()
        magic, packs, count = _HEAD.unpack_from(data)
        self._fan = (0, *_FAN.unpack_from(data, _HEAD.size))
        self._entries = _TABLE + packs * _PACK.size
        self.count: int = count
        ascending = all(low <= high for low, high in zip(self._fan, self._fan[1:], strict=False))
        if (
            magic != MAGIC
            or len(data) != self._entries + count * _ENTRY.size
            or self._fan[256] != count
            or not ascending
        ):
            raise self._damaged()
        self.packs: list[tuple[bytes, int]] = [_PACK.unpack_from(data, _TABLE + n * _PACK.size) for n in range(packs)]

    @classmethod
    def of_file(cls, name: str, path: Path) -> Segment:
        """A segment in a file, mapped."""
        with path.open("rb") as file:
            try:
                return cls(name, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except ValueError:  # an empty file cannot be mapped
                return cls(name, b"")

    def ordinal(self, blob_id: bytes) -> int | None:
        """Which entry is the blob's; None when this segment does not know it."""
        data, base, size = self._data, self._entries, _ENTRY.size
        low: int = self._fan[blob_id[0]]
        high: int = self._fan[blob_id[0] + 1]
        while low < high:
            middle = (low + high) >> 1
            start = base + middle * size
            found = data[start : start + 32]
            if found < blob_id:
                low = middle + 1
            elif found > blob_id:
                high = middle
            else:
                return middle
        return None

    def find(self, blob_id: bytes) -> Place | None:
        """Where the blob lies, if this segment knows it."""
        ordinal = self.ordinal(blob_id)
        return None if ordinal is None else self.place(ordinal)

    def place(self, ordinal: int) -> Place:
        """Where the blob of an entry lies."""
        number, offset, sealed, word = _ENTRY_TAIL.unpack_from(self._data, self._entries + ordinal * _ENTRY.size + 32)
        if number >= len(self.packs):
            raise self._damaged()
        return Place(self.packs[number][0], offset, sealed, word & _PLAIN_MASK, word >> 28)

    def id(self, ordinal: int) -> bytes:
        """The id of an entry's blob."""
        start = self._entries + ordinal * _ENTRY.size
        return bytes(self._data[start : start + 32])

    def __iter__(self) -> Iterator[tuple[bytes, Place]]:
        for ordinal in range(self.count):
            yield self.id(ordinal), self.place(ordinal)

    def close(self) -> None:
        """Unmap."""
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def _damaged(self) -> ObjectDamagedError:
        return ObjectDamagedError(
            f"{self.name} is damaged",
            advice="`p2v-backup repair-index` makes it anew from the packs.",
            subject=self.name,
        )


def encode_segment(entries: Iterable[tuple[bytes, Place]], sizes: Mapping[bytes, int]) -> bytes:
    """A segment of ``entries``, ascending by id; ``sizes`` are the lengths of all packs that it shall name."""
    numbers = {digest: number for number, digest in enumerate(sizes)}
    fan, body, count = [0] * 256, bytearray(), 0
    pack = _ENTRY.pack
    for blob_id, place in entries:
        body += pack(blob_id, numbers[place.pack], place.offset, place.sealed, place.plain | place.kind << 28)
        fan[blob_id[0]] += 1
        count += 1
    total = 0
    for first in range(256):
        total += fan[first]
        fan[first] = total
    table = b"".join(_PACK.pack(digest, size) for digest, size in sizes.items())
    return _HEAD.pack(MAGIC, len(sizes), count) + _FAN.pack(*fan) + table + bytes(body)


class Index:
    """All segments of a repository and what a run has added. Safe from several threads.

    ``shunned`` packs are not looked at: they are condemned, and nothing new may rely on them.
    """

    def __init__(self, segments: Iterable[Segment] = (), *, shunned: frozenset[bytes] = frozenset()) -> None:
        self.segments = sorted(segments, key=lambda segment: -segment.count)
        self.shunned = shunned
        self.added: dict[bytes, Place] = {}
        self.added_packs: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def find(self, blob_id: bytes) -> Place | None:
        """Where the blob lies; None when nobody knows it, or only in shunned packs."""
        if (place := self.added.get(blob_id)) is not None:
            return place
        for segment in self.segments:
            if (place := segment.find(blob_id)) is not None and place.pack not in self.shunned:
                return place
        return None

    def places(self, blob_id: bytes) -> Iterator[Place]:
        """Every place where the blob lies, those in shunned packs last."""
        found = [place] if (place := self.added.get(blob_id)) is not None else []
        found += [place for segment in self.segments if (place := segment.find(blob_id)) is not None]
        return iter(sorted(dict.fromkeys(found), key=lambda place: place.pack in self.shunned))

    def add(self, places: Iterable[tuple[bytes, Place]], pack: bytes, size: int) -> int:
        """Take in the blobs of a pack that is stored; returns how many entries are not in a segment yet."""
        with self._lock:
            self.added.update(places)
            self.added_packs[pack] = size
            return len(self.added)

    def take_added(self) -> tuple[dict[bytes, Place], dict[bytes, int]]:
        """What was added, to become a segment; it stays findable until ``settle``."""
        with self._lock:
            return dict(self.added), dict(self.added_packs)

    def settle(self, segment: Segment) -> None:
        """``segment`` now holds what ``take_added`` gave."""
        with self._lock:
            self.segments = sorted([*self.segments, segment], key=lambda segment: -segment.count)
            for blob_id, place in segment:
                if self.added.get(blob_id) == place:
                    del self.added[blob_id]
            for digest, _ in segment.packs:
                self.added_packs.pop(digest, None)

    def packs(self) -> dict[bytes, int]:
        """All packs that are known, with their lengths."""
        known = dict(self.added_packs)
        for segment in self.segments:
            known.update(segment.packs)
        return known

    def entries(self) -> Iterator[tuple[bytes, Place]]:
        """All entries of all segments, ascending by id; a blob that lies twice comes twice, neighbours to each other."""
        return merge(*self.segments, key=_first)

    def close(self) -> None:
        """Unmap the segments."""
        for segment in self.segments:
            segment.close()


def _first(entry: tuple[bytes, Place]) -> bytes:
    return entry[0]


def sorted_entries(added: Mapping[bytes, Place]) -> Iterator[tuple[bytes, Place]]:
    """Entries ascending by id."""
    for blob_id in sorted(added):
        yield blob_id, added[blob_id]
