"""Block sources around block sources."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.block import BlockSource, Extent, Kind, digest_of, merged
from formats.errors import NbdError, ReadError
from formats.layers import (
    Cached,
    Counted,
    Fault,
    Faulty,
    Mapped,
    Overlaid,
    Retried,
    Seeded,
    Segment,
    Throttled,
    UsedOnly,
)
from formats.memory import MemoryDisk
from tests.contracts.block_sink import noise
from tests.contracts.block_source import MIB, TIB, BlockSourceContract, Tape, read


def stored(content: bytes) -> MemoryDisk:
    """A disk in memory with holes where the content has long zero runs."""
    disk = MemoryDisk(len(content))
    for start in range(0, len(content), 65536):
        if any(content[start : start + 65536]):
            disk.write(memoryview(content)[start : start + 65536], start)
    return disk


def no_sleep(_: float) -> None:
    """Time passes elsewhere."""


def read_error() -> BaseException:
    """What a bad sector raises."""
    return ReadError("bad sector")


_WRAPPERS: dict[str, Callable[[BlockSource], BlockSource]] = {
    "counted": Counted,
    "cached": lambda source: Cached(source, block=10_000, limit=100_000),
    "retried": lambda source: Retried(
        Faulty(source, [Fault(start=0, length=1 << 60, error=read_error, times=2)]), sleep=no_sleep
    ),
    "retried-map": lambda source: Retried(
        Faulty(source, [Fault(start=0, length=1 << 60, error=read_error, after=1, times=2, map=True)]), sleep=no_sleep
    ),
    "throttled": lambda source: Throttled(source, rate=1e9, sleep=no_sleep),
    "faulty": lambda source: Faulty(source, []),
    "used": lambda source: UsedOnly(source, [Extent(0, source.size, Kind.DATA)]),
    "mapped": lambda source: Mapped(source.size, [Segment(0, source.size, source)]),
    "overlaid": lambda source: Overlaid(source, MemoryDisk(source.size), []),
    "seeded": lambda source: Seeded(source, MemoryDisk(source.size)),
}


@pytest.mark.parametrize("wrap", _WRAPPERS.values(), ids=_WRAPPERS.keys())
class TestWrapper(BlockSourceContract):
    @pytest.fixture
    def source(self, wrap: Callable[[BlockSource], BlockSource], content: bytes) -> Iterator[BlockSource]:
        layer = wrap(stored(content))
        yield layer
        layer.close()

    @pytest.fixture
    def vast(self, wrap: Callable[[BlockSource], BlockSource]) -> Iterator[BlockSource]:
        tape = Tape()
        layer = wrap(tape)
        yield layer
        assert tape.taken < 10
        layer.close()
        assert tape.closed


class TestMappedFromParts(BlockSourceContract):
    """The content in three pieces, each from the middle of its own disk; the long zero run is a gap."""

    @pytest.fixture
    def source(self, content: bytes) -> Iterator[BlockSource]:
        cuts = [(0, 600_001), (600_001, 2 * MIB + 512), (3 * MIB, len(content))]
        segments = []
        for low, high in reversed(cuts):
            part = MemoryDisk(high - low + 2 * 65536, noise(65536))
            part.zero(65536, high - low)
            for at in range(low, high, 65536):
                piece = content[at : min(at + 65536, high)]
                if any(piece):
                    part.write(memoryview(piece), 65536 + at - low)
            segments.append(Segment(low, high - low, part, 65536))
        mapped = Mapped(len(content), segments)
        yield mapped
        mapped.close()

    @pytest.fixture
    def content(self) -> bytes:
        return noise(600_001) + bytes(MIB) + noise(2 * MIB + 512 - 600_001 - MIB, 1) + bytes(MIB - 512) + noise(MIB, 2)

    @pytest.fixture
    def vast(self) -> Iterator[BlockSource]:
        tape = Tape()
        mapped = Mapped(64 * TIB, [Segment(n * TIB, TIB, tape, n * TIB) for n in range(0, 64, 2)])
        yield mapped
        assert tape.taken < 10
        mapped.close()


class TestUsedOnly(BlockSourceContract):
    """The unused parts of the disk below are full of noise: only zeroes may be seen."""

    @pytest.fixture
    def source(self, content: bytes) -> Iterator[BlockSource]:
        used = [Extent(n, 512, Kind.DATA) for n in range(0, len(content), 512) if any(content[n : n + 512])]
        below = MemoryDisk(len(content), noise(len(content), 8))
        for extent in used:
            below.write(memoryview(content)[extent.start : extent.end], extent.start)
        layer = UsedOnly(below, list(merged(used)))
        yield layer
        layer.close()

    @pytest.fixture
    def vast(self) -> Iterator[BlockSource]:
        asked: list[int] = []

        def used(start: int, length: int) -> Iterator[Extent]:
            for position in range(start // 8192 * 8192, start + length, 8192):
                asked.append(position)
                yield Extent(position, 4096, Kind.DATA)

        tape = Tape()
        layer = UsedOnly(tape, used)
        yield layer
        assert tape.taken < 10
        assert len(asked) < 10
        layer.close()


def test_mapped_refuses_segments_that_overlap_or_reach_outside() -> None:
    disk = MemoryDisk(100)
    for segments in (
        [Segment(0, 60, disk), Segment(50, 50, disk)],
        [Segment(50, 51, disk)],
        [Segment(0, 50, disk, 51)],
    ):
        with pytest.raises(ValueError, match=r"outside|two segments"):
            Mapped(100, segments)


def test_counted_counts_what_was_read() -> None:
    counted = Counted(Faulty(MemoryDisk(1000), [Fault(start=500, length=1, error=read_error)]))
    read(counted, 0, 300)
    with pytest.raises(ReadError):
        read(counted, 400, 200)
    read(counted, 400, 200)
    assert counted.bytes_read == 500


def test_cached_reads_a_block_once_and_no_more_than_the_limit_is_kept() -> None:
    below = Counted(MemoryDisk(1000, noise(1000)))
    cached = Cached(below, block=100, limit=300)
    assert read(cached, 50, 100) == noise(1000)[50:150]
    assert below.bytes_read == 200
    read(cached, 0, 200)
    assert below.bytes_read == 200
    read(cached, 200, 200)  # four blocks asked in all: the oldest goes
    read(cached, 100, 300)
    assert below.bytes_read == 400
    read(cached, 0, 1)
    assert below.bytes_read == 500


def test_cached_reads_a_block_once_for_all_threads() -> None:
    below = Counted(MemoryDisk(MIB, noise(MIB)))
    cached = Cached(below, block=4096, limit=MIB)
    threads = [threading.Thread(target=read, args=(cached, 0, MIB)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert below.bytes_read == MIB


def test_cached_keeps_no_block_that_failed() -> None:
    cached = Cached(Faulty(MemoryDisk(1000, b"x" * 1000), [Fault(start=0, length=1, error=read_error)]))
    with pytest.raises(ReadError):
        read(cached, 0, 10)
    assert read(cached, 0, 10) == b"x" * 10


def test_retried_waits_longer_each_time_and_gives_up() -> None:
    waited: list[float] = []
    faulty = Faulty(MemoryDisk(1000), [Fault(start=0, length=1, error=read_error, times=None)])
    retried = Retried(faulty, attempts=4, pause=0.5, sleep=waited.append)
    with pytest.raises(ReadError, match="bad sector"):
        read(retried, 0, 10)
    assert waited == [0.5, 1.0, 2.0]
    assert read(retried, 1, 10) == bytes(10)


def test_retried_leaves_other_errors_alone() -> None:
    waited: list[float] = []
    faulty = Faulty(MemoryDisk(10), [Fault(start=0, length=1, error=lambda: NbdError("gone"))])
    with pytest.raises(NbdError):
        read(Retried(faulty, sleep=waited.append), 0, 10)
    assert waited == []


def test_retried_opens_the_source_anew() -> None:
    disks: list[BlockSource] = []

    def reopen() -> BlockSource:
        times = None if len(disks) < 2 else 0
        fault = Fault(start=0, length=1, error=lambda: NbdError("gone"), times=times)
        disks.append(Faulty(MemoryDisk(10, b"0123456789"), [fault]))
        return disks[-1]

    retried = Retried(reopen(), on=NbdError, reopen=reopen, sleep=no_sleep)
    assert read(retried, 0, 4) == b"0123"
    assert len(disks) == 3
    with pytest.raises(ValueError, match="closed"):
        read(disks[0], 5, 1)


def test_retried_refuses_a_disk_that_changed_its_size() -> None:
    broken = Faulty(MemoryDisk(10), [Fault(start=0, length=1, error=read_error, times=None)])
    retried = Retried(broken, reopen=lambda: MemoryDisk(11), sleep=no_sleep)
    with pytest.raises(ReadError, match="11 bytes"):
        read(retried, 0, 10)


def test_retried_goes_on_with_the_map_where_it_failed() -> None:
    disk = MemoryDisk(10 * MIB)
    for start in range(0, 10 * MIB, MIB):
        disk.write(memoryview(b"x"), start)
    plan = [Fault(start=n * MIB, length=1, error=read_error, times=3, map=True) for n in range(10)]
    retried = Retried(Faulty(disk, plan), sleep=no_sleep)
    assert list(retried.extents(0, disk.size)) == list(disk.extents(0, disk.size))


def test_throttled_keeps_the_rate_over_any_run_of_reads() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    throttled = Throttled(MemoryDisk(MIB), rate=1000, sleep=sleep, clock=lambda: now)
    for _ in range(100):
        read(throttled, 0, 500)
    assert 49.0 <= now <= 50.0
    now += 1000  # a long rest saves up one second's worth, no more
    before = now
    for _ in range(10):
        read(throttled, 0, 500)
    assert 4.0 <= now - before <= 5.0


def test_used_only_reads_over_short_gaps_and_not_over_long_ones() -> None:
    below = Counted(MemoryDisk(4 * MIB, noise(4 * MIB)))
    near = [Extent(0, 4096, Kind.DATA), Extent(8192, 4096, Kind.DATA)]
    layer = UsedOnly(below, [*near, Extent(3 * MIB, 512, Kind.DATA), Extent(3 * MIB + 512, 512, Kind.ZERO)])
    expected = bytearray(4 * MIB)
    for start, length in ((0, 4096), (8192, 4096), (3 * MIB, 512)):
        expected[start : start + length] = noise(4 * MIB)[start : start + length]
    assert read(layer, 0, 4 * MIB) == expected
    assert below.bytes_read == 12288 + 512


def test_used_only_refuses_a_list_that_overlaps() -> None:
    with pytest.raises(ValueError, match="overlap"):
        UsedOnly(MemoryDisk(100), [Extent(0, 50, Kind.DATA), Extent(49, 1, Kind.DATA)])


@settings(deadline=None, max_examples=80)
@given(
    marks=st.lists(st.integers(0, 4000), unique=True, max_size=20).map(sorted),
    cut=st.tuples(st.integers(0, 4000), st.integers(0, 4000)),
)
def test_used_only_shows_what_is_used_for_any_map(marks: list[int], cut: tuple[int, int]) -> None:
    content = noise(4000)
    used = [Extent(a, b - a, Kind.DATA) for a, b in zip(marks[::2], marks[1::2], strict=False)]
    expected = bytearray(4000)
    for extent in used:
        expected[extent.start : extent.end] = content[extent.start : extent.end]
    layer = UsedOnly(MemoryDisk(4000, content), used)
    low, high = sorted(cut)
    assert read(layer, low, high - low) == expected[low:high]
    told = list(layer.extents(low, high - low))
    assert sum(extent.length for extent in told) == high - low
    for extent in told:
        assert extent.kind is Kind.DATA or not any(expected[extent.start : extent.end])


class Remote(MemoryDisk):
    """A disk that can tell digests, and counts what is asked of it."""

    def __init__(self, size: int, content: bytes = b"") -> None:
        super().__init__(size, content)
        self.sent = self.digests = 0

    def readinto(self, buffer: memoryview, offset: int) -> None:
        self.sent += len(buffer)
        super().readinto(buffer, offset)

    def digest(self, start: int, length: int) -> bytes | None:
        self.digests += 1
        buffer = memoryview(bytearray(length))
        super().readinto(buffer, start)
        return blake2b(buffer, digest_size=32).digest()


def test_a_digest_passes_through_layers_where_it_says_what_a_read_would() -> None:
    remote = Remote(8 * MIB, noise(8 * MIB, 3))
    disk = Mapped(16 * MIB, [Segment(4 * MIB, 8 * MIB, UsedOnly(remote, [Extent(0, 2 * MIB, Kind.DATA)]))])
    overlaid = Overlaid(Counted(disk), MemoryDisk(16 * MIB), [Extent(4 * MIB, 4096, Kind.ZERO)])
    for start, length in [(5 * MIB, MIB), (4 * MIB + 4096, 4096), (5 * MIB, 1)]:
        assert digest_of(overlaid, start, length) == blake2b(read(overlaid, start, length), digest_size=32).digest()
    for start, length in [(4 * MIB, 8192), (3 * MIB, MIB), (3 * MIB, 2 * MIB), (6 * MIB - 1, 2), (12 * MIB, 1)]:
        assert digest_of(overlaid, start, length) is None
    assert digest_of(MemoryDisk(10), 0, 10) is None


def test_a_seed_saves_what_is_the_same_and_nothing_else() -> None:
    remote = Remote(8 * MIB, noise(8 * MIB, 4))
    seed = MemoryDisk(8 * MIB, read(remote, 0, 5 * MIB))  # the rest never came
    seed.write(memoryview(b"changed since"), 2 * MIB + 77)
    remote.sent = 0
    seeded = Seeded(remote, seed)
    for start in range(0, 8 * MIB, MIB):
        assert read(seeded, start, MIB) == noise(8 * MIB, 4)[start : start + MIB]
    assert seeded.bytes_kept == 4 * MIB
    assert remote.sent == 4 * MIB
    assert remote.digests == 5  # what never came is not asked for


def test_a_seed_without_digests_saves_nothing() -> None:
    source = MemoryDisk(MIB, noise(MIB, 5))
    seeded = Seeded(source, MemoryDisk(MIB, noise(MIB, 5)))
    assert read(seeded, 0, MIB) == noise(MIB, 5)
    assert seeded.bytes_kept == 0


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8), st.booleans()), max_size=12))
def test_an_overlay_shows_what_was_written_last(writes: list[tuple[int, int, bool]]) -> None:
    size, unit = 72 * 4096, 4096
    base, top = MemoryDisk(size, noise(size, 6)), MemoryDisk(size)
    expected = bytearray(noise(size, 6))
    covered: dict[int, bool] = {}
    for place, count, zero in writes:
        for block in range(place, place + count):
            content = bytes(unit) if zero else noise(unit, block + 100)
            top.write(memoryview(content), block * unit)
            expected[block * unit : (block + 1) * unit] = content
            covered[block] = zero
    written = list(merged(Extent(b * unit, unit, Kind.ZERO if covered[b] else Kind.DATA) for b in sorted(covered)))
    disk = Overlaid(base, top, written)
    assert read(disk, 0, size) == bytes(expected)
    for extent in disk.extents(0, size):
        assert extent.kind is Kind.DATA or not any(expected[extent.start : extent.end])
