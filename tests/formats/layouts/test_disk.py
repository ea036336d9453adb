"""Whole disks seen through: partition tables, LVM, file systems, swap, and everything that must be read whole."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from formats.block import BlockSource, Kind
from formats.images.raw import RawFile
from formats.layouts import lvm
from formats.layouts.disk import DiskMap, look, used_of_disk, used_of_disks
from formats.layouts.signature import signatures
from formats.layouts.window import Window
from formats.memory import MemoryDisk
from tests.formats.layouts.volumes import (
    MIB,
    blank,
    copy_used,
    files_of,
    free_bytes,
    free_of,
    lvm_group,
    make_ext,
    run,
    tiles,
    tree,
)
from tests.requirement import needs, needs_root

pytestmark = needs("mke2fs", "dumpe2fs", "mkswap", "sfdisk")

DOS = """label: dos
start=2048,size=81920,type=83,bootable
start=83968,size=204800,type=5
start=290816,type=83
start=86016,size=81920,type=83
start=169984,size=40960,type=82
"""


def put(image: Path, start: int, part: Path) -> None:
    """Write a volume into the disk, holes left out."""
    content = part.read_bytes()
    with image.open("r+b") as file:
        for place in range(0, len(content), 65536):
            piece = content[place : place + 65536]
            if any(piece):
                file.seek(start + place)
                file.write(piece)


def cut(source: BlockSource, start: int, size: int, target: Path) -> Path:
    """A volume of the disk, as a file."""
    with target.open("wb") as file:
        file.truncate(size)
        for place in range(0, size, MIB):
            piece = bytearray(min(MIB, size - place))
            source.readinto(memoryview(piece), start + place)
            file.seek(place)
            if any(piece):
                file.write(piece)
    return target


@pytest.fixture
def dos_disk(tmp_path: Path) -> Path:
    """An MBR disk: ext4, extended with ext3 and swap, ext2; rubbish in the gaps, as a boot loader leaves it."""
    disk = blank(tmp_path / "disk", 200 * MIB)
    run("sfdisk", "-q", disk, stdin=DOS)
    content = tree(tmp_path / "tree")
    with disk.open("r+b") as file:
        file.seek(512)
        file.write(random.Random(1).randbytes(2047 * 512))
    for start, options, mebibytes in (
        (2048, "-t ext4", 40),
        (86016, "-t ext3 -b 1024", 40),
        (290816, "-t ext2", 58),
    ):
        put(disk, start * 512, make_ext(tmp_path / "part", options, mebibytes, content))
    swap = blank(tmp_path / "part", 20 * MIB)
    run("mkswap", swap)
    put(disk, 169984 * 512, swap)
    return disk


def test_a_disk_with_all_kinds_of_partitions(tmp_path: Path, dos_disk: Path) -> None:
    source = RawFile(dos_disk)
    used = used_of_disk(source)
    assert [(p.number, p.content, p.reason) for p in used.parts] == [
        (1, "ext4", ""),
        (5, "ext3", ""),
        (6, "swap", ""),
        (3, "ext2", ""),
    ]
    for part in used.parts:
        file = cut(source, part.start, part.size, tmp_path / "cut")
        free = 20 * MIB - 4096
        if part.content != "swap":
            block, _, runs = free_of(file)
            free = sum(end - first for first, end in runs) * block
        inside = sum(e.length for e in used.extents(part.start, part.size) if e.kind is Kind.ZERO)
        assert inside == free, part
    assert [e.kind for e in used.extents(0, MIB)] == [Kind.DATA], "the boot loader's core lies there"
    assert [e.kind for e in used.extents(104 * MIB, 36 * MIB)] == [Kind.DATA], "nobody knows what lies there"


def test_a_copy_of_what_is_used_has_the_same_tables_and_files(tmp_path: Path, dos_disk: Path) -> None:
    source = RawFile(dos_disk)
    used = used_of_disk(source)
    copy = RawFile(copy_used(source, used, tmp_path / "copy"))
    again = used_of_disk(copy)
    assert again.table == used.table
    assert [(p.start, p.content, p.reason) for p in again.parts] == [(p.start, p.content, p.reason) for p in used.parts]
    for part in used.parts:
        if part.content.startswith("ext"):
            before = files_of(cut(source, part.start, part.size, tmp_path / "a"), tmp_path / "fa")
            image = cut(copy, part.start, part.size, tmp_path / "b")
            run("e2fsck", "-fn", image)
            assert len(before) > 50
            assert files_of(image, tmp_path / "fb") == before


@needs("lvcreate", "losetup")
@needs_root()
def test_a_volume_group_over_two_disks(tmp_path: Path) -> None:
    content = tree(tmp_path / "tree")
    files = {"sda": blank(tmp_path / "pv0", 500 * MIB), "sdb": blank(tmp_path / "pv1", 300 * MIB)}
    with lvm_group(tmp_path, "vg0", list(files.values())) as made:
        made.create("vg0", "root", "-L", "100M", made.devices[0])
        made.create("vg0", "swap", "-L", "60M", made.devices[0])
        made.create("vg0", "fast", "-i2", "-I64k", "-L", "64M", "--")
        made.create("vg0", "odd", "-L", "20M", made.devices[1])
        made.lvm("lvextend", "-L", "+40M", "vg0/root", made.devices[1])
    sources = {key: RawFile(file) for key, file in files.items()}
    label = lvm.read_label(sources["sda"])
    assert label is not None
    assert label.group is not None
    keys = {pv.name: key for key in files for pv in label.group.physical if pv.uuid == _uuid(sources[key])}
    images = {
        "root": make_ext(tmp_path / "root", "-t ext4", 140, content),
        "fast": make_ext(tmp_path / "fast", "-t ext4 -b 1024", 64, content),
        "swap": blank(tmp_path / "swap", 60 * MIB),
        "odd": blank(tmp_path / "odd", 20 * MIB),
    }
    run("mkswap", images["swap"])
    images["odd"].write_bytes(random.Random(2).randbytes(20 * MIB))
    for volume in label.group.logical:
        _fill(
            lvm.lv_source(label.group, volume, {n: sources[k] for n, k in keys.items()}),
            images[volume.name],
            files,
            sources,
        )
    sources = {key: RawFile(file) for key, file in files.items()}
    maps = used_of_disks(sources)
    assert {n: c.kind for m in maps.values() for p in m.parts for n, c in p.volumes.items()} == {
        "vg0/root": "ext4",
        "vg0/swap": "swap",
        "vg0/fast": "ext4",
        "vg0/odd": "",
    }
    free = sum(free_bytes(m) for m in maps.values())
    expected = sum(pv.count * 4 * MIB for pv in label.group.physical) - (140 + 60 + 64 + 20) * MIB + 60 * MIB - 4096
    for name in ("root", "fast"):
        block, _, runs = free_of(images[name])
        expected += sum(end - first for first, end in runs) * block
    assert free == expected
    copies = {key: RawFile(copy_used(sources[key], maps[key], tmp_path / f"copy-{key}")) for key in sources}
    there = {name: copies[key] for name, key in keys.items()}
    for name in ("root", "fast", "odd"):
        volume = next(v for v in label.group.logical if v.name == name)
        source = lvm.lv_source(label.group, volume, there)
        copied = cut(source, 0, source.size, tmp_path / "copied")
        if name == "odd":
            assert copied.read_bytes() == images["odd"].read_bytes()
            continue
        run("e2fsck", "-fn", copied)
        assert files_of(copied, tmp_path / "fb") == files_of(images[name], tmp_path / "fa")
    # One disk alone: what lies on it alone is still seen through, what spans both is read whole.
    alone = used_of_disk(sources["sda"]).parts[0].volumes
    assert alone["vg0/swap"].used is not None
    assert alone["vg0/root"].used is None
    # A group that is there twice, as with a cloned disk: nobody knows whose extents are whose.
    twice = used_of_disks({"a": sources["sda"], "b": sources["sda"]})
    assert [free_bytes(m) for m in twice.values()] == [0, 0]


def _uuid(source: BlockSource) -> str:
    label = lvm.read_label(source)
    return label.uuid if label else ""


def _fill(logical: lvm.LogicalSource, image: Path, files: dict[str, Path], sources: dict[str, RawFile]) -> None:
    """Write the image into the logical volume, through the files that its physical volumes lie in."""
    content = image.read_bytes()
    position = 0
    for source, start, length in logical._runs(0, logical.size):
        file = next(files[key] for key in files if sources[key] is source)
        piece = content[position : position + length]
        if any(piece):
            with file.open("r+b") as opened:
                opened.seek(start)
                opened.write(piece)
        position += length


def ext_bytes(tmp_path: Path, mebibytes: int = 20) -> bytearray:
    """An ext4 file system, to be spoilt."""
    return bytearray(make_ext(tmp_path / "fs", "-t ext4", mebibytes).read_bytes())


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        (
            "linux_raid_member",
            lambda raw: raw.__setitem__(slice(len(raw) - 8192, len(raw) - 8188), b"\xfc\x4e\x2b\xa9"),
        ),
        (
            "linux_raid_member",
            lambda raw: raw.__setitem__(slice(len(raw) - 65536, len(raw) - 65532), b"\xfc\x4e\x2b\xa9"),
        ),
        ("linux_raid_member", lambda raw: raw.__setitem__(slice(4096, 4100), b"\xfc\x4e\x2b\xa9")),
        ("crypto_LUKS", lambda raw: raw.__setitem__(slice(0, 6), b"LUKS\xba\xbe")),
        ("xfs", lambda raw: raw.__setitem__(slice(0, 4), b"XFSB")),
        ("btrfs", lambda raw: raw.__setitem__(slice(0x10040, 0x10048), b"_BHRfS_M")),
        ("LVM2_member", lambda raw: raw.__setitem__(slice(512, 520), b"LABELONE")),
        ("swap", lambda raw: raw.__setitem__(slice(4086, 4096), b"SWAPSPACE2")),
        ("swsuspend", lambda raw: raw.__setitem__(slice(4086, 4096), b"S1SUSPEND\0")),
        (
            "zfs_member",
            lambda raw: raw.__setitem__(slice(len(raw) - 131072, len(raw) - 131064), b"\x0c\xb1\xba\0\0\0\0\0"),
        ),
        (
            "isw_raid_member",
            lambda raw: raw.__setitem__(slice(len(raw) - 1024, len(raw) - 1000), b"Intel Raid ISM Cfg Sig. "),
        ),
        ("ddf_raid_member", lambda raw: raw.__setitem__(slice(len(raw) - 512, len(raw) - 508), b"\xde\x11\xde\x11")),
    ],
)
def test_a_volume_with_signs_of_two_kinds_is_read_whole(
    tmp_path: Path, kind: str, spoil: Callable[[bytearray], None]
) -> None:
    raw = ext_bytes(tmp_path)
    assert signatures(MemoryDisk(len(raw), bytes(raw))) == {"ext"}
    spoil(raw)
    source = MemoryDisk(len(raw), bytes(raw))
    assert signatures(source) == {"ext", kind}
    content = look(source)
    assert content.used is None
    assert "more than one kind" in content.reason
    assert free_bytes(used_of_disk(source)) == 0


@needs("mkfs.xfs", "mkfs.vfat")
@pytest.mark.parametrize(
    ("command", "kind"), [("mkfs.xfs -q -f", "xfs"), ("mkfs.vfat", "vfat"), ("mkfs.vfat -F 32", "vfat")]
)
def test_other_file_systems_are_read_whole(tmp_path: Path, command: str, kind: str) -> None:
    path = blank(tmp_path / "fs", 400 * MIB)
    run(*command.split(), path)
    used = used_of_disk(RawFile(path))
    assert [part.content for part in used.parts] == [kind]
    assert kind in used.parts[0].reason
    assert free_bytes(used) == 0


def test_a_file_system_without_a_table(tmp_path: Path) -> None:
    path = make_ext(tmp_path / "fs", "-t ext4", 100)
    with path.open("r+b") as file:  # the boot record of a loader inside the file system
        file.write(b"\xeb\x58\x90EXTLINUX")
        file.seek(510)
        file.write(b"\x55\xaa")
    used = used_of_disk(RawFile(path))
    assert [(p.number, p.content) for p in used.parts] == [(0, "ext4")]
    block, _, runs = free_of(path)
    assert free_bytes(used) == sum(end - first for first, end in runs) * block


def test_a_file_system_below_a_partition_table_is_believed_neither(tmp_path: Path, dos_disk: Path) -> None:
    stale = make_ext(tmp_path / "stale", "-t ext4", 200).read_bytes()[1024:4096]
    with dos_disk.open("r+b") as file:
        file.seek(1024)
        file.write(stale)
    assert free_bytes(used_of_disk(RawFile(dos_disk))) == 0


@pytest.mark.parametrize(
    ("entries", "damage"),
    [
        ([(2048, 20480)], ""),
        ([(2048, 20480), (4096, 40960)], "overlap"),
        ([(2048, 20480), (2097152, 40960)], "outside the disk"),
        ([(2048, 20480), (0, 40960)], "outside the disk"),
    ],
)
def test_a_table_that_contradicts_itself_frees_nothing(
    tmp_path: Path, entries: list[tuple[int, int]], damage: str
) -> None:
    disk = blank(tmp_path / "disk", 500 * MIB)
    with disk.open("r+b") as file:
        file.seek(0x1BE)
        file.write(b"".join(struct.pack("<B3xB3xII", 0, 0x83, start, count) for start, count in entries))
        file.seek(510)
        file.write(b"\x55\xaa")
    put(disk, MIB, make_ext(tmp_path / "part", "-t ext4", 10))
    used = used_of_disk(RawFile(disk))
    assert damage in used.damage
    assert (free_bytes(used) == 0) == bool(damage)


def test_a_gpt_disk_with_large_sectors(tmp_path: Path) -> None:
    from tests.formats.layouts.test_partition import gpt

    part = make_ext(tmp_path / "part", "-t ext4", 20).read_bytes()
    disk = gpt(64 * MIB, 4096, [(256, 256 + 20 * 256 - 1, "root")])
    disk.write(memoryview(part), MIB)
    for sector in (None, 4096):
        used = used_of_disk(disk, sector)
        assert [(p.number, p.start, p.content) for p in used.parts] == [(1, MIB, "ext4")]
        assert free_bytes(used) > 10 * MIB
    assert free_bytes(used_of_disk(disk, 512)) == 0, "with a wrong sector size there is no table"


def test_an_empty_disk_is_in_use() -> None:
    for size in (0, 511, 512, 5000, MIB):
        used = used_of_disk(MemoryDisk(size))
        assert isinstance(used, DiskMap)
        assert free_bytes(used) == 0
        assert sum(e.length for e in tiles(used)) == size


def test_closing_a_window_leaves_the_disk_open() -> None:
    disk = MemoryDisk(MIB, b"x")
    window = Window(disk, 0, 10)
    window.close()
    window.close()
    with pytest.raises(ValueError, match="closed"):
        window.readinto(memoryview(bytearray(1)), 0)
    disk.readinto(memoryview(bytearray(1)), 0)
