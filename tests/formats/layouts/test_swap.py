"""Swap areas made by mkswap, hibernated ones and rubbish."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from formats.block import Extent, Kind
from formats.images.raw import RawFile
from formats.layouts import swap
from formats.memory import MemoryDisk
from tests.formats.layouts.volumes import MIB, blank, run
from tests.requirement import needs


@needs("mkswap")
@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_only_the_first_page_of_a_swap_area_is_in_use(tmp_path: Path, page: int) -> None:
    path = blank(tmp_path / "swap", 8 * MIB)
    run("mkswap", "-p", str(page), path)
    used = swap.used(RawFile(path))
    assert swap.is_swap(RawFile(path))
    assert used is not None
    assert list(used.extents(0, 8 * MIB)) == [Extent(0, page, Kind.DATA), Extent(page, 8 * MIB - page, Kind.ZERO)]


@needs("mkswap")
def test_what_lies_behind_the_area_is_in_use(tmp_path: Path) -> None:
    path = blank(tmp_path / "swap", 8 * MIB)
    run("mkswap", path, "4096")
    used = swap.used(RawFile(path))
    assert used is not None
    assert list(used.extents(0, 8 * MIB))[-1] == Extent(4 * MIB, 4 * MIB, Kind.DATA)


@needs("mkswap")
@pytest.mark.parametrize("sign", [b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001", b"SWAP-SPACE"])
def test_a_hibernated_machine_and_the_old_kind_are_read_whole(tmp_path: Path, sign: bytes) -> None:
    path = blank(tmp_path / "swap", 8 * MIB)
    run("mkswap", path)
    with path.open("r+b") as file:
        file.seek(4096 - 10)
        file.write(sign)
    assert swap.is_swap(RawFile(path))
    assert swap.used(RawFile(path)) is None


@pytest.mark.parametrize(("version", "last"), [(0, 100), (2, 100), (1, 0), (1, 1 << 31)])
def test_a_header_that_does_not_add_up_is_read_whole(version: int, last: int) -> None:
    head = bytearray(4096)
    struct.pack_into("<3I", head, 1024, version, last, 0)
    head[-10:] = b"SWAPSPACE2"
    disk = MemoryDisk(MIB, bytes(head))
    assert swap.is_swap(disk)
    assert swap.used(disk) is None


def test_no_swap() -> None:
    assert not swap.is_swap(MemoryDisk(MIB))
    assert not swap.is_swap(MemoryDisk(10))
