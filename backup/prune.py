"""Delete what no point needs, while other runs write.

A prune goes through these steps; no step looks at a clock:

    P1  lock       locks/prune is created where absent: there is one prune at a time
    P2  mark       list points, then read the index: which blobs are needed, which packs hold them
    P3  repack     what is needed of packs that are mostly waste is copied to new packs; their segment is stored
    P4  condemn    condemned/H lists the packs to be deleted; whoever starts from now on relies on none of them
    P5  quiet      leases: none (those of dead processes of this computer are removed); points = A; leases: none; points = B; A = B.
                   Otherwise the deletion is left to the next prune: nothing else is.
    P6  mark again over A, with every condemnation: a condemned pack that holds the only copy of a needed blob is spared
    P7  index      one new set of segments without the condemned packs, then the old segments are deleted
    P8  delete     the condemned packs, then the condemnations, then the lock

A backup: B1 lease · B2 list condemnations (their packs are shunned: not relied on through the index) · B3 list points, choose
the parent · B4 read the
index · B5 packs · B6 segments · B7 lease still there · B8 point · B9 lease still there, else the point is taken back · B10 lease removed.
A forget deletes points, nothing else. A crash leaves any prefix of these.

What may race with what, and why nothing needed is deleted. "needed": referred to by a point that is, or will be, committed.

| with | case | why |
|---|---|---|
| backup | B1 before P5's second look at leases, still running | its lease is seen: P8 does not happen in this run |
| backup | it ran and ended between the two looks | its point makes A and B differ: P8 does not happen |
| backup | it ended before A was listed | its point is in A: all that it refers to is needed in P6 |
| backup | B1 after the second look | B2 is later than P4: condemned packs are not relied on through the index. Its parent is in
B (B3 is later), so in A, or was committed by such a backup itself: all of the parent is needed in P6 |
| backup of S1 from S0, S0 forgotten meanwhile (PSA-2025-00019-1) | S1 not committed in P2, S0 gone | its lease was there before
S0 was read: one of the four rows above |
| forget | between A and B | A and B differ. Before A: not needed unless a lease is held. After B: A needs more than it must |
| prune | two at a time | P1. A dead one's lock is removed only when its process is known to be dead |
| crash of prune | after P3 | blobs lie twice; a later prune keeps one |
| crash of prune | after P4 | the condemnation stays: its packs are shunned, P6 of the next prune decides |
| crash of prune | in P7 | old and new segments: the old ones name condemned packs, which are shunned; readers find blobs in either |
| crash of prune | in P8 | packs that no segment names, still condemned: the next prune deletes them |
| crash of backup | any | dead lease: removed here if it is of this computer, else by `unlock`; its packs are waste or are
adopted by the next backup |
| reader | a blob was moved | the pack is missing: the reader reads the index again |
| `unlock` of a living backup | lease gone, P8 happened | B7 or B9 sees it: no point, or the point is taken back |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from backup.errors import ObjectDamagedError, ObjectMissingError
from backup.index import MAX_ENTRIES, Index, encode_segment
from backup.keys import PAGE, digest_name
from backup.lock import LEASES, exclusive, remove_dead
from backup.manifest import FAN, NOTHING, Tree, decode_inner, decode_leaf, span_length
from backup.pack import HEAD, Blob, Packer, Place, pack_digest, pack_name
from backup.repository import RESERVE, Point, Repository, keep_reserve
from backup.store.base import NameTakenError, Store
from backup.store.local import LocalStore
from formats.errors import NoSpaceError

CONDEMNED = "condemned/"
_WASTE = 0.2  # a pack with more waste than this share is written anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Condemnation:
    """The object of FORMAT.md."""

    packs: tuple[str, ...]
    leases: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Pruned:
    """What a prune did; bytes and counts. ``waiting`` names the leases that keep the deletion for a later run."""

    packs: int = 0
    needed: int = 0
    waste: int = 0
    repacked: int = 0
    condemned: int = 0
    deleted_packs: int = 0
    deleted_bytes: int = 0
    waiting: tuple[str, ...] = ()


def condemned_packs(store: Store) -> set[bytes]:
    """The packs of all condemnations. An unreadable one raises ``ObjectDamagedError``: going on could rely on what is about to go."""
    packs: set[bytes] = set()
    for stored in store.list(CONDEMNED):
        try:
            content = store.load(stored.name)
            if CONDEMNED + digest_name(content) != stored.name:
                raise ValueError("not what was stored under this name")
            found = msgspec.json.decode(content, type=Condemnation)
            packs.update(map(bytes.fromhex, found.packs))
        except ObjectMissingError:
            continue  # that prune has ended
        except (msgspec.DecodeError, ValueError):
            raise ObjectDamagedError(
                f"{stored.name} is damaged", advice="Delete it when no prune is running.", subject=stored.name
            ) from None
    return packs


class _Marks:
    """Which entries of an index are needed: a byte for each entry, and what that leaves of each pack."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._seen = [bytearray(segment.count) for segment in index.segments]
        self.bytes: dict[bytes, int] = {}
        self.lost: list[bytes] = []

    def visit(self, blob_id: bytes) -> bool:
        """Mark a blob; whether this is the first time."""
        for seen, segment in zip(self._seen, self._index.segments, strict=True):
            if (ordinal := segment.ordinal(blob_id)) is None:
                continue
            place = segment.place(ordinal)
            if place.pack in self._index.shunned:
                continue
            if seen[ordinal]:
                return False
            seen[ordinal] = 1
            self.bytes[place.pack] = self.bytes.get(place.pack, 0) + HEAD + place.sealed
            return True
        self.lost.append(blob_id)
        return True

    def needed(self, packs: set[bytes]) -> Iterator[tuple[bytes, Place]]:
        """The needed entries that lie in ``packs``, by pack and offset."""
        found = []
        for seen, segment in zip(self._seen, self._index.segments, strict=True):
            position = seen.find(1)
            while position >= 0:
                place = segment.place(position)
                if place.pack in packs:
                    found.append((segment.id(position), place))
                position = seen.find(1, position + 1)
        return iter(sorted(found, key=lambda entry: entry[1]))


