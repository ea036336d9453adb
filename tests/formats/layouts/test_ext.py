"""Used blocks of real ext file systems, held against dumpe2fs, e2fsck, debugfs and the kernel."""

from __future__ import annotations

import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.block import Kind
from formats.images.raw import RawFile
from formats.layers import UsedOnly
from formats.layouts import ext
from formats.layouts.crc import crc16, crc32c
from formats.memory import MemoryDisk
from tests.formats.layouts.volumes import (
    MIB,
    CountedFile,
    copy_used,
    files_of,
    free_bytes,
    free_of,
    make_ext,
    run,
    tiles,
    tree,
)
from tests.requirement import needs, needs_root

pytestmark = needs("mke2fs", "dumpe2fs", "debugfs", "e2fsck")

OPTIONS = [
    ("-t ext2 -b 1024", 60),
    ("-t ext2 -b 4096 -O ^sparse_super,^resize_inode", 700),
    ("-t ext2 -r 0 -O none -b 1024", 40),
    ("-t ext3 -b 1024", 200),
    ("-t ext3 -b 2048 -g 1024", 150),
    ("-t ext4", 1000),
    ("-t ext4 -b 1024", 300),
    ("-t ext4 -b 2048 -G 4", 3001),
    ("-t ext4 -O ^metadata_csum,uninit_bg", 3000),
    ("-t ext4 -O ^metadata_csum,uninit_bg,^64bit", 700),
    ("-t ext4 -O ^metadata_csum,^uninit_bg", 700),
    ("-t ext4 -O ^64bit", 700),
    ("-t ext4 -O ^has_journal", 500),
    ("-t ext4 -O ^flex_bg", 3000),
    ("-t ext4 -O ^sparse_super,^flex_bg,^resize_inode", 3000),
    ("-t ext4 -O sparse_super2", 2000),
    ("-t ext4 -O meta_bg,^resize_inode -b 1024", 900),
    ("-t ext4 -O meta_bg,^resize_inode", 20000),
    ("-t ext4 -O bigalloc -C 65536", 2000),
    ("-t ext4 -b 1024 -O bigalloc -C 16384", 500),
    ("-t ext4 -G 64", 12000),
    (
        "-t ext4 -O inline_data,ea_inode,encrypt,casefold,quota,project,verity,mmp,large_dir,orphan_file",
        900,
    ),
    ("-t ext4 -E packed_meta_blocks=1", 2000),
    ("-t ext4 -N 16", 300),
]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("tree"))


