"""Make the index anew from the packs. No key is needed: blobs say in clear what they are."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from backup.errors import ObjectMissingError
from backup.index import MAX_ENTRIES, encode_segment
from backup.keys import digest_name
from backup.lock import exclusive
from backup.pack import Place, pack_digest, scan
from backup.prune import condemned_packs
from backup.store.base import NameTakenError, Store
from formats.progress import Progress, Silence


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What was found: counts, and the names of packs whose bytes are not those that were stored."""

    packs: int
    blobs: int
    damaged: tuple[str, ...]


def repair_index(store: Store, *, time: str = "", progress: Progress | None = None) -> Repaired:
    """Walk through all packs and write an index of what they hold; then delete the segments that were there before.

    Of a damaged pack, every blob with a whole header is listed: whether its content is sound shows when it is read. Backups may run
    meanwhile: their segments come on top. ``LockedError`` while a prune runs.
    """
    show = progress or Silence()
    with exclusive(store, "repair-index", time):
        old = [stored.name for stored in store.list("index/")]
        condemned = condemned_packs(store)
        packs = list(store.list("packs/"))
        show.start("walk packs", sum(stored.size for stored in packs))
        entries: list[tuple[bytes, Place]] = []
        sizes: dict[bytes, int] = {}
        names: set[str] = set()
        count = blobs = 0
        damaged: list[str] = []

        def write() -> None:
            content = encode_segment(sorted(entries), sizes)
            name = f"index/{digest_name(content)}"
            with suppress(NameTakenError):
                store.store(name, [content])
            names.add(name)
            entries.clear()
            sizes.clear()

        for stored in packs:
            with suppress(ValueError, ObjectMissingError):
                digest = pack_digest(stored.name)
                if digest in condemned:
                    continue
                content = store.load(stored.name)
                if digest_name(content) != digest.hex():
                    damaged.append(stored.name)
                sizes[digest] = len(content)
                found = list(scan(digest, content))
                entries += found
                blobs += len(found)
                count += 1
            show.advance(stored.size)
            if len(entries) >= MAX_ENTRIES // 4:
                write()
        if entries or sizes:
            write()
        for name in old:
            if name not in names:
                store.delete(name)
        show.finish()
    return Repaired(packs=count, blobs=blobs, damaged=tuple(damaged))
