"""The copy loop, with every kind of source and sink that it meets."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.block import BlockSource, Extent, Kind, data_bytes
from formats.errors import InterruptedRunError, NoSpaceError, ReadError, WriteError
from formats.images.raw import RawFile, RawSink
from formats.layers import Counted, Fault, Faulty, UsedOnly
from formats.memory import MemoryDisk
from formats.nbd import NbdServer, connect
from formats.overlay import Overlay
from formats.transfer import BLOCK, copy, fingerprint
from tests.contracts.block_sink import SIZE, BlockSinkContract, Made, noise
from tests.contracts.block_source import MIB, TIB, read, sample, write_sparse
from tests.formats.nbd.peer import qemu_nbd, run
from tests.requirement import needs


class Sequential:
    """A sink that takes ascending writes once, in memory: what streamOptimized and OVA allow, and no more."""

    random_access = False

    def __init__(self, size: int) -> None:
        self.disk = MemoryDisk(size)
        self.size = size
        self.position = 0
        self.writers: set[int] = set()
        self.closed = False
        self._busy = threading.Lock()

    def write(self, data: memoryview, offset: int) -> None:
        """Store, in order only."""
        assert self._busy.acquire(blocking=False), "two threads write at a time"
        try:
            self._ascend(offset, len(data))
            self.disk.write(data, offset)
        finally:
            self._busy.release()

    def zero(self, start: int, length: int) -> None:
        """Leave out, in order only."""
        assert self._busy.acquire(blocking=False), "two threads write at a time"
        try:
            self._ascend(start, length)
        finally:
            self._busy.release()

    def flush(self) -> None:
        """Nothing."""
        if self.closed:
            raise ValueError("the disk is closed")

    def close(self) -> None:
        """Close."""
        self.closed = True

    def _ascend(self, start: int, length: int) -> None:
        if self.closed:
            raise ValueError("the disk is closed")
        if start < 0 or start + length > self.size:
            raise ValueError("outside the disk")
        if start < self.position:
            raise ValueError(f"byte {start} comes after byte {self.position}")
        self.position = start + length


class TestSequentialSink(BlockSinkContract):
    """The suite itself, on a sequential sink."""

    @pytest.fixture
    def made(self) -> Iterator[Made]:
        sink = Sequential(SIZE)
        yield Made(sink, lambda: read(sink.disk, 0, SIZE))


def stored(content: bytes) -> MemoryDisk:
    """The content in memory, with holes."""
    disk = MemoryDisk(len(content))
    for start in range(0, len(content), 65536):
        if any(content[start : start + 65536]):
            disk.write(memoryview(content)[start : start + 65536], start)
    return disk


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Meter:
    """A progress that adds up."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.done = 0
        self.finished = 0
        self._lock = threading.Lock()

    def start(self, label: str, total: int | None) -> None:
        """Begin."""
        self.total = total

    def advance(self, amount: int) -> None:
        """Add."""
        with self._lock:
            self.done += amount

    def finish(self) -> None:
        """End."""
        self.finished += 1


@pytest.mark.parametrize("threads", [1, 8])
def test_a_copy_is_equal_and_says_what_it_did(threads: int) -> None:
    content, meter = sample(), Meter()
    source = Counted(stored(content))
    sink = MemoryDisk(len(content))
    done = copy(source, sink, threads=threads, progress=meter, total=123)
    assert read(sink, 0, sink.size) == content
    assert done.size == len(content)
    assert done.read == source.bytes_read == meter.done
    assert data_bytes(stored(content)) <= done.read <= len(content)
    assert 0 < done.written <= done.read
    assert (meter.total, meter.finished) == (123, 1)
    assert done.fingerprint.differences(fingerprint(sink)) == []


@pytest.mark.parametrize("threads", [1, 8])
def test_a_sequential_sink_gets_ascending_writes(threads: int) -> None:
    content = sample() + noise(5 * MIB) + bytes(3 * MIB) + noise(MIB + 512)
    sink = Sequential(len(content))
    done = copy(stored(content), sink, threads=threads)
    assert read(sink.disk, 0, sink.size) == content
    assert done.fingerprint == fingerprint(stored(content))


def test_stored_zeroes_are_read_and_not_written() -> None:
    content = bytes(2 * MIB) + noise(65536) + bytes(MIB - 65536)
    source = MemoryDisk(len(content), content)
    sink = MemoryDisk(len(content))
    done = copy(source, sink)
    assert (done.read, done.written) == (3 * MIB, 65536)
    assert data_bytes(sink) == 65536


def test_a_sink_that_is_not_blank_is_zeroed_where_the_source_is() -> None:
    content = sample()
    for source in (stored(content), MemoryDisk(len(content), content), MemoryDisk(len(content))):
        sink = MemoryDisk(len(content), noise(len(content)))
        copy(source, sink, blank=False)
        assert read(sink, 0, sink.size) == read(source, 0, source.size)


