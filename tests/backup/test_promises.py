"""What a repository promises, each promise by its number (P1...), and for some the planted defect that the test must catch."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from backup import pack
from backup.check import Check, Checked, add_record
from backup.chunk import FixedGrid
from backup.engine import Backup
from backup.errors import (
    LeaseLostError,
    LockedError,
    ObjectDamagedError,
    ObjectMissingError,
    RepositoryError,
    RepositoryMissingError,
    RepositoryUnsupportedError,
    WrongPasswordError,
)
from backup.keys import CHUNK, POINT, Keyring, from_paper
from backup.lock import Holder, Lease, exclusive
from backup.manifest import SPAN
from backup.pack import Codec, pack_digest, scan
from backup.prune import Prune
from backup.repair import repair_index
from backup.repository import Point, Repository
from backup.retention import Policy, decide
from backup.store.layers import Faulty
from backup.store.memory import MemoryStore
from formats.block import Extent
from formats.errors import NoSpaceError
from p2v.config import Secret
from tests.backup.repositories import (
    MIB,
    PASSWORD,
    QUICK,
    back_up,
    bury,
    contents,
    machine,
    new_repository,
    opened,
    restored,
    scribble,
)
from tests.fakes.tracked_origin import TrackedOrigin


@dataclass(slots=True)
class World:
    """A repository with points, and what each of them must give back."""

    store: MemoryStore
    origin: TrackedOrigin
    points: list[Point]
    expected: dict[str, dict[str, bytes]]

    def add(self) -> Point:
        """Change the machine and back it up."""
        scribble(self.origin, len(self.expected) + 100)
        point = back_up(self.store, self.origin, self.points[-1] if self.points else None)
        self.points.append(point)
        self.expected[point.name] = contents(self.origin)
        return point


@pytest.fixture
def world() -> World:
    store = MemoryStore()
    new_repository(store)
    made = World(store, machine(), [], {})
    for _ in range(3):
        made.add()
    return made


def checked(store: MemoryStore) -> Checked:
    return Check(opened(store), read_data=True).run()


def verify(store: MemoryStore, expected: dict[str, dict[str, bytes]]) -> None:
    """The repository is sound, and every committed point gives back what it was made of."""
    result = checked(store)
    assert result.sound, (result.damages, result.hurts)
    for name in opened(store).point_names():
        if name in expected:
            assert restored(store, opened(store).point(name)) == expected[name]


# -- P1: killed anywhere ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


def killing(below: MemoryStore, after: int) -> Faulty:
    """A store that lets ``after`` mutations through, half of the next one (it is done, but nobody hears of it), and then nothing."""
    lock, begun = threading.Lock(), [0]

    def fault(operation: str, name: str, when: str) -> None:
        with lock:
            if operation in ("store", "delete") and when == "before":
                begun[0] += 1
            if begun[0] > after and (when == "after" or begun[0] > after + 1):
                raise Killed

    return Faulty(below, fault)


def run_backup(store: object, origin: TrackedOrigin) -> None:
    repository = Repository.open(store, PASSWORD)  # type: ignore[arg-type]
    with Backup(repository, FixedGrid(), threads=2) as run, origin.capture() as capture:
        run.store(capture, parent=run.points[-1])


def run_forget_and_prune(store: object, _: TrackedOrigin) -> None:
    repository = Repository.open(store, PASSWORD)  # type: ignore[arg-type]
    repository.forget(repository.points()[:-1])
    Prune(repository).run()


def run_key_change(store: object, _: TrackedOrigin) -> None:
    repository = Repository.open(store, PASSWORD)  # type: ignore[arg-type]
    old = repository.list_keys()[0][0]
    repository.add_key(PASSWORD, label="new", kdf=QUICK)
    repository.remove_key(old)


def run_repair(store: object, _: TrackedOrigin) -> None:
    repair_index(store)  # type: ignore[arg-type]


OPERATIONS = [run_backup, run_forget_and_prune, run_key_change, run_repair]


def kill_everywhere(world: World, operation: Callable[[object, TrackedOrigin], None]) -> int:
    """Kill the operation after each of its mutations; returns how many there were."""
    scribble(world.origin, 999)
    start = dict(world.store.objects)
    for after in range(1000):
        store = MemoryStore()
        store.objects = dict(start)
        survived = False
        with suppress(Killed):
            operation(killing(store, after), world.origin)
            survived = True
        bury(store)
        names = set(opened(store).point_names())
        assert names >= {world.points[-1].name}
        verify(store, world.expected)
        operation(store, world.origin)  # the next run comes through
        verify(store, world.expected)
        if survived:
            return after
    raise AssertionError("the operation has no end")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_p1_killed_after_any_mutation(world: World, operation: Callable[[object, TrackedOrigin], None]) -> None:
    assert kill_everywhere(world, operation) >= 2


def test_p1_catches_a_point_that_is_committed_too_early(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted defect: packs and segments are written after the point."""
    commit, flush = Repository.commit, Backup._flush
    held: list[Backup] = []

    def later(self: Backup) -> None:
        held.append(self)

    monkeypatch.setattr(Backup, "_flush", later)

    def early(self: Repository, point: Point) -> Point:
        made = commit(self, point)
        flush(held.pop())
        return made

    monkeypatch.setattr(Repository, "commit", early)
    with pytest.raises(AssertionError):
        kill_everywhere(world, run_backup)


