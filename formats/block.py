"""The first waist: bytes at offsets, with a map.

Guarantees of a ``BlockSource`` (the contract suite ``tests/contracts/block_source.py`` proves each by number):

S1  ``size`` is constant and a whole number of bytes >= 0.
S2  ``readinto(buffer, offset)`` fills all of ``buffer`` or raises; nothing is returned short.
S3  A range outside ``0 <= offset <= offset + len <= size`` raises ``ValueError`` and reads nothing.
S4  ``readinto`` is safe from several threads at once.
S5  ``extents(start, length)`` yields extents that tile exactly the asked range, in order, merged (no two neighbours of
    one kind) and clipped to it; an empty range yields nothing.
S6  It is lazy: the first extent comes without walking the whole disk.
S7  What is called ZERO reads as zeroes. What is called HOLE reads as zeroes too, unless a parent below decides.
S8  ``close`` is idempotent; reading afterwards raises.

Guarantees of a ``BlockSink`` (``tests/contracts/block_sink.py``):

K1  ``write(data, offset)`` stores all of ``data`` or raises.
K2  ``zero(start, length)`` makes the range read as zeroes, without storing them where the format can avoid it.
K3  A range outside the disk raises ``ValueError`` and writes nothing.
K4  A new sink reads as zeroes wherever nothing was written.
K5  ``flush`` returns when all that was written before is on stable storage.
K6  With ``random_access``, ``write`` and ``zero`` take any order, any number of times, from several threads. Without it they take
    ascending, non-overlapping ranges from one thread at a time; a range that goes back raises ``ValueError``. Ranges that are
    left out read as zeroes.
K7  ``close`` is idempotent and *does not* publish: a sink that was closed without ``flush`` promises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable


class Kind(Enum):
    """What a run of bytes holds."""

    DATA = "data"  # must be read
    ZERO = "zero"  # reads as zeroes
    HOLE = "hole"  # nothing here: a parent decides; without one it reads as zeroes


class Extent(NamedTuple):
    """``length`` bytes from ``start``, all of one kind. ``length`` > 0."""

    start: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        """First byte behind the extent."""
        return self.start + self.length


@runtime_checkable
class BlockSource(Protocol):
    """Bytes at offsets, to read; guarantees S1-S8 above."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        ...

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill all of ``buffer`` with the bytes at ``offset``; ``ReadError`` when they cannot be had."""
        ...

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Tile ``length`` bytes from ``start`` with extents, in order, merged, clipped and lazily."""
        ...

    def close(self) -> None:
        """Release what the source holds."""
        ...


@runtime_checkable
class BlockSink(Protocol):
    """Bytes at offsets, to write; guarantees K1-K7 above."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def random_access(self) -> bool:
        """Whether writes may come in any order and again; else ascending, each range once."""
        ...

    def write(self, data: memoryview, offset: int) -> None:
        """Store all of ``data`` at ``offset``; ``WriteError`` or ``NoSpaceError`` when it cannot be."""
        ...

    def zero(self, start: int, length: int) -> None:
        """Make ``length`` bytes from ``start`` read as zeroes."""
        ...

    def flush(self) -> None:
        """Return when everything written is on stable storage; for a sequential format this also writes its end."""
        ...

    def close(self) -> None:
        """Release what the sink holds, without publishing anything."""
        ...


@runtime_checkable
class Digesting(Protocol):
    """A source that can say what a range holds without giving it: a remote disk, and what is made of such disks."""

    def digest(self, start: int, length: int) -> bytes | None:
        """BLAKE2b (32 bytes) of the range, made where the bytes are; None when that cannot be had. At most 1 MiB."""
        ...


def digest_of(source: BlockSource, start: int, length: int) -> bytes | None:
    """The digest of a range as ``Digesting`` gives it; None for any other source."""
    return source.digest(start, length) if isinstance(source, Digesting) else None


def check_range(size: int, start: int, length: int) -> None:
    """Raise ``ValueError`` unless ``start``, ``length`` lies inside a disk of ``size`` bytes (S3, K3)."""
    if start < 0 or length < 0 or start + length > size:
        raise ValueError(f"range {start}+{length} lies outside the disk of {size} bytes")


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbouring extents of one kind; empty ones are dropped, gaps stay. The input must be ascending."""
    pending: Extent | None = None
    for extent in extents:
        if extent.length == 0:
            continue
        if pending is not None and pending.kind is extent.kind and pending.end == extent.start:
            pending = Extent(pending.start, pending.length + extent.length, pending.kind)
            continue
        if pending is not None:
            yield pending
        pending = extent
    if pending is not None:
        yield pending


def clipped(extents: Iterable[Extent], start: int, length: int) -> Iterator[Extent]:
    """The parts of ascending ``extents`` that lie inside ``length`` bytes from ``start``; stops at the range's end."""
    end = start + length
    for extent in extents:
        if extent.start >= end:
            return
        low, high = max(extent.start, start), min(extent.end, end)
        if low < high:
            yield Extent(low, high - low, extent.kind)


def gaps_filled(extents: Iterable[Extent], start: int, length: int, kind: Kind) -> Iterator[Extent]:
    """Tile the range from ascending, non-overlapping ``extents`` inside it, with ``kind`` wherever they leave a gap."""

    def tiled() -> Iterator[Extent]:
        position, end = start, start + length
        for extent in clipped(extents, start, length):
            if extent.start > position:
                yield Extent(position, extent.start - position, kind)
            yield extent
            position = extent.end
        if position < end:
            yield Extent(position, end - position, kind)

    return merged(tiled())


def data_bytes(source: BlockSource) -> int:
    """Bytes of all DATA extents of the source: walks the whole map."""
    return sum(extent.length for extent in source.extents(0, source.size) if extent.kind is Kind.DATA)


_ZEROES = bytes(1 << 20)


def is_zero(block: memoryview) -> bool:
    """Whether all bytes are zero. Copies in steps: ``bytes`` compares at tens of GB/s, a memoryview at half of one."""
    if len(block) and (block[0] or block[len(block) // 2]):  # most data is told without a copy
        return False
    for start in range(0, len(block), len(_ZEROES)):
        piece = bytes(block[start : start + len(_ZEROES)])
        if piece != (_ZEROES if len(piece) == len(_ZEROES) else _ZEROES[: len(piece)]):
            return False
    return True
