"""Partition tables made by sfdisk and sgdisk, damaged ones, and rubbish."""

from __future__ import annotations

import json
import struct
import uuid
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.images.raw import RawFile
from formats.layouts import partition
from formats.layouts.partition import read_table
from formats.machine import TableKind
from formats.memory import MemoryDisk
from tests.formats.layouts.volumes import MIB, blank, run
from tests.requirement import needs

DOS = """label: dos
label-id: 0x12345678
start=2048,size=409600,type=83,bootable
start=411648,size=1024000,type=5
start=1435648,type=8e
start=413696,size=204800,type=83
start=620544,size=204800,type=82
start=827392,size=204800,type=83
"""
GPT = """label: gpt
label-id: 6F2E1C55-33C8-4D6B-8F2A-0C9B1F5A7E11
start=2048,size=2048,type=21686148-6449-6E6F-744E-656564454649,name="grub"
start=4096,size=409600,type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B,name="EFI \u00fcml\u00e4ut"
start=413696,type=0FC63DAF-8483-4772-8E79-3D69D8477DE4,attrs="LegacyBIOSBootable"
"""


def made(path: Path, script: str, size: int = 1024 * MIB) -> Path:
    """A disk that sfdisk partitioned."""
    blank(path, size)
    run("sfdisk", "-q", path, stdin=script)
    return path


def in_sfdisks_words(path: Path) -> list[tuple[int, int, str, str]]:
    """(start, size, type, uuid) of every partition, as sfdisk reads the disk."""
    table = json.loads(run("sfdisk", "-J", path))["partitiontable"]
    return [
        (p["start"] * 512, p["size"] * 512, p["type"].lower(), p.get("uuid", "").lower()) for p in table["partitions"]
    ]


