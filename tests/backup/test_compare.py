"""In what two points differ, told from their pages; and a device brought back by writing only that."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup.compare import compare, suspects
from backup.manifest import FAN, NOTHING, SPAN, Entry, Tree, differing, encode_leaf, rebuild
from backup.reader import StoredDisk
from backup.restore import revert_disk
from backup.store.memory import MemoryStore
from formats.block import Kind
from formats.errors import NoSpaceError
from formats.progress import Silence
from tests.backup.repositories import MIB, back_up, contents, machine, new_repository, opened, scribble
from tests.loop import loop_device
from tests.requirement import needs_root

BLOCK = 4096


def blocks(old: bytes, new: bytes) -> set[int]:
    """The blocks that differ, told the plain way."""
    count = -(-len(new) // BLOCK)
    return {
        n
        for n in range(count)
        if old[n * BLOCK : (n + 1) * BLOCK] != new[n * BLOCK : (n + 1) * BLOCK] or ((n + 1) * BLOCK > max(len(old), 1)
        and len(new) > len(old))
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [None, 40 * MIB + 512, 3 * MIB, 17 * MIB])
def test_points_differ_where_the_disks_did(seed: int, size: int | None) -> None:
    store = MemoryStore()
    new_repository(store)
    origin = machine(seed)
    first, before = back_up(store, origin), contents(origin)
    scribble(origin, seed + 100)
    if size is not None:
        content = origin.content["large"]
        del content[size:]
        content.extend(bytes(size - len(content)))
    second, after = back_up(store, origin, changes=False), contents(origin)
    for disk in compare(opened(store), first, second):
        old, new = before[disk.id], after[disk.id]
        assert (disk.old_size, disk.new_size) == (len(old), len(new))
        found = {n for e in disk.ranges for n in range(e.start // BLOCK, -(-e.end // BLOCK))}
        assert found == blocks(old, new)
        assert all(e.kind is Kind.DATA and e.end <= len(new) for e in disk.ranges)
        assert disk.same == (old == new)


def test_equal_points_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    new_repository(store)
    origin = machine()
    first, second = back_up(store, origin), back_up(store, origin)
    repository = opened(store)
    monkeypatch.setattr(repository, "blobs", pytest.fail)
    assert all(disk.same for disk in compare(repository, first, second))


def test_a_disk_that_only_one_has() -> None:
    store = MemoryStore()
    new_repository(store)
    first = back_up(store, machine(sizes={"one": MIB}))
    second = back_up(store, machine(sizes={"other": MIB}))
    found = {disk.id: disk for disk in compare(opened(store), first, second)}
    assert found["one"].new_size is None and found["other"].old_size is None
    assert not found["one"].same and not found["other"].same


Leaves = dict[int, int]


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, FAN * FAN + 3), st.integers(1, FAN * FAN + 3)),
    st.tuples(
        st.dictionaries(st.integers(0, FAN * FAN + 2), st.integers(0, 2), max_size=6),
        st.dictionaries(st.integers(0, FAN * FAN + 2), st.integers(0, 2), max_size=6),
    ),
)
def test_trees_of_any_height_differ_in_their_spans(counts: tuple[int, int], leaves: tuple[Leaves, Leaves]) -> None:
    pages: dict[bytes, bytes] = {}

    def save(page: bytes) -> bytes:
        name = len(page).to_bytes(4) + page[:28].ljust(28, b"\1")
        while pages.setdefault(name, page) != page:
            name = name[:-2] + (int.from_bytes(name[-2:]) + 1).to_bytes(2)
        return name

    def tree(count: int, content: Leaves) -> Tree:
        made = {n: save(encode_leaf([Entry(SPAN, bytes([v + 1]) * 32)])) for n, v in content.items() if n < count}
        return Tree(rebuild(count * SPAN, made, save), count * SPAN, pages.__getitem__)

    old, new = (tree(count, content) for count, content in zip(counts, leaves, strict=True))
    plain = [n for n in range(counts[1]) if n >= counts[0] or old.leaf(n) != new.leaf(n)]
    assert list(differing(old, new)) == plain
    past = sum(e.length for e in suspects(old, new) if e.start >= old.size)
    assert past == max(0, new.size - old.size)
    assert old.leaf(0) != NOTHING or 0 not in leaves[0]


def spoiled(content: bytes, seed: int) -> bytearray:
    """Another state of the disk: some places differ, one of them where the disk is zero."""
    other = bytearray(content)
    generator = random.Random(seed)
    for _ in range(5):
        length = generator.choice([1, 700, 4096, 200_000])
        start = generator.randrange(len(other) - length)
        other[start : start + length] = generator.randbytes(length)
    return other


def test_an_image_is_brought_back_in_place(tmp_path: Path) -> None:
    store = MemoryStore()
    new_repository(store)
    origin = machine()
    point = back_up(store, origin)
    content = contents(origin)["large"]
    image = tmp_path / "disk.raw"
    image.write_bytes(spoiled(content, 3) + b"behind the end")
    (disk,) = (disk for disk in point.disks if disk.id == "large")
    repository = opened(store)
    done, kept = revert_disk(repository, disk, image, Silence())
    assert image.read_bytes() == content + b"behind the end"
    assert kept > done.read / 2
    asked: list[int] = []
    plain = repository.blobs
    repository.blobs = lambda wanted, kind: asked.append(len(ids := list(wanted))) or plain(ids, kind)  # type: ignore[method-assign,func-returns-value]
    done, kept = revert_disk(repository, disk, image, Silence())
    assert kept >= done.written and sum(asked) == 0  # chunks of two blocks are told twice; nothing is fetched


@needs_root()
def test_a_device_is_brought_back_in_place(tmp_path: Path) -> None:
    store = MemoryStore()
    new_repository(store)
    origin = machine()
    point = back_up(store, origin)
    content = contents(origin)["large"]
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(spoiled(content, 4)))
    (disk,) = (disk for disk in point.disks if disk.id == "large")
    with loop_device(image, writable=True) as device:
        revert_disk(opened(store), disk, Path(device), Silence())
    assert image.read_bytes() == content


def test_what_is_too_small_is_refused_untouched(tmp_path: Path) -> None:
    store = MemoryStore()
    new_repository(store)
    point = back_up(store, machine())
    image = tmp_path / "disk.raw"
    image.write_bytes(b"x" * MIB)
    with pytest.raises(NoSpaceError, match="holds 1048576 bytes"):
        revert_disk(opened(store), point.disks[0], image, Silence())
    assert image.read_bytes() == b"x" * MIB


def test_a_seed_is_believed_by_its_ids_alone() -> None:
    """A device that changes under the read gives chunks that do not fit their ids: those come from the repository."""
    store = MemoryStore()
    new_repository(store)
    origin = machine()
    point = back_up(store, origin)
    content = contents(origin)["small"]
    disk = point.disk("small")
    assert disk is not None

    class Restless:
        size = len(content)

        def readinto(self, buffer: memoryview, offset: int) -> None:
            buffer[:] = random.randbytes(len(buffer))

        def extents(self, start: int, length: int) -> object:
            raise AssertionError

        def close(self) -> None: ...

    source = StoredDisk(opened(store), disk, seed=Restless())  # type: ignore[arg-type]
    buffer = bytearray(len(content))
    source.readinto(memoryview(buffer), 0)
    assert buffer == content and source.bytes_kept == 0
