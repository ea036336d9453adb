"""Disks in memory: product code (staged boot areas, small overlays) and the default in unit tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from formats.block import Extent, Kind, check_range, merged

_PAGE = 64 * 1024
_ZEROES = memoryview(bytes(_PAGE))


class MemoryDisk:
    """A sparse, growable-free disk in memory; a ``BlockSource`` and a random-access ``BlockSink`` at once.

    Memory is used for written 64-KiB pages only, so a disk of many TiB costs nothing until it is written.
    """

    random_access = True

    def __init__(self, size: int, content: bytes = b"") -> None:
        if size < 0 or len(content) > size:
            raise ValueError(f"{len(content)} bytes do not fit a disk of {size} bytes")
        self._size = size
        self._pages: dict[int, bytearray] = {}
        self._lock = threading.Lock()
        self._closed = False
        if content:
            self.write(memoryview(content), 0)

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        self._check(offset, len(buffer))
        done = 0
        with self._lock:
            while done < len(buffer):
                number, inside = divmod(offset + done, _PAGE)
                step = min(_PAGE - inside, len(buffer) - done)
                page = self._pages.get(number)
                buffer[done : done + step] = (_ZEROES if page is None else memoryview(page))[inside : inside + step]
                done += step

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA for written pages, ZERO elsewhere."""
        self._check(start, length)
        return merged(self._tiles(start, length))

    def _tiles(self, start: int, length: int) -> Iterator[Extent]:
        # Walks written pages, not the disk: a gap of any length is one extent.
        end, position = start + length, start
        with self._lock:
            written = sorted(n for n in self._pages if n * _PAGE < end and (n + 1) * _PAGE > start)
        for number in written:
            low, high = max(number * _PAGE, start), min((number + 1) * _PAGE, end)
            if low > position:
                yield Extent(position, low - position, Kind.ZERO)
            yield Extent(low, high - low, Kind.DATA)
            position = high
        if position < end:
            yield Extent(position, end - position, Kind.ZERO)

    def write(self, data: memoryview, offset: int) -> None:
        """Store ``data`` at ``offset``."""
        self._check(offset, len(data))
        done = 0
        with self._lock:
            while done < len(data):
                number, inside = divmod(offset + done, _PAGE)
                step = min(_PAGE - inside, len(data) - done)
                page = self._pages.setdefault(number, bytearray(_PAGE))
                page[inside : inside + step] = data[done : done + step]
                done += step

    def zero(self, start: int, length: int) -> None:
        """Drop whole pages, clear the rest."""
        self._check(start, length)
        end = start + length
        with self._lock:
            touched = [n for n in self._pages if n * _PAGE < end and (n + 1) * _PAGE > start]
            for number in touched:
                low, high = max(number * _PAGE, start), min((number + 1) * _PAGE, end)
                if high - low == _PAGE:
                    del self._pages[number]
                else:
                    base = number * _PAGE
                    self._pages[number][low - base : high - base] = bytes(high - low)

    def flush(self) -> None:
        """Nothing to do: memory has no stable storage below it."""
        self._check(0, 0)

    def close(self) -> None:
        """Forget the content."""
        self._closed = True
        self._pages = {}

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self._size, start, length)
