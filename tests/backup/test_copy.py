"""Points taken over into another repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from backup.chunk import FixedGrid, chunker_named
from backup.copy import Copied, copy_points
from backup.engine import Backup
from backup.errors import ObjectDamagedError, StoreError
from backup.repository import Point
from backup.store.layers import Faulty
from backup.store.memory import MemoryStore
from formats.errors import ToolkitError
from tests.backup.repositories import back_up, contents, machine, new_repository, opened, restored, scribble
from tests.fakes.tracked_origin import TrackedOrigin


def copied(source: MemoryStore, target: MemoryStore | Faulty, *names: str, chunker: str = "") -> list[Copied]:
    """One run, as another process."""
    repository, other = opened(source), opened(target)
    points = [point for point in repository.points() if not names or point.name in names]
    cutter = chunker_named(chunker, other.keyring.cut_key) if chunker else FixedGrid()
    with Backup(other, cutter, threads=2, audit=0) as run:
        return list(copy_points(repository, points, run))


@pytest.fixture
def world() -> tuple[MemoryStore, list[Point], list[dict[str, bytes]]]:
    """Three points of a machine, the last two incremental."""
    store = MemoryStore()
    new_repository(store)
    origin: TrackedOrigin = machine()
    points, states = [back_up(store, origin)], [contents(origin)]
    for turn in range(2):
        scribble(origin, turn)
        points.append(back_up(store, origin, points[-1]))
        states.append(contents(origin))
    return store, points, states


World = tuple[MemoryStore, list[Point], list[dict[str, bytes]]]


@pytest.mark.parametrize("chunker", ["", "aligned-32768-65536-262144", "fixed-131072"])
def test_all_points_arrive_as_they_were(world: World, chunker: str) -> None:
    source, points, states = world
    target = MemoryStore()
    new_repository(target)
    done = copied(source, target, chunker=chunker)
    assert [item.point for item in done] == points and not any(item.there for item in done)
    found = opened(target).points()
    assert [item.copy for item in done] == found
    for point, copy, state in zip(points, found, states, strict=True):
        assert restored(target, copy) == state
        assert (copy.time, copy.machine, copy.source, copy.missing, copy.tags, copy.notices) == (
            *(point.time, point.machine, point.source, point.missing, point.tags, point.notices),
        )
        assert copy.copy_of == point.name
        assert [disk.mark for disk in copy.disks] == [disk.mark for disk in point.disks]


def test_nothing_is_copied_twice_not_even_by_way_of_a_third(world: World) -> None:
    source, points, _ = world
    second, third = MemoryStore(), MemoryStore()
    new_repository(second)
    new_repository(third)
    copied(source, second)
    copied(second, third)
    before = len(list(third.list("")))
    assert all(item.there for item in copied(source, third))
    assert all(item.there for item in copied(third, source))  # nor back to where it came from
    assert {point.copy_of for point in opened(third).points()} == {point.name for point in points}
    assert len(list(third.list(""))) == before


def test_only_what_differs_from_a_neighbour_is_read(world: World) -> None:
    source, points, states = world
    target = MemoryStore()
    new_repository(target)
    copied(source, target, points[0].name)
    repository, other = opened(source), opened(target)
    with Backup(other, FixedGrid(), threads=2, audit=0) as run:
        (done,) = copy_points(repository, [points[2]], run)
        assert run.statistics.read < sum(map(len, states[2].values())) / 4
    assert restored(target, done.copy) == states[2]


def test_the_next_backup_goes_on_from_the_copy() -> None:
    """The marks came along: the other repository can be backed up to at once, without reading everything."""
    source, target = MemoryStore(), MemoryStore()
    new_repository(source)
    new_repository(target)
    origin = machine()
    back_up(source, origin)
    (copy,) = (item.copy for item in copied(source, target))
    scribble(origin, 7)
    point = back_up(target, origin, copy, audit=0)
    assert point.statistics["read"] < sum(map(len, contents(origin).values())) / 4
    assert restored(target, point) == contents(origin)


def test_a_copy_that_is_killed_goes_on(world: World) -> None:
    source, points, states = world
    for kill in range(1, 200):
        target = MemoryStore()
        new_repository(target)
        broken = Faulty(target, lambda *_: None)

        def die(operation: str, _name: str, when: str, store: Faulty = broken, kill: int = kill) -> None:
            if operation in ("store", "delete") and when == "before" and store.count >= kill:
                raise StoreError("killed")

        broken._fault = die
        try:
            copied(source, broken)
        except ToolkitError:
            for stored in list(target.list("leases/")):
                target.delete(stored.name)
            done = copied(source, target)
            assert [item.point for item in done] == points
            for item, state in zip(done, states, strict=True):
                assert restored(target, item.copy) == state
        else:
            assert kill > 8
            return
    pytest.fail("it never came through")


def test_what_is_damaged_is_not_copied(world: World) -> None:
    source, points, _ = world
    target = MemoryStore()
    new_repository(target)
    for stored in list(source.list("packs/")):
        content = bytearray(source.load(stored.name))
        content[len(content) // 2] ^= 1
        source.delete(stored.name)
        source.store(stored.name, [bytes(content)])
    with pytest.raises(ObjectDamagedError):
        copied(source, target, points[0].name)
    assert opened(target).points() == []


def test_on_the_command_line(tmp_path: Path) -> None:
    from tests.backup.shell import Shell

    shell, image = Shell(tmp_path), tmp_path / "web.raw"
    shell("init")
    image.write_bytes(bytes(range(256)) * 4096)
    shell("backup", str(image), "--tag", "first")
    other = tmp_path / "other"
    shell("init", place=other, P2V_PASSWORD="of the other")
    words = ("copy", "--to-repo", str(other))
    assert len(shell(*words, "--dry-run", P2V_TO_PASSWORD="of the other")["data"]["would_copy"]) == 1
    shell(*words, P2V_TO_PASSWORD="wrong", expect=12)
    shell("copy", "--to-repo", str(tmp_path / "repository"), P2V_TO_PASSWORD="correct horse", expect=2)
    shell("copy", "--to-repo", str(tmp_path / "nowhere"), P2V_TO_PASSWORD="of the other", expect=10)
    (done,) = shell(*words, P2V_TO_PASSWORD="of the other")["data"]["copied"]
    assert not done["there_already"]
    (again,) = shell(*words, P2V_TO_PASSWORD="of the other")["data"]["copied"]
    assert again == {**done, "there_already": True}
    (point,) = shell("points", place=other, P2V_PASSWORD="of the other")["data"]["points"]
    assert point["tags"] == ["first"] and point["id"] == done["copy"]
    out = tmp_path / "out.raw"
    shell("restore", "latest", "--disk", "0", "--device", str(out), place=other, P2V_PASSWORD="of the other")
    assert out.read_bytes() == image.read_bytes()
    changed = bytearray(image.read_bytes())
    changed[5000:5003] = b"new"
    image.write_bytes(changed)
    shell("backup", str(image))
    first, second = (point["id"] for point in shell("points")["data"]["points"])
    (disk,) = shell("diff", first, second, expect=4)["data"]["disks"]
    assert disk["ranges"] == [{"start": 4096, "length": 4096}]
    shell("diff", first, first)
    shell("restore", second, "--disk", "0", "--device", str(out), "--in-place")
    assert out.read_bytes() == changed
    shell("restore", second, "--to", "qemu", "-o", str(tmp_path / "vm"), "--in-place", expect=2)
