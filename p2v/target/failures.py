"""The known ways in which a machine does not boot: what they print, what they mean, what to do.

The texts are those of the programs themselves: SeaBIOS, OVMF, the MBR code of DOS, Windows and syslinux, GRUB 2, the Linux
kernel, initramfs-tools, dracut, systemd, sulogin, e2fsck, cryptsetup's scripts, bootmgr.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Weight(Enum):
    """What seeing a failure class means for the result."""

    FATAL = "fatal"  # the boot is over, whatever comes later
    DEAD_END = "dead-end"  # the boot is over unless a sign of life comes later
    CAUSE = "cause"  # does not end a boot, but explains why one ended
    WAITING = "waiting"  # a question that nobody answers here


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureClass:
    """One way to fail. ``pattern`` is searched in single lines of the console; None: seen otherwise.

    What a group of the pattern matches is the cause: the finding's message ends with it. ``inconsistency`` says that a copy of a file
    system that was being written explains it too. ``settle`` is by how much longer than usual it must stand: GRUB goes on by itself some
    seconds after an error, perhaps with a fallback entry.
    """

    code: str
    pattern: re.Pattern[str] | None
    weight: Weight
    message: str
    fix: str
    inconsistency: bool = False
    settle: float = 1.0


def _class(
    code: str,
    weight: Weight,
    pattern: str,
    message: str,
    fix: str,
    *,
    inconsistency: bool = False,
    settle: float = 1.0,
) -> FailureClass:
    compiled = re.compile(pattern) if pattern else None
    return FailureClass(
        code=code, pattern=compiled, weight=weight, message=message, fix=fix, inconsistency=inconsistency, settle=settle
    )


_LOADER_FIX = "check that the boot disk comes first and that a boot loader is installed on it for this firmware"
_NO_EFI_LOADER_FIX = (
    "put a loader at \\EFI\\BOOT\\BOOTX64.EFI of the EFI system partition, or carry the machine's boot entries along"
)
_DRIVER_FIX = (
    "the initramfs probably lacks the driver of the target's disk controller, or the root device is named in a way that"
    " changes: add the driver to the initramfs and name the root by UUID, or choose another disk bus"
)
_CHECK_FIX = "repair the file system on the source (fsck), or take a consistent capture (LVM snapshot)"

FAILURES: tuple[FailureClass, ...] = (
    # -- firmware and boot record --
    _class(
        "no-bootable-device",
        Weight.DEAD_END,
        r"No bootable device|No bootable option or device was found|Reboot and Select proper Boot device|"
        r"FATAL: No bootable medium|INT ?18h?: ?BOOT FAILURE|Boot Failure\. Press any key",
        "the firmware found nothing to boot",
        _LOADER_FIX,
    ),
    _class(
        "boot-record-empty",
        Weight.CAUSE,
        r"Boot failed: (?:not a bootable disk|could not read the boot disk)$",
        "the boot disk has no boot record that this firmware starts",
        _LOADER_FIX,
    ),
    _class(
        "no-operating-system",
        Weight.DEAD_END,
        r"(?i)^\s*(?:missing operating system|operating system not found|no operating system|invalid partition table|"
        r"error loading operating system|non-system disk|no active partition|"
        r"this is not a bootable disk|an operating system wasn't found)",
        "the boot record found no operating system to start",
        "mark the boot partition active and install the boot loader again",
    ),
    _class(
        "uefi-shell",
        Weight.DEAD_END,
        r"UEFI Interactive Shell|^Shell>",
        "the firmware fell into the UEFI shell: it found no boot loader",
        _NO_EFI_LOADER_FIX,
    ),
    _class(
        "uefi-boot-entry-failed",
        Weight.CAUSE,
        r"BdsDxe: failed to (?:load|start) Boot\w+",
        "the firmware could not start one of its boot entries",
        _NO_EFI_LOADER_FIX,
    ),
    _class(
        "secure-boot-refused",
        Weight.DEAD_END,
        r"Security Violation|Verification failed: \(0x1A\)|Secure Boot (?:violation|Violation)",
        "secure boot refused a boot loader or kernel",
        "turn secure boot off for this machine or sign what it starts",
    ),
    _class(
        "lilo-or-syslinux-failed",
        Weight.DEAD_END,
        r"^(?:SYSLINUX|EXTLINUX|ISOLINUX).*(?:[Bb]oot error|ERROR)|^(?:Could not find kernel image|No DEFAULT or UI)",
        "syslinux could not start the kernel",
        "install the boot loader again",
    ),
    # -- GRUB --
    _class(
        "grub-rescue",
        Weight.DEAD_END,
        r"grub rescue>|Entering rescue mode\.\.\.",
        "GRUB fell into rescue mode: it does not find its own files",
        "install GRUB again on the boot disk; check that the disk with /boot is among the machine's disks",
    ),
    _class(
        "grub-prompt",
        Weight.DEAD_END,
        r"^\s*grub>(?:\s|$)|Minimal BASH-like line editing is supported",
        "GRUB shows its prompt instead of a menu: it found no configuration",
        "write the boot loader's configuration again (update-grub, grub2-mkconfig)",
    ),
    _class(
        "grub-kernel-missing",
        Weight.DEAD_END,
        r"error: (?:file `[^']*(?:vmlinuz|vmlinux|bzImage|linux)[^']*' not found|you need to load the kernel first|"
        r"invalid magic number|premature end of file)",
        "GRUB could not load the kernel",
        "put the kernel that the configuration names back into /boot, or write the configuration again",
        inconsistency=True,
        settle=4.0,
    ),
    _class(
        "grub-error",
        Weight.CAUSE,
        r"error: (?:no such (?:device|partition|disk)|unknown filesystem|file `[^']*' not found|symbol `[^']*' not found|"
        r"disk `[^']*' not found|can't find command|attempt to read or write outside|no such cryptodisk|out of memory|"
        r"failure reading sector|hd\d+ read error)",
        "GRUB reported an error",
        "check /boot and the boot loader's configuration",
        inconsistency=True,
    ),
    _class(
        "systemd-boot-failed",
        Weight.DEAD_END,
        r"Failed to execute .*\.efi|Error loading .*\.efi|Failed to (?:load|open) kernel|Error (?:opening|loading) kernel",
        "the boot manager could not start the kernel",
        "check the loader entries on the EFI system partition",
    ),
    # -- kernel --
    _class(
        "root-mount-failed",
        Weight.CAUSE,
        r"VFS: (?:Cannot open root device|Unable to mount root fs)",
        "the kernel cannot mount the root file system",
        _DRIVER_FIX,
    ),
    _class(
        "kernel-panic",
        Weight.FATAL,
        r"(?:end )?Kernel panic - not syncing(?:: (?P<reason>[^\]]{1,120}))?",
        "the kernel panicked",
        "see the line; when it names the root file system or init, the initramfs lacks a driver or the root is not found",
    ),
    _class(
        "initramfs-damaged",
        Weight.CAUSE,
        r"Initramfs unpacking failed|(?:ZSTD|XZ|LZ4|LZMA|GZIP|gzip)-compressed data is (?:corrupt|truncated)|"
        r"junk (?:in compressed archive|within compressed archive)",
        "the initramfs is damaged",
        "make the initramfs again on the source (update-initramfs -u, dracut -f)",
        inconsistency=True,
    ),
    _class(
        "disk-read-error",
        Weight.CAUSE,
        r"(?:blk_update_request: )?(?:I/O error, dev|critical medium error, dev|Buffer I/O error on dev)",
        "the machine could not read a disk",
        "check the source disk and the image",
    ),
    # -- initramfs --
    _class(
        "root-device-missing",
        Weight.CAUSE,
        r"ALERT!\s+\S+ does not exist|Gave up waiting for (?:root|suspend/resume)|"
        r"Timed out waiting for (?:udev queue|root device)|dracut-initqueue: timeout, still waiting|[Ww]arning: \S+ does not exist|"
        r"[Uu]nable to find (?:root|LVM) (?:device|volume)|Could not boot\.|Cannot find (?:root|device)",
        "the root device was not found",
        _DRIVER_FIX,
    ),
    _class(
        "volume-group-missing",
        Weight.CAUSE,
        r'Volume group "[^"]+" not found|Cannot process volume group|Couldn\'t find device with uuid',
        "an LVM volume group was not found",
        "check that all disks of the volume group are among the machine's disks; " + _DRIVER_FIX,
    ),
    _class(
        "initramfs-shell",
        Weight.DEAD_END,
        r"^\s*\(initramfs\)",
        "the boot stopped in the initramfs shell",
        _DRIVER_FIX,
    ),
    _class(
        "dracut-shell",
        Weight.DEAD_END,
        r"dracut:/#|Generating \"/run/initramfs/rdsosreport\.txt\"|Entering emergency mode\. Exit the shell",
        "the boot stopped in dracut's emergency shell",
        _DRIVER_FIX,
    ),
    _class(
        "waits-for-passphrase",
        Weight.WAITING,
        r"(?i)please unlock disk|enter passphrase for|please enter passphrase|enter passphrase:",
        "the machine waits for the passphrase of an encrypted disk",
        "an encrypted machine cannot be seen booting without its passphrase",
    ),
    # -- userland --
    _class(
        "file-system-check",
        Weight.CAUSE,
        r"UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY|requires a manual fsck|fsck (?:failed|exited) with (?:exit|status) |"
        r"File system check of the root filesystem failed",
        "a file system needs to be checked by hand",
        _CHECK_FIX,
        inconsistency=True,
    ),
    _class(
        "file-system-damaged",
        Weight.CAUSE,
        r"EXT[234]-fs error|EXT4-fs \(\S+\): (?:no journal found|group descriptors corrupted|error loading journal)|"
        r"XFS \(\S+\): (?:Corruption|Metadata corruption|log mount/recovery failed)|BTRFS (?:error|critical)|"
        r"Structure needs cleaning",
        "a file system is damaged",
        _CHECK_FIX,
        inconsistency=True,
    ),
    _class(
        "mount-failed",
        Weight.CAUSE,
        r"\[FAILED\] Failed to mount (?P<reason>\S.{0,80}?)\.?$|Timed out waiting for device (?P<device>\S.{0,120}?)\.?$|"
        r"Dependency failed for (?:/|Local File)|[Mm]ount of filesystem failed",
        "a file system of /etc/fstab was not mounted",
        "name file systems by UUID in /etc/fstab, mark what the target does not have as nofail, include all disks",
        inconsistency=True,
    ),
    _class(
        "emergency-mode",
        Weight.DEAD_END,
        r"You are in emergency mode|Welcome to emergency (?:mode|shell)|Reached target (?:emergency\.target|Emergency Mode)|"
        r"Started (?:emergency\.service|Emergency Shell)",
        "the system stopped in emergency mode",
        "see the failed mounts and units on the console: mostly an entry of /etc/fstab that does not exist on the target",
        inconsistency=True,
    ),
    _class(
        "rescue-mode",
        Weight.DEAD_END,
        r"You are in rescue mode|Welcome to rescue mode|Reached target (?:rescue\.target|Rescue Mode)",
        "the system stopped in rescue mode",
        "remove the rescue target or `single` from the kernel's command line",
    ),
    _class(
        "maintenance-shell",
        Weight.DEAD_END,
        r"(?:Give root password for|Press Enter for|Cannot open access to console, the root account is locked)"
        r"(?: (?:system )?maintenance)?|\(or (?:type|press) Control-D to continue\)",
        "the system waits in its maintenance shell",
        "see what failed before it on the console",
        inconsistency=True,
    ),
    _class(
        "init-missing",
        Weight.CAUSE,
        r"No (?:working )?init found|Target filesystem doesn't have requested|No init found\. Try passing init=|"
        r"run-init: .*No such file",
        "the root file system has no init",
        "the root that was mounted is not the right one or is incomplete",
        inconsistency=True,
    ),
    # -- Windows --
    _class(
        "windows-stop",
        Weight.FATAL,
        r"(?i)\*\*\* STOP: 0x0*(?!7b\b)[0-9a-f]{2,8}|Stop code: (?!INACCESSIBLE)[A-Z_]{4,}",
        "Windows stopped with a blue screen",
        "look the stop code up; after a move it is mostly a driver of the old hardware: disable it in safe mode on the source",
        inconsistency=True,
    ),
    _class(
        "windows-no-boot-disk",
        Weight.FATAL,
        r"(?i)STOP: 0x0*7b\b|INACCESSIBLE[_ ]BOOT[_ ]DEVICE",
        "Windows does not find the disk that it starts from (stop code 0x7B)",
        "have the driver of the target's disk controller start at boot (Start=0 of its service) before the move, or choose a bus"
        " that Windows drives already (SATA, IDE)",
    ),
    _class(
        "bitlocker-recovery",
        Weight.WAITING,
        r"(?i)bitlocker (?:drive encryption )?(?:recovery|needs your recovery key)|enter the (?:recovery key|password|PIN) "
        r"(?:for|to unlock) this drive",
        "BitLocker asks for its recovery key: the new hardware has another TPM, or none",
        "suspend BitLocker on the source before the move (manage-bde -protectors -disable C:), or keep the recovery key at hand",
    ),
    _class(
        "windows-loader",
        Weight.DEAD_END,
        r"(?:BOOTMGR|NTLDR) is (?:missing|compressed)|BOOTMGR image is corrupt|Windows (?:failed to start|Boot Manager)|"
        r"A disk read error occurred|Couldn't find (?:BOOTMGR|NTLDR)|0xc000000[ef]|0xc0000225",
        "the Windows boot loader reports an error",
        "repair the boot configuration (bcdboot) or choose the firmware that the machine was installed for",
    ),
    # -- seen otherwise --
    _class(
        "reboot-loop",
        Weight.FATAL,
        "",
        "the machine resets itself again and again",
        "see what stands on the console before each reset; a triple fault without output is mostly a loader for other firmware",
    ),
    _class(
        "powered-off",
        Weight.FATAL,
        "",
        "the machine switched itself off",
        "see the console for what ended it",
    ),
    _class(
        "processor-halted",
        Weight.FATAL,
        "",
        "every processor is halted with interrupts off",
        "the boot record or loader gave up: install the boot loader again",
    ),
    _class(
        "no-progress",
        Weight.FATAL,
        "",
        "firmware and boot loader make no progress",
        "install the boot loader again; see the console and the screenshot",
    ),
    _class(
        "source-read-error",
        Weight.CAUSE,
        "",
        "QEMU could not read or write a disk's data",
        "check the source and the link to it, and the room for the overlay; then boot again",
        inconsistency=True,
    ),
)

BY_CODE = {failure.code: failure for failure in FAILURES}
