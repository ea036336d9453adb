"""Ascending writes of any length, gathered into the aligned units that a sequential format is made of."""

from __future__ import annotations

from collections.abc import Callable

from formats.block import check_range


class Gatherer:
    """Collects ascending, non-overlapping ranges of a disk and hands on each aligned unit that holds any of them.

    ``emit(data, offset)`` gets each such unit once, in ascending order: ``unit`` bytes, fewer at the end of the disk, zero wherever
    nothing was written. Its first argument is never touched again. A range that goes back raises ``ValueError``.
    """

    def __init__(self, size: int, unit: int, emit: Callable[[bytes | bytearray, int], None]) -> None:
        self.size = size
        self._unit = unit
        self._emit = emit
        self._position = 0  # where the next range may start
        self._start = 0  # of the unit that is being filled
        self._filling: bytearray | None = None

    def write(self, data: memoryview, offset: int) -> None:
        """Take ``data`` at ``offset``."""
        self.skip(offset, len(data))
        done = 0
        while done < len(data):
            start = (offset + done) // self._unit * self._unit
            length = min(self._unit, self.size - start)
            inside = offset + done - start
            step = min(length - inside, len(data) - done)
            if self._start != start:
                self.finish()
            piece = data[done : done + step]
            done += step
            if step == length:
                self._emit(bytes(piece), start)
                continue
            if self._filling is None:
                self._start, self._filling = start, bytearray(length)
            self._filling[inside : inside + step] = piece
            if inside + step == length:
                self.finish()

    def skip(self, start: int, length: int) -> None:
        """Leave a range zero; it counts as written."""
        check_range(self.size, start, length)
        if start < self._position:
            raise ValueError(f"a write at {start} after one that ended at {self._position}: the format is sequential")
        self._position = start + length

    def finish(self) -> None:
        """Hand on the unit that is being filled, if there is one."""
        if self._filling is not None:
            filled, self._filling = self._filling, None
            self._emit(filled, self._start)
