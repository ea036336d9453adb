"""Will it boot there? What is known before a byte is copied, each finding with what will happen and its fix.

A BLOCKER is certain: the platform cannot take the machine, or no driver can be found. A RISK is likely to need attention;
the boot verdict decides. A NOTE is worth knowing and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from formats.definitions import Hardware, profile_of
from formats.errors import ToolkitError
from formats.machine import Firmware, Machine
from p2v.drivers import BUS_DRIVERS, lacking
from p2v.plan import disks_of, plan


class Severity(StrEnum):
    """How sure and how bad."""

    BLOCKER = "blocker"
    RISK = "risk"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found. ``code`` is stable kebab-case; ``subject`` the disk, kernel or interface it is about.

    ``adapted``: the adaptation of a live machine sees to it.
    """

    code: str
    severity: Severity
    message: str
    fix: str = ""
    subject: str = ""
    adapted: bool = False


_HYPERV = (frozenset({"hv_storvsc"}), frozenset({"sd_mod"}))

# Names that systemd and the BIOS derive from where the card sits: another mainboard, another name (systemd.net-naming-scheme).
_PLACED_NAME = re.compile(r"(en|eth|wl)(o\d|s\d|p\d|P\d|x[0-9a-f]{12})")
_ENCRYPTED = "crypto_LUKS"


def examine(machine: Machine, platform: str, disk_format: str = "", hardware: Hardware | None = None) -> list[Finding]:
    """All findings for the machine on the platform, the worst first. ``UsageError`` for a platform that does not exist."""
    chosen = hardware or profile_of(platform).default_hardware(machine)
    found = [finding for check in _CHECKS for finding in check(machine, chosen, platform)]
    found += _fits(machine, platform, disk_format, chosen)
    order = list(Severity)
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _fits(machine: Machine, platform: str, disk_format: str, hardware: Hardware) -> Iterator[Finding]:
    """Sizes, formats, firmware and counts: what the platform's own table refuses."""
    try:
        plan(machine, profile_of(platform), hardware, folder=Path(), name="machine", disk_format=disk_format)
    except ToolkitError as error:
        yield Finding(
            code="platform-refuses",
            severity=Severity.BLOCKER,
            message=error.message,
            fix=error.advice,
            subject=error.subject,
        )


def _no_disks(machine: Machine, _hardware: Hardware, _platform: str) -> Iterator[Finding]:
    for disk in machine.disks:
        if not machine.belongs(disk):
            yield Finding(
                code="removable-disk",
                severity=Severity.NOTE,
                message="is removable or on USB, and is not converted",
                subject=disk.name or disk.id,
            )
    if machine.disks and not disks_of(machine):
        yield Finding(code="no-fixed-disk", severity=Severity.BLOCKER, message="the machine has removable disks only")


def _kernels(machine: Machine, hardware: Hardware, platform: str) -> Iterator[Finding]:
    needed = (
        _HYPERV if platform == "hyperv" and hardware.firmware is Firmware.UEFI else BUS_DRIVERS.get(hardware.bus, ())
    )
    for kernel in machine.boot.kernels:
        if kernel.drivers is None:
            yield Finding(
                code="initramfs-unread",
                severity=Severity.NOTE,
                message="its initramfs could not be read: whether it has the drivers is left to the boot check",
                subject=kernel.version,
            )
            continue
        if missing := lacking(kernel, needed):
            default = kernel.version == machine.boot.running_kernel
            host_only = " (it was made for the source's hardware alone)" if kernel.host_only else ""
            yield Finding(
                code="initramfs-lacks-driver",
                severity=Severity.RISK if default else Severity.NOTE,
                message=f"the initramfs has no {', '.join(missing)} for {hardware.bus} disks{host_only}: it will not find its root",
                fix="Rebuild it on the source with all drivers (initramfs-tools: MODULES=most and update-initramfs -u -k all; "
                "dracut: dracut --no-hostonly --regenerate-all --force), or choose a platform with the source's kind of bus.",
                subject=kernel.version,
                adapted=True,
            )


def _network(machine: Machine, _hardware: Hardware, _platform: str) -> Iterator[Finding]:
    for nic in machine.nics:
        if nic.configured_by and _PLACED_NAME.match(nic.name):
            yield Finding(
                code="nic-renamed",
                severity=Severity.RISK,
                message=f"its name follows from its slot and will differ in the virtual machine: what {nic.configured_by} "
                "configures by this name will not come up",
                fix=f"Before converting, bind the name to the address {nic.mac}: a systemd .link file with "
                f"[Match] PermanentMACAddress={nic.mac} and [Link] Name={nic.name}. The definition keeps the MAC address.",
                subject=nic.name,
                adapted=True,
            )


def _encryption(machine: Machine, _hardware: Hardware, _platform: str) -> Iterator[Finding]:
    for volume in machine.volumes:
        if volume.content == _ENCRYPTED:
            yield Finding(
                code="encrypted",
                severity=Severity.RISK,
                message="is encrypted: unless it is unlocked without a person, the boot check ends unproven at the passphrase prompt",
                fix="Keep the passphrase at hand; a key in the source's TPM does not come along.",
                subject=volume.path,
            )


def _firmware(machine: Machine, hardware: Hardware, platform: str) -> Iterator[Finding]:
    if machine.boot.secure_boot and not hardware.secure_boot:
        yield Finding(
            code="secure-boot-off",
            severity=Severity.NOTE,
            message=f"Secure Boot is on at the source and will be off on {platform}",
        )
    if machine.firmware is Firmware.UEFI and not machine.boot.efi_variables:
        yield Finding(
            code="efi-variables-unread",
            severity=Severity.NOTE,
            message="the boot entries could not be read: the virtual machine starts the fallback loader \\EFI\\BOOT",
        )


def _nature(machine: Machine, _hardware: Hardware, platform: str) -> Iterator[Finding]:
    if machine.platform.virtualization:
        yield Finding(
            code="already-virtual",
            severity=Severity.NOTE,
            message=f"the source is a virtual machine already ({machine.platform.virtualization}); its guest tools stay installed",
        )
    if platform == "hyperv":
        yield Finding(
            code="stand-in-hardware",
            severity=Severity.NOTE,
            message="QEMU has no VMBus devices: the boot check runs on the controller that is nearest to Hyper-V's",
        )


_Check = Callable[[Machine, Hardware, str], Iterator[Finding]]
_CHECKS: tuple[_Check, ...] = (_no_disks, _kernels, _network, _encryption, _firmware, _nature)
