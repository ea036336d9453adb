"""What every ``BlockSource`` must do: S1 to S8 of ``formats.block``, one test or more for each number.

An implementation's test module inherits ``BlockSourceContract`` and gives two fixtures:

    class TestMine(BlockSourceContract):
        @pytest.fixture
        def source(self, tmp_path, content):      # a source that holds exactly ``content``
            ...
        @pytest.fixture
        def vast(self, tmp_path):                 # a source of at least 1 TiB, cheap to make; pytest.skip if there can be none
            ...

``content`` may be overridden, with a size of 512-byte sectors; ``tells_zeroes`` says whether the map shows the sample's long zero runs.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from formats.block import BlockSource, Extent, Kind, check_range

MIB = 1 << 20
TIB = 1 << 40


def sample() -> bytes:
    """A disk of 4 MiB and 7 sectors: data, zero runs of 1 MiB and of 512 bytes, zeroes that are stored, data up to the last byte."""
    generator = random.Random(20)
    disk = bytearray(4 * MIB + 7 * 512)

    def fill(start: int, length: int) -> None:
        disk[start : start + length] = generator.randbytes(length)

    fill(0, 512)
    fill(1024, 65536)
    fill(MIB, 3 * 4096 + 1)
    fill(2 * MIB - 1, 2)
    fill(3 * MIB + 65536, 512 * 1024)
    fill(len(disk) - 513, 513)
    return bytes(disk)


def write_sparse(path: Path, content: bytes, *, step: int = 4096) -> Path:
    """Write ``content`` to ``path`` with holes where ``step`` bytes on the grid are zero; return ``path``."""
    with path.open("wb") as file:
        for start in range(0, len(content), step):
            piece = content[start : start + step]
            if any(piece):
                file.seek(start)
                file.write(piece)
        file.truncate(len(content))
    return path


def read(source: BlockSource, start: int, length: int) -> bytes:
    """Read a range into a buffer that held something else before."""
    buffer = bytearray(b"\xa5" * length)
    source.readinto(memoryview(buffer), start)
    return bytes(buffer)


def ranges(size: int, count: int, seed: int) -> Iterator[tuple[int, int]]:
    """The edges of the disk, then ``count`` ranges of all lengths, the same each time."""
    yield from ((0, 0), (size, 0), (0, size), (0, min(1, size)), (max(0, size - 1), min(1, size)))
    generator = random.Random(seed)
    for _ in range(count):
        start = generator.randrange(size + 1)
        yield start, generator.randrange(min(size - start, 1 << generator.randrange(1, 23)) + 1)


class Tape:
    """A source of 1 EiB whose map changes every 4 KiB: whoever walks it to the end never comes back. Counts the extents taken."""

    size = 1 << 60

    def __init__(self) -> None:
        self.taken = 0
        self.closed = False

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Blocks of 4 KiB, ones and zeroes by turns."""
        if self.closed:
            raise ValueError("the disk is closed")
        check_range(self.size, offset, len(buffer))
        for index in range(len(buffer)):
            buffer[index] = 1 - (offset + index) // 4096 % 2

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA and ZERO by turns."""
        if self.closed:
            raise ValueError("the disk is closed")
        check_range(self.size, start, length)
        position = start
        while position < start + length:
            step = min(4096 - position % 4096, start + length - position)
            self.taken += 1
            yield Extent(position, step, Kind.ZERO if position // 4096 % 2 else Kind.DATA)
            position += step

    def close(self) -> None:
        """Close."""
        self.closed = True


class BlockSourceContract:
    """Inherit, and give the fixtures ``source`` and ``vast``."""

    tells_zeroes: ClassVar[bool] = True

    @pytest.fixture
    def content(self) -> bytes:
        """What the source under test holds."""
        return sample()

    @pytest.fixture
    def source(self, content: bytes) -> Iterator[BlockSource]:
        """The source under test."""
        raise NotImplementedError

    @pytest.fixture
    def vast(self) -> Iterator[BlockSource]:
        """A source of at least 1 TiB."""
        raise NotImplementedError

    def test_is_a_block_source(self, source: BlockSource) -> None:
        assert isinstance(source, BlockSource)

    def test_s1_size_is_that_of_the_content_and_constant(self, source: BlockSource, content: bytes) -> None:
        assert source.size == len(content)
        read(source, 0, min(4096, len(content)))
        list(source.extents(0, source.size))
        assert source.size == len(content)

    def test_s2_readinto_fills_the_whole_buffer(self, source: BlockSource, content: bytes) -> None:
        for start, length in ranges(len(content), 60, seed=2):
            assert read(source, start, length) == content[start : start + length], (start, length)

    def test_s2_readinto_writes_nothing_beside_the_buffer(self, source: BlockSource, content: bytes) -> None:
        frame = bytearray(b"\xa5" * 3000)
        source.readinto(memoryview(frame)[1000:2000], 700)
        assert frame[:1000] == frame[2000:] == b"\xa5" * 1000
        assert frame[1000:2000] == content[700:1700]

    @pytest.mark.parametrize(("start", "length"), [(-1, 1), (-512, 512), (1, None), (None, 1), (1 << 70, 1)])
    def test_s3_a_range_outside_raises_and_reads_nothing(
        self, source: BlockSource, start: int | None, length: int | None
    ) -> None:
        start = source.size if start is None else start
        length = source.size if length is None else length
        buffer = bytearray(b"\xa5" * length)
        with pytest.raises(ValueError, match="outside"):
            source.readinto(memoryview(buffer), start)
        assert buffer == b"\xa5" * length
        with pytest.raises(ValueError, match="outside"):
            list(source.extents(start, length))

    def test_s4_several_threads_read_at_once(self, source: BlockSource, content: bytes) -> None:
        wrong: list[object] = []

        def work(seed: int) -> None:
            try:
                for start, length in ranges(len(content), 25, seed):
                    if read(source, start, length) != content[start : start + length]:
                        wrong.append((seed, start, length))
                    if seed % 4 == 0:
                        list(source.extents(start, length))
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_s5_extents_tile_the_range_merged_and_clipped(self, source: BlockSource, content: bytes) -> None:
        for start, length in ranges(len(content), 40, seed=5):
            extents = list(source.extents(start, length))
            position, last = start, None
            for extent in extents:
                assert extent.length > 0
                assert extent.start == position, (start, length)
                assert extent.kind is not last, "two neighbours of one kind"
                position, last = extent.end, extent.kind
            assert position == start + length

    def test_s5_an_empty_range_yields_nothing(self, source: BlockSource) -> None:
        for start in (0, 1000, source.size):
            assert list(source.extents(start, 0)) == []

    def test_s6_the_first_extent_of_a_vast_disk_comes_at_once(self, vast: BlockSource) -> None:
        assert vast.size >= TIB
        first = next(iter(vast.extents(0, vast.size)))
        assert first.start == 0
        assert first.length > 0

    def test_s7_what_is_not_data_reads_as_zeroes(self, source: BlockSource) -> None:
        for extent in source.extents(0, source.size):
            if extent.kind is not Kind.DATA:
                assert not any(read(source, extent.start, extent.length)), extent

    def test_s7_long_zero_runs_are_told(self, source: BlockSource, content: bytes) -> None:
        if not self.tells_zeroes:
            pytest.skip("this kind of source has no map")
        told = sum(extent.length for extent in source.extents(0, source.size) if extent.kind is not Kind.DATA)
        there = sum(MIB // 8 for at in range(0, len(content), MIB // 8) if not any(content[at : at + MIB // 8]))
        assert told >= there * 3 // 4 > 0

    def test_s8_close_is_idempotent_and_reading_afterwards_raises(self, source: BlockSource) -> None:
        source.close()
        source.close()
        with pytest.raises((ValueError, OSError)):
            read(source, 0, 512)
        with pytest.raises((ValueError, OSError)):
            list(source.extents(0, 4096))
