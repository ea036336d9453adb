"""Block sources around block sources: one behaviour each, composed by wrapping.

A layer owns what it wraps: closing it closes the source below. Time comes in as functions (``sleep``, ``clock``), so that tests need none.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

from formats.block import BlockSource, Extent, Kind, check_range, clipped, digest_of, gaps_filled, merged
from formats.errors import ReadError, ToolkitError

_NEAR = 64 * 1024  # a gap this short is cheaper to read over than to ask again


class _Layer:
    """What every layer does unless it says otherwise: pass on."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._source.size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        self._check(offset, len(buffer))
        self._source.readinto(buffer, offset)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The extents of the source below."""
        self._check(start, length)
        return self._source.extents(start, length)

    def digest(self, start: int, length: int) -> bytes | None:
        """What the source below says; None where it cannot."""
        self._check(start, length)
        return digest_of(self._source, start, length)

    def close(self) -> None:
        """Close the source below."""
        if not self._closed:
            self._closed = True
            self._source.close()

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self.size, start, length)


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` bytes of a composed disk from ``start``: those of ``source`` from ``source_start``."""

    start: int
    length: int
    source: BlockSource
    source_start: int = 0

    @property
    def end(self) -> int:
        """First byte behind the segment."""
        return self.start + self.length


class Mapped:
    """A disk of ``size`` bytes composed of ``segments``; gaps between them are ZERO. Closing it closes their sources.

    Segments come in any order; ``ValueError`` when they overlap, or reach outside the disk or their source.
    """

    def __init__(self, size: int, segments: Sequence[Segment]) -> None:
        self._size = size
        self._segments = sorted((s for s in segments if s.length), key=lambda segment: segment.start)
        position = 0
        for segment in self._segments:
            check_range(size, segment.start, segment.length)
            check_range(segment.source.size, segment.source_start, segment.length)
            if segment.start < position:
                raise ValueError(f"two segments hold byte {segment.start}")
            position = segment.end
        self._starts = [segment.start for segment in self._segments]
        self._owned = {id(segment.source): segment.source for segment in segments}
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from the segments that hold the range; gaps read as zeroes."""
        self._check(offset, len(buffer))
        position, end = offset, offset + len(buffer)
        for segment in self._within(offset, end):
            low, high = max(segment.start, offset), min(segment.end, end)
            if low > position:
                buffer[position - offset : low - offset] = bytes(low - position)
            segment.source.readinto(buffer[low - offset : high - offset], segment.source_start + low - segment.start)
            position = high
        if position < end:
            buffer[position - offset :] = bytes(end - position)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The extents of the segments, ZERO between them."""
        self._check(start, length)
        return gaps_filled(self._tiles(start, start + length), start, length, Kind.ZERO)

    def digest(self, start: int, length: int) -> bytes | None:
        """What the source of the one segment says that holds all of the range; None for a range of several."""
        self._check(start, length)
        for segment in self._within(start, start + length):
            if segment.start <= start and start + length <= segment.end:
                return digest_of(segment.source, segment.source_start + start - segment.start, length)
        return None

    def close(self) -> None:
        """Close the sources of all segments."""
        if not self._closed:
            self._closed = True
            for source in self._owned.values():
                source.close()

    def _tiles(self, start: int, end: int) -> Iterator[Extent]:
        for segment in self._within(start, end):
            low, high = max(segment.start, start), min(segment.end, end)
            shift = segment.start - segment.source_start
            for extent in segment.source.extents(low - shift, high - low):
                yield Extent(extent.start + shift, extent.length, extent.kind)

    def _within(self, start: int, end: int) -> Iterator[Segment]:
        spot = max(0, bisect_right(self._starts, start) - 1)
        while spot < len(self._segments) and self._segments[spot].start < end:
            if self._segments[spot].end > start:
                yield self._segments[spot]
            spot += 1

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self._size, start, length)


class Counted(_Layer):
    """Counts the bytes that are read."""

    def __init__(self, source: BlockSource) -> None:
        super().__init__(source)
        self._lock = threading.Lock()
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes of all reads that succeeded."""
        return self._bytes_read

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Read and count."""
        super().readinto(buffer, offset)
        with self._lock:
            self._bytes_read += len(buffer)


