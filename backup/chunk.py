"""Where a disk is cut into chunks: the ``Chunker`` interface, a fixed grid, a cutter that follows content, and local re-cutting."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import blake3

from backup.errors import RepositoryUnsupportedError

GRAIN = 4096
"""Every cut is a multiple of this many bytes, except the end of a disk: file systems place files on such boundaries."""

LARGEST = 4 << 20
"""No chunk has more bytes."""

USUAL = "aligned-32768-65536-262144"
"""What a repository cuts by unless it is told otherwise: chosen by measurement, see scripts/bench/chunk.md."""

_WORDS = GRAIN // 8
_MARGIN = 8  # words at the end of a file's last block that are zero: 64 bytes
_SELECTED = 5  # one block in so many is chosen by its hash
_CONTEXT = "p2v-toolkit 2026 boundaries of chunks, version 1"


class Chunker(Protocol):
    """Decides the ends of chunks.

    ``name`` is stored with the point: equal names (and keys) cut equally. A chunk has at most ``maximum`` bytes; one of data has at least
    ``minimum`` unless zeroes or the end follow it.

    Where a chunk ends follows from the bytes between its start and ``lookahead`` bytes behind its end, and from nothing else. So cutting
    can begin anew at any cut, equal bytes from a cut on are cut equally, and `recut` gives what cutting the whole disk gives.
    Instances are immutable and safe from several threads.
    """

    @property
    def name(self) -> str: ...

    @property
    def minimum(self) -> int: ...

    @property
    def maximum(self) -> int: ...

    @property
    def lookahead(self) -> int: ...

    def cuts(self, data: memoryview, *, final: bool) -> Iterator[int]:
        """Yield the ends of chunks in ``data``, which begins at a chunk's start: ascending, relative to it, multiples of ``GRAIN``.

        With ``final`` nothing follows ``data``, and the last end is ``len(data)``, whatever that is. Without, what lies behind the last end
        belongs to a chunk whose end is not in sight yet: the caller gives it again, followed by more. A buffer of
        ``maximum + lookahead`` bytes yields at least one end.
        """
        ...


class FixedGrid:
    """Chunks of one length: the smallest increments of a disk whose blocks change in place at random, as under a database."""

    lookahead = 0

    def __init__(self, size: int = 64 * 1024) -> None:
        if size % GRAIN or size <= 0:
            raise ValueError(f"a grid of {size} bytes is no multiple of {GRAIN}")
        self.name = f"fixed-{size}"
        self.minimum = self.maximum = size

    def cuts(self, data: memoryview, *, final: bool) -> Iterator[int]:
        """See `Chunker`."""
        size, end = self.maximum, len(data)
        yield from range(size, end + 1, size)
        if final and end % size:
            yield end


class AlignedContent:
    """Cuts between blocks of 4 KiB where the content says so.

    A data chunk ends behind the first block that is
    - the end of a file, as soon as the chunk has ``minimum`` bytes: the last 64 bytes of the block are zero, as file systems leave the
      rest of a file's last block (file ends are where equal content on two disks parts);
    - chosen by its hash, one of `_SELECTED`, as soon as the chunk has ``usual`` bytes;
    - followed by a block of zeroes, always;
    - the last one for which the chunk has at most ``maximum`` bytes.

    Zeroes never share a chunk with data: a run of them is cut by itself, into pieces of ``maximum``.

    The hash of a block is the sum of its 64-bit words, each multiplied with a secret odd number, modulo 2^64, of which the top bits decide.
    The numbers come from ``key`` (32 bytes, one for each repository), so that without it the cuts within known files are not known.
    File ends are known: they hide nothing. Nor is the hash cryptographic: who chooses files and sees exact lengths may learn about it.
    """

    lookahead = GRAIN

    def __init__(
        self, key: bytes, *, minimum: int = 16 * 1024, usual: int = 32 * 1024, maximum: int = 256 * 1024
    ) -> None:
        if not 0 < minimum <= usual <= maximum or any(size % GRAIN for size in (minimum, usual, maximum)):
            raise ValueError(f"{minimum} <= {usual} <= {maximum} are no chunk sizes in multiples of {GRAIN}")
        self.name = f"aligned-{minimum}-{usual}-{maximum}"
        self.minimum, self.usual, self.maximum = minimum, usual, maximum
        # An even factor would drop the top bits of its words.
        weights = bytearray(blake3.blake3(key, derive_key_context=_CONTEXT).digest(length=GRAIN))
        weights[::8] = bytes(byte | 1 for byte in weights[::8])
        self._weights = bytes(weights)

    def cuts(self, data: memoryview, *, final: bool) -> Iterator[int]:
        """See `Chunker`."""
        blocks = self._look(data, final=final)
        position = 0
        while position < blocks.total:
            end = self._end(blocks, position, final=final)
            if end is None:
                return
            yield min(end * GRAIN, len(data))
            position = end

    def _end(self, blocks: _Blocks, start: int, *, final: bool) -> int | None:
        """The block behind the chunk that begins at block ``start``; None when it is not in sight."""
        # An even number of changes lies behind a block that holds data.
        turn = bisect_right(blocks.changes, start)
        change = blocks.changes[turn] if turn < len(blocks.changes) else blocks.total + 1
        end = min(start + self.maximum // GRAIN, change)
        if turn % 2 == 0:
            for anchors, smallest in ((blocks.file_ends, self.minimum), (blocks.selected, self.usual)):
                place = bisect_left(anchors, start + smallest // GRAIN)
                if place < len(anchors):
                    end = min(end, anchors[place])
        if end <= blocks.total:
            return end
        return blocks.total if final else None

    def _look(self, data: memoryview, *, final: bool) -> _Blocks:
        """Hash the whole blocks of ``data``, and with ``final`` count what is left behind them as one more."""
        import numpy as np

        whole = len(data) // GRAIN
        words = np.frombuffer(data, dtype="<u8", count=whole * _WORDS).reshape(whole, _WORDS)
        sums = words.dot(np.frombuffer(self._weights, dtype="<u8"))
        zero = sums == 0
        zero[zero] = ~words[zero].any(axis=1)
        file_ends = ~words[:, -_MARGIN:].any(axis=1) & ~zero
        selected = (sums < np.uint64(2**64 // _SELECTED)) & ~zero
        rest = data[whole * GRAIN :]
        if final and rest:
            zero = np.append(zero, not any(rest))
        return _Blocks(
            len(zero),
            np.flatnonzero(np.diff(zero, prepend=False)).tolist(),
            (np.flatnonzero(file_ends) + 1).tolist(),
            (np.flatnonzero(selected) + 1).tolist(),
        )


class _Blocks(NamedTuple):
    """What decides the cuts of a buffer, in blocks."""

    total: int
    changes: list[int]  # where runs of zeroes begin and end, in turns; before the first block there is data
    file_ends: list[int]  # the blocks behind those that end a file
    selected: list[int]  # the blocks behind those that the hash selects


Read = Callable[[int, int], memoryview]
"""``read(start, length)`` gives these bytes of a disk."""


class Piece(NamedTuple):
    """What replaces the chunks between two old cuts: ``ends`` are the new ends, absolute, ascending; the last one is ``stop``."""

    start: int
    stop: int
    ends: tuple[int, ...]


def chunker_named(name: str, key: bytes) -> Chunker:
    """The chunker that ``name`` stands for. ``RepositoryUnsupportedError`` when this program does not know it."""
    kind, *words = name.split("-")
    sizes = [int(word) if word.isdigit() and len(word) < 10 else 0 for word in words]
    with suppress(ValueError):
        if kind == "fixed" and len(sizes) == 1 and sizes[0] <= LARGEST:
            return FixedGrid(*sizes)
        if kind == "aligned" and len(sizes) == 3 and sizes[2] <= LARGEST:
            return AlignedContent(key, minimum=sizes[0], usual=sizes[1], maximum=sizes[2])
    raise RepositoryUnsupportedError(
        f"there is no way to cut disks called {name!r}", advice=f"{USUAL} is the usual one."
    )


def cut(chunker: Chunker, read: Read, start: int, size: int, *, step: int) -> Iterator[int]:
    """Yield the ends of all chunks from the chunk's start ``start`` to the disk's end ``size``, absolute.

    Lazily: ``step`` bytes are read at a time, or what it takes to decide one chunk if that is more.
    """
    step = max(step, chunker.maximum + chunker.lookahead)
    while start < size:
        end = min(start + step, size)
        base = start
        for offset in chunker.cuts(read(base, end - base), final=end == size):
            start = base + offset
            yield start


def recut(chunker: Chunker, old: Sequence[int], changed: Sequence[tuple[int, int]], read: Read) -> Iterator[Piece]:
    """Yield what has to be cut anew on a disk that was cut at ``old`` before the ranges ``changed`` changed.

    ``old`` holds the ends of all chunks, ascending; its last is the size, which is still the same (of a disk that grew or shrank,
    everything is cut anew). ``changed`` holds (start, end), ascending, apart, any alignment; it covers every byte that differs.

    Replacing the old cuts behind each piece's start up to its stop by its ends gives exactly what cutting the whole disk anew gives,
    provided that ``old`` was made so, by a chunker of the same name and key. A piece begins at the last old cut that no changed byte had
    part in, and stops at the first new cut behind a change that is an old one too: from there on the chunker decides as it did. Where
    content has no anchors (the same block again and again), that may be as late as the next zeroes, or the end. Where a change
    shortens or lengthens a run of zeroes, its pieces move and it is as late as the end of the run: the caller bounds that by spans.
    Pieces come in order; the ends of one are held in memory.
    """
    starts = [0, *old[:-1]]
    # A cut may have been decided by the ``lookahead`` bytes behind it, and these are looked at in whole grains.
    begins = [starts[max(0, bisect_right(starts, low // GRAIN * GRAIN - chunker.lookahead) - 1)] for low, _ in changed]
    number = 0
    while number < len(changed):
        start = stop = begins[number]
        ends: list[int] = []
        for stop in cut(chunker, read, start, old[-1], step=2 * chunker.maximum):
            ends.append(stop)
            while number < len(changed) and changed[number][1] <= stop:
                number += 1
            if _has(starts, stop) and (number == len(changed) or begins[number] >= stop):
                break
        yield Piece(start, stop, tuple(ends))


def _has(ascending: Sequence[int], value: int) -> bool:
    place = bisect_left(ascending, value)
    return place < len(ascending) and ascending[place] == value