# -- P3, P4: damage ---------------------------------------------------------------------------------------------------


def kinds(world: World) -> dict[str, list[str]]:
    """Names of objects by kind; a condemnation and a record among them."""
    add_record(opened(world.store), world.points[-1], {"kind": "drill", "time": "2026-01-01T00:00:00+00:00"})
    with Lease(world.store, "backup"):
        world.store.delete(f"points/{world.points[0].name}")
        Prune(opened(world.store)).run()
    found: dict[str, list[str]] = {}
    for stored in world.store.list(""):
        found.setdefault(stored.name.split("/")[0], []).append(stored.name)
    del found["reserve"]  # nothing
    return found


def flips(length: int, seed: str) -> Iterator[int]:
    """Bits to flip: in the first byte, in the last, and some between."""
    generator = random.Random(seed)
    yield from (generator.randrange(8), length * 8 - 1 - generator.randrange(8))
    for _ in range(4):
        yield generator.randrange(length * 8)


def survey(store: MemoryStore, world: World) -> tuple[bool, set[str]]:
    """Whether damage is found, and the points that are said to be hurt. No byte that comes out is wrong, hurt or not."""
    try:
        result = checked(store)
    except RepositoryError:
        return True, set()
    hurt = {found.point for found in result.hurts}
    for name in world.expected:
        try:
            point = opened(store).point(name)
        except RepositoryError:
            continue
        try:
            content = restored(store, point)
        except (ObjectDamagedError, ObjectMissingError):
            assert name in hurt, "a point is damaged, and the check did not say so"
        else:
            assert content == world.expected[name], "wrong bytes came out"
            assert name not in hurt, "a point is said to be hurt, and is not"
    return not result.sound, hurt


