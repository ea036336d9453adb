"""Every format that QEMU reads and writes for us, through real servers, with qemu-img as the second opinion."""

from __future__ import annotations

import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from formats import qemu_img
from formats.block import BlockSource, Kind
from formats.errors import (
    ImageError,
    ImageUnsupportedError,
    InterruptedRunError,
    NoSpaceError,
    UnsafeImageError,
    UsageError,
)
from formats.images import FORMATS, create_sink, image_size, open_source, probe
from formats.memory import MemoryDisk
from formats.transfer import copy
from tests.contracts.block_sink import SIZE, BlockSinkContract, Made, noise
from tests.contracts.block_source import MIB, TIB, BlockSourceContract, read
from tests.formats.images import disks
from tests.requirement import needs, needs_root

pytestmark = needs("qemu-img", "qemu-nbd")

KINDS = [
    (name, layout.name, "") for name, chosen in FORMATS.items() for layout in chosen.subformats if name != "raw"
] + [("qcow2", "compat=1.1", "zlib"), ("qcow2", "compat=1.1", "zstd"), ("qcow2", "compat=0.10", "zlib")]


def by_qemu(path: Path, name: str, folder: Path) -> bytes:
    """What qemu-img reads in an image."""
    raw = folder / "by-qemu.raw"
    qemu_img.convert(path, FORMATS[name].driver, raw, "raw")
    return raw.read_bytes()


@pytest.mark.parametrize(("name", "subformat", "compress"), KINDS)
class TestSinks(BlockSinkContract):
    @pytest.fixture
    def made(self, tmp_path: Path, name: str, subformat: str, compress: str) -> Iterator[Made]:
        path = tmp_path / "disk.img"
        sink = create_sink(path, name, SIZE, subformat=subformat, compress=compress)

        def content() -> bytes:
            assert qemu_img.check(path, FORMATS[name].driver).clean
            stored = by_qemu(path, name, tmp_path)
            assert not any(stored[SIZE:])
            return stored[:SIZE]

        yield Made(sink, content)
        sink.close()


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "raw"])
class TestSources(BlockSourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, content: bytes, name: str) -> Iterator[BlockSource]:
        path = tmp_path / "disk.img"
        disks.write(path, name, content)
        source = open_source(path)
        yield source
        source.close()

    @pytest.fixture
    def vast(self, tmp_path: Path, name: str) -> Iterator[BlockSource]:
        path = tmp_path / "vast.img"
        size = min(4 * TIB, FORMATS[name].subformat().limit)
        create_sink(path, name, size).close()
        source = open_source(path)
        yield source
        source.close()

    def test_s7_long_zero_runs_are_told(self, source: BlockSource, content: bytes, name: str) -> None:  # type: ignore[override]
        # Blocks of 2 MiB and more hide the sample's zero runs, and QEMU has no map of VHDX.
        if FORMATS[name].name in ("vhd", "vhdx", "vdi", "parallels"):
            pytest.skip("its blocks are larger than the runs of the sample")
        super().test_s7_long_zero_runs_are_told(source, content)


@pytest.mark.parametrize("shape", ["empty", "sparse", "dense", "odd", "incompressible-end", "short-end"])
@pytest.mark.parametrize(("name", "subformat", "compress"), KINDS)
def test_what_is_written_is_read_by_qemu(tmp_path: Path, name: str, subformat: str, compress: str, shape: str) -> None:
    content = disks.shape(shape)
    path = tmp_path / "disk.img"
    disks.write(path, name, content, subformat=subformat, compress=compress)
    header = probe(path)
    assert header.format == name
    assert header.size == image_size(name, len(content), subformat)
    assert by_qemu(path, name, tmp_path) == content.ljust(header.size, b"\0")
    source = open_source(path)
    assert read(source, 0, source.size) == content.ljust(header.size, b"\0")
    source.close()


@pytest.mark.parametrize("name", ["qcow2", "vhdx", "vdi", "parallels"])
def test_a_vast_disk_holds_bytes_at_both_ends(tmp_path: Path, name: str) -> None:
    size = 16 * TIB
    path = tmp_path / "disk.img"
    sink = create_sink(path, name, size)
    for offset in (0, size - MIB):
        sink.write(memoryview(noise(MIB, offset)), offset)
    sink.flush()
    sink.close()
    source = open_source(path)
    assert [read(source, offset, MIB) for offset in (0, size - MIB)] == [noise(MIB, 0), noise(MIB, size - MIB)]
    assert source.size == size
    source.close()
    assert path.stat().st_blocks * 512 < 200 * MIB


