"""Store a capture as a point.

The disk is taken span by span. A worker reads what it needs of a span, cuts it, hashes it, compares with the parent point and the
index, compresses, seals and verifies what is new, and hands the span's new chunks to the packer as one piece, so that neighbours
lie together. Several
workers overlap reading, computing and writing; nothing is queued but spans, so memory is bounded by the number of workers.

Order (FORMAT.md): lease; condemned packs; points; index; packs; segments; point; lease gone. An interrupted run leaves packs and
segments: the
next run finds their chunks and stores them no second time; packs that no segment names are walked by their headers first.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from backup.chunk import GRAIN, Chunker
from backup.index import encode_segment, sorted_entries
from backup.keys import CHUNK, PAGE, digest_name
from backup.lock import Lease
from backup.manifest import (
    NOTHING,
    SPAN,
    Entry,
    Tree,
    encode_leaf,
    rebuild,
    span_count,
    span_length,
)
from backup.pack import Blob, Packer, Place, pack_digest, scan
from backup.prune import condemned_packs
from backup.repository import Missing, Point, PointDisk, Repository
from backup.store.base import NameTakenError
from formats.block import BlockSource, Extent, Kind, is_zero
from formats.capture import Capture, CapturedDisk, Changed
from formats.errors import InterruptedRunError, Notice
from formats.progress import Progress, Silence

_POLL = 0.2  # seconds between looks at the stop flag
_FLUSH = 128 * 1024  # entries that make a segment: what a killed run loses at most of its index, and what memory holds
_PAGE_PACK = 4 << 20  # bytes of a pack of pages
_AUDIT = 4  # spans that are read although they are said not to have changed


@dataclass(slots=True)
class Statistics:
    """What a run did, in bytes and counts; ``stored`` is what the repository grew by, packs only."""

    read: int = 0
    chunks: int = 0
    new_chunks: int = 0
    new_bytes: int = 0
    stored: int = 0
    audited: int = 0

    def as_mapping(self) -> dict[str, float]:
        """For the point's record."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class _Span:
    """One span to do: what to read of it. ``regions`` None: everything; ``audit``: it is said not to have changed."""

    number: int
    regions: list[tuple[int, int]] | None
    audit: bool = False


@dataclass(slots=True)
class _Work:
    """A span under way: ``known`` ids need no look-up, ``blobs`` are new."""

    source: BlockSource
    base: int
    buffer: memoryview
    known: set[bytes]
    blobs: list[Blob]


