"""Machines in files: bare images, definitions, and folders that a conversion wrote."""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from pathlib import Path

import pytest

from formats import qemu_img
from formats.capture import Consistency, Unknown
from formats.errors import ImageError, ImageUnsupportedError, ReadError, ToolkitError, UnsafeImageError
from formats.images.raw import RawFile
from formats.machine import Disk, Firmware
from p2v.cli import run
from p2v.collect import files
from p2v.collect.files import FileOrigin
from p2v.errors import LinkLostError
from tests.requirement import needs

MIB = 1 << 20


def raw_image(path: Path, size: int = 8 * MIB) -> bytes:
    content = os.urandom(MIB)
    with path.open("wb") as stream:
        stream.truncate(size)
        stream.seek(2 * MIB)
        stream.write(content)
    return content


def read(origin: FileOrigin, disk_id: str, offset: int, length: int) -> bytes:
    buffer = memoryview(bytearray(length))
    with origin.capture() as capture:
        capture.disks[disk_id].source.readinto(buffer, offset)
    return bytes(buffer)


def test_a_raw_image_is_a_machine_with_one_disk(tmp_path: Path) -> None:
    content = raw_image(tmp_path / "old server.raw")
    origin = FileOrigin(tmp_path / "old server.raw")
    machine = origin.inspect()
    assert machine.name == "old-server"
    assert machine.firmware is Firmware.BIOS
    assert [disk.size for disk in machine.disks] == [8 * MIB]
    assert read(origin, "disk0", 2 * MIB, MIB) == content
    with origin.capture() as capture:
        assert capture.disks["disk0"].consistency is Consistency.CRASH
        assert isinstance(capture.changes("disk0"), Unknown)


@needs("qemu-img", "qemu-nbd")
def test_a_folder_that_a_conversion_wrote_is_a_source(tmp_path: Path) -> None:
    content = raw_image(tmp_path / "disk.raw")
    folder = tmp_path / "vm"
    words = ["convert", str(tmp_path / "disk.raw"), "--to", "libvirt", "-o", str(folder), "--boot-check", "none", "-q"]
    assert run(words) == 3  # it was not seen to boot: a notice
    names = {path.name for path in folder.iterdir()}
    assert names == {"disk.xml", "disk-disk0.qcow2", "machine.json"}
    for source in (folder, folder / "disk.xml"):
        origin = FileOrigin(source)
        assert origin.platform == "libvirt"
        assert origin.hardware is not None
        assert read(origin, origin.inspect().disks[0].id, 2 * MIB, MIB) == content
    assert (
        run(["convert", str(folder), "--to", "hyperv", "-o", str(tmp_path / "hv"), "--boot-check", "none", "-q"]) == 3
    )
    assert {path.name for path in (tmp_path / "hv").iterdir()} == {"disk.ps1", "disk-disk0.vhdx", "machine.json"}
    assert qemu_img.compare(tmp_path / "disk.raw", "raw", tmp_path / "hv" / "disk-disk0.vhdx", "vhdx").equal


@needs("qemu-img", "qemu-nbd")
@pytest.mark.parametrize("kind", ["qcow2", "raw", "vhd", "vhdx", "vmdk", "vmdk:streamOptimized"])
def test_every_format_of_a_conversion_equals_the_source(tmp_path: Path, kind: str) -> None:
    raw_image(tmp_path / "disk.raw", 8 * MIB)
    platform = "vmware-workstation" if kind.startswith("vmdk") else "hyperv" if kind.startswith("vhd") else "qemu"
    words = [
        "convert",
        str(tmp_path / "disk.raw"),
        "--to",
        platform,
        "-o",
        str(tmp_path / "vm"),
        "--boot-check",
        "none",
        "-q",
    ]
    assert run([*words, "--disk-format", kind]) == 3
    image = next(p for p in (tmp_path / "vm").iterdir() if "disk0" in p.name)
    driver = {"vhd": "vpc"}.get(kind, kind.partition(":")[0])
    assert qemu_img.compare(tmp_path / "disk.raw", "raw", image, driver).equal


def test_an_unknown_folder_says_what_it_misses(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"machine\.json"):
        FileOrigin(tmp_path)


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "", ".", "a/b"])
def test_a_record_cannot_name_files_elsewhere(tmp_path: Path, file: str) -> None:
    raw_image(tmp_path / "disk.raw")
    folder = tmp_path / "vm"
    words = ["convert", str(tmp_path / "disk.raw"), "--to", "qemu", "-o", str(folder), "--boot-check", "none", "-q"]
    assert run([*words, "--disk-format", "raw"]) == 3
    record = json.loads((folder / "machine.json").read_bytes())
    record["disks"][0]["file"] = file
    (folder / "machine.json").write_text(json.dumps(record))
    with pytest.raises(UnsafeImageError):
        FileOrigin(folder)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", ImageError),
        (b"[]", ImageError),
        (b'{"version": 2}', ImageUnsupportedError),
        (b'{"version": 1}', ImageError),
        (b"{" * 100_000, ImageError),
        (b"\xff\xfe", ImageError),
    ],
)
def test_a_broken_record_is_refused(tmp_path: Path, content: bytes, kind: type[ToolkitError]) -> None:
    (tmp_path / "machine.json").write_bytes(content)
    with pytest.raises(kind):
        FileOrigin(tmp_path)


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReadError):
        FileOrigin(tmp_path / "absent.raw")


@needs("qemu-img", "qemu-nbd")
def test_a_destination_that_is_full_leaves_nothing(tmp_path: Path, small_filesystem: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(os.urandom(24 * MIB))
    words = [
        "convert",
        str(source),
        "--to",
        "libvirt",
        "-o",
        str(small_filesystem / "vm"),
        "--boot-check",
        "none",
        "-q",
    ]
    assert run(words) == 13
    assert list((small_filesystem / "vm").iterdir()) == []


@needs("qemu-img", "qemu-nbd")
def test_a_copy_that_broke_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's second half cannot be read at first; the digests are those of a live host's agent."""
    content = os.urandom(24 * MIB)
    source = tmp_path / "disk.raw"
    source.write_bytes(content)
    broken = True
    sent = 0

    class Remote(RawFile):
        def readinto(self, buffer: memoryview, offset: int) -> None:
            nonlocal sent
            if broken and offset >= 16 * MIB:
                raise LinkLostError("the link was cut")
            sent += len(buffer)
            super().readinto(buffer, offset)

        def digest(self, start: int, length: int) -> bytes | None:
            return blake2b(content[start : start + length], digest_size=32).digest()

    monkeypatch.setattr(files, "open_source", lambda path, format: Remote(path) if path == source else None)  # noqa: A006
    monkeypatch.setattr(FileOrigin, "_disk", lambda *_: Disk(id="disk0", size=24 * MIB))
    folder = tmp_path / "vm"
    words = ["convert", str(source), "--to", "libvirt", "-o", str(folder), "--boot-check", "none", "-q"]
    assert run(words) == 36
    assert [path.name for path in folder.iterdir()] == [".disk.part"]
    assert sent < 24 * MIB
    broken, sent = False, 0
    assert run(words) == 3
    assert sent <= 16 * MIB, "what had arrived was sent again"
    assert qemu_img.compare(source, "raw", folder / "disk-disk0.qcow2", "qcow2").equal
    assert {path.name for path in folder.iterdir()} == {"disk.xml", "disk-disk0.qcow2", "machine.json"}
