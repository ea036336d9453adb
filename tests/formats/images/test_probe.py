"""What images say of themselves: those of other products, damaged ones, and any bytes at all."""

from __future__ import annotations

import bz2
import functools
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import qemu_img
from formats.errors import ImageError, ImageUnsupportedError, ReadError, ToolkitError, UnsafeImageError, UsageError
from formats.images import FORMATS, create_sink, open_source, probe, vhd, vmdk
from formats.images.header import LIMIT, Headers
from formats.transfer import fingerprint
from tests.contracts.block_sink import noise
from tests.contracts.block_source import MIB, read
from tests.formats.images import disks
from tests.formats.images.disks import shared
from tests.requirement import missing, needs

PRODUCTS = [
    # name, format, subformat, bytes of the disk
    ("d2v-zerofilled.vhd", "vhd", "dynamic", 263454720),
    ("virtualpc-dynamic.vhd", "vhd", "dynamic", 65278 * 16 * 255 * 512),  # Virtual PC means the geometry
    ("iotest-dynamic-1G.vhdx", "vhdx", "dynamic", 1 << 30),
    ("iotest-version3.vmdk", "vmdk", "streamOptimized", 16 << 30),
    ("parallels-v1", "parallels", "expanding", 2 << 20),
    ("grub_mbr.raw", "raw", "", 512),
]


def unpacked(name: str, folder: Path) -> Path:
    """A shared image, unpacked sparsely."""
    path = folder / name
    with bz2.open(shared("images", f"{name}.bz2")) as packed, path.open("wb") as file:
        while piece := packed.read(MIB):
            if any(piece):
                file.write(piece)
            else:
                file.seek(len(piece), os.SEEK_CUR)
        file.truncate(file.tell())
    return path


@pytest.mark.parametrize(("name", "kind", "subformat", "size"), PRODUCTS)
def test_images_of_other_products(tmp_path: Path, name: str, kind: str, subformat: str, size: int) -> None:
    header = probe(unpacked(name, tmp_path))
    assert (header.format, header.subformat, header.size) == (kind, subformat, size)
    assert (header.backing, header.references, header.unclean) == ("", (), "")


@needs("qemu-img", "qemu-nbd")
@pytest.mark.parametrize(("name", "kind", "subformat", "size"), PRODUCTS)
def test_images_of_other_products_read_as_qemu_reads_them(
    tmp_path: Path, name: str, kind: str, subformat: str, size: int
) -> None:
    path = unpacked(name, tmp_path)
    source = open_source(path)
    assert source.size == size
    with qemu_img.serve(path, FORMATS[kind].driver) as uri:
        raw = tmp_path / "by-qemu.raw"
        qemu_img.convert(uri, "raw", raw, "raw")
    reference = open_source(raw, format="raw")
    assert reference.size == size
    assert fingerprint(source) == fingerprint(reference)
    reference.close()
    source.close()


