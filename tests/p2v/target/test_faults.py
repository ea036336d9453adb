"""The fault table of the level `boots`: real Debian machines, each broken in one way, really booted. Slow: nightly.

machine x fault -> expected result and finding. A machine without a fault must pass: no false alarm.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from formats.images.raw import RawFile
from formats.machine import Boot, Disk, Machine, Volume
from p2v.emulator import Accelerator
from p2v.target.boots import BootDisk, boot
from p2v.target.disks import prove_data_disks
from p2v.target.evidence import Patience
from p2v.target.hardware import platform_hardware
from p2v.target.verdict import Result
from tests.machines.builder import BuiltMachine
from tests.requirement import needs

pytestmark = [pytest.mark.nightly, pytest.mark.slow_boot, needs("qemu-system-x86_64", "debugfs", "cpio", "zstd")]

_PARTITION = 1 << 20  # the first partition of both machines


def debugfs(disk: Path, *commands: str, at: int = _PARTITION) -> str:
    """Run debugfs' commands on the file system at this offset, writing."""
    out = ""
    for command in commands:
        done = subprocess.run(
            ["debugfs", "-w", "-R", command, f"{disk}?offset={at}"], capture_output=True, text=True, check=True
        )
        out += done.stdout
    return out


def _names(disk: Path, folder: str, prefix: str) -> list[str]:
    listing = debugfs(disk, f"ls -p {folder}")
    return [name for line in listing.splitlines() if "/" in line and (name := line.split("/")[5]).startswith(prefix)]


