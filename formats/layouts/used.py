"""Maps of the bytes that a volume uses, and how they are put together.

A ``UsedMap`` answers, for any range, which bytes are in use (DATA) and which are *provably* free (ZERO). What is not
understood is DATA: a wrong DATA costs time, a wrong ZERO costs somebody's file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from formats.block import Extent, Kind, check_range, merged


class UsedMap(Protocol):
    """Which bytes of a volume are in use.

    ``extents`` keeps S3-S6 of ``formats.block``: DATA and ZERO extents that tile the range, ascending, merged,
    clipped, lazily; it may read
    from the volume and raise what that raises. It is safe from several threads. It describes the volume as it was when
    the map was made: the volume must not change while the map is in use.
    """

    @property
    def size(self) -> int:
        """Bytes of the volume."""
        ...

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Tile ``length`` bytes from ``start`` with DATA (in use, or not known) and ZERO (free)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What was found at the start of a volume.

    ``used`` is None when the volume has to be read whole; ``reason`` then says why, for a person.
    """

    kind: str
    used: UsedMap | None = None
    reason: str = ""


class Uniform:
    """A volume of which all bytes are of one kind."""

    def __init__(self, size: int, kind: Kind) -> None:
        self._size = size
        self._kind = kind

    @property
    def size(self) -> int:
        """Bytes of the volume."""
        return self._size

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """One extent."""
        check_range(self._size, start, length)
        if length:
            yield Extent(start, length, self._kind)


class Section:
    """``size`` bytes from ``start`` of another map, as a map of their own."""

    def __init__(self, whole: UsedMap, start: int, size: int) -> None:
        check_range(whole.size, start, size)
        self._whole = whole
        self._start = start
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of the section."""
        return self._size

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The whole's extents, moved."""
        check_range(self._size, start, length)
        for extent in self._whole.extents(self._start + start, length):
            yield Extent(extent.start - self._start, extent.length, extent.kind)


class Composite:
    """A volume made of parts; wherever no part lies, it is DATA.

    ``parts`` are (start, map), ascending. Parts must lie inside the volume and must not overlap: ``ValueError``.
    """

    def __init__(self, size: int, parts: Iterable[tuple[int, UsedMap]]) -> None:
        self._size = size
        self._parts: Sequence[tuple[int, UsedMap]] = tuple(part for part in parts if part[1].size)
        self._starts = [start for start, _ in self._parts]
        position = 0
        for start, part in self._parts:
            if start < position or start + part.size > size:
                raise ValueError(f"part {start}+{part.size} overlaps another or leaves the volume of {size} bytes")
            position = start + part.size

    @property
    def size(self) -> int:
        """Bytes of the volume."""
        return self._size

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The parts' extents, and DATA between them."""
        check_range(self._size, start, length)
        return merged(self._tiles(start, start + length))

    def _tiles(self, position: int, end: int) -> Iterator[Extent]:
        index = max(0, bisect_right(self._starts, position) - 1)
        while index < len(self._parts) and position < end:
            base, part = self._parts[index]
            index += 1
            low, high = max(base, position), min(base + part.size, end)
            if low >= high:
                continue
            if low > position:
                yield Extent(position, low - position, Kind.DATA)
            for extent in part.extents(low - base, high - low):
                yield Extent(base + extent.start, extent.length, extent.kind)
            position = high
        if position < end:
            yield Extent(position, end - position, Kind.DATA)
