"""A sink over a disk that holds an earlier state already: what is there is not written again, which would take time, room and wear."""

from __future__ import annotations

from formats.block import BlockSink, BlockSource, Kind, is_zero

_STEP = 1 << 20  # bytes that are looked at at once where zeroes are wanted


class Refill:
    """Passes on to ``sink`` only what differs from ``there``: the same disk, read. Both stay the caller's.

    Not K4: what nobody writes or zeroes stays as it is. Random access.
    """

    random_access = True

    def __init__(self, there: BlockSource, sink: BlockSink) -> None:
        self._there, self._sink = there, sink
        self.size = sink.size

    def write(self, data: memoryview, offset: int) -> None:
        """Write what differs."""
        there = memoryview(bytearray(len(data)))
        self._there.readinto(there, offset)
        if there != data:
            self._sink.write(data, offset)

    def zero(self, start: int, length: int) -> None:
        """Zero what holds anything else."""
        for extent in self._there.extents(start, length):
            if extent.kind is not Kind.DATA:
                continue
            for position in range(extent.start, extent.end, _STEP):
                there = memoryview(bytearray(min(_STEP, extent.end - position)))
                self._there.readinto(there, position)
                if not is_zero(there):
                    self._sink.zero(position, len(there))

    def flush(self) -> None:
        """Bring it to stable storage."""
        self._sink.flush()

    def close(self) -> None:
        """Both are closed by their owner."""