def damage_everything(world: World) -> None:
    found = kinds(world)
    assert set(found) == {"config", "keys", "packs", "index", "points", "records", "condemned"}
    for names in found.values():
        for name in names:
            content = world.store.objects[name]
            for bit in flips(len(content), name):
                store = MemoryStore()
                store.objects = dict(world.store.objects)
                broken = bytearray(content)
                broken[bit // 8] ^= 1 << bit % 8
                store.objects[name] = bytes(broken)
                assert survey(store, world)[0], f"bit {bit} of {name} was flipped, and nobody noticed"


def test_p3_a_flipped_bit_anywhere_is_found_and_never_gives_wrong_bytes(world: World) -> None:
    damage_everything(world)


def test_p3_catches_a_codec_that_does_not_check_the_seal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted defect: of a blob with a broken seal something comes out all the same."""

    def careless(self: Codec, blob_id: bytes, kind: int, data: memoryview | bytes, subject: str = "") -> bytes:
        try:
            return decode(self, blob_id, kind, data, subject)
        except ObjectDamagedError:
            return bytes(pack._HEAD.unpack(bytes(data[: pack.HEAD]))[4])

    decode = Codec.decode
    monkeypatch.setattr(Codec, "decode", careless)
    with pytest.raises(AssertionError):
        damage_everything(world)


def test_p3_damage_is_traced_to_the_ranges_that_it_hurts(world: World) -> None:
    point = world.points[0]
    repository = opened(world.store)
    entries = repository.tree(point.disks[0]).entries(0)
    position, victim = 0, None
    for entry in entries:
        if entry.id is not None:
            victim = entry
            break
        position += entry.length
    assert victim is not None and victim.id is not None
    place = repository.index.find(victim.id)
    assert place is not None
    name = pack.pack_name(place.pack)
    broken = bytearray(world.store.objects[name])
    broken[place.end - 1] ^= 1
    world.store.objects[name] = bytes(broken)
    result = checked(world.store)
    assert [found.subject for found in result.damages] == [name]
    ranges = {(hurt.point, hurt.disk): hurt.ranges for hurt in result.hurts}
    assert ranges[point.name, "large"] == ((position, victim.length),)


@pytest.mark.parametrize("keep", [0, 7, 0.5])
def test_p4_cut_objects_are_found(world: World, keep: float) -> None:
    for names in kinds(world).values():
        name = names[0]
        store = MemoryStore()
        store.objects = dict(world.store.objects)
        content = store.objects[name]
        store.objects[name] = content[: int(keep if keep >= 1 or not keep else len(content) * keep)]
        assert survey(store, world)[0], f"{name} was cut, and nobody noticed"


def test_p4_missing_and_exchanged_objects_are_found(world: World) -> None:
    found = kinds(world)
    for kind in ("packs", "index"):
        noticed = 0
        for name in found[kind]:
            store = MemoryStore()
            store.objects = {key: value for key, value in world.store.objects.items() if key != name}
            noticed += survey(store, world)[0]  # what nobody needs may go unnoticed
            with suppress(RepositoryError):
                Prune(opened(store)).run()
            store.objects.setdefault(name, world.store.objects[name])
            for point in opened(store).point_names():
                assert restored(store, opened(store).point(point)) == world.expected[point], "a prune made it worse"
        assert noticed
    for kind in ("packs", "index", "points"):
        one, two = found[kind][:2]
        store = MemoryStore()
        store.objects = dict(world.store.objects)
        store.objects[one], store.objects[two] = store.objects[two], store.objects[one]
        assert survey(store, world)[0]


def test_p4_a_second_copy_heals(world: World) -> None:
    """A blob that lies in two packs is read from the other when one is damaged."""
    store, point = world.store, world.points[-1]
    start = dict(store.objects)
    for name in [key for key in start if key.startswith("index/")]:
        del store.objects[name]
    repository = opened(store)
    with Backup(repository, FixedGrid()) as run:
        run.index.added.clear()  # as if the index had been lost: everything is stored again
        with world.origin.capture() as capture:
            run.store(capture)
    store.objects |= start
    for name in [key for key in start if key.startswith("packs/")]:
        store.objects[name] = bytes(len(store.objects[name]))
    assert restored(store, point) == world.expected[point.name]


# -- P5: the index is a cache ------------------------------------------------------------------------------------------


def test_p5_the_index_is_made_anew_without_a_key(world: World) -> None:
    before = dict(opened(world.store).index.entries())
    for name in [key for key in world.store.objects if key.startswith("index/")]:
        del world.store.objects[name]
    assert not checked(world.store).sound
    repair_index(world.store)
    assert dict(opened(world.store).index.entries()) == before
    verify(world.store, world.expected)


def test_p5_behind_a_damaged_length_the_other_blobs_are_found(world: World) -> None:
    name, content = next((n, c) for n, c in world.store.objects.items() if n.startswith("packs/") and len(c) > MIB)
    digest = pack_digest(name)
    whole = list(scan(digest, content))
    broken = bytearray(content)
    broken[whole[2][1].offset + 12] ^= 0x40
    found = list(scan(digest, bytes(broken)))
    assert set(found) >= set(whole) - {whole[1], whole[2]}
    assert len(found) >= len(whole) - 2


# -- P6, P7: at the same time ------------------------------------------------------------------------------------------


def test_p6_two_writers_at_the_same_time(world: World) -> None:
    """Both succeed; what both store costs space, no more."""
    parent = world.points[-1]
    other = machine(5)
    other.content["large"][: 4 * MIB] = world.origin.content["large"][: 4 * MIB]
    made: list[Point] = []
    threads = [
        threading.Thread(target=lambda o=origin, p=p: made.append(back_up(world.store, o, p)))
        for origin, p in ((world.origin, parent), (other, None))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    for point in made:
        assert restored(world.store, point) in (contents(world.origin), contents(other))
    verify(world.store, world.expected)


class Actor:
    """An operation in a thread of its own that stops before each access to the store until it is let go."""

    def __init__(self, below: MemoryStore, action: Callable[[object], None]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.done = self.free = False
        self.error: BaseException | None = None
        store = Faulty(below, self._pause)

        def run() -> None:
            try:
                action(store)
            except BaseException as error:
                self.error = error
            self.done = True
            self._stopped.release()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def _pause(self, operation: str, name: str, when: str) -> None:
        if when == "before" and not self.free:
            self._stopped.release()
            self._go.acquire()

    def steps(self, count: int) -> int:
        """Let it go on for so many accesses; returns how many it had left to make."""
        for number in range(count):
            if self.done:
                return number
            self._go.release()
            self._stopped.acquire()
        return count

    def finish(self) -> None:
        """Let it come to its end."""
        self.steps(1 << 30)
        self._thread.join()


class Race:
    """A backup from S1, a forget of S1 and a prune run at the same time.

    S0 was forgotten, and an earlier prune has condemned its packs, but could not delete them: the backup of S1 was running, and
    S1 now relies on
    them. The new state also has chunks that only S0 had and that S1 has not.
    """

    def __init__(self) -> None:
        self.base = MemoryStore()
        new_repository(self.base)
        generator = random.Random(9)
        self.origin = TrackedOrigin({"disk": 12 * 4096})
        self.origin.write("disk", generator.randbytes(8 * 4096), 0)
        old = bytes(self.origin.content["disk"][:8192])
        first = back_up(self.base, self.origin, threads=1, chunker=FixedGrid(4096))
        self.origin.write("disk", generator.randbytes(8192), 0)
        with Backup(opened(self.base), FixedGrid(4096), threads=1, audit=0) as run:
            self.base.delete(f"points/{first.name}")
            assert Prune(opened(self.base)).run().waiting
            with self.origin.capture() as capture:
                self.parent = run.store(capture)
        self.origin.write("disk", old, 9 * 4096)

    def run(self, order: str, first: int, second: int) -> tuple[bool, bool]:
        """One interleaving; whether the steps of the first and the second actor were all used up."""
        store = MemoryStore()
        store.objects = dict(self.base.objects)
        want = contents(self.origin)

        def backup(view: object) -> None:
            repository = Repository.open(view, PASSWORD)  # type: ignore[arg-type]
            with Backup(repository, FixedGrid(4096), threads=1, audit=0) as run:
                parent = next((point for point in run.points if point.name == self.parent.name), None)
                # A capture with the changes since S1, so that all else is taken over from S1 unread.
                marks = {d.id: d.mark for d in parent.disks if d.mark} if parent else {}
                with self.origin.capture(marks) as capture:
                    run.store(capture, parent=parent)

        def forget(view: MemoryStore) -> None:
            view.delete(f"points/{self.parent.name}")

        def prune(view: object) -> None:
            Prune(Repository.open(view, PASSWORD)).run()  # type: ignore[arg-type]

        writer, pruner = Actor(store, backup), Actor(store, prune)
        actors = {"b": writer, "p": pruner}
        used = []
        for letter, count in zip(order, (first, second), strict=False):
            used.append(actors[letter].steps(count) < count)
        forget(store)
        for letter in order[2:]:
            actors[letter].finish()
        for actor in (writer, pruner):
            if actor.error is not None:
                # The point that it was to start from may be forgotten under its hands; that ends the run, and hurts nothing.
                assert isinstance(actor.error, ObjectMissingError), actor.error
        result = checked(store)
        assert result.sound, (order, first, second, result.hurts)
        for point in opened(store).points():
            assert restored(store, point) == want
        Prune(opened(store)).run()  # what was left to the next prune is done now, and hurts nothing either
        assert checked(store).sound, (order, first, second, "after the next prune")
        return used[0], used[1]

    def explore(self, *, stride: int = 1) -> int:
        """All interleavings with three switches: one goes some way, the other goes some way, S1 is forgotten, they end in either order.

        ``stride`` leaves out the stops of the second one between.
        """
        count = 0
        for order in ("pbpb", "bppb", "bpbp", "pbbp"):
            for first in range(200):
                ended = False
                for second in range(first % stride, 200, stride):
                    ended, other_ended = self.run(order, first, second)
                    count += 1
                    if other_ended:
                        break
                if ended:
                    break
        return count


def test_p7_prune_and_backup_in_all_orders() -> None:
    """The sequence of PSA-2025-00019-1 is among them: a new point from one that is forgotten while a prune has marked already."""
    assert Race().explore(stride=4) > 500


def _without_leases(self: Prune, result: object) -> list[Point]:
    return [self._repository.point(name) for name in self._repository.point_names()]


def _read_late(self: Prune, result: object) -> list[Point] | None:
    """Points are read after the last look, not before it."""
    from backup.lock import remove_dead

    names = self._repository.point_names()
    if remove_dead(self._store) or self._repository.point_names() != names:
        return None
    points = []
    for name in names:
        with suppress(ObjectMissingError):
            points.append(self._repository.point(name))
    return points


@pytest.mark.parametrize("defect", [_without_leases, _read_late])
def test_p7_catches_a_prune_that_does_not_look(defect: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted defects: leases are not looked at; the points are read too late."""
    monkeypatch.setattr(Prune, "_quiet", defect)
    with pytest.raises(AssertionError):
        Race().explore()


def test_p7_a_prune_leaves_the_deletion_to_the_next_while_somebody_writes(world: World) -> None:
    world.store.delete(f"points/{world.points[0].name}")
    packs = {found.name for found in world.store.list("packs/")}
    with Lease(world.store, "backup") as lease:
        result = Prune(opened(world.store)).run()
        assert result.waiting == (lease.name,)
        assert packs <= {found.name for found in world.store.list("packs/")}
    result = Prune(opened(world.store)).run()
    assert result.deleted_packs and not result.waiting
    assert list(world.store.list("condemned/")) == list(world.store.list("locks/")) == []
    verify(world.store, world.expected)


def test_p7_one_prune_at_a_time(world: World) -> None:
    with exclusive(world.store, "prune"), pytest.raises(LockedError):
        Prune(opened(world.store)).run()


# -- P8, P9: clocks and the dead ----------------------------------------------------------------------------------------


def test_p8_a_wrong_clock_forgets_nothing_and_prunes_nothing(world: World) -> None:
    """A clock that is years behind keeps everything; one that is years ahead changes nothing in what rules by count keep."""
    points = opened(world.store).points()
    policy = Policy(last=1)
    past = decide(points, policy, points[0].when - timedelta(days=400))
    assert all(decision.keep for decision in past)
    future = decide(points, policy, points[-1].when + timedelta(days=4000))
    assert [decision.keep for decision in future] == [False, False, True]
    spoiled = replace(points[-1], time=datetime(2099, 1, 1, tzinfo=UTC).isoformat(), name="f" * 64)
    kept = decide([*points, spoiled], policy, points[-1].when + timedelta(days=1))
    assert [decision.keep for decision in kept] == [False, False, True, True]


def _stranger(dead: bool, host: str | None = None) -> Holder:
    mine = Holder.of_this_process("backup")
    return replace(mine, started="1" if dead else mine.started, host=host or mine.host)


def test_p9_a_dead_process_stops_nobody(world: World) -> None:
    for name in ("leases/aa", "locks/prune"):
        world.store.store(name, [msgspec.json.encode(_stranger(dead=True))])
    world.add()
    world.store.delete(f"points/{world.points[0].name}")
    assert Prune(opened(world.store)).run().deleted_packs
    assert list(world.store.list("leases/")) == []
    verify(world.store, world.expected)


@pytest.mark.parametrize("host", [None, "another.example"])
def test_p9_a_living_or_foreign_lease_is_never_stolen(world: World, host: str | None) -> None:
    world.store.store("leases/aa", [msgspec.json.encode(_stranger(dead=host is not None, host=host))])
    world.store.delete(f"points/{world.points[0].name}")
    assert Prune(opened(world.store)).run().waiting == ("leases/aa",)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_p9_a_run_that_lost_its_lease_commits_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Stopped for so long that somebody took the lease away: before the commit, or in the middle of it."""
    commit = Repository.commit

    def late(self: Repository, point: Point) -> Point:
        made = commit(self, point)
        bury(world.store)
        return made

    names = opened(world.store).point_names()
    if moment == "after":
        monkeypatch.setattr(Repository, "commit", late)
    run = Backup(opened(world.store), FixedGrid())
    with run, world.origin.capture() as capture:
        if moment == "before":
            bury(world.store)
        with pytest.raises(LeaseLostError):
            run.store(capture)
    assert opened(world.store).point_names() == names


# -- P11, P12: passwords -------------------------------------------------------------------------------------------------


# -- P10: the disk is full at any write (on a real full file system: test_cli.py) --------------------------------------


def full_at(below: MemoryStore, number: int) -> Faulty:
    """A store on which write ``number``, counted from 1, finds no room, and so does every later one until something was deleted."""
    lock, state = threading.Lock(), {"writes": 0, "full": False}

    def fault(operation: str, _name: str, when: str) -> None:
        with lock:
            if when == "after":
                if operation == "delete":
                    state["full"] = False
                return
            if operation != "store":
                return
            state["writes"] += 1
            state["full"] = state["full"] or state["writes"] == number
            if state["full"]:
                raise NoSpaceError("the disk is full")

    return Faulty(below, fault)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_p10_the_disk_is_full_at_any_write(world: World, operation: Callable[[object, TrackedOrigin], None]) -> None:
    """It ends with the error that says so, or finds room by itself; what was there is whole, and with room again all goes on."""
    scribble(world.origin, 999)
    start = dict(world.store.objects)
    refused = 0
    for number in range(1, 1000):
        store = MemoryStore()
        store.objects = dict(start)
        faulty = full_at(store, number)
        try:
            operation(faulty, world.origin)
        except NoSpaceError:
            refused += 1
        assert set(opened(store).point_names()) >= {world.points[-1].name}
        verify(store, world.expected)
        operation(store, world.origin)
        verify(store, world.expected)
        if faulty.count < number:
            break
    assert refused >= 1 or operation is run_forget_and_prune


def test_p11_the_paper_key_alone_opens(world: World) -> None:
    paper = opened(world.store).keyring.paper()
    for name in [key for key in world.store.objects if key.startswith("keys/")]:
        del world.store.objects[name]
    repository = Repository.open(world.store, Secret(paper.lower().replace("p2v1", "P2V1")))
    assert {point.name for point in repository.points()} == set(world.expected)


def test_p11_a_wrong_password_has_its_own_error_and_changes_nothing(world: World) -> None:
    before = dict(world.store.objects)
    for number in range(20):
        with pytest.raises(WrongPasswordError):
            Repository.open(world.store, Secret(f"wrong {number}"))
    assert world.store.objects == before


def test_p11_a_mistyped_paper_key_is_told_from_a_password() -> None:
    keyring = Keyring.generate()
    paper = keyring.paper()
    found = from_paper(paper)
    assert found is not None
    assert found.paper() == paper
    wrong = [paper[:-1] + letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567" if letter != paper[-1]]
    for text in (*wrong, paper[:-4], paper + "A", "P2V1-!"):
        with pytest.raises(WrongPasswordError):
            from_paper(text)
    assert from_paper("a password") is None


@pytest.mark.parametrize(
    "bad",
    [{"memory_kib": 1 << 30}, {"iterations": 1 << 20}, {"lanes": 0}, {"memory_kib": 0}, {"name": "md5"}, {"salt": b""}],
)
def test_p11_spoiled_parameters_of_a_key_are_refused(world: World, bad: dict[str, object]) -> None:
    from backup.keys import decode_key, digest_name

    name = next(key for key in world.store.objects if key.startswith("keys/"))
    key = decode_key(world.store.objects.pop(name), name)
    kdf = replace(key.kdf, **bad)  # type: ignore[arg-type]
    content = msgspec.json.encode(replace(key, kdf=kdf))
    world.store.store(f"keys/{digest_name(content)}", [content])
    with pytest.raises(ObjectDamagedError):
        opened(world.store)


def test_p12_a_second_key_opens_and_the_first_can_go(world: World) -> None:
    second = Secret("battery staple")
    repository = opened(world.store)
    first = repository.list_keys()[0][0]
    repository.add_key(second, label="second", kdf=QUICK)
    opened(world.store)
    Repository.open(world.store, second).remove_key(first)
    with pytest.raises(WrongPasswordError):
        opened(world.store)
    assert len(Repository.open(world.store, second).points()) == 3


# -- P14 to P20 -----------------------------------------------------------------------------------------------------------


def test_p14_a_bomb_does_not_exhaust_memory() -> None:
    """A frame of 1 KiB that grows to 64 MiB, sealed by somebody who has the key: its stated length is what is believed."""
    import zstandard

    keyring = Keyring.generate()
    codec = Codec(keyring)
    plain = bytes(64 << 20)
    blob_id = keyring.id(CHUNK, plain)
    packed = zstandard.ZstdCompressor().compress(plain)
    for stated in (65536, len(plain)):
        head = pack._HEAD.pack(b"P2VB", CHUNK, 1, 0, stated, 12 + len(packed) + 16, blob_id)
        sealed = keyring.cipher(CHUNK, blob_id).encrypt(bytes(12), packed, head)
        with pytest.raises(ObjectDamagedError):
            codec.decode(blob_id, CHUNK, head + bytes(12) + sealed)


def test_p14_a_frame_without_a_length_is_refused() -> None:
    import zstandard

    keyring = Keyring.generate()
    plain = bytes(1 << 20)
    blob_id = keyring.id(CHUNK, plain)
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(plain)
    head = pack._HEAD.pack(b"P2VB", CHUNK, 1, 0, len(plain), 12 + len(packed) + 16, blob_id)
    sealed = keyring.cipher(CHUNK, blob_id).encrypt(bytes(12), packed, head)
    with pytest.raises(ObjectDamagedError):
        Codec(keyring).decode(blob_id, CHUNK, head + bytes(12) + sealed)


def test_p16_sealed_objects_and_blobs_cannot_be_moved(world: World) -> None:
    """A blob under another's id, a chunk as a page, a record at another point: refused."""
    repository = opened(world.store)
    (one, place), (two, _) = [entry for entry in repository.index.entries() if entry[1].kind == CHUNK][:2]
    raw = world.store.objects[pack.pack_name(place.pack)][place.offset : place.end]
    assert repository.codec.decode(one, CHUNK, raw)
    with pytest.raises(ObjectDamagedError):
        repository.codec.decode(two, CHUNK, raw)
    with pytest.raises(ObjectDamagedError):
        repository.codec.decode(two, CHUNK, raw[:16] + two + raw[48:])
    with pytest.raises(ObjectDamagedError):
        repository.codec.decode(one, 2, raw[:4] + b"\2" + raw[5:])
    add_record(repository, world.points[0], {"kind": "drill"})
    name = next(key for key in world.store.objects if key.startswith("records/"))
    world.store.objects[name.replace(world.points[0].name, world.points[1].name)] = world.store.objects.pop(name)
    assert not checked(world.store).sound
    foreign = MemoryStore()
    new_repository(foreign)
    stranger = back_up(foreign, machine(3))
    world.store.objects[f"points/{stranger.name}"] = foreign.objects[f"points/{stranger.name}"]
    with pytest.raises(ObjectDamagedError):
        opened(world.store).point(stranger.name)


def test_p17_nonces_do_not_repeat() -> None:
    """The same chunk again and again, as two runs that know nothing of each other store it."""
    keyring = Keyring.generate()
    codec, plain = Codec(keyring), random.Random(1).randbytes(4096)
    blob_id = keyring.id(CHUNK, plain)
    nonces = {codec.encode(CHUNK, blob_id, plain).data[48:60] for _ in range(2000)}
    assert len(nonces) == 2000
    assert len({keyring.seal(POINT, b"x")[:44] for _ in range(500)}) == 500


def test_p17_nonces_do_not_repeat_in_a_process_and_its_fork() -> None:
    """What a generator in memory would do wrong: both sides of a fork go on from the same state."""
    keyring = Keyring.generate()
    codec, plain = Codec(keyring), random.Random(1).randbytes(4096)
    blob_id = keyring.id(CHUNK, plain)
    codec.encode(CHUNK, blob_id, plain)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"".join(codec.encode(CHUNK, blob_id, plain).data[48:60] for _ in range(300)))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        theirs = file.read()
    os.waitpid(child, 0)
    nonces = [theirs[at : at + 12] for at in range(0, len(theirs), 12)]
    nonces += [bytes(codec.encode(CHUNK, blob_id, plain).data[48:60]) for _ in range(300)]
    assert len(set(nonces)) == len(nonces) == 600


