"""LVM metadata that LVM's own tools wrote, hand-written texts, and rubbish."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.block import BlockSource, Extent, Kind
from formats.images.raw import RawFile
from formats.layouts import lvmtext
from formats.layouts.lvm import VolumeGroupText, lv_source, parse_group, physical_map, plain_volumes, read_label
from formats.layouts.lvmtext import LvmTextError
from formats.layouts.used import Composite, Uniform
from formats.memory import MemoryDisk
from tests.contracts.block_source import TIB, BlockSourceContract
from tests.formats.layouts.volumes import MIB, LvmGroup, blank, lvm_group, tiles
from tests.requirement import needs, needs_root

PHYSICAL = """pv{number} {{
    id = "PV{number}"
    device = "/dev/x"
    status = ["ALLOCATABLE"]
    pe_start = 2048
    pe_count = {count} }}
"""
GROUP = """vg0 {{
id = "VG"
seqno = 7
format = "lvm2" # informational
extent_size = 8192
physical_volumes {{
{physical}}}
logical_volumes {{
{volumes}}}
}}
contents = "Text Format Volume Group"
version = 1
description = "a \\"b\\" \\\\ c"
"""


def text(volumes: str, count: int = 100) -> str:
    """A volume group's text with two physical volumes and these logical ones."""
    physical = "".join(PHYSICAL.format(number=number, count=count) for number in (0, 1))
    return GROUP.format(physical=physical, volumes=volumes)


def volume(name: str, *segments: str) -> str:
    """A logical volume's section."""
    inner = "".join(f"segment{n} {{\n{segment}\n}}\n" for n, segment in enumerate(segments, 1))
    return (
        f'{name} {{\nid = "{name}"\nstatus = ["READ","WRITE","VISIBLE"]\nsegment_count = {len(segments)}\n{inner}}}\n'
    )


def linear(start: int, count: int, pv: str, at: int) -> str:
    """A linear segment."""
    return (
        f'start_extent = {start}\nextent_count = {count}\ntype = "striped"\nstripe_count = 1\nstripes = ["{pv}", {at}]'
    )


def striped(start: int, count: int, *areas: tuple[str, int], size: int = 128) -> str:
    """A striped segment; ``size`` in sectors."""
    listed = ", ".join(f'"{pv}", {at}' for pv, at in areas)
    return (
        f'start_extent = {start}\nextent_count = {count}\ntype = "striped"\nstripe_count = {len(areas)}\n'
        f"stripe_size = {size}\nstripes = [{listed}]"
    )


def other(count: int, kind: str, rest: str = "") -> str:
    """A segment of another kind, the first of its volume; ``rest`` are its further values, apart by semicolons."""
    return "\n".join(["start_extent = 0", f"extent_count = {count}", f'type = "{kind}"', *rest.split(";")])


def free(group: VolumeGroupText, size: int = 401 * MIB) -> list[int | None]:
    """Free bytes of each physical volume when nothing is looked into; None: read whole."""
    found: list[int | None] = []
    for pv in group.physical:
        used = physical_map(group, pv, size, {})
        found.append(None if used is None else sum(e.length for e in tiles(used) if e.kind is Kind.ZERO))
    return found


def test_a_linear_and_a_striped_volume() -> None:
    group = parse_group(
        text(
            volume("a", linear(0, 10, "pv0", 5), linear(10, 20, "pv1", 80))
            + volume("b", striped(0, 20, ("pv0", 50), ("pv1", 0)))
        )
    )
    assert (group.name, group.sequence, group.extent_size) == ("vg0", 7, 4 * MIB)
    assert [lv.name for lv in plain_volumes(group)] == ["a", "b"]
    assert [group.free_extents(pv) for pv in group.physical] == [80, 70]
    assert free(group) == [80 * 4 * MIB, 70 * 4 * MIB]