@pytest.mark.parametrize(
    ("name", "subformat", "size", "named"),
    [
        ("vhd", "", 3 * TIB, "VHDX"),
        ("vhd", "fixed", (2040 << 30) + 1, "VHDX"),
        ("vhdx", "", 65 * TIB, "qcow2"),
        ("vmdk", "", 3 * TIB, "qcow2"),
        ("vmdk", "streamOptimized", 63 * TIB, "qcow2"),
    ],
)
def test_too_large_a_disk_is_refused_before_a_byte_is_written(
    tmp_path: Path, name: str, subformat: str, size: int, named: str
) -> None:
    path = tmp_path / "disk.img"
    with pytest.raises(ImageUnsupportedError) as caught:
        create_sink(path, name, size, subformat=subformat)
    assert named in caught.value.advice
    assert not path.exists()


def test_unknown_names_are_usage_errors(tmp_path: Path) -> None:
    for wanted in (
        {"format": "vhdd"},
        {"format": "vmdk", "subformat": "thick"},
        {"format": "vhd", "compress": "zstd"},
        {"format": "qcow2", "compress": "lzo"},
        {"format": "qcow2", "compress": "zstd", "subformat": "compat=0.10"},
    ):
        with pytest.raises(UsageError):
            create_sink(tmp_path / "disk.img", size=MIB, **wanted)
    assert list(tmp_path.iterdir()) == []


def test_vhd_states_the_exact_size_for_readers_of_both_kinds(tmp_path: Path) -> None:
    for subformat in ("dynamic", "fixed"):
        path = tmp_path / subformat
        create_sink(path, "vhd", 100 * MIB + 512, subformat=subformat).close()
        footer = path.read_bytes()[-512:]
        assert footer[28:32] == b"qem2"
        assert {int.from_bytes(footer[at : at + 8], "big") for at in (40, 48)} == {100 * MIB + 512}
        assert footer[56:60] == (65535).to_bytes(2, "big") + bytes([16, 255])


def test_fixed_vhd_is_told_from_raw_by_its_footer(tmp_path: Path) -> None:
    content = disks.shape("sparse")
    path = disks.write(tmp_path / "disk.vhd", "vhd", content, subformat="fixed")
    assert (probe(path).format, probe(path).subformat) == ("vhd", "fixed")
    raw = open_source(path, format="raw")
    assert raw.size == len(content) + 512
    raw.close()


@needs("7zz")
@pytest.mark.parametrize(("name", "kind"), [("vhd", "VHD"), ("vhdx", "VHDX"), ("vdi", "VDI"), ("qcow2", "QCOW")])
def test_7zip_reads_the_same(tmp_path: Path, name: str, kind: str) -> None:
    content = disks.shape("sparse")
    path = disks.write(tmp_path / "disk.img", name, content)
    answer = subprocess.run(["7zz", "x", "-so", f"-t{kind}", path], capture_output=True, check=True)
    assert answer.stdout == content


