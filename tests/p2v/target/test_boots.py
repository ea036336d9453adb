"""Verdicts on real boots: boot sectors that act each class in a second, and a real machine, sound and broken."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from formats import qemu_img
from formats.errors import UnsafeImageError
from formats.machine import Firmware
from p2v.emulator import Accelerator, Chipset, Controller, Hardware, NicModel
from p2v.target.boots import BootDisk, boot
from p2v.target.evidence import Patience
from p2v.target.hardware import platform_hardware
from p2v.target.verdict import Level, Result, Verdict
from tests.machines.builder import BuiltMachine
from tests.p2v.boot_sector import Step, boot_disk
from tests.requirement import needs

pytestmark = needs("qemu-system-x86_64", "qemu-img", "qemu-nbd")

QUICK = Patience(total=30, idle=6, busy=6, early=4, settle=0.6)


def run(folder: Path, *steps: Step, ending: str = "idle", patience: Patience = QUICK, fuzzy: bool = False) -> Verdict:
    disk = boot_disk(folder / "disk.raw", steps, ending)
    return boot(
        None,
        [BootDisk(path=disk)],
        Hardware(memory=256 << 20, cpus=1),
        folder=folder,
        patience=patience,
        accelerator=Accelerator.TCG,
        fuzzy=fuzzy,
    )


def codes(verdict: Verdict) -> set[str]:
    return {finding.code for finding in verdict.findings}


@pytest.mark.parametrize("stream", ["screen", "serial"])
def test_a_login_prompt_passes(tmp_path: Path, stream: str) -> None:
    verdict = run(tmp_path, ("wait", 10), (stream, "\nmetal1 login: "))
    assert (verdict.level, verdict.result, verdict.findings) == (Level.BOOTS, Result.PASS, ())
    assert ("login-prompt", stream) in [(signal.code, signal.stream) for signal in verdict.signals]
    assert 0 < verdict.seconds < 30
    assert verdict.bytes_read[0] >= 512
    assert Path(verdict.screenshot).read_bytes().startswith(b"\x89PNG")
    if stream == "serial":
        assert Path(verdict.console).read_bytes() == b"\r\nmetal1 login: "


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("no-operating-system", "Missing operating system."),
        ("grub-rescue", "error: unknown filesystem.\nEntering rescue mode...\ngrub rescue> "),
        ("grub-prompt", "GNU GRUB  version 2.06\n\ngrub> "),
        ("kernel-panic", "[ 1.0] Linux version 6.1\n[ 2.0] Kernel panic - not syncing: VFS: Unable to mount root fs"),
        ("initramfs-shell", "ALERT!  UUID=1 does not exist.  Dropping to a shell!\n(initramfs) "),
        ("emergency-mode", "You are in emergency mode. After logging in\nGive root password for maintenance\n"),
        ("dracut-shell", "Entering emergency mode. Exit the shell to continue.\ndracut:/# "),
    ],
)
@pytest.mark.parametrize("stream", ["screen", "serial"])
def test_a_dead_end_fails(tmp_path: Path, stream: str, code: str, text: str) -> None:
    verdict = run(tmp_path, (stream, text))
    assert verdict.result is Result.FAIL
    assert code in codes(verdict)
    assert all(finding.fix and finding.evidence for finding in verdict.findings)


def test_a_dead_end_that_the_machine_leaves_is_no_failure(tmp_path: Path) -> None:
    patience = Patience(total=30, idle=6, busy=6, early=4, settle=3)
    verdict = run(tmp_path, ("serial", "(initramfs) "), ("wait", 20), ("serial", "\nmetal1 login: "), patience=patience)
    assert verdict.result is Result.PASS
    assert codes(verdict) == {"initramfs-shell"}


def test_a_menu_that_counts_down_is_no_failure(tmp_path: Path) -> None:
    count = [("screen", f"\rThe highlighted entry will be executed automatically in {n}s.") for n in (3, 2, 1)]
    steps: list[Step] = [step for line in count for step in (line, ("wait", 18))]
    patience = Patience(total=30, idle=6, busy=6, early=2, settle=0.6)
    verdict = run(tmp_path, *steps, ("serial", "\nmetal1 login: "), patience=patience)
    assert verdict.result is Result.PASS


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("halt", "processor-halted"),
        ("spin", "no-progress"),
        ("idle", "no-progress"),
        ("triple-fault", "reboot-loop"),
        ("reset", "reboot-loop"),
        ("power-off", "powered-off"),
    ],
)
def test_an_end_without_words_fails(tmp_path: Path, ending: str, code: str) -> None:
    verdict = run(tmp_path, ("screen", "GRUB"), ending=ending)
    assert verdict.result is Result.FAIL
    assert codes(verdict) == {code}


def test_a_kernel_that_says_nothing_more_is_unproven(tmp_path: Path) -> None:
    verdict = run(tmp_path, ("screen", "Loading initial ramdisk ..."))
    assert verdict.result is Result.UNPROVEN
    assert codes(verdict) == {"no-signal"}


def test_a_disk_without_a_system_fails(tmp_path: Path) -> None:
    (tmp_path / "empty.raw").write_bytes(bytes(1 << 20))
    drive = BootDisk(path=tmp_path / "empty.raw")
    verdict = boot(None, [drive], Hardware(), folder=tmp_path, patience=QUICK, accelerator=Accelerator.TCG)
    assert verdict.result is Result.FAIL
    assert codes(verdict) == {"boot-record-empty", "no-bootable-device"}


def test_boots_over_nbd_and_the_verdict_is_json(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "disk.raw", [("serial", "metal1 login: ")])
    heard: list[str] = []
    with qemu_img.serve(disk, "raw") as uri:
        verdict = boot(
            None, [BootDisk(uri=uri)], Hardware(nic=None), folder=tmp_path, patience=QUICK, listen=heard.append,
            accelerator=Accelerator.TCG,
        )  # fmt: skip
    assert verdict.result is Result.PASS
    assert any("login-prompt" in line for line in heard)
    answer = msgspec.json.decode(msgspec.json.encode(verdict))
    assert {"level", "result", "signals", "findings", "seconds", "console", "screenshot"} <= set(answer)
    assert (answer["level"], answer["result"]) == ("boots", "pass")


def test_a_vanished_source_is_unproven(tmp_path: Path) -> None:
    # The boot sector asks for a sector again and again, by which time the server is gone, and then panics.
    disk = boot_disk(tmp_path / "disk.raw", [("serial", "wait")])
    code = bytes.fromhex(
        "31c08ed88ec08ed0bc007cfb b90f00 f4 e2fd b442 b280 be007d cd13 be107d ac 84c0 7406 baf803 ee ebf5 f4 ebfd"
    )
    packet = bytes.fromhex("1000 0100 0080 0000 6400000000000000")
    sector = (code.ljust(0x100, b"\0") + packet + b"Kernel panic - not syncing\r\n\0").ljust(510, b"\0") + b"\x55\xaa"
    disk.write_bytes(sector.ljust(1 << 20, b"\0"))
    server = qemu_img.Server(disk, "raw")
    threading.Timer(0.8, server.close).start()
    patience = Patience(total=30, idle=6, busy=6, early=6, settle=1.5)
    verdict = boot(
        None, [BootDisk(uri=server.uri)], Hardware(), folder=tmp_path, patience=patience, accelerator=Accelerator.TCG
    )
    assert verdict.result is Result.UNPROVEN
    assert "source-read-error" in codes(verdict)


def test_a_stop_ends_the_boot_unproven(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "disk.raw", [("screen", "Loading initial ramdisk ...")])
    stop = threading.Event()
    stop.set()
    verdict = boot(None, [BootDisk(path=disk)], Hardware(), folder=tmp_path, accelerator=Accelerator.TCG, stop=stop)
    assert verdict.result is Result.UNPROVEN


def test_nothing_to_boot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing"):
        boot(None, [], Hardware(), folder=tmp_path)


@pytest.mark.skipif(not Path("/usr/share/OVMF/OVMF_CODE_4M.fd").exists(), reason="not installed: ovmf")
def test_uefi_with_an_empty_disk_fails(tmp_path: Path) -> None:
    (tmp_path / "empty.raw").write_bytes(bytes(1 << 20))
    hardware = Hardware(firmware=Firmware.UEFI, chipset=Chipset.Q35, controller=Controller.SATA, nic=NicModel.E1000E)
    patience = Patience(total=90, idle=30, busy=60, early=60, settle=1)
    drive = BootDisk(path=tmp_path / "empty.raw")
    verdict = boot(None, [drive], hardware, folder=tmp_path, patience=patience, accelerator=Accelerator.TCG)
    assert verdict.result is Result.FAIL
    assert codes(verdict) & {"uefi-shell", "no-bootable-device"}


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("qcow2", ""),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vpc", ""),
        ("vhdx", ""),
        ("vdi", ""),
    ],
)
def test_boots_an_image_of_each_format(tmp_path: Path, driver: str, options: str) -> None:
    raw, image = boot_disk(tmp_path / "disk.raw", [("serial", "metal1 login: ")]), tmp_path / "image"
    extra = ["-o", options] if options else []
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", driver, *extra, str(raw), str(image)], check=True)
    disk = BootDisk(path=image, format=driver)
    verdict = boot(None, [disk], Hardware(), folder=tmp_path, patience=QUICK, accelerator=Accelerator.TCG)
    assert verdict.result is Result.PASS


def test_an_image_that_reaches_for_another_file_is_refused(tmp_path: Path) -> None:
    raw, image = boot_disk(tmp_path / "disk.raw", [("serial", "metal1 login: ")]), tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(raw), "-F", "raw", str(image)], check=True)
    with pytest.raises(UnsafeImageError):
        boot(None, [BootDisk(path=image, format="qcow2")], Hardware(), folder=tmp_path, patience=QUICK)


# -- a real machine --------------------------------------------------------------------------------------------------


def real(disk: Path, folder: Path, platform: str) -> Verdict:
    hardware = platform_hardware(platform).hardware
    return boot(None, [BootDisk(path=disk)], hardware, folder=folder, accelerator=Accelerator.TCG)


def on_boot_partition(disk: Path, change: Callable[[str], None]) -> None:
    # The recipe's /boot is the first partition, at 1 MiB; debugfs takes an offset in the name.
    change(f"{disk}?offset={1 << 20}")


@pytest.fixture
def copy(bios_lvm_disk: BuiltMachine, tmp_path: Path) -> Path:
    target = tmp_path / "copy.raw"
    subprocess.run(["cp", "--sparse=always", str(bios_lvm_disk.disk), str(target)], check=True)
    target.chmod(0o600)
    return target


@pytest.mark.slow_boot
def test_a_sound_machine_boots(bios_lvm_disk: BuiltMachine, tmp_path: Path) -> None:
    verdict = real(bios_lvm_disk.disk, tmp_path / "boot", "vsphere")
    assert verdict.result is Result.PASS
    seen = {signal.code for signal in verdict.signals}
    assert {"loader", "kernel", "initramfs", "userland"} <= seen
    assert seen & {"login-prompt", "ssh-banner"}
    assert verdict.bytes_read[0] < 512 << 20


@pytest.mark.slow_boot
@needs("debugfs")
def test_a_machine_without_its_kernel_fails_in_grub(copy: Path, tmp_path: Path) -> None:
    def remove(partition: str) -> None:
        listing = subprocess.run(
            ["debugfs", "-R", "ls -p /", partition], capture_output=True, text=True, check=True
        ).stdout
        names = [line.split("/")[5] for line in listing.splitlines() if "/vmlinuz-" in line]
        assert names
        for name in names:
            subprocess.run(["debugfs", "-w", "-R", f"rm /{name}", partition], capture_output=True, check=True)

    on_boot_partition(copy, remove)
    verdict = real(copy, tmp_path / "boot", "proxmox")
    assert verdict.result is Result.FAIL
    assert "grub-kernel-missing" in codes(verdict)
    assert "kernel" not in {signal.code for signal in verdict.signals}
    assert verdict.bytes_read[0] < 64 << 20


@pytest.mark.slow_boot
def test_a_machine_with_a_wrong_root_fails_in_the_initramfs(copy: Path, tmp_path: Path) -> None:
    # Same length, in the blocks of /boot alone: no file system has to be written.
    with copy.open("r+b") as file:
        file.seek(1 << 20)
        boot_partition = file.read(300 << 20)
        good = b"root=/dev/mapper/vg0-root"
        assert good in boot_partition
        file.seek(1 << 20)
        file.write(boot_partition.replace(good, b"root=/dev/mapper/vg9-root"))
    verdict = real(copy, tmp_path / "boot", "proxmox")
    assert verdict.result is Result.FAIL
    assert {"initramfs-shell", "root-device-missing"} <= codes(verdict)


@pytest.mark.slow_boot
@needs("debugfs", "mkfs.vfat", "mcopy")
@pytest.mark.skipif(not Path("/usr/share/OVMF/OVMF_CODE_4M.fd").exists(), reason="not installed: ovmf")
def test_a_panic_under_uefi_is_read_from_the_frame_buffer(bios_lvm_disk: BuiltMachine, tmp_path: Path) -> None:
    # A kernel as the fallback loader of an EFI system partition, with neither initramfs nor root nor serial console.
    partition, kernel, disk = f"{bios_lvm_disk.disk}?offset={1 << 20}", tmp_path / "vmlinuz", tmp_path / "esp.raw"
    listing = subprocess.run(["debugfs", "-R", "ls -p /", partition], capture_output=True, text=True, check=True).stdout
    name = next(line.split("/")[5] for line in listing.splitlines() if "/vmlinuz-" in line)
    subprocess.run(["debugfs", "-R", f"dump /{name} {kernel}", partition], capture_output=True, check=True)
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.vfat", "-F", "32", str(disk)], capture_output=True, check=True)
    subprocess.run(["mmd", "-i", str(disk), "::/EFI", "::/EFI/BOOT"], check=True)
    subprocess.run(["mcopy", "-i", str(disk), str(kernel), "::/EFI/BOOT/BOOTX64.EFI"], check=True)
    hardware = platform_hardware("libvirt", firmware=Firmware.UEFI).hardware
    verdict = boot(None, [BootDisk(path=disk)], hardware, folder=tmp_path / "boot", accelerator=Accelerator.TCG)
    assert verdict.result is Result.FAIL
    assert {"kernel-panic", "root-mount-failed"} <= codes(verdict)
    assert b"Kernel panic" not in Path(verdict.console).read_bytes()  # so it was read off the screen