def _replaced(disk: Path, path: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file; debugfs' `write` takes a file from outside, so the old one goes first."""
    outside = disk.with_name("outside")
    debugfs(disk, f"dump {path} {outside}")
    outside.write_bytes(change(outside.read_bytes()))
    folder, _, name = path.rpartition("/")
    done = subprocess.run(
        ["debugfs", "-w", "-f", "-", f"{disk}?offset={_PARTITION}"],
        input=f"rm {path}\ncd {folder or '/'}\nwrite {outside} {name}\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"Allocated inode" in done.stdout, done.stderr  # noqa: F541


def zeroed(start: int, length: int) -> Callable[[Path], None]:
    def apply(disk: Path) -> None:
        with disk.open("r+b") as file:
            file.seek(start)
            file.write(bytes(length))

    return apply


def removed(folder: str, prefix: str) -> Callable[[Path], None]:
    def apply(disk: Path) -> None:
        names = _names(disk, folder, prefix)
        assert names
        debugfs(disk, *(f"rm {folder.rstrip('/')}/{name}" for name in names))

    return apply


def cut(prefix: str, length: int) -> Callable[[Path], None]:
    def apply(disk: Path) -> None:
        for name in _names(disk, "/boot", prefix):
            _replaced(disk, f"/boot/{name}", lambda content: content[:length])

    return apply


def fstab(line: str) -> Callable[[Path], None]:
    return lambda disk: _replaced(disk, "/etc/fstab", lambda content: content + line.encode() + b"\n")


def configured(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new)

    return lambda disk: _replaced(disk, "/boot/grub/grub.cfg", change)


def without_drivers(disk: Path) -> None:
    """An initramfs that has no virtio: as one made for the old hardware alone."""

    def change(content: bytes) -> bytes:
        # Same length, so that neither cpio nor anything behind it moves: the modules' names are what modprobe looks for.
        plain = subprocess.run(["zstd", "-dc"], input=content, capture_output=True, check=True).stdout
        for name in (b"virtio_blk.ko", b"virtio_pci.ko", b"virtio_scsi.ko"):
            plain = plain.replace(name, b"xirtio" + name[6:])
        return subprocess.run(["zstd", "-1c"], input=plain, capture_output=True, check=True).stdout

    for name in _names(disk, "/boot", "initrd.img-"):
        _replaced(disk, f"/boot/{name}", change)


def manual_check(disk: Path) -> None:
    """A root that e2fsck does not repair unasked: a file's map of blocks is nonsense, and the file system is marked as having errors."""
    debugfs(disk, "set_inode_field /etc/hostname block[0] 1", "ssv state 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    name: str
    apply: Callable[[Path], None]
    result: Result
    codes: frozenset[str]
    says: str = ""


def _fault(name: str, apply: Callable[[Path], None], result: Result, *codes: str, says: str = "") -> Fault:
    return Fault(name=name, apply=apply, result=result, codes=frozenset(codes), says=says)


_NOWHERE = "UUID=00000000-1111-2222-3333-444444444444 /data ext4 defaults,x-systemd.device-timeout=20s 0 2"

FAULTS = [
    _fault("nothing", lambda _: None, Result.PASS),
    _fault("boot record zeroed", zeroed(0, 512), Result.FAIL, "no-bootable-device"),
    _fault("boot code zeroed", zeroed(0, 440), Result.FAIL),
    _fault("core.img wiped", zeroed(512, 100 * 512), Result.FAIL),
    _fault("four sectors of core.img zeroed: GRUB repairs them", zeroed(40 * 512, 4 * 512), Result.PASS),
    _fault("partition entry gone", zeroed(446, 16), Result.FAIL, "grub-rescue"),
    _fault("superblock dead", zeroed(_PARTITION + 1024, 1024), Result.FAIL, "grub-rescue"),
    _fault("normal.mod missing", removed("/boot/grub/i386-pc", "normal.mod"), Result.FAIL, "grub-rescue"),
    _fault("grub.cfg missing", removed("/boot/grub", "grub.cfg"), Result.FAIL, "grub-prompt"),
    _fault("kernel missing", removed("/boot", "vmlinuz-"), Result.FAIL, "grub-kernel-missing"),
    _fault("kernel truncated", cut("vmlinuz-", 4 << 20), Result.FAIL),
    _fault("initrd missing", removed("/boot", "initrd.img-"), Result.FAIL, "kernel-panic"),
    _fault("initrd truncated", cut("initrd.img-", 8 << 20), Result.FAIL, "kernel-panic"),
    _fault("fstab names a missing disk", fstab(_NOWHERE), Result.FAIL, "emergency-mode", says="/data"),
    _fault("initramfs without the driver", without_drivers, Result.FAIL, "initramfs-shell", "root-device-missing"),
    _fault("root needs a manual check", manual_check, Result.FAIL, "file-system-check"),
    _fault("init missing: panic", configured(b" ro console", b" init=/nowhere rdinit=/nowhere ro console"), Result.FAIL, "kernel-panic"),
    _fault("root is another", configured(b"root=UUID=5", b"root=UUID=6"), Result.FAIL, "root-device-missing"),
    _fault("emergency target", configured(b" ro console", b" systemd.unit=emergency.target ro console"), Result.FAIL, "emergency-mode"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_bios_plain(bios_plain_disk: BuiltMachine, tmp_path: Path, fault: Fault) -> None:
    disk = tmp_path / "disk.raw"
    subprocess.run(["cp", "--sparse=always", str(bios_plain_disk.disk), str(disk)], check=True)
    disk.chmod(0o600)
    fault.apply(disk)
    verdict = boot(
        None, [BootDisk(path=disk)], platform_hardware("qemu").hardware, folder=tmp_path / "boot",
        accelerator=Accelerator.TCG, patience=replace(Patience.emulated(), total=600),
    )  # fmt: skip
    found = [finding.describe() for finding in verdict.findings]
    print(
        f"\n| bios-plain | {fault.name} | {fault.result} | {verdict.result} | {verdict.seconds} s | {verdict.reason} |"
    )
    assert verdict.result is fault.result, found
    assert fault.codes <= {finding.code for finding in verdict.findings}, found
    assert fault.says in verdict.reason or any(fault.says in text for text in found), found
    if fault.result is Result.FAIL:
        assert all(finding.fix for finding in verdict.findings)


# -- the data disk of uefi-dracut ------------------------------------------------------------------------------------


@needs("debugfs")
@pytest.mark.parametrize(
    ("start", "length", "result"),
    [
        (0, 0, Result.PASS),
        (_PARTITION + 1024, 1024, Result.FAIL),
        (0, 34 * 512, Result.FAIL),
        (_PARTITION, 64 << 20, Result.FAIL),
    ],
)
def test_a_damaged_data_disk(
    uefi_dracut_disk: BuiltMachine, tmp_path: Path, start: int, length: int, result: Result
) -> None:
    [source] = uefi_dracut_disk.further_disks
    disk = tmp_path / "data.raw"
    subprocess.run(["cp", "--sparse=always", str(source), str(disk)], check=True)
    disk.chmod(0o600)
    with disk.open("rb") as file:
        file.seek(_PARTITION + 0x468)
        digits = file.read(16).hex()
    uuid = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    if length:
        zeroed(start, length)(disk)
    data, main = RawFile(disk), RawFile(uefi_dracut_disk.disk)
    try:
        machine = Machine(
            name="metal3",
            disks=(Disk(id="main", size=main.size, name="sda"), Disk(id="data", size=data.size, name="sdb")),
            volumes=(
                Volume(path="/dev/sdb1", kind="part", size=data.size, parents=("/dev/sdb",), content="ext4", uuid=uuid,
                       mountpoints=("/data",)),
            ),
            boot=Boot(disk="main"),
        )  # fmt: skip
        [proof] = prove_data_disks(machine, {"main": main, "data": data})
    finally:
        data.close()
        main.close()
    print(
        f"\n| uefi-dracut | data disk, {length} bytes at {start} zeroed | {result} | {proof.result} | {proof.findings} |"
    )
    assert proof.result is result, proof