class Cached(_Layer):
    """Keeps the blocks read last, up to ``limit`` bytes, and reads whole blocks of ``block`` bytes.

    Only for a source that does not change. A block that several threads want is read once.
    """

    def __init__(self, source: BlockSource, *, block: int = 256 << 10, limit: int = 64 << 20) -> None:
        if block < 1 or limit < block:
            raise ValueError(f"a cache of {limit} bytes holds no block of {block}")
        super().__init__(source)
        self._block, self._slots = block, limit // block
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._loading: set[int] = set()
        self._changed = threading.Condition()

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from cached blocks; those that are missing are read whole."""
        self._check(offset, len(buffer))
        done = 0
        while done < len(buffer):
            number, inside = divmod(offset + done, self._block)
            step = min(self._block - inside, len(buffer) - done)
            buffer[done : done + step] = memoryview(self._get(number))[inside : inside + step]
            done += step

    def close(self) -> None:
        """Close the source below and forget the blocks."""
        super().close()
        with self._changed:
            self._blocks.clear()

    def _get(self, number: int) -> bytes:
        with self._changed:
            while number in self._loading:
                self._changed.wait()
            if (found := self._blocks.get(number)) is not None:
                self._blocks.move_to_end(number)
                return found
            self._loading.add(number)
        content: bytes | None = None
        try:
            start = number * self._block
            loaded = bytearray(min(self._block, self.size - start))
            self._source.readinto(memoryview(loaded), start)
            content = bytes(loaded)
        finally:
            with self._changed:
                self._loading.discard(number)
                if content is not None and not self._closed:
                    self._blocks[number] = content
                    while len(self._blocks) > self._slots:
                        self._blocks.popitem(last=False)
                self._changed.notify_all()
        return content


class Retried(_Layer):
    """Tries a failed read or map again, up to ``attempts`` times in all, after ``pause`` seconds that double each time.

    ``reopen`` makes the source anew before each further try, for sources that a fault ends (a broken connection); it must have the same
    size. Only errors of class ``on`` count; the last one is raised.
    """

    def __init__(
        self,
        source: BlockSource,
        *,
        attempts: int = 4,
        pause: float = 1.0,
        on: type[ToolkitError] | tuple[type[ToolkitError], ...] = ReadError,
        reopen: Callable[[], BlockSource] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if attempts < 1:
            raise ValueError("at least one attempt is needed")
        super().__init__(source)
        self._size = source.size
        self._attempts, self._pause, self._on = attempts, pause, on
        self._reopen, self._sleep = reopen, sleep
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the disk when it was first opened."""
        return self._size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Read, again if need be; a retry fills the whole buffer anew."""
        self._check(offset, len(buffer))
        attempt = 0
        while True:
            source = self._source
            try:
                return source.readinto(buffer, offset)
            except self._on:
                self._prepare(source, attempt)
                attempt += 1
            except ValueError:
                if source is self._source:
                    raise
                # Another thread has replaced and closed the source under this read.

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The extents of the source below; after an error the walk goes on where it stopped."""
        self._check(start, length)
        return merged(self._tiles(start, start + length))

    def _tiles(self, position: int, end: int) -> Iterator[Extent]:
        attempt = 0
        while position < end:
            source = self._source
            try:
                for extent in source.extents(position, end - position):
                    yield extent
                    position, attempt = extent.end, 0
                return
            except self._on:
                self._prepare(source, attempt)
                attempt += 1
            except ValueError:
                if source is self._source:
                    raise

    def _prepare(self, failed: BlockSource, attempt: int) -> None:
        """Called while an error is handled: raise it when there is no try left, else pause and reopen."""
        if attempt + 1 >= self._attempts or self._closed:
            raise  # noqa: PLE0704
        self._sleep(self._pause * 2**attempt)
        if self._reopen is None:
            return
        with self._lock:
            if self._source is not failed or self._closed:
                return  # another thread has done it
            fresh = self._reopen()
            if fresh.size != self._size:
                fresh.close()
                raise ReadError(
                    f"the disk has {fresh.size} bytes after it was opened again, it had {self._size}",
                    advice="The disk was changed in the meantime: start anew.",
                )
            self._source = fresh
            failed.close()