def mark(repository: Repository, points: Iterable[Point], index: Index) -> _Marks:
    """Visit everything that ``points`` refer to; a page that several share is walked once."""
    marks = _Marks(index)
    for point in points:
        for disk in point.disks:
            _mark_tree(repository, repository.tree(disk), marks)
    return marks


def _mark_tree(repository: Repository, tree: Tree, marks: _Marks) -> None:
    pending = [(tree.root, tree.level, 0)]
    while pending:
        page, level, number = pending.pop()
        if page == NOTHING or not marks.visit(page):
            continue
        content = repository.blob(page, PAGE)
        if level:
            pending += [(child, level - 1, number * FAN + n) for n, child in enumerate(decode_inner(content))]
            continue
        for entry in decode_leaf(content, span_length(tree.size, number)):
            if entry.id is not None:
                marks.visit(entry.id)


def _spared(marks: _Marks, index: Index) -> set[bytes]:
    """The condemned packs that hold needed blobs which lie nowhere else.

    ``ObjectMissingError`` for a needed blob that the index does not know: its pack may be there, and look like waste.
    """
    packs: set[bytes] = set()
    for blob_id in marks.lost:
        places = [place.pack for place in index.places(blob_id)]
        if not places:
            raise ObjectMissingError(
                f"the index does not know the blob {blob_id.hex()[:16]}, which a point needs; nothing was deleted",
                advice="Run `p2v-backup repair-index`, then `p2v-backup check`. Forget the points that it says are hurt.",
            )
        packs.update(places)
    return packs


