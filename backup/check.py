"""Is everything there, and is it what was written? Damage is traced to the ranges of the disks that it hurts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import msgspec

from backup.errors import ObjectDamagedError, ObjectMissingError, RepositoryError
from backup.index import Index, Segment
from backup.keys import CHUNK, PAGE, RECORD, decode_key, digest_name
from backup.manifest import FAN, NOTHING, SPAN, Tree, decode_inner, decode_leaf, span_length
from backup.pack import HEAD, Place, pack_digest, pack_name, scan
from backup.prune import condemned_packs
from backup.repository import Point, Repository
from formats.block import Extent, Kind, merged
from formats.progress import Progress, Silence


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """An object that is not as it should be."""

    subject: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hurt:
    """What a point lost: the ranges of a disk (start, length), all of the point where ``disk`` is empty."""

    point: str
    disk: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Checked:
    """The result; ``sound`` when there is no damage. ``packs`` were found, ``bytes_read`` of them read."""

    damages: list[Damage] = field(default_factory=list)
    hurts: list[Hurt] = field(default_factory=list)
    points: int = 0
    packs: int = 0
    bytes_read: int = 0
    strays: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages and not self.hurts

    def add(self, subject: str, message: str) -> None:
        """Note damage."""
        self.damages.append(Damage(subject=subject, message=message))


class Check:
    """One check; reads only. With ``read_data`` every byte of every pack is read, opened and hashed."""

    def __init__(self, repository: Repository, *, read_data: bool = False, progress: Progress | None = None) -> None:
        self._repository, self._store = repository, repository.store
        self._read_data, self._progress = read_data, progress or Silence()
        self.result = Checked()
        self._bad: set[bytes] = set()  # blobs that are damaged wherever they lie, or nowhere
        self._doubtful = False  # a segment is damaged: what the index says is believed only when it was read
        self._sizes: dict[bytes, int] = {}  # of the packs that are there

    def run(self) -> Checked:
        """Check everything; damage is in the result, not raised."""
        self._small_objects()
        points = list(self._points())
        index = self._index()
        for stored in self._store.list("packs/"):
            try:
                self._sizes[pack_digest(stored.name)] = stored.size
            except ValueError:
                self.result.add(stored.name, "this is no name of a pack")
        self.result.packs = len(self._sizes)
        self._places(index)
        if self._read_data:
            self._packs(index)
        for point in points:
            for disk in point.disks:
                ranges = tuple((e.start, e.length) for e in merged(self._lost(self._repository.tree(disk), index)))
                if ranges:
                    self.result.hurts.append(Hurt(point=point.name, disk=disk.id, ranges=ranges))
        index.close()
        return self.result

    # -- objects ---------------------------------------------------------------------------------------------------

    def _small_objects(self) -> None:
        for stored in self._store.list("keys/"):
            self._attempt(stored.name, partial(self._key, stored.name))
        for stored in self._store.list("records/"):
            self._attempt(stored.name, partial(self._record, stored.name))
        self._attempt("forgotten", lambda: list(self._repository.forgotten()))
        self._attempt("condemned", partial(condemned_packs, self._store))

    def _key(self, name: str) -> None:
        decode_key(self._named(name), name)

    def _record(self, name: str) -> None:
        content = self._named(name)
        self._repository.keyring.unseal(RECORD, content, subject=name, binding=name.split("/")[1].encode())

    def _named(self, name: str) -> bytes:
        content = self._store.load(name)
        if digest_name(content) != name.rpartition("/")[2]:
            raise ObjectDamagedError("it is not what was stored under this name", subject=name)
        return content

    def _attempt(self, subject: str, action: Callable[[], object]) -> None:
        try:
            action()
        except RepositoryError as error:
            self.result.add(error.subject or subject, error.message)

    def _points(self) -> Iterator[Point]:
        for name in self._repository.point_names():
            self.result.points += 1
            try:
                yield self._repository.point(name)
            except ObjectMissingError:
                self.result.points -= 1  # forgotten meanwhile
            except RepositoryError as error:
                self.result.add(f"points/{name}", error.message)
                self.result.hurts.append(Hurt(point=name, disk="", ranges=()))

    def _index(self) -> Index:
        segments: list[Segment] = []
        for stored in self._store.list("index/"):
            try:
                segments.append(self._repository.open_segment(stored.name))
                self._named(stored.name)
            except RepositoryError as error:
                self._doubtful = True
                self.result.add(stored.name, error.message)
        return Index(segments)

    # -- packs -----------------------------------------------------------------------------------------------------

    def _places(self, index: Index) -> None:
        """Packs that segments name must be there, as long as they say."""
        for digest, size in index.packs().items():
            found = self._sizes.get(digest)
            if found is None:
                self.result.add(pack_name(digest), "the pack is missing")
            elif found != size:
                self.result.add(pack_name(digest), f"the pack has {found} bytes, {size} are expected")
        self.result.strays = len(self._sizes.keys() - index.packs().keys())

    def _packs(self, index: Index) -> None:
        broken: dict[bytes, bytes] = {}
        self._progress.start("read packs", sum(self._sizes.values()))
        for digest, size in self._sizes.items():
            name = pack_name(digest)
            try:
                content = self._store.load(name)
            except ObjectMissingError:
                continue  # pruned meanwhile; if it is needed, its blobs are missing below
            except RepositoryError as error:
                self.result.add(name, error.message)
                continue
            self.result.bytes_read += size
            if digest_name(content) != digest.hex():
                self.result.add(name, "its bytes are not those that were stored")
                broken[digest] = content
            for blob_id, place in () if digest in broken else scan(digest, content):
                self._open(blob_id, place, content)
            self._progress.advance(size)
        self._progress.finish()
        if broken:
            for blob_id, place in index.entries():
                if place.pack in broken and place.end <= len(broken[place.pack]):
                    self._open(blob_id, place, broken[place.pack])

    def _open(self, blob_id: bytes, place: Place, content: bytes) -> None:
        try:
            raw = memoryview(content)[place.offset : place.offset + HEAD + place.sealed]
            self._repository.codec.decode(blob_id, place.kind, raw, pack_name(place.pack))
        except ObjectDamagedError as error:
            self._bad.add(blob_id)
            if not self.result.damages or self.result.damages[-1].subject != pack_name(place.pack):
                self.result.add(pack_name(place.pack), error.message)

    # -- disks -----------------------------------------------------------------------------------------------------

    def _lost(self, tree: Tree, index: Index) -> Iterator[Extent]:
        """The ranges of a disk that cannot be restored, ascending."""
        yield from self._below(tree, tree.root, 0, index)

    def _there(self, blob_id: bytes, kind: int, index: Index) -> bool:
        places = [place for place in index.places(blob_id) if self._sizes.get(place.pack, -1) >= place.end]
        if blob_id not in self._bad and not self._doubtful:
            return bool(places)
        return any(self._readable(blob_id, kind, place) for place in places)

    def _readable(self, blob_id: bytes, kind: int, place: Place) -> bool:
        try:
            data = self._store.load(pack_name(place.pack), place.offset, HEAD + place.sealed)
            self._repository.codec.decode(blob_id, kind, data)
        except RepositoryError:
            return False
        return True

    def _below(self, tree: Tree, page: bytes, number: int, index: Index, below_root: int = 0) -> Iterator[Extent]:
        if page == NOTHING:
            return
        level = tree.level - below_root
        reach = SPAN * FAN**level
        start = number * reach
        length = min(reach, tree.size - start)
        try:
            if not self._there(page, PAGE, index):
                raise ObjectMissingError("a page is missing")
            content = self._repository.blob(page, PAGE)
            if level:
                for child, below in enumerate(decode_inner(content)):
                    yield from self._below(tree, below, number * FAN + child, index, below_root + 1)
                return
            entries = decode_leaf(content, span_length(tree.size, number))
        except (ObjectDamagedError, ObjectMissingError):
            yield Extent(start, length, Kind.HOLE)
            return
        position = start
        for entry in entries:
            if entry.id is not None and not self._there(entry.id, CHUNK, index):
                yield Extent(position, entry.length, Kind.HOLE)
            position += entry.length


def add_record(repository: Repository, point: Point, document: dict[str, object]) -> None:
    """Append what was learnt of a point: a drill, a check."""
    content = repository.keyring.seal(RECORD, msgspec.json.encode(document), binding=point.name.encode())
    repository.store.store(f"records/{point.name}/{digest_name(content)}", [content])


def records(repository: Repository, point: Point) -> list[dict[str, object]]:
    """The records of a point, oldest first."""
    found = []
    for stored in repository.store.list(f"records/{point.name}/"):
        content = repository.store.load(stored.name)
        document = repository.keyring.unseal(RECORD, content, subject=stored.name, binding=point.name.encode())
        found.append(msgspec.json.decode(document, type=dict[str, object]))
    return sorted(found, key=lambda document: str(document.get("time", "")))
