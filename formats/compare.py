"""Where two disks differ."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from formats.block import BlockSource, Extent, Kind, merged

_BLOCK = 4096  # bytes that are told apart
_STEP = 1 << 20  # bytes that are compared at once


def data_of_either(one: BlockSource, other: BlockSource) -> Iterator[Extent]:
    """Where at least one of two disks holds data: ascending, merged, DATA, lazily. Elsewhere both read as zeroes."""
    pending: Extent | None = None
    for extent in heapq.merge(_data(one), _data(other)):
        if pending is not None and extent.start <= pending.end:
            pending = Extent(pending.start, max(pending.end, extent.end) - pending.start, Kind.DATA)
            continue
        if pending is not None:
            yield pending
        pending = extent
    if pending is not None:
        yield pending


def _data(source: BlockSource) -> Iterator[Extent]:
    return (extent for extent in source.extents(0, source.size) if extent.kind is Kind.DATA)


def differences(old: BlockSource, new: BlockSource, where: Iterator[Extent]) -> Iterator[Extent]:
    """The blocks of 4096 bytes that differ, of the extents ``where``, read in both: ascending, merged, DATA.

    Bytes past the old size differ.
    """
    return merged(_differences(old, new, where))


def _differences(old: BlockSource, new: BlockSource, where: Iterator[Extent]) -> Iterator[Extent]:
    done = 0
    for extent in where:
        low = max(done, extent.start // _BLOCK * _BLOCK)
        high = min(-(-extent.end // _BLOCK) * _BLOCK, new.size)
        done = max(done, high)
        for start in range(low, min(high, old.size), _STEP):
            stop = min(start + _STEP, high, old.size)
            one, other = bytearray(stop - start), bytearray(stop - start)
            old.readinto(memoryview(one), start)
            new.readinto(memoryview(other), start)
            if one == other:
                continue
            for at in range(0, len(one), _BLOCK):
                if one[at : at + _BLOCK] != other[at : at + _BLOCK]:
                    yield Extent(start + at, min(_BLOCK, len(one) - at), Kind.DATA)
        if high > max(low, old.size):
            edge = max(low, old.size)
            yield Extent(edge, high - edge, Kind.DATA)
