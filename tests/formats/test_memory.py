"""Disks in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from formats.block import BlockSource
from formats.memory import MemoryDisk
from tests.contracts.block_sink import SIZE, BlockSinkContract, Made
from tests.contracts.block_source import TIB, BlockSourceContract, read


class TestMemorySource(BlockSourceContract):
    @pytest.fixture
    def source(self, content: bytes) -> Iterator[BlockSource]:
        disk = MemoryDisk(len(content))
        for start in range(0, len(content), 65536):
            if any(content[start : start + 65536]):
                disk.write(memoryview(content)[start : start + 65536], start)
        yield disk
        disk.close()

    @pytest.fixture
    def vast(self) -> Iterator[BlockSource]:
        disk = MemoryDisk(1 << 60)
        disk.write(memoryview(b"end"), disk.size - 3)
        yield disk
        disk.close()


class TestMemorySink(BlockSinkContract):
    @pytest.fixture
    def made(self) -> Iterator[Made]:
        disk = _Open(SIZE)
        yield Made(disk, lambda: disk.kept)


class _Open(MemoryDisk):
    """Its content is lost with ``close``: kept here for the suite."""

    kept = b""

    def flush(self) -> None:
        super().flush()
        self.kept = read(self, 0, self.size)


def test_a_vast_disk_costs_what_is_written() -> None:
    disk = MemoryDisk(16 * TIB)
    disk.write(memoryview(b"x"), 15 * TIB)
    assert read(disk, 15 * TIB, 2) == b"x\0"
    disk.zero(0, disk.size)
    assert [extent.length for extent in disk.extents(0, disk.size)] == [disk.size]


def test_content_must_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        MemoryDisk(2, b"abc")