class _AuditError(Exception):
    """A block that was called unchanged has changed."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class Backup:
    """One run that stores captures. A context manager: entering takes the lease, leaving releases it."""

    def __init__(
        self,
        repository: Repository,
        chunker: Chunker,
        *,
        threads: int = 4,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        notice: Callable[[Notice], None] = lambda _: None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        audit: int = _AUDIT,
    ) -> None:
        self.repository, self.chunker = repository, chunker
        # What lies between data may begin at any block, but for a grid, whose chunks must lie where they lay before.
        self._grain = GRAIN if chunker.lookahead else chunker.minimum
        self.statistics = Statistics()
        self._threads, self._audit, self._clock = threads, audit, clock
        self._progress, self._stop = progress or Silence(), stop or threading.Event()
        self._notices: list[Notice] = []
        self._tell = notice
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._claimed: set[bytes] = set()
        self._broken = False

    def __enter__(self) -> Backup:
        store = self.repository.store
        self.lease = Lease(store, "backup", self._clock().isoformat(timespec="seconds"))
        try:
            # After the lease, so that a prune that does not see the lease is seen here (backup/prune.py).
            shunned = condemned_packs(store)
            self.points = self.repository.points()
            self.index = self.repository.load_index(shunned=frozenset(shunned))
            self._adopt(shunned)
        except BaseException:
            self.lease.release()
            raise
        self._data = Packer(self._publish)
        self._pages = Packer(self._publish, target=_PAGE_PACK)
        return self

    def __exit__(self, *_: object) -> None:
        self.lease.release()
        self.index.close()

    def _adopt(self, shunned: Iterable[bytes]) -> None:
        """Take in the packs that no segment names: a run was killed before it wrote one."""
        known = self.index.packs().keys() | set(shunned)
        for stored in self.repository.store.list("packs/"):
            with suppress(ValueError):
                digest = pack_digest(stored.name)
                if digest not in known:
                    content = self.repository.store.load(stored.name)
                    if digest_name(content) == digest.hex():
                        self.index.add(scan(digest, content), digest, len(content))

    # -- the run ---------------------------------------------------------------------------------------------------

    def store(
        self,
        capture: Capture,
        *,
        source: str = "",
        tags: Sequence[str] = (),
        parent: Point | None = None,
        original: Point | None = None,
    ) -> Point:
        """Store a capture and return the committed point.

        ``parent`` is compared with, disk by disk; it must be the point that the capture says its changes against. Every disk of the machine
        that is not in the capture is named in the point and by a notice. With ``original`` the point is a copy of that one, of another
        repository: its time and what was said of it are kept. Raises what sources and the store raise; nothing is committed then.
        """
        if self._broken:
            raise ValueError("a run that failed cannot go on: what it promised to store may be missing")
        self._broken = True
        point = self._store(capture, source, tags, parent, original)
        self._broken = False
        return point

    def _store(
        self, capture: Capture, source: str, tags: Sequence[str], parent: Point | None, original: Point | None
    ) -> Point:
        disks = []
        for disk_id, captured in capture.disks.items():
            before = parent.disk(disk_id) if parent else None
            disks.append(self._disk(disk_id, captured, capture, before, parent.audit if parent else 0))
        missing = original.missing if original else self._missing(capture)
        self._flush()
        self.lease.require()
        point = self.repository.commit(
            Point(
                version=1,
                kind="disks",
                time=original.time if original else self._clock().isoformat(timespec="milliseconds"),
                machine=capture.machine,
                source=source,
                disks=tuple(disks),
                parent=parent.name if parent else "",
                missing=missing,
                tags=tuple(tags),
                notices=(*(original or capture).notices, *self._notices),
                statistics=self.statistics.as_mapping(),
                audit=(parent.audit if parent else 0) + self._audit,
                copy_of=original.original if original else "",
            )
        )
        try:
            # Had the lease gone before the commit, a prune might have deleted what the point needs.
            self.lease.require()
        except BaseException:
            self.repository.store.delete(f"points/{point.name}")
            raise
        self.repository.refresh()
        return point

    def _missing(self, capture: Capture) -> tuple[Missing, ...]:
        """The disks of the machine that the capture does not hold; each is told."""
        machine = capture.machine
        missing = tuple(
            Missing(
                id=disk.id, reason="the capture did not hold it" if machine.belongs(disk) else "removable or on USB"
            )
            for disk in machine.disks
            if disk.id not in capture.disks
        )
        for disk in missing:
            self._notice("disk-missing", f"this disk of the machine is not in the point: {disk.reason}", disk.id)
        return missing

    def _disk(
        self, disk_id: str, captured: CapturedDisk, capture: Capture, before: PointDisk | None, cursor: int
    ) -> PointDisk:
        source = captured.source
        old = self.repository.tree(before) if before is not None else None
        changes = capture.changes(disk_id) if before is not None else None
        leaves: dict[int, bytes] = {}
        root: bytes | None = None
        if isinstance(changes, Changed) and old is not None:
            try:
                spans = list(self._touched(source, old, changes.extents, cursor))
                self._work(source, old, spans, leaves)
                root = rebuild(source.size, leaves, self._save_page, old)
            except _AuditError as lie:
                self._notice(
                    "changes-wrong",
                    f"the block at {lie.offset} changed without being on the list of changes; the whole disk was read",
                    disk_id,
                    "Change tracking at the source lost writes: reset it there.",
                )
                leaves = {}
        if root is None:
            self._work(source, old, self._all(source), leaves, total=source.size)
            root = rebuild(source.size, leaves, self._save_page)
        return PointDisk(
            id=disk_id,
            size=source.size,
            root="" if root == NOTHING else root.hex(),
            chunker=self.chunker.name,
            consistency=captured.consistency,
            mark=captured.mark,
        )

    def _all(self, source: BlockSource) -> Iterator[_Span]:
        """The spans with data in them; the others are zeroes."""
        last = -1
        for extent in source.extents(0, source.size):
            if extent.kind is Kind.DATA:
                for number in range(max(last + 1, extent.start // SPAN), -(-extent.end // SPAN)):
                    yield _Span(number, None)
                    last = number

    def _touched(self, source: BlockSource, old: Tree, extents: Sequence[Extent], cursor: int) -> Iterator[_Span]:
        """The spans in which something may have changed, with the changed regions, and some for the audit."""
        regions: dict[int, list[tuple[int, int]]] = {}
        if source.size != old.size:
            # The span at the shorter end changes its length, whatever the list says.
            edge = max(0, min(source.size, old.size) - 1) // SPAN
            extents = (
                [*extents, Extent(edge * SPAN, span_length(source.size, edge), Kind.DATA)] if source.size else extents
            )
        for extent in extents:
            for number in range(extent.start // SPAN, -(-min(extent.end, source.size) // SPAN)):
                base = number * SPAN
                low, high = max(extent.start - base, 0), min(extent.end - base, span_length(source.size, number))
                regions.setdefault(number, []).append((low, high))
        for number in sorted(regions):
            yield _Span(number, regions[number])
        count = span_count(min(source.size, old.size))
        if not self._audit or not count:
            return
        audited = 0
        for number, _ in old.leaves(cursor % count):
            if number not in regions and number < count:
                yield _Span(number, None, audit=True)
                audited += 1
            if audited == self._audit:
                return

    def _work(
        self,
        source: BlockSource,
        old: Tree | None,
        spans: Iterable[_Span],
        leaves: dict[int, bytes],
        total: int | None = None,
    ) -> None:
        """Do all spans with several threads; the first error wins."""
        todo: queue.Queue[_Span | None] = queue.Queue(maxsize=self._threads)
        errors: list[BaseException] = []

        def work() -> None:
            buffer = memoryview(bytearray(SPAN))
            while (span := todo.get()) is not None:
                if errors:
                    continue
                try:
                    leaf = self._span(source, old, span, buffer)
                    with self._lock:
                        if not span.audit:
                            leaves[span.number] = leaf
                except BaseException as error:
                    errors.append(error)

        workers = [threading.Thread(target=work, name=f"backup-{n}", daemon=True) for n in range(self._threads)]
        self._progress.start("back up", total)
        for worker in workers:
            worker.start()
        try:
            for span in spans:
                if not self._put(todo, span, errors):
                    break
        except BaseException as error:
            errors.append(error)
        finally:
            for _ in workers:
                todo.put(None)
            for worker in workers:
                worker.join()
            self._progress.finish()
        if errors:
            raise errors[0]

    def _put(self, todo: queue.Queue[_Span | None], span: _Span, errors: list[BaseException]) -> bool:
        while not errors:
            if self._stop.is_set():
                raise InterruptedRunError(
                    "the backup was stopped", advice="Run it again: what is stored is not stored twice."
                )
            with suppress(queue.Full):
                todo.put(span, timeout=_POLL)
                return True
        return False

    # -- one span --------------------------------------------------------------------------------------------------

    def _span(self, source: BlockSource, old: Tree | None, span: _Span, buffer: memoryview) -> bytes:
        """Do one span and return the id of its leaf."""
        number, base = span.number, span.number * SPAN
        length = span_length(source.size, number)
        before = old.entries(number) if old is not None and number < span_count(old.size) else []
        if span.audit:
            self._verify(source, base, before, buffer[:length])
            return NOTHING
        work = _Work(source, base, buffer, {entry.id for entry in before if entry.id is not None}, [])
        entries: list[Entry] = []
        if span.regions is None or sum(entry.length for entry in before) != length:
            entries = self._cut(work, 0, length)
        else:
            for low, high, kept in _regions(before, span.regions, self.chunker.lookahead, self._grain):
                entries += kept if kept is not None else self._cut(work, low, high)
        if work.blobs:
            self._data.add(work.blobs)
        page = encode_leaf(entries)
        return self._save_page(page) if page else NOTHING

    def _verify(self, source: BlockSource, base: int, before: list[Entry], content: memoryview) -> None:
        """Compare a span that is said not to have changed with what the last point has of it."""
        source.readinto(content, base)
        position = 0
        for length, chunk in before:
            plain = content[position : position + length]
            if not is_zero(plain) if chunk is None else self.repository.keyring.id(CHUNK, plain) != chunk:
                raise _AuditError(base + position)
            position += length
        with self._lock:
            self.statistics.audited += len(content)

    def _cut(self, work: _Work, low: int, high: int) -> list[Entry]:
        """Read a region of a span, given as offsets in it, and cut it: its entries."""
        entries: list[Entry] = []
        position, read = low, 0
        for start, end in _data_runs(work.source, work.base + low, high - low, self._grain):
            first, last = start - work.base, end - work.base
            if first > position:
                entries.append(Entry(first - position, None))
            run = work.buffer[first:last]
            work.source.readinto(run, start)
            read += last - first
            previous = 0
            for cut in self.chunker.cuts(run, final=True):
                entries.append(self._chunk(run[previous:cut], work))
                previous = cut
            position = last
        if position < high:
            entries.append(Entry(high - position, None))
        self._progress.advance(high - low)
        with self._lock:
            self.statistics.read += read
            self.statistics.chunks += len(entries)
        return entries

    def _chunk(self, plain: memoryview, work: _Work) -> Entry:
        if not plain[0] and not plain[-1] and is_zero(plain):
            return Entry(len(plain), None)
        chunk = self.repository.keyring.id(CHUNK, plain)
        if chunk not in work.known and self._claim(chunk):
            work.blobs.append(self.repository.codec.encode(CHUNK, chunk, plain))
        return Entry(len(plain), chunk)

    def _claim(self, blob_id: bytes) -> bool:
        """Whether this run has to store the blob: nobody has, and no other thread is about to."""
        if self.index.find(blob_id) is not None:
            return False
        with self._lock:
            if blob_id in self._claimed:
                return False
            self._claimed.add(blob_id)
            return True

    def _save_page(self, page: bytes) -> bytes:
        page_id = self.repository.keyring.id(PAGE, page)
        if self._claim(page_id):
            self._pages.add([self.repository.codec.encode(PAGE, page_id, page)])
        return page_id

    def _notice(self, code: str, message: str, subject: str, advice: str = "") -> None:
        notice = Notice(code=code, message=message, subject=subject, advice=advice)
        self._notices.append(notice)
        self._tell(notice)

    # -- packs and segments ----------------------------------------------------------------------------------------

    def _publish(self, name: str, parts: list[bytes], places: list[tuple[bytes, Place]]) -> None:
        size = sum(map(len, parts))
        with suppress(NameTakenError):  # equal names are equal bytes
            self.repository.store.store(name, parts)
        pending = self.index.add(places, pack_digest(name), size)
        with self._lock:
            self._claimed.difference_update(blob_id for blob_id, _ in places)
            self.statistics.stored += size
            chunks = [place for _, place in places if place.kind == CHUNK]
            self.statistics.new_chunks += len(chunks)
            self.statistics.new_bytes += sum(place.plain for place in chunks)
        if pending >= _FLUSH:
            self._write_segment()

    def _flush(self) -> None:
        self._data.flush()
        self._pages.flush()
        self._write_segment()

    def _write_segment(self) -> None:
        with self._flushing:
            added, packs = self.index.take_added()
            if not packs:
                return
            content = encode_segment(sorted_entries(added), packs)
            name = f"index/{digest_name(content)}"
            with suppress(NameTakenError):
                self.repository.store.store(name, [content])
            self.index.settle(self.repository.open_segment(name))


def _regions(
    before: list[Entry], changed: list[tuple[int, int]], lookahead: int, grain: int
) -> Iterator[tuple[int, int, list[Entry] | None]]:
    """Tile a span: what is kept as it was (with its entries), and what is to be read and cut anew.

    A region goes from an old cut to an old cut. A chunk that ends within ``lookahead`` before a change is cut anew too: its end may
    have depended on it. The last cut of a region is the old one, so what follows needs no new cuts.
    """
    before = list(_split(before, changed, grain))
    ends, position = [], 0
    for entry in before:
        position += entry.length
        ends.append(position)
    redo = [False] * len(before)
    for low, high in changed:
        first = bisect_right(ends, max(0, low - lookahead))
        last = bisect_right(ends, max(low, min(high, position) - 1))
        for number in range(first, min(last, len(before) - 1) + 1):
            redo[number] = True
    start = 0
    while start < len(before):
        stop = start
        while stop < len(before) and redo[stop] == redo[start]:
            stop += 1
        low, high = (ends[start - 1] if start else 0), ends[stop - 1]
        yield low, high, None if redo[start] else before[start:stop]
        start = stop


def _split(before: list[Entry], changed: list[tuple[int, int]], grain: int) -> Iterator[Entry]:
    """The entries, with runs of zeroes cut around what changed: of a run, only that is to be read."""
    marks = sorted({low // grain * grain for low, _ in changed} | {-(-high // grain) * grain for _, high in changed})
    position = 0
    for entry in before:
        end = position + entry.length
        if entry.id is None:
            for number in range(bisect_right(marks, position), bisect_left(marks, end)):
                yield Entry(marks[number] - position, None)
                position = marks[number]
        yield Entry(end - position, entry.id)
        position = end


def _data_runs(source: BlockSource, start: int, length: int, grid: int) -> Iterator[tuple[int, int]]:
    """The runs of a region that hold data, rounded outward to ``grid`` so that equal data has equal cuts; joined where they touch.

    A span is a multiple of the grid of every chunker, so rounding never leaves it but for the region's own bounds.
    """
    pending: tuple[int, int] | None = None
    for extent in source.extents(start, length):
        if extent.kind is not Kind.DATA:
            continue
        low = max(start, extent.start // grid * grid)
        high = min(start + length, -(-extent.end // grid) * grid)
        if pending is not None and low <= pending[1]:
            pending = (pending[0], max(high, pending[1]))
            continue
        if pending is not None:
            yield pending
        pending = (low, high)
    if pending is not None:
        yield pending
