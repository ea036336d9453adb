"""Machines in files: bare images, definitions, and folders that a conversion wrote."""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from pathlib import Path

import pytest

from formats import qemu_img
from formats.capture import Consistency, Unknown
from formats.definitions import PLATFORMS
from formats.errors import ImageError, ImageUnsupportedError, ReadError, ToolkitError, UnsafeImageError
from formats.images.raw import RawFile
from formats.machine import Disk, Firmware
from p2v.cli import run
from p2v.collect import files
from p2v.collect.files import FileOrigin
from p2v.emit import Emission
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
            if broken and offset >= 16 * MIB and sent > MIB:  # not the look at what lies on the disk
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


NOW = ("--boot-check", "none", "-q")


@needs("qemu-img", "qemu-nbd")
def test_a_resumed_run_that_stops_early_keeps_what_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_image(tmp_path / "disk.raw")
    words = ["convert", str(tmp_path / "disk.raw"), "--to", "libvirt", "-o", str(tmp_path / "vm"), *NOW]
    with monkeypatch.context() as patch:
        patch.setattr(Emission, "verify", interrupt)
        assert run(words) == 130
    part = tmp_path / "vm" / ".disk.part" / "disk-disk0.qcow2"
    assert part.exists()
    with monkeypatch.context() as patch:
        patch.setattr(FileOrigin, "capture", interrupt)
        assert run(words) == 130
    assert part.exists()
    assert run(words) == 3
    assert not part.exists()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@needs("qemu-img", "qemu-nbd")
def test_a_publication_that_breaks_off_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_image(tmp_path / "disk.raw")
    folder = tmp_path / "vm"
    words = ["convert", str(tmp_path / "disk.raw"), "--to", "libvirt", "-o", str(folder), *NOW]
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if target.suffix == ".xml":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        assert run(words) == 130
    assert not (folder / "disk.xml").exists()
    assert run(words) == 3
    assert {path.name for path in folder.iterdir()} == {"disk.xml", "disk-disk0.qcow2", "machine.json"}
    assert qemu_img.compare(tmp_path / "disk.raw", "raw", folder / "disk-disk0.qcow2", "qcow2").equal


@needs("qemu-img", "qemu-nbd")
@pytest.mark.parametrize("kind", ["qcow2", "vhdx", "vmdk"])
def test_a_disk_of_an_odd_size_reads_back_equal(tmp_path: Path, kind: str) -> None:
    (tmp_path / "disk.raw").write_bytes(os.urandom(MIB + 1000))
    platform = {"vhdx": "hyperv", "vmdk": "vmware-workstation"}.get(kind, "qemu")
    words = ["convert", str(tmp_path / "disk.raw"), "--to", platform, "-o", str(tmp_path / "vm"), *NOW]
    assert run([*words, "--disk-format", kind]) == 3


@needs("qemu-img", "qemu-nbd")
def test_a_disk_that_was_only_begun_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_image(tmp_path / "disk.raw")
    words = ["convert", str(tmp_path / "disk.raw"), "--to", "qemu", "-o", str(tmp_path / "vm"), *NOW]
    with monkeypatch.context() as patch:
        patch.setattr(Emission, "verify", interrupt)
        assert run(words) == 130
    begun = tmp_path / "vm" / ".disk.part" / "disk-disk0.qcow2"
    begun.unlink()
    qemu_img.create(begun, "qcow2", 0)
    assert run(words) == 3
    assert qemu_img.compare(tmp_path / "disk.raw", "raw", tmp_path / "vm" / "disk-disk0.qcow2", "qcow2").equal


@needs("qemu-img", "qemu-nbd")
def test_nothing_that_was_there_is_overwritten_or_removed(tmp_path: Path) -> None:
    raw_image(tmp_path / "disk.raw")
    folder = tmp_path / "vm"
    (folder / "web-boot").mkdir(parents=True)
    for name in ("web.xml", "web-boot/precious"):
        (folder / name).write_text("mine")
    words = ["convert", str(tmp_path / "disk.raw"), "--to", "libvirt", "-o", str(folder), *NOW]
    assert run([*words, "--name", "web-"]) == 2
    assert (folder / "web.xml").read_text() == "mine"
    assert run([*words, "--name", "web2"]) == 3
    assert (folder / "web-boot" / "precious").read_text() == "mine"
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "ok-disk0-flat.vmdk").write_text("mine")
    words = ["convert", str(tmp_path / "disk.raw"), "--to", "vmware-workstation", "-o", str(flat), *NOW]
    assert run([*words, "--name", "ok", "--disk-format", "vmdk:monolithicFlat"]) == 2
    assert (flat / "ok-disk0-flat.vmdk").read_text() == "mine"


def test_an_empty_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").touch()
    with pytest.raises(ImageError, match="empty"):
        FileOrigin(tmp_path / "disk.raw")


@pytest.mark.parametrize("folder", ["/proc/p2v", "/sys/kernel"])
def test_a_destination_that_cannot_be_written_is_a_usage_error(tmp_path: Path, folder: str) -> None:
    raw_image(tmp_path / "disk.raw")
    assert run(["convert", str(tmp_path / "disk.raw"), "--to", "libvirt", "-o", folder, *NOW]) == 2


def test_a_password_in_a_source_is_not_echoed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "ssh://root:pa/ss@host", "--json"]) == 2
    shown = capsys.readouterr()
    assert "pa/ss" not in shown.out + shown.err


@needs("qemu-img", "qemu-nbd")
@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_image_becomes_a_machine_of_every_platform(
    tmp_path: Path, platform: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image, folder = tmp_path / "web.raw", tmp_path / "vm"
    image.write_bytes(bytes(range(256)) * 8192)
    words = ["convert", str(image), "--to", platform, "-o", str(folder), "--boot-check", "none", "--json"]
    assert run(words) == 3  # not seen to boot
    plan = json.loads(capsys.readouterr().out)["data"]["plan"]
    assert (folder / f"web{PLATFORMS[platform].suffix}").exists()
    (disk,) = plan["disks"]
    back = tmp_path / "back.raw"
    assert run(["image", "convert", str(folder / disk["file"]), str(back), "-q"]) == 0
    assert back.read_bytes()[: 2 << 20] == image.read_bytes()
    assert run(["convert", str(folder), "--to", "qemu", "-o", str(tmp_path / "on"), "--boot-check", "none", "-q"]) == 3