def test_a_vhd_of_an_unknown_writer_keeps_its_tail(tmp_path: Path) -> None:
    """QEMU before 10 believes the geometry of writers it does not know, as Azure's, and cuts the disk."""
    size = 30 * MIB + 512
    path = disks.write(tmp_path / "disk.vhd", "vhd", bytes(size - 512) + noise(512), subformat="fixed")
    with path.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        footer = bytearray(file.read())
        footer[28:32] = b"wa\0\0"
        footer[56:60] = struct.pack(">HBB", size // 512 // (4 * 17), 4, 17)
        footer[64:68] = struct.pack(">I", vhd.checksum(bytes(footer), 64))
        file.seek(-512, os.SEEK_END)
        file.write(footer)
    source = open_source(path)
    assert source.size == size
    assert read(source, size - 512, 512) == noise(512)
    source.close()


def test_a_differencing_vhd_names_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "child.vhd"
    create_sink(path, "vhd", 8 * MIB).close()
    content = bytearray(path.read_bytes())
    content[512 + 64 : 512 + 64 + 22] = "parent.vhd\0".encode("utf-16-be")
    content[512 + 36 : 512 + 40] = struct.pack(">I", vhd.checksum(bytes(content[512:1536]), 36))
    for at in (0, len(content) - 512):
        content[at + 60 : at + 64] = struct.pack(">I", 4)
        content[at + 64 : at + 68] = struct.pack(">I", vhd.checksum(bytes(content[at : at + 512]), 64))
    path.write_bytes(content)
    assert (probe(path).subformat, probe(path).backing) == ("differencing", "parent.vhd")
    with pytest.raises(ImageUnsupportedError, match=r"parent\.vhd"):
        open_source(path)


def test_a_damaged_footer_is_told(tmp_path: Path) -> None:
    path = disks.write(tmp_path / "disk.vhd", "vhd", disks.shape("sparse"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # 511 bytes, as some early writers left it: the copy at the start counts
    assert probe(path).size == len(disks.shape("sparse"))
    path.write_bytes(b"conectix" + bytes(504) + whole[512:-512])
    with pytest.raises(ImageError, match="checksum"):
        probe(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\x1f\x8b\x08" + bytes(600), "gzip"),
        (bytes(257) + b"ustar  \0" + bytes(600), "tar"),
        (b"QED\0" + bytes(600), "QED"),
        (b"COWD" + bytes(600), "ESXi"),
        (b"QFI\xfb\0\0\0\1" + bytes(600), "version 1"),
        (b"QFI\xfb\0\0\0\4" + bytes(600), "version 4"),
    ],
)
def test_foreign_formats_are_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(ImageUnsupportedError, match=named):
        probe(path)
    assert probe(path, format="raw").size == len(content)


def test_a_raw_disk_that_looks_like_an_image_must_be_named_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + noise(4096))
    with pytest.raises(ImageError) as caught:
        probe(path)
    assert "raw" in caught.value.advice or isinstance(caught.value, ImageUnsupportedError)
    source = open_source(path, format="raw")
    assert source.size == 4104
    source.close()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReadError, match="neither"):
        probe(tmp_path / "pipe")
    with pytest.raises(ReadError, match="No such file"):
        probe(tmp_path / "none")
    with pytest.raises(ImageUnsupportedError, match="folder"):
        probe(tmp_path)
    with pytest.raises(UsageError, match="vhdd"):
        probe(tmp_path, format="vhdd")
    (tmp_path / "empty").touch()
    assert (probe(tmp_path / "empty").format, probe(tmp_path / "empty").size) == ("raw", 0)


def test_unknown_qcow2_features_are_refused(tmp_path: Path) -> None:
    path = disks.write(tmp_path / "disk.qcow2", "qcow2", disks.shape("sparse"))
    content = bytearray(path.read_bytes())
    content[79] |= 0x20
    path.write_bytes(content)
    with pytest.raises(ImageUnsupportedError, match="later qcow2"):
        probe(path)
    content[79] = 2
    path.write_bytes(content)
    with pytest.raises(ImageError, match="not closed well"):
        open_source(path)


def test_a_vhdx_with_a_log_is_refused(tmp_path: Path) -> None:
    path = disks.write(tmp_path / "disk.vhdx", "vhdx", disks.shape("sparse"))
    from formats.images import vhdx

    content = bytearray(path.read_bytes())
    for at in (65536, 131072):
        content[at + 48 : at + 64] = b"\1" * 16
        content[at + 4 : at + 8] = vhdx._crc32c(bytes(content[at : at + 4096])).to_bytes(4, "little")
    path.write_bytes(content)
    assert "log" in probe(path).unclean
    with pytest.raises(ImageError, match="log"):
        open_source(path)
    content[65536 + 4] ^= 1
    content[131072 + 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match="checksum"):
        probe(path)


