"""The one copy loop: from a BlockSource to a BlockSink.

The disk is walked in blocks of ``BLOCK`` bytes on a fixed grid. A block without DATA extents is zeroed without being read; from any other
the hull of its DATA is read at once, zero runs in it are dropped, and the rest is written. Worker threads do this for several blocks
at a time; a sequential sink gets its blocks in ascending order from one thread. The first error wins: it stops the others and is raised.

Each block that holds anything but zeroes goes into a ``Fingerprint``, so that what arrived can be compared later with what
was read, block for block, without reading the source again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from blake3 import blake3

from formats.block import BlockSink, BlockSource, Extent, Kind, is_zero
from formats.errors import InterruptedRunError
from formats.progress import Progress, Silence

BLOCK = 1 << 20
"""Bytes of a block of the grid; also the unit of the fingerprint."""

_GRAIN = 64 * 1024  # zero runs shorter than this are written: cheaper than another request
_SEGMENT = 1 << 30  # a mismatch of fingerprints is located to this many bytes
_POLL = 0.2  # seconds between looks at the stop flag, so that Ctrl-C is answered


@dataclass(slots=True)
class Fingerprint:
    """What a disk holds, independent of the order it was read in: per GiB, the sum of keyed digests of its non-zero blocks.

    Memory is 32 bytes for each GiB that holds data. Two disks with equal fingerprints are equal (BLAKE3, 256 bits; the sum of
    digests is safe against accident, not against an adversary who chooses blocks).
    """

    segments: dict[int, int] = field(default_factory=dict)

    def add(self, offset: int, block: memoryview) -> None:
        """Add the non-zero block at ``offset``; not thread-safe."""
        digest = blake3(offset.to_bytes(8, "little"))
        digest.update(block)
        self.merge_digest(offset, int.from_bytes(digest.digest(), "little"))

    def merge_digest(self, offset: int, digest: int) -> None:
        """Add a digest that ``block_digest`` made; not thread-safe."""
        segment = offset // _SEGMENT
        self.segments[segment] = (self.segments.get(segment, 0) + digest) % (1 << 256)

    def differences(self, other: Fingerprint) -> list[Extent]:
        """The GiB segments in which the two differ, ascending."""
        numbers = sorted(self.segments.keys() | other.segments.keys())
        return [
            Extent(n * _SEGMENT, _SEGMENT, Kind.DATA) for n in numbers if self.segments.get(n) != other.segments.get(n)
        ]


def block_digest(offset: int, block: memoryview) -> int:
    """The digest of a non-zero block at ``offset``, as ``Fingerprint`` sums it."""
    digest = blake3(offset.to_bytes(8, "little"))
    digest.update(block)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """What a copy did, in bytes: ``size`` of the disk, ``read`` from the source, ``written`` to the sink (zeroes not counted)."""

    size: int
    read: int
    written: int
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class _Task:
    """One block of the grid: its bytes, and the hull of DATA in it (empty hull: nothing to read)."""

    start: int
    length: int
    low: int
    high: int


def tasks(source: BlockSource) -> Iterator[_Task]:
    """Walk the map once, lazily, and yield each block of the grid that holds DATA."""
    hull: tuple[int, int, int] | None = None  # block number, low, high
    for extent in source.extents(0, source.size):
        if extent.kind is not Kind.DATA:
            continue
        position = extent.start
        while position < extent.end:
            number = position // BLOCK
            end = min(extent.end, (number + 1) * BLOCK)
            if hull is not None and hull[0] == number:
                hull = (number, hull[1], end)
            else:
                if hull is not None:
                    yield _task(hull, source.size)
                hull = (number, position, end)
            position = end
    if hull is not None:
        yield _task(hull, source.size)


def _task(hull: tuple[int, int, int], size: int) -> _Task:
    start = hull[0] * BLOCK
    return _Task(start, min(BLOCK, size - start), hull[1], hull[2])


def copy(
    source: BlockSource,
    sink: BlockSink,
    *,
    threads: int = 8,
    progress: Progress | None = None,
    total: int | None = None,
    stop: threading.Event | None = None,
    blank: bool = True,
) -> Transferred:
    """Copy all of ``source`` to ``sink`` and return what was done; ``sink`` is not flushed.

    ``blank`` says that the sink reads as zeroes (K4; a sequential sink always does, K6): then nothing is done where the source has no
    data; else those ranges are zeroed. ``progress`` advances by bytes read, of ``total`` when known. ``stop`` ends the copy with
    ``InterruptedRunError``.
    Raises what source or sink raise, the first one. Peak memory: (2 x ``threads``) blocks.
    """
    if sink.size < source.size:
        raise ValueError(f"a disk of {source.size} bytes does not fit into {sink.size}")
    run = _Run(source, sink, progress or Silence(), stop or threading.Event(), blank or not sink.random_access)
    return run.parallel(threads, total) if sink.random_access else run.ordered(threads, total)


def fingerprint(
    source: BlockSource,
    *,
    threads: int = 4,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Fingerprint:
    """Read all DATA of ``source`` and return its fingerprint."""
    return copy(source, _Nowhere(source.size), threads=threads, progress=progress, stop=stop).fingerprint


class _Nowhere:
    """A sink that forgets."""

    random_access = True

    def __init__(self, size: int) -> None:
        self.size = size

    def write(self, data: memoryview, offset: int) -> None:
        """Forget."""

    def zero(self, start: int, length: int) -> None:
        """Forget."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _Run:
    """The state that the worker threads of one copy share."""

    def __init__(
        self, source: BlockSource, sink: BlockSink, progress: Progress, stop: threading.Event, blank: bool
    ) -> None:
        self.source, self.sink, self.progress, self.stop, self.blank = source, sink, progress, stop, blank
        self.lock = threading.Lock()
        self.turn = threading.Condition(self.lock)  # ordered sinks: whose block comes next
        self.next_index = 0
        self.error: BaseException | None = None
        self.read = self.written = 0
        self.fingerprint = Fingerprint()

    def parallel(self, threads: int, total: int | None) -> Transferred:
        """Copy with writes in any order."""
        return self._run(threads, total, ordered=False)

    def ordered(self, threads: int, total: int | None) -> Transferred:
        """Copy with reads in parallel and writes in ascending order."""
        return self._run(threads, total, ordered=True)

    def _run(self, threads: int, total: int | None, *, ordered: bool) -> Transferred:
        todo: queue.Queue[tuple[int, _Task] | None] = queue.Queue(maxsize=threads)
        self.progress.start("copy", total)
        workers = [
            threading.Thread(target=self._work, args=(todo, ordered), name=f"copy-{n}", daemon=True)
            for n in range(threads)
        ]
        for worker in workers:
            worker.start()
        try:
            self._feed(todo)
            self._dismiss(todo, workers)
        except (
            BaseException
        ) as error:  # Ctrl-C too, at any point: no worker may go on after this function has been left
            self._fail(error)
            self._dismiss(todo, workers)
        finally:
            self.progress.finish()
        if self.error is not None:
            raise self.error
        return Transferred(size=self.source.size, read=self.read, written=self.written, fingerprint=self.fingerprint)

    def _feed(self, todo: queue.Queue[tuple[int, _Task] | None]) -> None:
        position = 0
        for index, task in enumerate(tasks(self.source)):
            if not self.blank and task.start > position:
                self.sink.zero(position, task.start - position)
            position = task.start + task.length
            if not self._put(todo, (index, task)):
                return
        if not self.blank and position < self.source.size:
            self.sink.zero(position, self.source.size - position)

    def _dismiss(self, todo: queue.Queue[tuple[int, _Task] | None], workers: list[threading.Thread]) -> None:
        """Return when every worker has done what was queued and is gone."""
        while alive := [worker for worker in workers if worker.is_alive()]:
            if self.stop.is_set():
                self._fail(InterruptedRunError("the copy was stopped"))
            with suppress(queue.Full):
                for _ in alive:
                    todo.put(None, timeout=_POLL)
            alive[0].join(_POLL)

    def _put(self, todo: queue.Queue[tuple[int, _Task] | None], item: tuple[int, _Task]) -> bool:
        while True:
            if self.stop.is_set():
                self._fail(InterruptedRunError("the copy was stopped"))
            if self.error is not None:
                return False
            try:
                todo.put(item, timeout=_POLL)
            except queue.Full:
                continue
            return True

    def _work(self, todo: queue.Queue[tuple[int, _Task] | None], ordered: bool) -> None:
        buffer = memoryview(bytearray(BLOCK))
        while (item := todo.get()) is not None:
            if self.error is not None:
                continue  # drain, so that the feeder never blocks
            try:
                self._copy_block(item[0], item[1], buffer, ordered)
            except BaseException as error:
                self._fail(error)

    def _copy_block(self, index: int, task: _Task, buffer: memoryview, ordered: bool) -> None:
        block = buffer[: task.length]
        low, high = task.low - task.start, task.high - task.start
        block[:low] = bytes(low)
        block[high:] = bytes(task.length - high)
        self.source.readinto(block[low:high], task.low)
        pieces = list(_pieces(block))
        digest = block_digest(task.start, block) if pieces else 0
        if ordered:
            with self.turn:
                while self.next_index != index and self.error is None:
                    self.turn.wait(_POLL)
                if self.error is not None:
                    return
        self._write(task, block, pieces)
        with self.turn:
            self.next_index = index + 1
            self.read += high - low
            self.written += sum(end - start for start, end in pieces)
            if pieces:
                self.fingerprint.merge_digest(task.start, digest)
            self.turn.notify_all()
        self.progress.advance(high - low)

    def _write(self, task: _Task, block: memoryview, pieces: list[tuple[int, int]]) -> None:
        position = 0
        for start, end in pieces:
            if not self.blank and start > position:
                self.sink.zero(task.start + position, start - position)
            self.sink.write(block[start:end], task.start + start)
            position = end
        if not self.blank and position < task.length:
            self.sink.zero(task.start + position, task.length - position)

    def _fail(self, error: BaseException) -> None:
        with self.turn:
            if self.error is None:
                self.error = error
            self.turn.notify_all()


def _pieces(block: memoryview) -> Iterator[tuple[int, int]]:
    """The runs of grains of a block that hold anything but zeroes, as (start, end)."""
    run: int | None = None
    for start in range(0, len(block), _GRAIN):
        if is_zero(block[start : start + _GRAIN]):
            if run is not None:
                yield run, start
                run = None
        elif run is None:
            run = start
    if run is not None:
        yield run, len(block)