@pytest.mark.parametrize(
    ("volumes", "plain", "free_mebibytes"),
    [
        # The origin of a snapshot may hold, in blocks that it calls free, what the snapshot still shows.
        (
            volume("root", linear(0, 10, "pv0", 0))
            + volume("snap", linear(0, 2, "pv0", 10))
            + volume("snapshot0", other(10, "snapshot", 'chunk_size = 8;origin = "root";cow_store = "snap"')),
            [],
            [352, 400],
        ),
        (
            volume("thin", other(50, "thin", 'thin_pool = "pool";transaction_id = 0;device_id = 1'))
            + volume("pool", other(10, "thin-pool", 'metadata = "pool_tmeta";pool = "pool_tdata"'))
            + volume("pool_tmeta", linear(0, 1, "pv0", 0))
            + volume("pool_tdata", linear(0, 10, "pv1", 3)),
            [],
            [396, 360],
        ),
        (
            volume("r", other(4, "raid1", 'device_count = 2;raids = ["r_m0", "r_0", "r_m1", "r_1"]'))
            + volume("r_m0", linear(0, 1, "pv0", 20))
            + volume("r_0", linear(0, 4, "pv0", 0))
            + volume("r_m1", linear(0, 1, "pv1", 20))
            + volume("r_1", linear(0, 4, "pv1", 0))
            + volume("other", linear(0, 5, "pv0", 50)),
            ["other"],
            [360, 380],
        ),
        (volume("m", other(4, "mirror", 'mirror_count = 2;mirrors = ["pv0", 0, "pv1", 9]')), [], [384, 384]),
        (volume("z", other(4, "error")), [], [400, 400]),
        # A kind of tomorrow that lies on a physical volume itself: that volume is read whole.
        (volume("n", other(4, "newkind", 'places = ["pv1", 0]')), [], [400, None]),
        # Two volumes on one extent: the metadata is wrong, nothing on that volume is free.
        (volume("a", linear(0, 10, "pv0", 0)) + volume("b", linear(0, 10, "pv0", 9)), ["a", "b"], [None, 400]),
        (volume("a", linear(0, 10, "pv0", 95)), ["a"], [None, 400]),
    ],
)
def test_volumes_of_every_kind_keep_their_extents(
    volumes: str, plain: list[str], free_mebibytes: list[int | None]
) -> None:
    group = parse_group(text(volumes))
    assert [lv.name for lv in plain_volumes(group)] == plain
    assert free(group) == [None if f is None else f * MIB for f in free_mebibytes]


def test_a_physical_volume_shorter_than_its_group_says_is_read_whole() -> None:
    assert free(parse_group(text("")), size=400 * MIB) == [None, None]


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "vg0 {",
        "vg0 { id = }",
        "a = [1, 2",
        'a = "b',
        "a { " * 100,
        "a = 1 a = 2",
        "}",
        "a = b",
        text("").replace("Volume Group", "Something Else"),
        text("").replace("version = 1", "version = 2"),
        text("").replace("extent_size = 8192", "extent_size = 0"),
        text("").replace("extent_size = 8192", "extent_size = -8"),
        text("").replace("seqno = 7", 'seqno = "x"'),
        text(volume("a", linear(3, 10, "pv0", 0))),
        text(volume("a", linear(0, 0, "pv0", 0))),
        text(volume("a", linear(0, 10, "pv0", 0)).replace("segment_count = 1", "segment_count = 2")),
        text(volume("a", linear(0, 10, "pv0", 0)).replace("stripe_count = 1", "stripe_count = 2")),
        text(volume("a", linear(0, 10, "pv0", 0)).replace("segment_count = 1", "segment_count = 99999999999")),
    ],
)
def test_a_text_that_makes_no_sense_is_refused(broken: str) -> None:
    with pytest.raises(LvmTextError):
        parse_group(broken)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_rubbish_is_refused_or_parsed_but_never_crashes(data: st.DataObject) -> None:
    whole = text(volume("a", linear(0, 10, "pv0", 5)) + volume("b", striped(0, 20, ("pv0", 50), ("pv1", 0))))
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 30)))
    changed = whole[:start] + data.draw(st.text(' {}[]=,"\\#\n19ax-', max_size=8)) + whole[end:]
    try:
        group = parse_group(changed)
    except LvmTextError:
        return
    for pv in group.physical:
        if pv.count < 10_000 and group.extent_size < 1 << 30:
            used = physical_map(group, pv, 401 * MIB, {})
            assert used is None or tiles(used)