class Throttled(_Layer):
    """Lets no more than ``rate`` bytes per second be read on average, over all threads; bursts of up to one second's worth pass."""

    def __init__(
        self,
        source: BlockSource,
        *,
        rate: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if rate <= 0:
            raise ValueError("the rate must be more than zero")
        super().__init__(source)
        self._rate, self._sleep, self._clock = rate, sleep, clock
        self._lock = threading.Lock()
        self._allowed_from = clock() - 1.0  # the moment up to which the bytes read so far are paid for

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Wait until the read is within the rate, then read."""
        self._check(offset, len(buffer))
        with self._lock:
            now = self._clock()
            self._allowed_from = max(self._allowed_from, now - 1.0) + len(buffer) / self._rate
            delay = self._allowed_from - now
        if delay > 0:
            self._sleep(delay)
        super().readinto(buffer, offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Reads that touch ``length`` bytes from ``start`` fail with what ``error`` makes: ``times`` times, after ``after`` good ones.

    ``times`` None is for ever. ``map`` lets the extents of the range fail instead of its bytes.
    """

    start: int
    length: int
    error: Callable[[], BaseException]
    after: int = 0
    times: int | None = 1
    map: bool = False


class Faulty(_Layer):
    """Fails as planned: for tests of what is above, with any source below."""

    def __init__(self, source: BlockSource, plan: Sequence[Fault]) -> None:
        super().__init__(source)
        self._plan = list(plan)
        self._met = [0] * len(self._plan)
        self._lock = threading.Lock()

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Read, or fail."""
        self._check(offset, len(buffer))
        self._fail(offset, len(buffer), mapping=False)
        super().readinto(buffer, offset)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Map, or fail at the extent that the plan names."""
        self._check(start, length)
        return self._tiles(start, length)

    def _tiles(self, start: int, length: int) -> Iterator[Extent]:
        for extent in self._source.extents(start, length):
            self._fail(extent.start, extent.length, mapping=True)
            yield extent

    def _fail(self, start: int, length: int, *, mapping: bool) -> None:
        for index, fault in enumerate(self._plan):
            if fault.map != mapping or start >= fault.start + fault.length or start + length <= fault.start:
                continue
            with self._lock:
                met = self._met[index]
                self._met[index] += 1
            if met >= fault.after and (fault.times is None or met < fault.after + fault.times):
                raise fault.error()


class UsedOnly(_Layer):
    """Shows only what is used: the rest is ZERO and reads as zeroes, whatever lies there (S7).

    ``used`` is ascending, non-overlapping extents of which DATA says "used" (gaps and other kinds: unused), or a function that yields them
    for a range; it must answer the same each time, or a read and the map would differ.
    """

    def __init__(self, source: BlockSource, used: Callable[[int, int], Iterator[Extent]] | Sequence[Extent]) -> None:
        super().__init__(source)
        self._used = used if callable(used) else _listed(used)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Read the used parts, short gaps between them included, and zero the rest."""
        self._check(offset, len(buffer))
        used = list(self._runs(offset, len(buffer)))
        for low, high in _coalesced(used):
            self._source.readinto(buffer[low - offset : high - offset], low)
        position = offset
        for run in [*used, Extent(offset + len(buffer), 0, Kind.DATA)]:
            if run.start > position:
                buffer[position - offset : run.start - offset] = bytes(run.start - position)
            position = run.end

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """What the source says where it is used, ZERO elsewhere."""
        self._check(start, length)
        return gaps_filled(self._tiles(start, length), start, length, Kind.ZERO)

    def digest(self, start: int, length: int) -> bytes | None:
        """What the source says of a range that is used throughout; None for any other."""
        self._check(start, length)
        if list(self._runs(start, length)) != [Extent(start, length, Kind.DATA)]:
            return None
        return digest_of(self._source, start, length)

    def _tiles(self, start: int, length: int) -> Iterator[Extent]:
        for run in self._runs(start, length):
            yield from self._source.extents(run.start, run.length)

    def _runs(self, start: int, length: int) -> Iterator[Extent]:
        return merged(e for e in clipped(self._used(start, length), start, length) if e.kind is Kind.DATA)


class Overlaid(_Layer):
    """``source`` below a ``top`` disk of the same size, of which only the ``written`` extents count (DATA and ZERO, ascending). Closing it
    closes both.
    """

    def __init__(self, source: BlockSource, top: BlockSource, written: Sequence[Extent]) -> None:
        super().__init__(source)
        if top.size != source.size:
            raise ValueError(f"an overlay of {top.size} bytes does not fit a disk of {source.size}")
        self._top = top
        self._written = _listed(written)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Read what was written from the top, the rest from below."""
        self._check(offset, len(buffer))
        for extent, below in self._parts(offset, len(buffer)):
            part = buffer[extent.start - offset : extent.end - offset]
            (self._source if below else self._top).readinto(part, extent.start)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The written extents, and those of the source where nothing was written."""
        self._check(start, length)
        return merged(self._tiles(start, length))

    def digest(self, start: int, length: int) -> bytes | None:
        """What the source says where nothing was written over it."""
        self._check(start, length)
        untouched = all(below for _, below in self._parts(start, length))
        return digest_of(self._source, start, length) if untouched else None

    def close(self) -> None:
        """Close both disks."""
        if not self._closed:
            self._top.close()
        super().close()

    def _tiles(self, start: int, length: int) -> Iterator[Extent]:
        for extent, below in self._parts(start, length):
            if below:
                yield from self._source.extents(extent.start, extent.length)
            else:
                yield extent

    def _parts(self, start: int, length: int) -> Iterator[tuple[Extent, bool]]:
        for extent in gaps_filled(self._written(start, length), start, length, Kind.HOLE):
            yield extent, extent.kind is Kind.HOLE


class Seeded(_Layer):
    """Takes from ``seed`` what the source's own digest shows to be the same there, so that it need not be sent again.

    ``seed`` is an earlier, perhaps partial copy of at least the same size; it stays the caller's. Without digests everything is read.
    ``bytes_kept`` is what the seed had right.
    """

    def __init__(self, source: BlockSource, seed: BlockSource) -> None:
        super().__init__(source)
        self._seed = seed
        self._lock = threading.Lock()
        self.bytes_kept = 0

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` run by run, from the seed where its bytes have the source's digest."""
        for extent in self.extents(offset, len(buffer)):
            part = buffer[extent.start - offset : extent.end - offset]
            if extent.kind is not Kind.DATA:
                part[:] = bytes(extent.length)
            elif not self._from_seed(part, extent.start):
                self._source.readinto(part, extent.start)

    def _from_seed(self, part: memoryview, start: int) -> bool:
        if all(extent.kind is not Kind.DATA for extent in self._seed.extents(start, len(part))):
            return False  # never came: not worth a question
        theirs = digest_of(self._source, start, len(part))
        if theirs is None:
            return False
        self._seed.readinto(part, start)
        if blake2b(part, digest_size=32).digest() != theirs:
            return False
        with self._lock:
            self.bytes_kept += len(part)
        return True


def _listed(extents: Sequence[Extent]) -> Callable[[int, int], Iterator[Extent]]:
    """A list of extents as a function of a range."""
    kept = list(extents)
    starts = [extent.start for extent in kept]
    if any(a.end > b.start for a, b in pairwise(kept)):
        raise ValueError("the used extents overlap or descend")

    def used(start: int, length: int) -> Iterator[Extent]:
        spot = max(0, bisect_right(starts, start) - 1)
        while spot < len(kept) and kept[spot].start < start + length:
            yield kept[spot]
            spot += 1

    return used


def _coalesced(runs: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    """The (start, end) of runs, joined over gaps that are shorter than ``_NEAR``."""
    pending: tuple[int, int] | None = None
    for run in runs:
        if pending is not None and run.start - pending[1] < _NEAR:
            pending = (pending[0], run.end)
            continue
        if pending is not None:
            yield pending
        pending = (run.start, run.end)
    if pending is not None:
        yield pending