def test_a_larger_sink_is_taken_a_smaller_one_is_not() -> None:
    sink = MemoryDisk(MIB)
    copy(MemoryDisk(700_001, noise(700_001)), sink)
    assert read(sink, 0, MIB) == noise(700_001) + bytes(MIB - 700_001)
    with pytest.raises(ValueError, match="does not fit"):
        copy(MemoryDisk(MIB + 1), sink)


def test_an_empty_disk_is_copied() -> None:
    assert copy(MemoryDisk(0), MemoryDisk(0)).read == 0
    assert copy(MemoryDisk(0), MemoryDisk(MIB), blank=False).written == 0


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("at", [0, 7 * MIB + 5, 20 * MIB - 1])
def test_the_first_error_of_the_source_ends_the_copy(sequential: bool, at: int) -> None:
    disk = MemoryDisk(20 * MIB, noise(20 * MIB))
    fault = Fault(start=at, length=1, error=lambda: ReadError(f"sector at {at}"), times=None)
    meter = Meter()
    sink = Sequential(disk.size) if sequential else MemoryDisk(disk.size)
    with pytest.raises(ReadError, match=f"sector at {at}"):
        copy(Faulty(disk, [fault]), sink, progress=meter)
    assert meter.finished == 1


def test_an_error_of_the_map_ends_the_copy() -> None:
    disk = MemoryDisk(20 * MIB)
    for start in range(0, disk.size, 2 * MIB):
        disk.write(memoryview(b"x"), start)
    fault = Fault(start=10 * MIB, length=1, error=lambda: ReadError("map lost"), map=True)
    with pytest.raises(ReadError, match="map lost"):
        copy(Faulty(disk, [fault]), MemoryDisk(disk.size))


@pytest.mark.parametrize("sequential", [False, True])
def test_an_error_of_the_sink_ends_the_copy(sequential: bool) -> None:
    class Full(Sequential):
        random_access = not sequential

        def write(self, data: memoryview, offset: int) -> None:
            if offset >= 5 * MIB:
                raise NoSpaceError("full")
            self.disk.write(data, offset)

    with pytest.raises(NoSpaceError, match="full"):
        copy(MemoryDisk(20 * MIB, noise(20 * MIB)), Full(20 * MIB))


def test_the_first_error_wins_and_others_do_not_hide_it() -> None:
    first = threading.Event()

    class Failing(MemoryDisk):
        def write(self, data: memoryview, offset: int) -> None:
            if offset == 0:
                first.set()
                raise WriteError("the first")
            assert first.wait(30)
            time.sleep(0.1)
            raise WriteError("a later one")

    for _ in range(5):
        first.clear()
        source = MemoryDisk(8 * MIB, noise(8 * MIB))
        sink = Failing(8 * MIB)
        with pytest.raises(WriteError, match="the first"):
            copy(source, sink)


def test_ctrl_c_while_the_last_blocks_are_written_leaves_no_worker() -> None:
    class Interrupted(MemoryDisk):
        def write(self, data: memoryview, offset: int) -> None:
            if offset == 2 * MIB:
                os.kill(os.getpid(), signal.SIGINT)  # the main thread waits for the workers now, or feeds them
                time.sleep(0.3)
            super().write(data, offset)

    with pytest.raises(KeyboardInterrupt):
        copy(MemoryDisk(3 * MIB, noise(3 * MIB)), Interrupted(3 * MIB))


def test_a_sequential_sink_is_blank_whatever_is_said() -> None:
    """Zeroing from the thread that walks the map would overtake the writes."""
    source = MemoryDisk(64 * MIB)
    for start in range(0, source.size, 4 * MIB):
        source.write(memoryview(noise(65536)), start)
    sink = Sequential(source.size)
    copy(source, sink, blank=False)
    assert fingerprint(sink.disk) == fingerprint(source)


@pytest.mark.parametrize("sequential", [False, True])
def test_stop_ends_the_copy(sequential: bool) -> None:
    stop = threading.Event()

    class Stopping(MemoryDisk):
        reads = 0

        def readinto(self, buffer: memoryview, offset: int) -> None:
            super().readinto(buffer, offset)
            self.reads += 1
            if self.reads == 5:
                stop.set()

    source = Stopping(200 * MIB)
    for start in range(0, source.size, BLOCK):
        source.write(memoryview(b"x"), start)
    sink = Sequential(source.size) if sequential else MemoryDisk(source.size)
    with pytest.raises(InterruptedRunError) as caught:
        copy(source, sink, stop=stop)
    assert caught.value.exit_code == 130
    assert source.reads < 100


