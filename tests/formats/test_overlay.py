"""Copy-on-write in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.block import BlockSource, Extent, Kind
from formats.errors import NoSpaceError
from formats.memory import MemoryDisk
from formats.overlay import PAGE, Overlay
from tests.contracts.block_sink import SIZE, BlockSinkContract, Made, noise
from tests.contracts.block_source import TIB, BlockSourceContract, Tape, read


class TestOverlaySource(BlockSourceContract):
    """Half of the content is the parent's, half the overlay's; what the parent holds elsewhere must not shine through."""

    @pytest.fixture
    def source(self, content: bytes) -> Iterator[BlockSource]:
        parent = MemoryDisk(len(content), noise(len(content), 5))
        for start in range(0, len(content), PAGE):
            piece = content[start : start + PAGE]
            parent.zero(start, len(piece)) if not any(piece) else parent.write(memoryview(piece), start)
        parent.write(memoryview(noise(900_000, 6)), 1_100_001)
        overlay = Overlay(parent)
        for start in range(1_100_001, 2_000_001, 450_000):
            piece = content[start : start + 450_000]
            overlay.write(memoryview(piece), start) if any(piece) else overlay.zero(start, len(piece))
        yield overlay
        overlay.close()

    @pytest.fixture
    def vast(self) -> Iterator[BlockSource]:
        overlay = Overlay(Tape())
        overlay.write(memoryview(b"boot"), 0)
        overlay.zero(TIB, 2 * TIB)
        yield overlay
        overlay.close()


class TestOverlaySink(BlockSinkContract):
    @pytest.fixture
    def made(self) -> Iterator[Made]:
        kept: list[bytes] = []

        class Kept(Overlay):
            def flush(self) -> None:
                super().flush()
                kept.append(read(self, 0, self.size))

        yield Made(Kept(MemoryDisk(SIZE)), lambda: kept[-1])


def test_the_parent_stays_as_it_is_and_open() -> None:
    parent = MemoryDisk(PAGE * 3, b"parent" * 100)
    overlay = Overlay(parent)
    overlay.write(memoryview(b"X"), 3)
    overlay.zero(PAGE, PAGE)
    assert read(overlay, 0, 8) == b"parXntpa"
    overlay.close()
    assert read(parent, 0, 8) == b"parentpa"


def test_changed_lists_what_was_written_and_zeroed() -> None:
    overlay = Overlay(MemoryDisk(10 * PAGE + 100))
    assert list(overlay.changed()) == []
    overlay.write(memoryview(b"x"), 2 * PAGE + 5)
    overlay.zero(5 * PAGE, 2 * PAGE)
    overlay.write(memoryview(b"tail"), 10 * PAGE + 96)
    assert list(overlay.changed()) == [
        Extent(2 * PAGE, PAGE, Kind.DATA),
        Extent(5 * PAGE, 2 * PAGE, Kind.ZERO),
        Extent(10 * PAGE, 100, Kind.DATA),
    ]


def test_a_full_overlay_is_no_space_and_keeps_what_it_has() -> None:
    overlay = Overlay(MemoryDisk(1 << 30), limit=3 * PAGE)
    overlay.write(memoryview(noise(3 * PAGE)), 0)
    overlay.write(memoryview(b"again"), PAGE)
    with pytest.raises(NoSpaceError, match="full"):
        overlay.write(memoryview(b"x"), 10 * PAGE)
    overlay.zero(0, PAGE)
    overlay.write(memoryview(b"x"), 10 * PAGE)
    assert overlay.memory == 3 * PAGE
    assert read(overlay, PAGE, 5) == b"again"


def test_zeroing_a_vast_disk_costs_no_memory() -> None:
    overlay = Overlay(Tape())
    overlay.zero(0, overlay.size)
    assert list(overlay.extents(0, overlay.size)) == [Extent(0, overlay.size, Kind.ZERO)]
    assert overlay.memory == 0
    overlay.write(memoryview(b"x"), TIB)
    assert read(overlay, TIB - 1, 3) == b"\0x\0"


def test_a_page_zeroed_while_its_first_write_waits_for_the_parent_does_not_come_back() -> None:
    class Slow(MemoryDisk):
        started, go = threading.Event(), threading.Event()

        def readinto(self, buffer: memoryview, offset: int) -> None:
            super().readinto(buffer, offset)
            self.started.set()
            self.go.wait(30)

    parent = Slow(PAGE, b"\xff" * PAGE)
    overlay = Overlay(parent)
    writer = threading.Thread(target=overlay.write, args=(memoryview(b"new"), 0))
    writer.start()
    assert parent.started.wait(30)
    overlay.zero(0, PAGE)
    parent.go.set()
    writer.join()
    assert read(overlay, 0, PAGE) == b"new" + bytes(PAGE - 3)


_SIZE = 5 * PAGE + 77
_CHANGE = st.tuples(st.booleans(), st.integers(0, _SIZE), st.integers(0, 3 * PAGE), st.integers(0, 255))


@settings(deadline=None, max_examples=80)
@given(changes=st.lists(_CHANGE, max_size=15), cut=st.tuples(st.integers(0, _SIZE), st.integers(0, _SIZE)))
def test_any_changes_over_any_parent(changes: list[tuple[bool, int, int, int]], cut: tuple[int, int]) -> None:
    parent = MemoryDisk(_SIZE)
    parent.write(memoryview(noise(PAGE)), PAGE + 100)
    before = read(parent, 0, _SIZE)
    overlay, expected = Overlay(parent), bytearray(before)
    for wipe, start, wanted, seed in changes:
        length = min(wanted, _SIZE - start)
        data = bytes(length) if wipe else noise(length, seed)
        overlay.zero(start, length) if wipe else overlay.write(memoryview(data), start)
        expected[start : start + length] = data
    low, high = sorted(cut)
    assert read(overlay, 0, _SIZE) == expected
    assert read(overlay, low, high - low) == expected[low:high]
    for extent in overlay.extents(low, high - low):
        assert extent.kind is Kind.DATA or not any(expected[extent.start : extent.end])
    applied = bytearray(before)
    for extent in overlay.changed():
        applied[extent.start : extent.end] = read(overlay, extent.start, extent.length)
        assert extent.kind is Kind.DATA or not any(applied[extent.start : extent.end])
    assert applied == expected
    assert read(parent, 0, _SIZE) == before
