"""P2: a power cut loses nothing that was committed.

What a ``LocalStore`` does to the file system is recorded while backups, a forget and a prune run. Then the power is cut at every
point of the record: file
contents that were not flushed are empty, names in folders that were not flushed are there or not, by chance; what remains must
be a sound repository with
every point that had been committed.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backup.check import Check
from backup.prune import Prune
from backup.repository import Point
from backup.store.local import LocalStore
from backup.store.memory import MemoryStore
from formats.errors import ToolkitError
from tests.backup.repositories import MIB, back_up, bury, contents, machine, new_repository, opened, restored, scribble


@dataclass(slots=True)
class Disk:
    """The record: (what, path, detail). ``marks``: how long it was when a point was committed or forgotten."""

    events: list[tuple[str, str, str | bytes]] = field(default_factory=list)

    def state(self, root: Path, length: int, generator: random.Random) -> MemoryStore:
        """What may be on the disk when the power was cut after ``length`` events."""
        flushed: dict[str, bytes] = {}
        names: dict[str, dict[str, str]] = {}  # folder -> name -> file, on the disk
        waiting: dict[str, list[tuple[str, str, str]]] = {}
        for what, path, detail in self.events[:length]:
            folder, _, name = path.rpartition("/")
            if what == "data" and isinstance(detail, bytes):
                flushed[path] = detail
            elif what == "sync":
                for change in waiting.pop(path, []):
                    _apply(names.setdefault(path, {}), change)
            elif isinstance(detail, str):
                waiting.setdefault(folder, []).append((what, name, detail))
        for folder, changes in waiting.items():
            for change in changes:
                if generator.random() < 0.5:
                    _apply(names.setdefault(folder, {}), change)
        store = MemoryStore()
        self._walk(str(root), "", names, flushed, store)
        return store

    def _walk(
        self, folder: str, prefix: str, names: dict[str, dict[str, str]], flushed: dict[str, bytes], store: MemoryStore
    ) -> None:
        for name, file in names.get(folder, {}).items():
            if name.startswith("."):
                continue
            if file == "folder":
                self._walk(f"{folder}/{name}", f"{prefix}{name}/", names, flushed, store)
            else:
                store.objects[prefix + name] = flushed.get(file, b"")


def _apply(folder: dict[str, str], change: tuple[str, str, str]) -> None:
    what, name, detail = change
    if what == "unlink":
        folder.pop(name, None)
    else:
        folder[name] = detail


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Records what is done to the file system."""
    made = Disk()
    sync, link, unlink, mkdir = os.fsync, os.link, Path.unlink, Path.mkdir

    def recorded_sync(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            made.events.append(("sync", path, ""))
        else:
            made.events.append(("data", path, Path(path).read_bytes()))
        sync(descriptor)

    def recorded_link(source: Path, target: Path) -> None:
        link(source, target)
        made.events.append(("link", str(target), str(source)))

    def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
        there = path.exists()
        unlink(path, missing_ok=missing_ok)
        if there:
            made.events.append(("unlink", str(path), ""))

    def recorded_mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        mkdir(path, mode, parents, exist_ok)
        made.events.extend(("mkdir", str(folder), "folder") for folder in reversed(missing))

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "link", recorded_link)
    monkeypatch.setattr(Path, "unlink", recorded_unlink)
    monkeypatch.setattr(Path, "mkdir", recorded_mkdir)
    yield made
    monkeypatch.undo()


def live(disk: Disk, root: Path) -> tuple[list[tuple[int, int, str]], dict[str, dict[str, bytes]]]:
    """Three backups, a forget, a prune: when each point was committed and when its forgetting began, and what each point holds."""
    store = LocalStore(root)
    new_repository(store)
    origin = machine(1, {"disk": 2 * MIB})
    parent: Point | None = None
    spans: list[tuple[int, int, str]] = []
    expected: dict[str, dict[str, bytes]] = {}
    for turn in range(3):
        scribble(origin, turn)
        parent = back_up(store, origin, parent, threads=1)
        spans.append((len(disk.events), 1 << 60, parent.name))
        expected[parent.name] = contents(origin)
    for number, (committed, _, name) in enumerate(spans[:2]):
        spans[number] = (committed, len(disk.events), name)
        store.delete(f"points/{name}")
    Prune(opened(store)).run()
    return spans, expected


def cut_everywhere(disk: Disk, root: Path) -> None:
    spans, expected = live(disk, root)
    generator = random.Random(5)
    for length in range(spans[0][0], len(disk.events) + 1):
        for _ in range(3):
            store = disk.state(root, length, generator)
            bury(store)
            repository = opened(store)
            names = set(repository.point_names())
            for committed, forgotten, name in spans:
                assert name in names or not committed <= length <= forgotten, "a committed point is gone"
            # An object that was never committed may be there, empty: it must not be in the way of what was.
            result = Check(repository, read_data=True).run()
            needed = {hurt.point for hurt in result.hurts}
            for committed, forgotten, name in spans:
                if committed <= length <= forgotten:
                    assert name not in needed, "a committed point is hurt"
                    assert restored(store, repository.point(name)) == expected[name]
            assert not needed, "a point is there without what it refers to"


def test_p2_the_power_is_cut_anywhere(disk: Disk, tmp_path: Path) -> None:
    cut_everywhere(disk, tmp_path)


@pytest.mark.parametrize("forgotten", ["file", "folder"])
def test_p2_catches_a_flush_that_was_forgotten(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """The planted defects: contents, or names, are not flushed."""
    recorded = os.fsync

    def lazy(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) != (forgotten == "folder"):
            recorded(descriptor)

    monkeypatch.setattr(os, "fsync", lazy)
    with pytest.raises((AssertionError, ToolkitError)):
        cut_everywhere(disk, tmp_path)