VALUES = st.recursive(
    st.integers(0, 1 << 60) | st.text(max_size=8) | st.lists(st.integers(0, 99) | st.text(max_size=5), max_size=4),
    lambda inner: st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True), VALUES, max_size=5))
def test_what_is_written_is_parsed(section: dict[str, object]) -> None:
    def written(value: object) -> str:
        if isinstance(value, str):
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        if isinstance(value, list):
            return "[" + ", ".join(written(item) for item in value) + "]"
        return str(value)

    def lines(inner: dict[str, object]) -> str:
        return "".join(
            f"{key} {{ # a comment {{\n{lines(value)}}}\n"
            if isinstance(value, dict)
            else f"\t{key} = {written(value)}\n"
            for key, value in inner.items()
        )

    assert lvmtext.parse(lines(section)) == section


# What LVM's own tools write.


@pytest.fixture
def group(tmp_path: Path) -> Iterator[tuple[LvmGroup, list[Path]]]:
    files = [blank(tmp_path / "pv0", 400 * MIB), blank(tmp_path / "pv1", 300 * MIB)]
    with lvm_group(tmp_path, "vg0", files) as made:
        made.create("vg0", "root", "-L", "100M", made.devices[0])
        made.create("vg0", "fast", "-i2", "-I64k", "-L", "64M", "--")
        made.lvm("lvextend", "-L", "+40M", "vg0/root", made.devices[1])
        yield made, files


@needs("lvcreate", "losetup")
@needs_root()
def test_real_metadata(group: tuple[LvmGroup, list[Path]]) -> None:
    made, files = group
    labels = [read_label(RawFile(file)) for file in files]
    report = made.lvm(
        "pvs",
        "--noheadings",
        "-o",
        "pv_name,pv_uuid,pv_pe_count,pv_pe_alloc_count,pe_start",
        "--units",
        "b",
        "--nosuffix",
    )
    expected = {words[1]: words for line in report.splitlines() if (words := line.split())}
    assert len(expected) == 2
    for label in labels:
        assert label is not None
        assert label.damage == ""
        assert label.group is not None
        assert label.group == labels[0].group if labels[0] else None
        pv = next(p for p in label.group.physical if p.uuid == label.uuid)
        _, _, count, allocated, start = expected[label.uuid]
        assert (pv.count, pv.start) == (int(count), int(start))
        assert label.group.free_extents(pv) == int(count) - int(allocated)
    volumes = made.lvm("lvs", "--noheadings", "-o", "lv_name,lv_uuid,lv_size", "--units", "b", "--nosuffix")
    assert labels[0] is not None
    assert labels[0].group is not None
    ours = sorted((lv.name, lv.uuid, str(lv.size * 4 * MIB)) for lv in labels[0].group.logical)
    assert ours == sorted(tuple(line.split()) for line in volumes.splitlines())


@needs("lvcreate", "losetup")
@needs_root()
def test_the_metadata_ring_wraps(group: tuple[LvmGroup, list[Path]]) -> None:
    made, files = group
    # Each change writes the text anew behind the last one; a long text makes the ring of about 1 MiB wrap soon.
    for number in range(14):
        made.lvm("vgchange", "--addtag", f"t{number:03}" + "x" * 1000, "vg0")
    made.lvm("pvchange", *[word for n in range(40) for word in ("--addtag", f"p{n:03}" + "y" * 1000)], made.devices[0])
    seen = set()
    for number in range(30):
        made.lvm("vgchange", "--addtag" if number % 2 else "--deltag", "t000" + "x" * 1000, "vg0")
        label = read_label(RawFile(files[0]))
        assert label is not None
        assert label.group is not None, label.damage
        seen.add(label.group.sequence)
    assert len(seen) == 30