def test_p19_a_broken_compressor_is_noticed_before_anything_is_stored(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zstandard

    real = zstandard.ZstdCompressor

    class Broken:
        def __init__(self, **options: object) -> None:
            self._real = real(**options)  # type: ignore[arg-type]

        def compress(self, plain: memoryview) -> bytes:
            wrong = bytearray(plain)
            wrong[len(wrong) // 2] ^= 1
            return self._real.compress(wrong)

    monkeypatch.setattr(zstandard, "ZstdCompressor", Broken)
    before = dict(world.store.objects)
    world.origin.write("large", bytes(range(256)) * 1000, 0)
    with pytest.raises(ObjectDamagedError, match="as it was encoded"):
        back_up(world.store, world.origin, world.points[-1])
    assert world.store.objects == before


def test_p19_codecs_are_not_shared_between_threads() -> None:
    keyring = Keyring.generate()
    codec, errors = Codec(keyring), list[BaseException]()

    def work(seed: int) -> None:
        generator = random.Random(seed)
        try:
            for _ in range(60):
                plain = generator.randbytes(2000) * generator.randrange(1, 30)
                blob_id = keyring.id(CHUNK, plain)
                assert codec.decode(blob_id, CHUNK, codec.encode(CHUNK, blob_id, plain).data) == plain
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("change", [{"version": 2}, {"features": ("erasure-code",)}, {"format": "other"}])
def test_p20_a_later_format_is_refused(world: World, change: dict[str, object]) -> None:
    config = opened(world.store).config
    world.store.objects["config"] = replace(config, **change).encode()  # type: ignore[arg-type]
    with pytest.raises(RepositoryUnsupportedError):
        opened(world.store)


def test_p20_a_later_point_is_refused(world: World) -> None:
    repository = opened(world.store)
    later = repository.commit(replace(world.points[0], kind="files"))
    with pytest.raises(RepositoryUnsupportedError):
        repository.point(later.name)


def test_p1_an_init_that_was_killed_can_be_done_again() -> None:
    for after in range(4):
        store = MemoryStore()
        with suppress(Killed):
            new_repository(killing(store, after))
        if "config" not in store.objects:
            with pytest.raises(RepositoryMissingError):
                opened(store)
            new_repository(store)
        assert opened(store).points() == []


def test_no_repository(world: World) -> None:
    with pytest.raises(RepositoryMissingError):
        opened(MemoryStore())


# -- P22, P24 ---------------------------------------------------------------------------------------------------------------


def test_p22_a_damaged_point_gives_all_that_is_not_damaged_and_names_the_rest(world: World) -> None:
    point = world.points[-1]
    generator = random.Random(4)
    for name, content in list(world.store.objects.items()):
        if name.startswith("packs/"):
            broken = bytearray(content)
            for _ in range(max(1, len(content) // 200_000)):
                broken[generator.randrange(len(broken))] ^= 1
            world.store.objects[name] = bytes(broken)
    holes: dict[str, list[Extent]] = {disk.id: [] for disk in point.disks}
    found = restored(world.store, point, holes)
    assert any(holes.values())
    for disk_id, content in found.items():
        want = bytearray(world.expected[point.name][disk_id])
        for hole in holes[disk_id]:
            want[hole.start : hole.end] = bytes(hole.length)
        assert content == bytes(want)
    lost = {
        (hurt.disk, start, length) for hurt in checked(world.store).hurts if hurt.point == point.name
        for start, length in hurt.ranges
    }  # fmt: skip
    assert lost
    assert sum(length for _, _, length in lost) == sum(hole.length for many in holes.values() for hole in many)
    assert all(hole.length <= SPAN for many in holes.values() for hole in many)


def test_p24_a_disk_that_is_not_captured_is_loud(world: World) -> None:
    told: list[str] = []
    run = Backup(opened(world.store), FixedGrid(), notice=lambda notice: told.append(f"{notice.code} {notice.subject}"))
    with run, world.origin.capture() as capture:
        del capture.disks["small"]
        point = run.store(capture)
    assert told == ["disk-missing small"]
    assert [missing.id for missing in point.missing] == ["small"]
    assert [notice.code for notice in opened(world.store).point(point.name).notices] == ["disk-missing"]


def test_p24_a_disk_that_was_added_is_covered(world: World) -> None:
    world.origin.add("new", MIB)
    world.origin.write("new", b"content", 5)
    assert "new" in {disk.id for disk in world.add().disks}


def test_an_interrupted_run_is_gone_on_with(world: World) -> None:
    """Packs without an index are adopted: the second run stores only what the first had not."""
    start = dict(world.store.objects)
    world.origin.write("large", random.Random(7).randbytes(8 * MIB), 0)
    with suppress(Killed):
        run_backup(killing(world.store, 2), world.origin)  # lease, one pack
    bury(world.store)
    added = [name for name in world.store.objects if name not in start]
    assert {name.split("/")[0] for name in added} == {"packs"}
    point = back_up(world.store, world.origin, world.points[-1])
    assert point.statistics["new_bytes"] < 2 * MIB
    verify(world.store, world.expected)