@pytest.mark.parametrize(("options", "mebibytes"), OPTIONS)
def test_the_map_is_what_dumpe2fs_says(tmp_path: Path, content: Path, options: str, mebibytes: int) -> None:
    image = make_ext(tmp_path / "fs", options, mebibytes, content if "-N 16" not in options else None)
    block, _, free = free_of(image)
    used = ext.used(RawFile(image))
    assert used is not None
    found = [(e.start // block, e.end // block) for e in tiles(used) if e.kind is Kind.ZERO]
    assert found == free


@pytest.mark.parametrize(
    ("options", "mebibytes"),
    [
        ("-t ext2 -b 1024", 40),
        ("-t ext3 -b 2048", 80),
        ("-t ext4", 150),
        ("-t ext4 -O ^metadata_csum,uninit_bg -g 8192", 150),
        ("-t ext4 -O meta_bg,^resize_inode -b 1024", 60),
        ("-t ext4 -O bigalloc -C 65536", 150),
    ],
)
def test_a_copy_of_the_used_blocks_is_clean_and_complete(
    tmp_path: Path, content: Path, options: str, mebibytes: int
) -> None:
    image = make_ext(tmp_path / "fs", options, mebibytes, content)
    # An aged file system: holes where files were, and new ones in them.
    (tmp_path / "new").write_bytes(random.Random(5).randbytes(300_000))
    commands = [f"rm d0/{'deeper/' * (n % 3)}f{n}" for n in range(7, 60, 7)] + [
        "mkdir later",
        f"write {tmp_path}/new later/new",
    ]
    run("debugfs", "-w", "-f", "-", image, stdin="\n".join(commands) + "\n")
    run("e2fsck", "-fyD", image, check=False)
    source = RawFile(image)
    used = ext.used(source)
    assert used is not None
    copy = copy_used(source, used, tmp_path / "copy")
    assert "UNEXPECTED" not in run("e2fsck", "-fn", copy)
    before, after = files_of(image, tmp_path / "before"), files_of(copy, tmp_path / "after")
    assert len(before) > 40
    assert before == after


def test_through_a_layer_free_blocks_read_as_zeroes_and_the_rest_as_it_is(tmp_path: Path, content: Path) -> None:
    image = make_ext(tmp_path / "fs", "-t ext4", 100, content)
    source = RawFile(image)
    used = ext.used(source)
    assert used is not None
    rubbish = RawFile(copy_used(source, used, tmp_path / "rubbish"))
    seen = UsedOnly(rubbish, used.extents)
    whole = bytearray(source.size)
    seen.readinto(memoryview(whole), 0)
    expected = bytearray(source.size)
    for extent in tiles(used):
        if extent.kind is Kind.DATA:
            source.readinto(memoryview(expected)[extent.start : extent.end], extent.start)
    assert whole == expected


def test_any_range_is_a_clip_of_the_whole(tmp_path: Path, content: Path) -> None:
    used = ext.used(RawFile(make_ext(tmp_path / "fs", "-t ext4 -b 1024 -g 1024", 30, content)))
    assert used is not None
    kinds = bytearray(used.size // 512)
    for extent in tiles(used):
        if extent.kind is Kind.DATA:
            kinds[extent.start // 512 : extent.end // 512] = b"\1" * (extent.length // 512)
    generator = random.Random(7)
    for _ in range(300):
        start = generator.randrange(len(kinds))
        length = generator.randrange(1, min(len(kinds) - start, 3000) + 1)
        part = bytearray()
        for extent in used.extents(start * 512, length * 512):
            part += (b"\1" if extent.kind is Kind.DATA else b"\0") * (extent.length // 512)
        assert part == kinds[start : start + length]


def test_several_threads_ask_at_once(tmp_path: Path, content: Path) -> None:
    # More batches than are kept, so that threads push one another's out.
    image = make_ext(tmp_path / "fs", "-t ext4 -b 1024 -g 256 -O ^resize_inode -N 4000", 160, content)
    alone, shared = ext.used(RawFile(image)), ext.used(RawFile(image))
    assert alone is not None
    assert shared is not None
    places = [random.Random(8).randrange(159 * MIB) for _ in range(200)]
    expected = [list(alone.extents(place, MIB)) for place in places]

    def ask(seed: int) -> bool:
        order = random.Random(seed).sample(range(len(places)), len(places))
        return all(list(shared.extents(places[n], MIB)) == expected[n] for n in order)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(6)))


def test_few_reads_and_none_before_they_are_needed(tmp_path: Path) -> None:
    image = make_ext(tmp_path / "fs", "-t ext4 -E lazy_itable_init=1", 64 * 1024)
    source = CountedFile(image)
    used = ext.used(source)
    assert used is not None
    assert source.reads == 1
    next(iter(used.extents(0, used.size)))
    assert source.reads <= 3
    tiles(used)
    # 512 groups: a read for the bitmaps of 16 groups at most, and a few for descriptors.
    assert source.reads <= 1 + 512 // 16 + 2
    reads = source.reads
    for start in range(0, 2 << 30, 64 * MIB):
        list(used.extents(start, MIB))
    assert source.reads <= reads + 1, "ranges that are asked again are read again"


def test_bytes_around_the_file_system_are_in_use(tmp_path: Path) -> None:
    image = make_ext(tmp_path / "fs", "-t ext2 -b 1024", 20)
    with image.open("r+b") as file:
        file.truncate(21 * MIB + 512)
    used = ext.used(RawFile(image))
    assert used is not None
    assert [e.kind for e in used.extents(0, 1024)] == [Kind.DATA]
    assert [e.kind for e in used.extents(20 * MIB, MIB + 512)] == [Kind.DATA]


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        ("feature needs_recovery", "journal must be replayed"),
        ("set_super_value state 3", "errors"),
        ("set_super_value state 0", "not unmounted cleanly"),
        ("set_super_value state 5", "orphans"),
        ("set_super_value feature_incompat 0x802c2", "not known here"),
        ("set_super_value feature_ro_compat 0x8046b", "not known here"),
        ("set_super_value feature_compat 0x803c", "not known here"),
        ("set_super_value journal_inum 0", "another device"),
        ("set_super_value journal_dev 0x0801", "another device"),
        ("set_super_value checksum_type 9", "kind of checksum"),
        ("set_super_value blocks_count 99999999", "larger than its volume"),
        ("set_super_value blocks_per_group 12345", "cluster size needs bigalloc"),
        ("set_super_value log_block_size 9", "block size"),
    ],
)
def test_what_cannot_be_trusted_has_no_map(tmp_path: Path, commands: str, words: str) -> None:
    image = make_ext(tmp_path / "fs", "-t ext4", 50)
    run("debugfs", "-w", "-f", "-", image, stdin=commands + "\n")
    content = ext.look(RawFile(image))
    assert content is not None
    assert content.used is None
    assert words in content.reason
    assert ext.used(RawFile(image)) is None


def test_an_external_journal_and_its_file_system_have_no_map(tmp_path: Path) -> None:
    journal = make_ext(tmp_path / "journal", "-O journal_dev", 20)
    content = ext.look(RawFile(journal))
    assert content is not None
    assert content.used is None


def test_no_file_system(tmp_path: Path) -> None:
    assert ext.look(MemoryDisk(10 * MIB)) is None
    assert ext.look(MemoryDisk(100)) is None
    assert ext.look(MemoryDisk(0)) is None


@pytest.mark.parametrize("options", ["-t ext4", "-t ext4 -O ^metadata_csum,uninit_bg", "-t ext2"])
def test_a_bitmap_that_does_not_fit_makes_its_group_used(tmp_path: Path, content: Path, options: str) -> None:
    image = make_ext(tmp_path / "fs", f"{options} -b 1024 -g 8192", 64, content)
    _, _, free = free_of(image)
    bitmap = int(run("dumpe2fs", image).split("Group 1:")[1].split("Block bitmap at ")[1].split()[0].rstrip(","))
    with image.open("r+b") as file:
        file.seek(bitmap * 1024 + 1000)
        byte = file.read(1)[0]
        file.seek(bitmap * 1024 + 1000)
        # One block more is called free, or one less: either way the count or the checksum differs.
        file.write(bytes([byte ^ 0x10]))
    used = ext.used(RawFile(image))
    assert used is not None
    first, end = 8193 * 1024, 16385 * 1024
    assert [e.kind for e in used.extents(first, end - first)] == [Kind.DATA]
    others = sum(min(e, 8193) - s for s, e in free if s < 8193) + sum(e - max(s, 16385) for s, e in free if e > 16385)
    assert free_bytes(used) == others * 1024


@pytest.mark.parametrize("options", ["-t ext4", "-t ext4 -O ^metadata_csum,uninit_bg"])
def test_a_descriptor_that_fails_its_checksum_makes_its_group_used(tmp_path: Path, options: str) -> None:
    image = make_ext(tmp_path / "fs", f"{options} -b 1024 -g 8192", 64)
    with image.open("r+b") as file:
        place = 2 * 1024 + 2 * 64 + 0x12
        file.seek(place)
        flags = file.read(1)[0]
        file.seek(place)
        file.write(bytes([flags ^ 0x2]))
    used = ext.used(RawFile(image))
    assert used is not None
    assert [e.kind for e in used.extents((1 + 2 * 8192) * 1024, 8192 * 1024)] == [Kind.DATA]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("small")
    found = {}
    for name, options in (
        ("checked", "-t ext4 -b 1024"),
        ("unchecked", "-t ext2 -b 1024"),
        ("wide", "-t ext4 -O bigalloc"),
    ):
        found[name] = make_ext(folder / name, options, 8).read_bytes()
    return found


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 1023), value=st.integers(0, 255))
def test_a_superblock_with_one_wrong_byte_has_no_map(small: dict[str, bytes], place: int, value: int) -> None:
    raw = bytearray(small["checked"])
    if raw[1024 + place] == value:
        return
    raw[1024 + place] = value
    assert ext.used(MemoryDisk(len(raw), bytes(raw))) is None


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["unchecked", "wide"]),
    changes=st.lists(st.tuples(st.integers(1024, 6 * 1024), st.integers(0, 255)), min_size=1, max_size=8),
    fix=st.booleans(),
)
def test_rubbish_in_the_metadata_neither_crashes_nor_leaves_the_volume(
    small: dict[str, bytes], name: str, changes: list[tuple[int, int]], fix: bool
) -> None:
    raw = bytearray(small[name])
    for place, value in changes:
        raw[place] = value
    if fix:
        struct.pack_into("<I", raw, 1024 + 0x3FC, crc32c(0xFFFFFFFF, bytes(raw[1024 : 1024 + 0x3FC])))
    used = ext.used(MemoryDisk(len(raw), bytes(raw)))
    if used is not None:
        tiles(used)