def test_a_vast_sparse_source_costs_what_it_holds() -> None:
    source = MemoryDisk(16 * TIB)
    for at in (0, 3 * TIB + 5, 16 * TIB - 512):
        source.write(memoryview(noise(512)), at)
    sink = MemoryDisk(16 * TIB)
    done = copy(source, sink)
    assert done.written <= 4 * 65536
    assert len(done.fingerprint.segments) == 3
    for at in (0, 3 * TIB + 5, 16 * TIB - 512):
        assert read(sink, at, 512) == noise(512)
    sink.write(memoryview(b"!"), 3 * TIB + 600)
    assert done.fingerprint.differences(fingerprint(sink)) == [Extent(3 * TIB, 1 << 30, Kind.DATA)]


def test_a_fingerprint_sees_one_bit_and_a_block_in_the_wrong_place() -> None:
    content = bytearray(noise(3 * MIB) + bytes(MIB))
    before = fingerprint(MemoryDisk(len(content), bytes(content)))
    for position in (0, MIB + 77, 3 * MIB - 1, 4 * MIB - 1):
        content[position] ^= 1
        assert before.differences(fingerprint(MemoryDisk(len(content), bytes(content))))
        content[position] ^= 1
    swapped = content[MIB : 2 * MIB] + content[:MIB] + content[2 * MIB :]
    assert before.differences(fingerprint(MemoryDisk(len(content), bytes(swapped))))
    assert before == fingerprint(stored(bytes(content)))


def test_equal_content_has_one_fingerprint_whatever_the_map_says() -> None:
    """Zeroes that are stored, told or left out; data in any order and by any number of threads."""
    content = sample()
    ways: list[BlockSource] = [
        stored(content),
        MemoryDisk(len(content), content),
        Overlay(stored(content)),
        UsedOnly(
            MemoryDisk(len(content), content),
            [Extent(n, 512, Kind.DATA) for n in range(0, len(content), 512) if any(content[n : n + 512])],
        ),
    ]
    prints = [fingerprint(way, threads=threads) for way in ways for threads in (1, 5)]
    assert all(each == prints[0] for each in prints)
    assert prints[0].segments


@needs("qemu-img", "qemu-nbd")
@pytest.mark.parametrize("form", ["qcow2", "vhdx", "vmdk", "vpc"])
def test_a_copy_through_qemu_nbd_is_equal_by_qemus_own_word(form: str, tmp_path: Path) -> None:
    plain = write_sparse(tmp_path / "disk.raw", sample())
    image = tmp_path / f"disk.{form}"
    options = ["-o", "force_size=on"] if form == "vpc" else []
    run("qemu-img", "create", "-f", form, *options, image, str(len(sample())))
    source = RawFile(plain)
    with qemu_nbd(tmp_path, image, form, writable=True) as uri:
        sink = connect(uri)
        done = copy(source, sink)
        sink.flush()
        assert done.fingerprint == fingerprint(sink)
        sink.close()
    source.close()
    run("qemu-img", "compare", "-f", "raw", "-F", form, plain, image)
    if form != "vpc":
        run("qemu-img", "check", "-f", form, image)


def test_from_file_over_nbd_to_file(tmp_path: Path) -> None:
    source = RawFile(write_sparse(tmp_path / "a.raw", sample() * 5))
    sink = RawSink(tmp_path / "b.raw", source.size)
    with NbdServer({"disk": source}) as server:
        disk = connect(server.uri("disk"))
        done = copy(disk, sink)
        sink.flush()
        disk.close()
    sink.close()
    source.close()
    assert (tmp_path / "b.raw").read_bytes() == sample() * 5
    assert done.written < len(sample()) * 5 // 2


_RUN = st.tuples(st.sampled_from(["hole", "data", "stored", "mixed"]), st.integers(1, 3 * BLOCK))


@settings(deadline=None, max_examples=40)
@given(
    runs=st.lists(_RUN, min_size=1, max_size=6),
    threads=st.integers(1, 8),
    blank=st.booleans(),
    sequential=st.booleans(),
)
def test_any_layout_is_copied(runs: list[tuple[str, int]], threads: int, blank: bool, sequential: bool) -> None:
    parts: dict[str, Callable[[int], bytes]] = {
        "hole": bytes,
        "stored": bytes,
        "data": noise,
        "mixed": lambda n: bytes(n // 2) + noise(n - n // 2),
    }
    content = b"".join(parts[kind](length) for kind, length in runs)
    source, position = MemoryDisk(len(content)), 0
    for kind, length in runs:
        if kind != "hole":
            source.write(memoryview(content)[position : position + length], position)
        position += length
    if sequential:
        ordered = Sequential(len(content))
        done = copy(source, ordered, threads=threads, blank=blank)
        assert read(ordered.disk, 0, len(content)) == content
    else:
        sink = MemoryDisk(len(content), b"" if blank else noise(len(content), 3))
        done = copy(source, sink, threads=threads, blank=blank)
        assert read(sink, 0, len(content)) == content
    assert done.fingerprint == fingerprint(source, threads=1)
