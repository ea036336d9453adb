"""A volume inside a larger one, as a BlockSource of its own."""

from __future__ import annotations

from collections.abc import Iterator

from formats.block import BlockSource, Extent, check_range


class Window:
    """``size`` bytes from ``start`` of another source. Closing it leaves the other one open: it is only borrowed."""

    def __init__(self, source: BlockSource, start: int, size: int) -> None:
        check_range(source.size, start, size)
        self._source = source
        self._start = start
        self._size = size
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the window."""
        return self._size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` of the window."""
        self._check(offset, len(buffer))
        self._source.readinto(buffer, self._start + offset)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The other source's extents, moved."""
        self._check(start, length)
        for extent in self._source.extents(self._start + start, length):
            yield Extent(extent.start - self._start, extent.length, extent.kind)

    def close(self) -> None:
        """Refuse further reading."""
        self._closed = True

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the window is closed")
        check_range(self._size, start, length)