@functools.cache
def heads() -> list[tuple[str, bytes]]:
    """Small real images of every format, to damage; whole, for the tables lie anywhere in them."""
    found = [("descriptor", b'# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\nRW 8 FLAT "a" 0\nRW 8 ZERO\n')]
    if missing("qemu-img", "qemu-nbd"):
        return found
    with tempfile.TemporaryDirectory() as folder:
        for name, chosen in FORMATS.items():
            for layout in chosen.subformats:
                if name == "raw" or layout.name in ("monolithicFlat", "twoGbMaxExtentSparse", "static"):
                    continue
                path = Path(folder, layout.name)
                disks.write(path, name, noise(70_000 // 512 * 512), subformat=layout.name)
                found.append((name, path.read_bytes()[: 3 * MIB]))
    return found


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_crashes_the_probe(tmp_path: Path, data: st.DataObject) -> None:
    """Each damaged header is read as something bounded, or refused with an error of the tree."""
    _, whole = data.draw(st.sampled_from(heads()))
    content = bytearray(whole[: data.draw(st.sampled_from([len(whole), 512, 1024, 70_000, 200_000]))])
    spots = st.one_of(
        st.integers(0, min(len(content) - 1, 1100)), st.integers(65536, 65700), st.integers(0, len(content) - 1)
    )
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(spots)
        patch = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff", b"\1", b"\x80", b"\n", b'"']))
        content[at : at + len(patch)] = patch
    path = tmp_path / "image"
    path.write_bytes(content)
    if len(content) >= 512 and data.draw(st.booleans()) and content.startswith(b"conectix"):
        fix = vhd.checksum(bytes(content[:512]), 64)
        content[64:68] = struct.pack(">I", fix)
        path.write_bytes(content)
    try:
        header = probe(path)
    except ToolkitError as error:
        assert 20 <= error.exit_code <= 29
        assert len(str(error)) < 2000
        return
    assert 0 <= header.size < 1 << 62
    assert str(header).isprintable()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    magic=st.sampled_from([b"", b"QFI\xfb\0\0\0\3", b"QFI\xfb\0\0\0\2", b"KDMV", b"conectix", b"vhdxfile", b"WithoutFreeSpace"])
    | st.just(b"WithouFreSpacExt\2\0\0\0") | st.just(bytes(64) + b"\x7f\x10\xda\xbe\1\0\1\0") | st.just(b"# Disk DescriptorFile\n"),
    rest=st.binary(max_size=3000),
)  # fmt: skip
def test_any_bytes_are_read_or_refused(tmp_path: Path, magic: bytes, rest: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(magic + rest)
    try:
        header = probe(path)
    except ImageError:
        return
    assert header.size >= 0


def test_headers_are_read_in_bounds(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with Headers(path) as file_read:
        for offset, length in [(0, MIB + 1), (-1, 1), (1 << 40, 1), ((1 << 40) - 1, 2), (0, -1)]:
            with pytest.raises(ImageError):
                file_read.at(offset, length)
        for _ in range(LIMIT // MIB):
            file_read.at(0, MIB)
        with pytest.raises(ImageError, match="larger than any real one"):
            file_read.at(0, 1)


_SPACE = st.sampled_from([" ", "\t", "\n", "\r", "\v", "\f", "  ", ""])


@needs("qemu-img")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.tuples(
        _SPACE,
        st.sampled_from(["RW", "rw", "RDONLY", "RWX"]),
        _SPACE,
        st.sampled_from(["8", "+8", "08", "0x8"]),
        _SPACE,
        st.sampled_from(["FLAT", "VMFS", "SPARSE", "flat"]),
        _SPACE,
        st.sampled_from(['"', "'", ""]),
        _SPACE,
        st.sampled_from(["0", "", "0 0"]),
    ),
    before=st.sampled_from(["", "#", "\0", "x\0", " ", "a=", "a=b ", '"\n']),
)
def test_what_qemu_takes_for_an_extent_is_seen_here(tmp_path: Path, parts: tuple[str, ...], before: str) -> None:
    """A file that QEMU would open because of a line of a descriptor is named or refused by the probe."""
    a, access, b, sectors, c, kind, d, quote, e, start = parts
    target = tmp_path / "target"
    target.write_bytes(noise(8192))
    text = f'# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n{before}'
    text += f"{a}{access}{b}{sectors}{c}{kind}{d}{quote}{target}{quote}{e}{start}\nRW 8 ZERO\n"
    path = tmp_path / "disk.vmdk"
    path.write_bytes(text.encode())
    try:
        header = probe(path)
    except ImageError:
        return
    if header.references:
        with pytest.raises(UnsafeImageError):
            open_source(path)
        return
    answer = subprocess.run(
        ["qemu-img", "info", qemu_img.node(path, "vmdk")], capture_output=True, text=True, check=False
    )
    assert not re.search(r"filename: .*target", answer.stdout), (text, answer.stdout)


def test_a_descriptor_inside_a_sparse_extent_names_no_file(tmp_path: Path) -> None:
    path = disks.write(tmp_path / "disk.vmdk", "vmdk", disks.shape("sparse"))
    content = bytearray(path.read_bytes())
    zero = bytearray(content)
    zero[12:20] = bytes(8)  # capacity 0: a reader goes by the descriptor
    path.write_bytes(zero)
    with pytest.raises(ImageError, match="without capacity"):
        probe(path)
    at = content.index(b"RW ")
    line = b'RW 8 FLAT "/etc/passwd" 0\n'
    content[at : at + len(line)] = line
    path.write_bytes(content)
    with pytest.raises(ImageError):
        probe(path)


def test_every_subformat_is_recognised(tmp_path: Path) -> None:
    for layout in FORMATS["vmdk"].subformats:
        path = disks.write(tmp_path / f"{layout.name}.vmdk", "vmdk", disks.shape("short-end"), subformat=layout.name)
        assert probe(path).subformat == layout.name
    assert vmdk.MAGIC == b"KDMV"
