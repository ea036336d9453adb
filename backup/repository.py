"""The repository: what lies in a store, opened with a password. Points are listed and opened here; the engine writes them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from backup.chunk import USUAL
from backup.errors import (
    ObjectDamagedError,
    ObjectMissingError,
    RepositoryError,
    RepositoryMissingError,
    RepositoryUnsupportedError,
    WrongPasswordError,
)
from backup.index import Index, Segment
from backup.keys import FORGOTTEN, PAGE, POINT, Kdf, Keyring, decode_key, digest_name, from_paper, unwrap, wrap
from backup.manifest import NOTHING, Tree
from backup.pack import HEAD, Codec, Place, pack_name
from backup.store.base import Store
from backup.store.local import LocalStore
from formats.capture import Consistency, Mark
from formats.errors import NoSpaceError, Notice, UsageError
from formats.machine import Machine
from p2v.config import Secret

RESERVE = "reserve"
"""The object that a prune on a full disk deletes first, so that it has room for what it must write."""

_RESERVE_SIZE = 256 * 1024
_FORMAT, _VERSION = "p2v-repository", 1
_FEATURES: frozenset[str] = frozenset()  # mandatory features that this program knows
_PAGES = 4096  # pages kept in memory by one reader: 36 MiB
_RUN = 2 << 20  # bytes of neighbouring blobs that one request fetches
_RUN_GAP = 16 << 10  # bytes between blobs that are cheaper to read over


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The object ``config``."""

    format: str
    version: int
    id: str
    chunker: str
    created: str
    features: tuple[str, ...] = ()
    mac: str = ""

    def encode(self) -> bytes:
        """The object, in the only form that is accepted."""
        return msgspec.json.encode(self) + b"\n"

    @property
    def stated(self) -> bytes:
        """What the MAC covers."""
        return "\0".join([self.id, str(self.version), ",".join(self.features), self.chunker, self.created]).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class PointDisk:
    """A disk of a point. ``root`` is the hex id of its root page, empty for a disk of zeroes."""

    id: str
    size: int
    root: str
    chunker: str
    consistency: Consistency
    mark: Mark | None = None

    @property
    def root_id(self) -> bytes:
        """The id of the root page."""
        return bytes.fromhex(self.root) if self.root else NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A disk of the machine that is not in the point."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a point says. ``name`` is the hex of its object's name; it is not stored.

    ``copy_of`` is the name of the point of another repository that it is a copy of, the first of them where copies were copied.
    """

    version: int
    kind: str
    time: str
    machine: Machine
    source: str
    disks: tuple[PointDisk, ...]
    parent: str = ""
    missing: tuple[Missing, ...] = ()
    tags: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()
    statistics: Mapping[str, float] = field(default_factory=dict)
    audit: int = 0
    copy_of: str = ""
    name: str = ""

    @property
    def original(self) -> str:
        """The name under which it was made first: the same for all its copies."""
        return self.copy_of or self.name

    @property
    def short(self) -> str:
        """The name for people."""
        return self.name[:8]

    @property
    def when(self) -> datetime:
        """The time of the capture."""
        return datetime.fromisoformat(self.time)

    def disk(self, disk_id: str) -> PointDisk | None:
        """The disk with this id."""
        return next((disk for disk in self.disks if disk.id == disk_id), None)


class Repository:
    """An opened repository. Reading takes no lease: a reader that meets a prune finds the moved blobs by reading the index again."""

    def __init__(
        self, store: Store, keyring: Keyring, config: Config, *, level: int = 3, cache: Path | None = None
    ) -> None:
        self.store, self.keyring, self.config = store, keyring, config
        self.codec = Codec(keyring, level=level)
        self._cache = cache
        self._index: Index | None = None
        self._pages: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    # -- making and opening ----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, store: Store, password: Secret, *, chunker: str = USUAL, level: int = 3, kdf: Kdf | None = None
    ) -> Repository:
        """Make a repository in an empty store: a key, and last the config. ``UsageError`` when there is something already."""
        if next(iter(store.list("")), None) is not None:
            try:
                store.load("config")
            except ObjectMissingError:
                # A killed `init` leaves keys and the reserve, and nothing else: they open nothing.
                left = [stored.name for stored in store.list("")]
                if any(name != RESERVE and not name.startswith("keys/") for name in left):
                    raise UsageError("the place holds other objects", advice="Choose an empty one.") from None
                for name in left:
                    store.delete(name)
            else:
                raise UsageError("there is a repository already", advice="Choose another place, or use it as it is.")
        keyring, identity, now = Keyring.generate(), secrets.token_hex(16), _now().isoformat(timespec="seconds")
        blank = Config(format=_FORMAT, version=_VERSION, id=identity, chunker=chunker, created=now)
        config = replace(blank, mac=keyring.mac(blank.stated))
        made = cls(store, keyring, config, level=level)
        made.add_key(password, label="first", kdf=kdf)
        keep_reserve(store)
        store.store("config", [config.encode()])
        return made

    @classmethod
    def open(cls, store: Store, password: Secret, *, level: int = 3, cache: Path | None = None) -> Repository:
        """Open with a password or the paper key.

        ``RepositoryMissingError``, ``WrongPasswordError``, ``RepositoryUnsupportedError``, or ``ObjectDamagedError`` when the
        config is not the key's.
        """
        config = cls.require(store)
        keyring = from_paper(password.reveal()) or _unlock(store, config, password)
        if keyring.mac(config.stated) != config.mac:
            raise ObjectDamagedError(
                "the repository's config is damaged, or this key is of another repository",
                advice="Put back a copy of the object `config`.",
                subject="config",
            )
        return cls(store, keyring, config, level=level, cache=cache)

    @staticmethod
    def require(store: Store) -> Config:
        """The config, not yet shown to be the key's; ``RepositoryMissingError`` where there is none."""
        try:
            return _decode_config(store.load("config"))
        except ObjectMissingError:
            raise RepositoryMissingError("there is no repository", advice="Make one with `p2v-backup init`.") from None

    def close(self) -> None:
        """Unmap the index; the store stays the caller's."""
        if self._index is not None:
            self._index.close()
            self._index = None

    # -- keys ------------------------------------------------------------------------------------------------------

    def add_key(self, password: Secret, *, label: str, kdf: Kdf | None = None) -> str:
        """Wrap the master key with one more password; returns the key's name."""
        now = _now().isoformat(timespec="seconds")
        content = wrap(self.keyring, password, repository=self.config.id, label=label, created=now, kdf=kdf)
        name = digest_name(content)
        self.store.store(f"keys/{name}", [content])
        return name

    def list_keys(self) -> list[tuple[str, str, str]]:
        """Names, labels and times of the keys."""
        found = []
        for stored in self.store.list("keys/"):
            key = decode_key(self.store.load(stored.name), stored.name)
            found.append((stored.name.partition("/")[2], key.label, key.created))
        return sorted(found, key=lambda key: key[2])

    def remove_key(self, prefix: str) -> str:
        """Remove a key. ``UsageError`` for none, several, or the last one. The master key stays the same: whoever knew it still does."""
        names = [stored.name for stored in self.store.list("keys/")]
        name = _one([name.partition("/")[2] for name in names], prefix, "key")
        if len(names) == 1:
            raise UsageError("this is the last key: nobody could open the repository", advice="Add another one first.")
        self.store.delete(f"keys/{name}")
        return name

    # -- points ----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """All points, oldest first. ``ObjectDamagedError`` for one that cannot be read: see ``check``."""
        return sorted(map(self.point, self.point_names()), key=lambda point: (point.when, point.name))

    def point_names(self) -> list[str]:
        """The names of all committed points."""
        return sorted(stored.name.partition("/")[2] for stored in self.store.list("points/"))

    def point(self, name: str) -> Point:
        """One point by its full name."""
        content = self.store.load(f"points/{name}")
        document = self.keyring.unseal(POINT, content, subject=f"points/{name}")
        if digest_name(content) != name:
            raise ObjectDamagedError(f"points/{name} is not what was stored under this name", subject=name)
        try:
            head = msgspec.json.decode(document, type=_PointHead)
            if head.version != 1 or head.kind != "disks":
                raise RepositoryUnsupportedError(
                    f"the point {name[:8]} is of kind {head.kind!r}, version {head.version}",
                    advice="Use a later version of the toolkit.",
                )
            point = msgspec.json.decode(document, type=Point)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise ObjectDamagedError(f"points/{name} is no point: {error}", subject=name) from None
        return _named(point, name)

    def find_point(self, text: str, points: Sequence[Point] | None = None) -> Point:
        """The point that ``text`` names: an id or its unique beginning, ``latest``, or ``MACHINE@latest``."""
        known = self.points() if points is None else list(points)
        machine, at, what = text.rpartition("@")
        if at:
            known = [point for point in known if point.machine.name == machine]
        if what == "latest":
            if not known:
                raise UsageError(
                    f"there is no point{f' of {machine}' if machine else ''}", advice="See `p2v-backup points`."
                )
            return known[-1]
        name = _one([point.name for point in known], what, "point")
        return next(point for point in known if point.name == name)

    def commit(self, point: Point) -> Point:
        """Store a point: everything that it refers to must be stored and in the index."""
        document = msgspec.json.encode({k: v for k, v in msgspec.to_builtins(point).items() if k != "name"})
        content = self.keyring.seal(POINT, document)
        name = digest_name(content)
        self.store.store(f"points/{name}", [content])
        return _named(point, name)

    def forget(self, points: Sequence[Point]) -> None:
        """Delete points and what was learnt of them; what they alone need is left to a prune.

        A sealed note that they went on purpose comes first: without one a point that is gone was taken away (``forgotten``). On a full disk
        the note gets its room from the reserve, which the next prune puts back.
        """
        if not points:
            return
        document = {"time": _now().isoformat(timespec="seconds"), "points": [point.name for point in points]}
        content = self.keyring.seal(FORGOTTEN, msgspec.json.encode(document))
        name = f"forgotten/{digest_name(content)}"
        try:
            self.store.store(name, [content])
        except NoSpaceError:
            self.store.delete(RESERVE)
            self.store.store(name, [content])
        for point in points:
            self.store.delete(f"points/{point.name}")
            for stored in list(self.store.list(f"records/{point.name}/")):
                self.store.delete(stored.name)

    def forgotten(self) -> Iterator[frozenset[str]]:
        """The names of points that were forgotten, note by note, in any order. ``ObjectDamagedError`` for a note that is not ours."""
        for stored in self.store.list("forgotten/"):
            document = self.keyring.unseal(FORGOTTEN, self.store.load(stored.name), subject=stored.name)
            try:
                yield frozenset(msgspec.json.decode(document, type=_Forgotten).points)
            except (msgspec.DecodeError, RecursionError):
                raise ObjectDamagedError(f"{stored.name} is no note of forgotten points", subject=stored.name) from None

    # -- blobs -----------------------------------------------------------------------------------------------------

    @property
    def index(self) -> Index:
        """The index as it was when it was first asked for, or last refreshed."""
        with self._lock:
            if self._index is None:
                self._index = self.load_index()
            return self._index

    def refresh(self) -> None:
        """Read the index again: a prune may have moved blobs."""
        with self._lock:
            self._index = None  # mapped segments may still be read by other threads: they go with their last user

    def load_index(self, *, shunned: frozenset[bytes] = frozenset(), strict: bool = False) -> Index:
        """Open every segment. A segment that is merged away meanwhile makes it look again.

        A segment whose tables are broken is left out: what it alone knows is missing then. ``strict``: every segment is hashed,
        and damage raises: who deletes must know all.
        """
        for _ in range(8):
            segments: list[Segment] = []
            with contextlib.suppress(ObjectMissingError):
                for stored in list(self.store.list("index/")):
                    if strict and digest_name(self.store.load(stored.name)) != stored.name.partition("/")[2]:
                        raise ObjectDamagedError(
                            f"{stored.name} is damaged", advice="Run `p2v-backup repair-index`.", subject=stored.name
                        )
                    try:
                        segments.append(self.open_segment(stored.name))
                    except ObjectDamagedError:
                        if strict:
                            raise
                return Index(segments, shunned=shunned)
        raise RepositoryError("the index changes faster than it can be read", advice="Try again.")

    def open_segment(self, name: str) -> Segment:
        """One segment: mapped where it lies, or from a copy in the cache."""
        if isinstance(self.store, LocalStore):
            try:
                return Segment.of_file(name, self.store.path(name))
            except FileNotFoundError:
                raise ObjectMissingError(f"the object {name} is missing", subject=name) from None
        if self._cache is None:
            return Segment(name, self.store.load(name))
        path = self._cache / self.config.id / name
        if not path.exists() or digest_name(path.read_bytes()) != name.partition("/")[2]:
            content = self.store.load(name)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_bytes(content)
            part.rename(path)
        return Segment.of_file(name, path)

    def blob(self, blob_id: bytes, kind: int) -> bytes:
        """The plain bytes of one blob; tries every place that the index knows, then the index anew."""
        return self.blobs([blob_id], kind)[blob_id]

    def blobs(self, wanted: Iterable[bytes], kind: int) -> dict[bytes, bytes]:
        """The plain bytes of several blobs; neighbours in a pack come with one request. Raises for the first that cannot be had."""
        ids = list(dict.fromkeys(wanted))
        index = self.index
        places: list[tuple[Place, bytes]] = []
        found: dict[bytes, bytes] = {}
        for blob_id in ids:
            place = index.find(blob_id)
            if place is None:
                found[blob_id] = self._elsewhere(blob_id, kind, None)
            else:
                places.append((place, blob_id))
        places.sort()
        for run in _runs(places):
            first, last = run[0][0], run[-1][0]
            name = pack_name(first.pack)
            try:
                view = memoryview(self.store.load(name, first.offset, last.end - first.offset))
            except (ObjectMissingError, ObjectDamagedError):
                for place, blob_id in run:
                    found[blob_id] = self._elsewhere(blob_id, kind, place)
                continue
            for place, blob_id in run:
                start = place.offset - first.offset
                try:
                    found[blob_id] = self.codec.decode(blob_id, kind, view[start : start + HEAD + place.sealed], name)
                except ObjectDamagedError:
                    found[blob_id] = self._elsewhere(blob_id, kind, place)
        return found

    def _elsewhere(self, blob_id: bytes, kind: int, bad: Place | None) -> bytes:
        """Look for a blob in every other place, in the index as it is now."""
        problem: RepositoryError | None = None
        if bad is None or self._moved(bad):
            self.refresh()
        for place in self.index.places(blob_id):
            name = pack_name(place.pack)
            try:
                return self.codec.decode(blob_id, kind, self.store.load(name, place.offset, HEAD + place.sealed), name)
            except (ObjectMissingError, ObjectDamagedError) as error:
                problem = error
        if problem is not None:
            raise problem
        raise ObjectMissingError(
            f"the blob {blob_id.hex()[:16]} is in no pack that the index knows",
            advice="`p2v-backup check` says which points it hurts; `p2v-backup repair-index` looks through all packs.",
        )

    def _moved(self, place: Place) -> bool:
        try:
            self.store.load(pack_name(place.pack), 0, 0)
        except ObjectMissingError:
            return True
        except ObjectDamagedError:
            return False
        return False

    def page(self, page_id: bytes) -> bytes:
        """A page of a manifest, from memory where it was used lately."""
        with self._lock:
            if (page := self._pages.get(page_id)) is not None:
                self._pages.move_to_end(page_id)
                return page
        page = self.blob(page_id, PAGE)
        with self._lock:
            self._pages[page_id] = page
            while len(self._pages) > _PAGES:
                self._pages.popitem(last=False)
        return page

    def tree(self, disk: PointDisk) -> Tree:
        """The manifest of a disk."""
        return Tree(disk.root_id, disk.size, self.page)