def test_checksums() -> None:
    # The check values of the catalogue of parametrised CRC algorithms.
    assert crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert crc16(0, b"123456789") == 0xBB3D
    for length in range(20):
        data = bytes(range(length))
        assert crc32c(crc32c(7, data[:5]), data[5:]) == crc32c(7, data)


@needs("mount", "fsfreeze", "umount")
@needs_root()
@pytest.mark.parametrize("options", ["-t ext4", "-t ext3", "-t ext4 -O ^has_journal"])
def test_a_mounted_file_system_has_a_map_only_while_it_is_frozen(tmp_path: Path, options: str) -> None:
    image = make_ext(tmp_path / "fs", options, 100)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    run("mount", "-o", "loop", image, mounted)
    frozen = False
    try:
        tree(mounted, seed=9)
        (mounted / "d0" / "deeper" / "f7").unlink()
        assert ext.used(RawFile(image)) is None
        run("fsfreeze", "-f", mounted)
        frozen = True
        source = RawFile(image)
        used = ext.used(source)
        if "^has_journal" in options:
            assert used is None, "without a journal, nothing on the disk tells that it is frozen"
            return
        assert used is not None
        copy = copy_used(source, used, tmp_path / "copy")
        expected = {
            str(p.relative_to(mounted)): p.read_bytes()
            for p in sorted(mounted.rglob("*"))
            if p.is_file() and not p.is_symlink()
        }
    finally:
        if frozen:
            run("fsfreeze", "-u", mounted)
        run("umount", mounted)
    run("e2fsck", "-fn", copy)
    assert files_of(copy, tmp_path / "files") == expected
