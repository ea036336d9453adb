"""Composition of used maps, and windows into sources."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.block import BlockSource, Extent, Kind
from formats.layouts.used import Composite, Section, Uniform
from formats.layouts.window import Window
from formats.memory import MemoryDisk
from tests.contracts.block_source import TIB, BlockSourceContract
from tests.formats.layouts.volumes import tiles


class TestWindow(BlockSourceContract):
    @pytest.fixture
    def source(self, content: bytes) -> Iterator[BlockSource]:
        disk = MemoryDisk(len(content) + 3 * 65536)
        for start in range(0, len(content), 65536):
            if any(content[start : start + 65536]):
                disk.write(memoryview(content)[start : start + 65536], 65536 + start)
        disk.write(memoryview(b"outside"), 0)
        disk.write(memoryview(b"outside"), 65536 + len(content))
        yield Window(disk, 65536, len(content))

    @pytest.fixture
    def vast(self) -> Iterator[BlockSource]:
        yield Window(MemoryDisk(3 * TIB), TIB, 2 * TIB)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.booleans()), max_size=12),
    clip=st.tuples(st.integers(0, 500), st.integers(0, 500)),
)
def test_a_composite_is_its_parts_and_data_between_them(
    lengths: list[tuple[int, int, bool]], clip: tuple[int, int]
) -> None:
    model, parts = "", []
    for gap, length, is_free in lengths:
        parts.append((len(model) + gap, Uniform(length, Kind.ZERO if is_free else Kind.DATA)))
        model += "D" * gap + ("Z" if is_free else "D") * length
    used = Composite(len(model), parts)
    tiles(used)
    start, end = sorted(min(place, len(model)) for place in clip)
    found = "".join(("Z" if e.kind is Kind.ZERO else "D") * e.length for e in used.extents(start, end - start))
    assert found == model[start:end]
    section = Section(used, start, end - start)
    assert [Extent(e.start + start, e.length, e.kind) for e in tiles(section)] == list(used.extents(start, end - start))


def test_parts_must_not_overlap_or_leave_the_volume() -> None:
    for parts in ([(0, 6), (5, 2)], [(8, 3)], [(-1, 2)]):
        with pytest.raises(ValueError, match="overlaps"):
            Composite(10, [(start, Uniform(size, Kind.ZERO)) for start, size in parts])