def keep_reserve(store: Store) -> None:
    """Put the object back that a prune on a full disk lives from."""
    store.store(RESERVE, [os.urandom(_RESERVE_SIZE)])


class _Forgotten(msgspec.Struct):
    points: list[str]


class _PointHead(msgspec.Struct):
    version: int
    kind: str


def _named(point: Point, name: str) -> Point:
    return replace(point, name=name)


def _decode_config(content: bytes) -> Config:
    try:
        config = msgspec.json.decode(content, type=Config)
    except (msgspec.DecodeError, RecursionError):
        raise ObjectDamagedError(
            "the repository's config cannot be read", advice="Put back a copy of the object `config`.", subject="config"
        ) from None
    unknown = set(config.features) - _FEATURES
    if config.format != _FORMAT or config.version != _VERSION or unknown:
        what = f"features {', '.join(sorted(unknown))}" if unknown else f"{config.format!r}, version {config.version}"
        raise RepositoryUnsupportedError(f"the repository is of {what}", advice="Use a later version of the toolkit.")
    if config.encode() != content:
        raise ObjectDamagedError(
            "the repository's config is damaged", advice="Put back a copy of the object `config`.", subject="config"
        )
    return config


def _unlock(store: Store, config: Config, password: Secret) -> Keyring:
    damaged: list[str] = []
    names = [stored.name for stored in store.list("keys/")]
    for name in names:
        content = store.load(name)
        if digest_name(content) != name.partition("/")[2]:
            damaged.append(name)
            continue
        key = decode_key(content, name)
        if key.repository == config.id and (keyring := unwrap(key, password)) is not None:
            return keyring
    if damaged or not names:
        raise ObjectDamagedError(
            f"{len(damaged) or 'all'} keys of the repository are damaged or gone, no other opens with this password",
            advice="Use another password, or the paper key as the password.",
            subject=", ".join(damaged),
        )
    raise WrongPasswordError(
        "no key of the repository opens with this password",
        advice="Give another one in P2V_PASSWORD, or the paper key.",
    )


def _one(names: Sequence[str], prefix: str, what: str) -> str:
    found = [name for name in names if name.startswith(prefix)] if re.fullmatch("[0-9a-f]{2,64}", prefix) else []
    if len(found) != 1:
        how = "no" if not found else "more than one"
        raise UsageError(
            f"{how} {what} begins with {prefix!r}", advice=f"See the list of {what}s, and give more digits."
        )
    return found[0]


def _runs(places: Sequence[tuple[Place, bytes]]) -> Iterator[list[tuple[Place, bytes]]]:
    """Neighbours in a pack, joined while a run is not too long."""
    run: list[tuple[Place, bytes]] = []
    for item in places:
        place = item[0]
        if run and not (
            place.pack == run[-1][0].pack
            and place.offset - run[-1][0].end <= _RUN_GAP
            and place.end - run[0][0].offset <= _RUN
        ):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