@needs("lvcreate", "losetup")
@needs_root()
@pytest.mark.parametrize(("place", "words"), [(512 + 40, "checksum"), (4096 + 30, "checksum"), (None, "checksum")])
def test_a_wrong_byte_in_label_header_or_text_is_damage(
    group: tuple[LvmGroup, list[Path]], place: int | None, words: str
) -> None:
    made, files = group
    made.lvm("vgs")
    raw = bytearray(files[0].read_bytes()[: 2 * MIB])
    newest = max(re.finditer(rb"seqno = (\d+)", raw), key=lambda match: int(match.group(1)))
    at = newest.start() + 8 if place is None else place
    raw[at] ^= 1
    label = read_label(MemoryDisk(400 * MIB, bytes(raw)))
    assert label is not None
    assert label.group is None
    assert words in label.damage


class TestLogicalSource(BlockSourceContract):
    """A logical volume of two linear segments and a striped one, over two physical volumes in memory."""

    EXTENT = 1 << 19

    @pytest.fixture
    def source(self, content: bytes) -> Iterator[BlockSource]:
        yield from self.made(content)

    @pytest.fixture
    def content(self) -> bytes:
        generator = random.Random(4)
        whole = bytearray(12 * self.EXTENT)
        for start in range(0, len(whole) - 210_000, 300_000):
            if start // 300_000 % 3:
                whole[start : start + 210_000] = generator.randbytes(210_000)
        return bytes(whole)

    def made(self, content: bytes) -> Iterator[BlockSource]:
        raw = text(
            volume("a", linear(0, 3, "pv0", 5), striped(3, 6, ("pv1", 7), ("pv0", 20)), linear(9, 3, "pv1", 0))
        ).replace("extent_size = 8192", "extent_size = 1024")
        group = parse_group(raw)
        disks = {name: MemoryDisk(101 * self.EXTENT + MIB) for name in ("pv0", "pv1")}
        for start in range(0, len(content), 65536):
            extent, inside = divmod(start, self.EXTENT)
            if extent < 3:
                pv, at = "pv0", (5 + extent) * self.EXTENT + inside
            elif extent >= 9:
                pv, at = "pv1", (extent - 9) * self.EXTENT + inside
            else:
                row, column = divmod((start - 3 * self.EXTENT) // 65536, 2)
                pv, at = ("pv1", "pv0")[column], (7, 20)[column] * self.EXTENT + row * 65536
            if any(content[start : start + 65536]):
                disks[pv].write(memoryview(content)[start : start + 65536], MIB + at)
        source = lv_source(group, group.logical[0], disks)
        yield source
        source.close()

    @pytest.fixture
    def vast(self) -> Iterator[BlockSource]:
        group = parse_group(text(volume("a", linear(0, 1 << 20, "pv0", 0)), count=1 << 20))
        yield lv_source(group, group.logical[0], {"pv0": MemoryDisk(4 * TIB + 2 * MIB)})


def test_a_volume_with_a_missing_or_short_part_has_no_source() -> None:
    group = parse_group(text(volume("a", linear(0, 10, "pv0", 5), linear(10, 20, "pv1", 80))))
    disk = MemoryDisk(401 * MIB)
    with pytest.raises(ValueError, match="missing"):
        lv_source(group, group.logical[0], {"pv0": disk})
    with pytest.raises(ValueError, match="shorter"):
        lv_source(group, group.logical[0], {"pv0": disk, "pv1": MemoryDisk(MIB)})
    mirror = parse_group(text(volume("m", other(4, "mirror", 'mirrors = ["pv0", 0]'))))
    with pytest.raises(ValueError, match="no linear or striped"):
        lv_source(mirror, mirror.logical[0], {"pv0": disk})


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.sampled_from([8, 128, 1024]), st.data())
def test_the_map_of_a_striped_volume_lies_where_its_bytes_do(width: int, stripe: int, data: st.DataObject) -> None:
    """Paint the used parts of the logical volume through its source: exactly those bytes of the physical volumes are
    DATA.
    """
    areas = tuple(("pv0", 3 + 10 * n) if n % 2 == 0 else ("pv1", 1 + 10 * n) for n in range(width))
    raw = text(volume("a", striped(0, 2 * width, *areas, size=stripe))).replace(
        "extent_size = 8192", "extent_size = 1024"
    )
    group = parse_group(raw)
    extent, size = 1 << 19, (2 * width) << 19
    cuts = sorted({n * 4096 for n in data.draw(st.lists(st.integers(0, size // 4096), max_size=12))} | {0, size})
    parts = [
        (low, Uniform(high - low, Kind.ZERO if n % 2 else Kind.DATA)) for n, (low, high) in enumerate(pairwise(cuts))
    ]
    used = Composite(size, parts)
    disks = {name: MemoryDisk(100 * extent + MIB) for name in ("pv0", "pv1")}
    source = lv_source(group, group.logical[0], disks)
    painted: dict[str, list[Extent]] = {"pv0": [], "pv1": []}
    for piece in used.extents(0, size):
        if piece.kind is Kind.DATA:
            for disk, start, length in source._runs(piece.start, piece.length):
                painted["pv0" if disk is disks["pv0"] else "pv1"].append(Extent(start, length, Kind.DATA))
    for pv in group.physical:
        seen = physical_map(group, pv, disks[pv.name].size, {"a": used})
        assert seen is not None
        data_bytes = {b for e in tiles(seen) if e.kind is Kind.DATA for b in range(e.start // 512, e.end // 512)}
        outside = set(range(MIB // 512))  # metadata
        expected = {b for e in painted[pv.name] for b in range(e.start // 512, e.end // 512)}
        assert data_bytes == expected | outside


@needs("lvcreate", "losetup")
@needs_root()
def test_lvm_itself_takes_the_kinds_of_segments_that_are_hand_written_here(tmp_path: Path) -> None:
    files = [blank(tmp_path / "pv0", 400 * MIB), blank(tmp_path / "pv1", 400 * MIB)]
    with lvm_group(tmp_path, "vg0", files) as made:
        made.create("vg0", "root", "-L", "40M", made.devices[0])
        made.create("vg0", "snap", "-L", "8M", made.devices[0])
        backup = tmp_path / "backup"
        made.lvm("vgcfgbackup", "-f", str(backup), "vg0")
        snapshot = (
            volume(
                "snapshot0",
                other(10, "snapshot", 'chunk_size = 8;origin = "root";cow_store = "snap"'),
            )
            .replace('id = "snapshot0"', 'id = "abcdef-abcd-abcd-abcd-abcd-abcd-abcdef"')
            .replace(',"VISIBLE"', "")
        )
        changed = backup.read_text().replace("logical_volumes {\n", "logical_volumes {\n" + snapshot)
        backup.write_text(changed)
        made.lvm("vgcfgrestore", "--force", "-f", str(backup), "vg0")
        assert "root" in made.lvm("lvs", "-a", "-o", "lv_name,origin", "--noheadings")
        label = read_label(RawFile(files[0]))
        assert label is not None
        assert label.group is not None
        assert plain_volumes(label.group) == []
        assert [lv.name for lv in label.group.logical if lv.name == "snapshot0"] == ["snapshot0"]


def test_a_plain_disk_has_no_label() -> None:
    assert read_label(MemoryDisk(MIB)) is None
    assert read_label(MemoryDisk(100)) is None