@needs("sfdisk")
def test_an_mbr_with_logical_partitions(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", DOS)
    table = read_table(RawFile(path))
    assert table is not None
    assert (table.kind, table.id) == (TableKind.MBR, "0x12345678")
    ours = sorted((p.start, p.size, p.type.removeprefix("0x").lstrip("0")) for p in table.partitions)
    assert ours == sorted((start, size, kind) for start, size, kind, _ in in_sfdisks_words(path))
    assert [p.number for p in table.partitions] == [1, 2, 3, 5, 6, 7]
    assert [p.logical for p in table.partitions] == [False] * 3 + [True] * 3
    assert [p.number for p in table.partitions if p.bootable] == [1]
    assert table.partitions[4].uuid == "12345678-06"
    assert partition.read(RawFile(path)).damage == ""


@needs("sfdisk")
def test_a_gpt(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", GPT)
    table = read_table(RawFile(path))
    assert table is not None
    assert (table.kind, table.id) == (TableKind.GPT, "6f2e1c55-33c8-4d6b-8f2a-0c9b1f5a7e11")
    assert [(p.start, p.size, p.type, p.uuid) for p in table.partitions] == in_sfdisks_words(path)
    assert [p.label for p in table.partitions] == ["grub", "EFI \u00fcml\u00e4ut", ""]
    assert [p.bootable for p in table.partitions] == [False, False, True]


@needs("sfdisk")
@pytest.mark.parametrize(
    ("damaged", "words"),
    [([1], "second one was used"), ([2], "second one was used"), ([-1], "missing"), ([-2], "missing")],
)
def test_one_copy_of_the_gpt_is_enough(tmp_path: Path, damaged: list[int], words: str) -> None:
    path = made(tmp_path / "disk", GPT)
    before = read_table(RawFile(path))
    with path.open("r+b") as file:
        for sector in damaged:
            # -1 is the second header, -2 an entry before it: its 32 sectors of entries end there, the used ones are
            # the first.
            place = {1: 512, 2: 1024, -1: 1024 * MIB - 512, -2: 1024 * MIB - 33 * 512}[sector]
            file.seek(place)
            file.write(b"\xff" * 64)
    reading = partition.read(RawFile(path))
    assert reading.table == before
    assert words in reading.damage


@needs("sfdisk")
def test_both_copies_damaged_are_no_table(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", GPT)
    with path.open("r+b") as file:
        for place in (512, 1024 * MIB - 512):
            file.seek(place)
            file.write(bytes(8))
    reading = partition.read(RawFile(path))
    assert reading.table is None
    assert "both copies" in reading.damage


@needs("sfdisk", "sgdisk")
def test_a_hybrid_mbr_says_what_it_adds(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", GPT)
    run("sgdisk", "-h", "2", path)
    assert partition.read(RawFile(path)).foreign == ()
    with path.open("r+b") as file:
        file.seek(0x1BE + 3 * 16)
        file.write(struct.pack("<B3xB3xII", 0, 0x83, 100_000, 5000))
    assert partition.read(RawFile(path)).foreign == ((100_000 * 512, 5000 * 512),)


def gpt(size: int, sector: int, entries: list[tuple[int, int, str]], width: int = 128) -> MemoryDisk:
    """A disk with both copies of a GPT, made by hand: entries are (first, last sector, name)."""
    last = size // sector - 1
    raw = b"".join(
        struct.pack(
            "<16s16sQQQ72s", b"\x01" * 16, bytes([n + 1] * 16), first, end, 0, name.encode("utf-16-le")[:72]
        ).ljust(width, b"\0")
        for n, (first, end, name) in enumerate(entries)
    ).ljust(128 * width, b"\0")
    sectors = -(-len(raw) // sector)
    disk = MemoryDisk(size)
    boot = bytearray(512)
    boot[0x1BE:0x1CE] = struct.pack("<B3xB3xII", 0, 0xEE, 1, min(last, 0xFFFFFFFF))
    boot[510:] = b"\x55\xaa"
    disk.write(memoryview(boot), 0)
    for mine, other, where in ((1, last, 2), (last, 1, last - sectors)):
        guid = uuid.UUID(int=77).bytes_le
        low, high = 2 + sectors, last - sectors - 1
        header = bytearray(
            struct.pack(
                "<8s4I4Q16sQ3I",
                b"EFI PART",
                0x10000,
                92,
                0,
                0,
                mine,
                other,
                low,
                high,
                guid,
                where,
                128,
                width,
                zlib.crc32(raw),
            )
        )
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        disk.write(memoryview(header), mine * sector)
        disk.write(memoryview(raw), where * sector)
    return disk


@settings(deadline=None)
@given(
    sector=st.sampled_from([512, 4096]),
    width=st.sampled_from([128, 256]),
    lengths=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 90), st.text("abc\u00e4\u4e2d", max_size=36)), max_size=20
    ),
)
def test_a_gpt_is_read_as_it_was_written(sector: int, width: int, lengths: list[tuple[int, int, str]]) -> None:
    position, entries = 300, []
    for gap, length, name in lengths:
        entries.append((position + gap, position + gap + length - 1, name))
        position += gap + length
    disk = gpt(sector * 8192, sector, entries, width)
    reading = partition.read(disk, sector)
    assert reading.damage == ""
    assert reading.table is not None
    assert [(p.start, p.size, p.label) for p in reading.table.partitions] == [
        (first * sector, (last + 1 - first) * sector, name) for first, last, name in entries
    ]
    assert read_table(disk, 512 if sector == 4096 else 4096) is None


def chain(links: list[tuple[int, int, int]], sectors: int = 10_000) -> MemoryDisk:
    """A disk with an extended partition at 100 whose boot records are (sector, data start, next), relative as on a
    disk.
    """
    disk = MemoryDisk(sectors * 512)

    def record(at: int, *entries: tuple[int, int, int]) -> None:
        raw = bytearray(512)
        for n, (kind, start, count) in enumerate(entries):
            raw[0x1BE + 16 * n : 0x1CE + 16 * n] = struct.pack("<B3xB3xII", 0, kind, start, count)
        raw[510:] = b"\x55\xaa"
        disk.write(memoryview(raw), at * 512)

    record(0, (0x05, 100, 9000))
    for at, data, following in links:
        record(at, (0x83, data, 10), (0x05, following, 100) if following else (0, 0, 0))
    return disk


@pytest.mark.parametrize(
    ("links", "found", "words"),
    [
        ([(100, 1, 50), (150, 1, 0)], 2, ""),
        ([(100, 1, 50), (150, 1, 50)], 2, "does not end"),
        ([(100, 1, 50)], 1, "broken"),
        ([(100, 1, 20_000)], 1, "leaves the extended"),
        ([(100, 9500, 0)], 0, "leaves its extended"),
    ],
)
def test_a_chain_of_logical_partitions_is_bounded(links: list[tuple[int, int, int]], found: int, words: str) -> None:
    reading = partition.read(chain(links))
    assert reading.table is not None
    assert len([p for p in reading.table.partitions if p.logical]) == found
    assert words in reading.damage
    assert bool(words) == bool(reading.damage)


def test_a_boot_sector_of_a_file_system_is_no_table() -> None:
    raw = bytearray(b"\xeb\x3c\x90MSDOS5.0".ljust(512, b"\xcd"))
    raw[510:] = b"\x55\xaa"
    assert read_table(MemoryDisk(MIB, bytes(raw))) is None
    assert read_table(MemoryDisk(MIB)) is None
    assert read_table(MemoryDisk(512)) is None
    assert read_table(MemoryDisk(0)) is None


@settings(max_examples=300, deadline=None)
@given(
    sector=st.sampled_from([512, 4096]),
    changes=st.lists(st.tuples(st.integers(0, 3 * 4096), st.binary(min_size=1, max_size=16)), min_size=1, max_size=6),
    start=st.sampled_from(["gpt", "chain"]),
)
def test_rubbish_neither_crashes_nor_leaves_the_disk(sector: int, changes: list[tuple[int, bytes]], start: str) -> None:
    disk = (
        gpt(sector * 4096, sector, [(100, 199, "a"), (300, 399, "b")])
        if start == "gpt"
        else chain([(100, 1, 50), (150, 1, 0)])
    )
    for place, raw in changes:
        disk.write(memoryview(raw), place)
    table = partition.read(disk, sector).table
    for entry in table.partitions if table else ():
        assert 0 <= entry.start < entry.start + entry.size <= disk.size