class TestRefusals:
    def test_a_backing_file_is_not_followed(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret.raw"
        secret.write_bytes(noise(MIB))
        path = tmp_path / "disk.qcow2"
        options = ["-F", "raw", "-b", str(secret)]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path], check=True)
        assert probe(path).backing == str(secret)
        with pytest.raises(UnsafeImageError, match=r"secret\.raw"):
            open_source(path)
        # And if it came to a start of QEMU all the same, the parent would be cut off.
        with qemu_img.serve(path, "qcow2") as uri:
            raw = tmp_path / "seen.raw"
            qemu_img.convert(uri, "raw", raw, "raw")
        assert raw.read_bytes() == bytes(MIB)

    def test_a_data_file_is_not_followed(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        options = ["-o", f"data_file={tmp_path / 'data'},data_file_raw=on"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M"], check=True)
        assert probe(path).references == (str(tmp_path / "data"),)
        with pytest.raises(UnsafeImageError, match="data"):
            open_source(path)

    def test_encryption_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        options = [
            "--object",
            "secret,id=s,data=x",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ]
        subprocess.run(["qemu-img", "create", "-q", *options, "-f", "qcow2", path, "1M"], check=True)
        assert probe(path).encrypted
        with pytest.raises(ImageUnsupportedError, match="encrypted"):
            open_source(path)

    def test_a_vmdk_parent_is_not_followed(self, tmp_path: Path) -> None:
        parent = tmp_path / "parent.vmdk"
        subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", parent, "1M"], check=True)
        path = tmp_path / "child.vmdk"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", parent, path], check=True, cwd=tmp_path
        )
        assert probe(path).backing == str(parent)
        with pytest.raises(UnsafeImageError, match=r"parent\.vmdk"):
            open_source(path)

    @pytest.mark.parametrize(
        "name", ["/etc/hostname", "../out.raw", "sub/part.raw", "..", "a:b", "json:{}", "tab\there"]
    )
    def test_extents_outside_the_folder_are_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "disk.vmdk"
        path.write_text(f'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 2 FLAT "{name}" 0\n')
        with pytest.raises(UnsafeImageError):
            open_source(path)

    def test_an_extent_that_is_a_link_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.vmdk"
        path.write_text('# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 1 FLAT "x" 0\n')
        with pytest.raises(ImageError, match="missing"):
            open_source(path)
        (tmp_path / "x").symlink_to("/etc/passwd")
        with pytest.raises(UnsafeImageError, match="no plain file"):
            open_source(path)

    def test_a_sparse_extent_may_be_no_descriptor_again(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.vmdk"
        disks.write(path, "vmdk", disks.shape("sparse"), subformat="twoGbMaxExtentSparse")
        (part,) = probe(path).references
        extent = bytearray((tmp_path / part).read_bytes())
        extent[12:20] = bytes(8)  # no capacity: QEMU goes by the text inside
        extent[28:44] = struct.pack("<QQ", 1, 20)
        text = b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 16384 FLAT "/etc/passwd" 0\n'
        extent[512 : 512 + 10240] = text.ljust(10240, b"\0")
        (tmp_path / part).write_bytes(extent)
        with pytest.raises(ImageError, match="without capacity"):
            open_source(path)
        (tmp_path / part).write_bytes(text)
        with pytest.raises(ImageError, match="no sparse extent"):
            open_source(path)

    def test_devices_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.vmdk"
        path.write_text('# Disk DescriptorFile\nversion=1\ncreateType="fullDevice"\nRW 2 FLAT "/dev/sda" 0\n')
        with pytest.raises(UnsafeImageError, match="device"):
            probe(path)

    @pytest.mark.parametrize(
        "line",
        ['RW 2 FLAT "a" 0 x', "RW", 'RW\t2 FLAT "a', 'rw 2 FLAT "a"', 'RW -2 FLAT "a"', 'RW"a" 2 FLAT', 'RW 2 NEW "a"'],
    )
    def test_an_extent_line_that_is_none_is_refused(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "disk.vmdk"
        path.write_text(f'# Disk DescriptorFile\nversion=1\ncreateType="x"\nRW 2 ZERO\n{line}\n')
        with pytest.raises(ImageError):
            probe(path)


def test_flat_vmdk_of_several_files_and_zeroes(tmp_path: Path) -> None:
    """Composed natively, as ESXi (VMFS, without an offset) and Workstation (FLAT) write it."""
    parts = [noise(3 * 512, 1), noise(8 * 512, 2)]
    for number, part in enumerate(parts):
        (tmp_path / f"disk-{number}.vmdk").write_bytes(part)
    path = tmp_path / "disk.vmdk"
    lines = ['RW 3 VMFS "disk-0.vmdk"', "RW 5 ZERO", 'RW 4 FLAT "disk-1.vmdk" 4']
    path.write_text("# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n" + "\r\n".join(lines) + "\n")
    source = open_source(path)
    assert read(source, 0, source.size) == parts[0] + bytes(5 * 512) + parts[1][4 * 512 :]
    assert [extent.kind for extent in source.extents(0, source.size)] == [Kind.DATA, Kind.ZERO, Kind.DATA]
    source.close()
    path.write_text(path.read_text().replace('"disk-1.vmdk" 4', '"disk-1.vmdk" 5'))
    with pytest.raises(ImageError, match="shorter"):
        open_source(path)


def test_a_stated_format_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = disks.write(tmp_path / "disk.img", "vdi", disks.shape("sparse"))
    with pytest.raises(ImageError, match="looks like vdi"):
        open_source(path, format="qcow2")


def test_a_server_that_is_killed_is_an_error_and_no_image(tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "disk.img", "qcow2", 8 * MIB)
    sink.write(memoryview(noise(MIB)), 0)
    os.kill(sink._server.pid, 9)  # type: ignore[attr-defined]
    with pytest.raises(ImageError):
        sink.flush()
    with pytest.raises(ImageError, match="not finished"):
        sink.close()


@needs_root()
@needs("mount")
@pytest.mark.parametrize(("name", "subformat"), [("qcow2", ""), ("vhd", ""), ("vmdk", ""), ("vmdk", "streamOptimized")])
def test_a_full_file_system_is_no_space(tmp_path: Path, name: str, subformat: str) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        sink = create_sink(folder / "disk.img", name, 16 * MIB, subformat=subformat)
        with pytest.raises(NoSpaceError):
            copy(MemoryDisk(16 * MIB, noise(16 * MIB)), sink)
            sink.flush()
        sink.close()
        with pytest.raises(NoSpaceError):
            create_sink(folder / "other.img", "vdi", 1 << 42)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_stopped_copy_leaves_no_server(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    sink = create_sink(tmp_path / "disk.img", "qcow2", 8 * MIB)
    pid = sink._server.pid  # type: ignore[attr-defined]
    with pytest.raises(InterruptedRunError):
        copy(MemoryDisk(8 * MIB, noise(8 * MIB)), sink, stop=stop)
    sink.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