class Prune:
    """One prune."""

    def __init__(
        self,
        repository: Repository,
        *,
        dry_run: bool = False,
        time: str = "",
    ) -> None:
        self._repository, self._store = repository, repository.store
        self._dry_run, self._time = dry_run, time

    def run(self) -> Pruned:
        """Prune. ``LockedError`` when another one runs; damage that is met raises and nothing is deleted."""
        if self._dry_run:
            return self._mark()[0]
        self._store.delete(RESERVE)  # on a full disk, the room for what a prune has to write before it can free any
        try:
            return self._locked()
        finally:
            with suppress(NoSpaceError, NameTakenError):
                keep_reserve(self._store)

    def _locked(self) -> Pruned:
        with exclusive(self._store, "prune", self._time):
            result, waste, repack = self._mark()
            try:
                self._repack(repack, result)
            except NoSpaceError:
                repack.clear()  # what was copied is waste now; delete what is nothing but waste, and there is room the next time
            self._condemn({*waste, *repack}, result)
            points = self._quiet(result)
            if points is not None:
                self._sweep(points, result)
        return result

    # -- P2 --------------------------------------------------------------------------------------------------------

    def _mark(self) -> tuple[Pruned, set[bytes], dict[bytes, list[tuple[bytes, Place]]]]:
        repository = self._repository
        shunned = frozenset(condemned_packs(self._store))
        points = [repository.point(name) for name in repository.point_names()]
        repository.refresh()
        index = repository.load_index(shunned=shunned, strict=True)
        sizes = {pack_digest(stored.name): stored.size for stored in self._store.list("packs/")}
        marks = mark(repository, points, index)
        _spared(marks, index)  # what lies in condemned packs alone is spared in P6
        result = Pruned(packs=len(sizes), needed=sum(marks.bytes.values()))
        result.waste = sum(sizes.values()) - result.needed
        waste = {digest for digest in sizes if digest not in marks.bytes and digest not in shunned}
        wasteful = {
            digest
            for digest, needed in marks.bytes.items()
            if digest in sizes and sizes[digest] - needed > _WASTE * sizes[digest]
        }
        repack: dict[bytes, list[tuple[bytes, Place]]] = {digest: [] for digest in wasteful}
        for blob_id, place in marks.needed(wasteful):
            repack[place.pack].append((blob_id, place))
        index.close()
        return result, waste, repack

    # -- P3 --------------------------------------------------------------------------------------------------------

    def _repack(self, repack: dict[bytes, list[tuple[bytes, Place]]], result: Pruned) -> None:
        """Copy needed blobs as they are sealed, each verified. A pack with damage stays as it is."""
        added: dict[bytes, Place] = {}
        sizes: dict[bytes, int] = {}

        def publish(name: str, parts: list[bytes], places: list[tuple[bytes, Place]]) -> None:
            with suppress(NameTakenError):
                self._store.store(name, parts)
            added.update(places)
            sizes[pack_digest(name)] = sum(map(len, parts))

        packers: dict[int, Packer] = {}
        for digest in list(repack):
            try:
                blobs = self._verified(digest, repack[digest])
            except (ObjectDamagedError, ObjectMissingError):
                del repack[digest]
                continue
            for blob in blobs:
                packers.setdefault(blob.kind, Packer(publish)).add([blob])
                result.repacked += blob.size
        for packer in packers.values():
            packer.flush()
        if added:
            content = encode_segment(sorted(added.items()), sizes)
            with suppress(NameTakenError):
                self._store.store(f"index/{digest_name(content)}", [content])

    def _verified(self, digest: bytes, entries: list[tuple[bytes, Place]]) -> list[Blob]:
        content = memoryview(self._store.load(pack_name(digest)))
        blobs = []
        for blob_id, place in entries:
            raw = content[place.offset : place.end]
            self._repository.codec.decode(blob_id, place.kind, raw, pack_name(digest))
            blobs.append(Blob(place.kind, blob_id, place.plain, bytes(raw)))
        return blobs

    # -- P4, P5 ----------------------------------------------------------------------------------------------------

    def _condemn(self, packs: set[bytes], result: Pruned) -> None:
        result.condemned = len(packs)
        if not packs:
            return
        leases = tuple(sorted(stored.name for stored in self._store.list(LEASES)))
        content = msgspec.json.encode(Condemnation(packs=tuple(sorted(p.hex() for p in packs)), leases=leases))
        with suppress(NameTakenError):
            self._store.store(CONDEMNED + digest_name(content), [content])

    def _quiet(self, result: Pruned) -> list[Point] | None:
        """The points, when nobody writes; None when somebody may."""
        result.waiting = tuple(remove_dead(self._store))
        if result.waiting:
            return None
        names = self._repository.point_names()
        # Read now: a point that is forgotten after B may be the parent of a backup that has begun since.
        points = []
        for name in names:
            try:
                points.append(self._repository.point(name))
            except ObjectMissingError:
                result.waiting = ("points changed meanwhile",)
                return None
        result.waiting = tuple(remove_dead(self._store))
        if result.waiting:
            return None
        if self._repository.point_names() != names:
            result.waiting = ("points changed meanwhile",)
            return None
        return points

    # -- P6 to P8 --------------------------------------------------------------------------------------------------

    def _sweep(self, points: list[Point], result: Pruned) -> None:
        repository, store = self._repository, self._store
        if isinstance(store, LocalStore):
            store.sweep()  # nobody writes but we; a key that is being added fails and says so
        condemnations = [stored.name for stored in store.list(CONDEMNED)]
        condemned = condemned_packs(store)
        if not condemned:
            return
        old = [stored.name for stored in store.list("index/")]
        repository.refresh()
        index = repository.load_index(shunned=frozenset(condemned), strict=True)
        marks = mark(repository, points, index)
        doomed = condemned - _spared(marks, index)
        try:
            kept = self._write_index(index, doomed)
        except NoSpaceError:
            # The index may name packs that are gone while they are condemned: nobody relies on them.
            self._delete(doomed, result)
            kept = self._write_index(index, doomed)
        for name in old:
            if name not in kept:
                store.delete(name)
        index.close()
        self._delete(doomed, result)
        for name in condemnations:
            store.delete(name)
        repository.refresh()

    def _delete(self, doomed: set[bytes], result: Pruned) -> None:
        sizes = {pack_digest(stored.name): stored.size for stored in self._store.list("packs/")}
        for digest in sorted(doomed & sizes.keys()):
            self._store.delete(pack_name(digest))
            result.deleted_packs += 1
            result.deleted_bytes += sizes[digest]

    def _write_index(self, index: Index, doomed: set[bytes]) -> set[str]:
        """Merge all segments, without doomed packs, into segments of about ``MAX_ENTRIES``; returns their names."""
        names: set[str] = set()
        batch: list[tuple[bytes, Place]] = []

        def write() -> None:
            sizes = {place.pack: known[place.pack] for _, place in batch}
            content = encode_segment(batch, sizes)
            name = f"index/{digest_name(content)}"
            with suppress(NameTakenError):
                self._store.store(name, [content])
            names.add(name)
            batch.clear()

        known = index.packs()
        previous: tuple[bytes, Place] | None = None
        for entry in index.entries():
            if entry[1].pack in doomed or entry == previous:
                continue
            previous = entry
            batch.append(entry)
            if len(batch) >= MAX_ENTRIES:
                write()
        if batch:
            write()
        return names
