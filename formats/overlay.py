"""Copy-on-write in memory: a disk that looks changed while its parent stays as it is."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from formats.block import BlockSource, Extent, Kind, check_range, merged
from formats.errors import NoSpaceError

PAGE = 64 * 1024
"""Bytes that the first write into a page costs in memory."""


class Overlay:
    """A disk of the size of ``parent`` that takes writes into memory; a ``BlockSource`` and a random-access ``BlockSink``.

    Several overlays may share one parent: it is never written and not closed. ``limit`` bounds the memory for written pages, in bytes: a
    write past it raises ``NoSpaceError``. Ranges that were zeroed cost nothing. K4 reads here: what was not written is the parent's.
    """

    random_access = True

    def __init__(self, parent: BlockSource, *, limit: int | None = None) -> None:
        self._parent, self._limit = parent, limit
        self._pages: dict[int, bytearray] = {}
        self._zeroed = _Ranges()  # pages that read as zeroes unless they are in _pages
        self._lock = threading.Lock()
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._parent.size

    @property
    def memory(self) -> int:
        """Bytes of written pages that are held."""
        return len(self._pages) * PAGE

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``: changed pages from memory, the runs between them from the parent, each with one read."""
        self._check(offset, len(buffer))
        for extent, changed in list(self._runs(offset, offset + len(buffer))):
            part = buffer[extent.start - offset : extent.end - offset]
            if not changed:
                self._parent.readinto(part, extent.start)
            elif extent.kind is Kind.ZERO:
                part[:] = bytes(len(part))
            else:
                self._copy(part, extent.start)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA where pages were written, ZERO where they were zeroed, elsewhere what the parent says."""
        self._check(start, length)
        return merged(self._tiles(start, start + length))

    def changed(self) -> Iterator[Extent]:
        """What was written (DATA) and zeroed (ZERO) since the overlay was made, ascending, whole pages; nothing else."""
        self._check(0, 0)
        return merged(extent for extent, changed in self._runs(0, self.size) if changed)

    def write(self, data: memoryview, offset: int) -> None:
        """Keep ``data``; the rest of a page that is written in part is fetched from the parent first."""
        self._check(offset, len(data))
        done = 0
        while done < len(data):
            number, inside = divmod(offset + done, PAGE)
            step = min(PAGE - inside, len(data) - done)
            whole = step == min(PAGE, self.size - number * PAGE)
            below = bytearray(PAGE) if whole else self._below(number)
            with self._lock:
                page = self._page(number, below)
                page[inside : inside + step] = data[done : done + step]
            done += step

    def zero(self, start: int, length: int) -> None:
        """Forget whole pages, clear the rest."""
        self._check(start, length)
        end = start + length
        first = -(-start // PAGE)
        last = -(-end // PAGE) if end == self.size else end // PAGE
        if first >= last:
            self.write(memoryview(bytes(length)), start)
            return
        self.write(memoryview(bytes(first * PAGE - start)), start)
        if last * PAGE < end:
            self.write(memoryview(bytes(end - last * PAGE)), last * PAGE)
        with self._lock:
            if last - first < len(self._pages):
                for number in range(first, last):
                    self._pages.pop(number, None)
            else:
                self._pages = {number: page for number, page in self._pages.items() if not first <= number < last}
            self._zeroed.add(first, last)

    def flush(self) -> None:
        """Nothing to do: memory has no stable storage below it."""
        self._check(0, 0)

    def close(self) -> None:
        """Forget the changes; the parent stays open."""
        with self._lock:
            self._closed = True
            self._pages = {}

    def _below(self, number: int) -> bytearray:
        """What a page held before its first write; read outside the lock, so that a slow parent stops nobody."""
        content = bytearray(PAGE)
        with self._lock:
            if number in self._pages or self._zeroed.holds(number):
                return content
        start = number * PAGE
        with memoryview(content) as view:
            self._parent.readinto(view[: min(PAGE, self.size - start)], start)
        return content

    def _page(self, number: int, below: bytearray) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            if self._closed:
                raise ValueError("the disk is closed")
            if self._limit is not None and (len(self._pages) + 1) * PAGE > self._limit:
                raise NoSpaceError(
                    f"the overlay is full: {self._limit} bytes in memory",
                    advice="Raise the limit of the overlay; what writes to it writes more than was expected.",
                )
            # The page may have been zeroed since it was fetched: then what was below it does not count any more.
            page = self._pages[number] = bytearray(PAGE) if self._zeroed.holds(number) else below
        return page

    def _copy(self, part: memoryview, start: int) -> None:
        done = 0
        with self._lock:
            while done < len(part):
                number, inside = divmod(start + done, PAGE)
                step = min(PAGE - inside, len(part) - done)
                page = self._pages.get(number)  # a page that was zeroed meanwhile is gone
                part[done : done + step] = bytes(step) if page is None else page[inside : inside + step]
                done += step

    def _tiles(self, start: int, end: int) -> Iterator[Extent]:
        for extent, changed in self._runs(start, end):
            if changed:
                yield extent
            else:
                yield from self._parent.extents(extent.start, extent.length)

    def _runs(self, start: int, end: int) -> Iterator[tuple[Extent, bool]]:
        """Tile the range with (extent, whether it was changed). Walks what was changed when it began, not the disk."""
        first, last = start // PAGE, -(-end // PAGE)
        with self._lock:
            if last - first < len(self._pages):
                pages = [number for number in range(first, last) if number in self._pages]
            else:
                pages = sorted(number for number in self._pages if first <= number < last)
            zeroed = list(self._zeroed.within(first, last))
        marks = _layered(pages, zeroed, first, last)
        for low, high, kind in marks:
            clip_low, clip_high = max(low * PAGE, start), min(high * PAGE, end)
            if clip_low < clip_high:
                yield Extent(clip_low, clip_high - clip_low, kind or Kind.DATA), kind is not None

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self.size, start, length)


def _layered(
    pages: list[int], zeroed: list[tuple[int, int]], first: int, last: int
) -> Iterator[tuple[int, int, Kind | None]]:
    """Tile pages ``first`` to ``last``: written ones (DATA) lie over zeroed ones (ZERO) over the parent's (None)."""
    position, index = first, 0
    starts = [start for start, _ in zeroed]
    while position < last:
        if index < len(pages) and pages[index] == position:
            begin = position
            while index < len(pages) and pages[index] == position:
                position, index = position + 1, index + 1
            yield begin, position, Kind.DATA
            continue
        stop = pages[index] if index < len(pages) else last
        spot = bisect_right(starts, position) - 1
        if spot >= 0 and zeroed[spot][1] > position:
            stop = min(stop, zeroed[spot][1])
            yield position, stop, Kind.ZERO
        else:
            if spot + 1 < len(zeroed):
                stop = min(stop, zeroed[spot + 1][0])
            yield position, stop, None
        position = stop


class _Ranges:
    """A set of whole numbers as sorted, disjoint, non-touching ranges."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Add ``start`` up to but not including ``end``."""
        low, high = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if low < high:
            start, end = min(start, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high], self._ends[low:high] = [start], [end]

    def holds(self, number: int) -> bool:
        """Whether ``number`` is in the set."""
        spot = bisect_right(self._starts, number) - 1
        return spot >= 0 and number < self._ends[spot]

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges that touch ``start`` up to ``end``."""
        spot = bisect_right(self._ends, start)
        while spot < len(self._starts) and self._starts[spot] < end:
            yield self._starts[spot], self._ends[spot]
            spot += 1
