"""What has to change in a machine so that it starts on hardware it has never seen; decided from its record, printable, nothing is done."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from formats.definitions import Hardware
from formats.errors import UsageError
from formats.machine import Firmware, Machine
from p2v.drivers import BUS_DRIVERS, drivers_of

ITEMS = ("initramfs", "names", "device-map", "lvm-devices", "network", "console", "efi-fallback", "selinux")
"""Every item by the name that ``--adapt-only`` takes, in the order in which they are done."""

STORAGE_DRIVERS = (
    *("virtio_pci", "virtio_blk", "virtio_scsi", "ahci", "nvme", "ata_piix", "ata_generic", "sd_mod"),
    *("mptspi", "mptsas", "vmw_pvscsi", "megaraid_sas", "hv_vmbus", "hv_storvsc", "xen_blkfront"),
)
"""Modules that find the disks of some platform. An initramfs has to hold each that its kernel has."""

NETWORK_DRIVERS = ("virtio_net", "e1000", "e1000e", "vmxnet3", "hv_netvsc", "xen_netfront")
"""Modules for the platforms' network cards: they are loaded from the root file system, so no initramfs is changed for their sake."""

_ONLY_FIRST_PORT = re.compile(r"ttyS[1-9]\d*(,|$)")
_LAST_RESORT = "whether there is anything to do is seen in the machine itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptItem:
    """One thing to see to, and why. ``name`` is one of ``ITEMS``."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptPlan:
    """The items in order; none means that there is nothing to do.

    ``rebuild`` asks for initramfs images made anew by the distribution's own tool where the missing drivers would otherwise be appended.
    """

    items: tuple[AdaptItem, ...] = ()
    rebuild: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The names of the items."""
        return frozenset(item.name for item in self.items)


def plan_adaptation(
    machine: Machine, hardware: Hardware | None = None, only: frozenset[str] | None = None, *, rebuild: bool = False
) -> AdaptPlan:
    """The plan for ``machine``; ``hardware`` of the target is named in the reasons. ``only`` keeps these items and leaves out all others.

    ``rebuild``: see ``AdaptPlan``. Raises ``UsageError`` for an item that does not exist.
    """
    unknown = sorted((only or frozenset()) - set(ITEMS))
    if unknown:
        raise UsageError(
            f"there is nothing to adapt called {', '.join(unknown)}", advice=f"choose from: {', '.join(ITEMS)}"
        )
    if machine.system.family not in {"", "linux"}:
        return AdaptPlan()
    reasons = {
        "initramfs": _initramfs(machine, hardware, rebuild=rebuild),
        "names": f"names of disks that follow from the order in which they are found give way to UUIDs; {_LAST_RESORT}",
        "device-map": "GRUB's list of the disks names those of the source" if "grub" in machine.boot.loader else "",
        "lvm-devices": "LVM's list of devices would hide disks with other serial numbers"
        if machine.volume_groups or any(volume.content == "LVM2_member" for volume in machine.volumes)
        else "",
        "network": _network(machine),
        "console": _console(machine),
        "efi-fallback": _efi(machine),
        "selinux": "files that are changed keep the labels that SELinux expects",
    }
    items = tuple(
        AdaptItem(name=name, reason=reasons[name]) for name in ITEMS if reasons[name] and (only is None or name in only)
    )
    return AdaptPlan(items=() if {item.name for item in items} <= {"selinux"} else items, rebuild=rebuild)


def _initramfs(machine: Machine, hardware: Hardware | None, *, rebuild: bool) -> str:
    parts = list(_lacking(machine, hardware))
    if rebuild:
        parts.append("every initramfs is made anew by the system's own tool, with the drivers of all platforms")
    if any(kernel.host_only is not False for kernel in machine.boot.kernels):
        parts.append("the next update must not make one for the present hardware alone")
    return "; ".join(parts)


def _lacking(machine: Machine, hardware: Hardware | None) -> Iterator[str]:
    groups = BUS_DRIVERS.get(hardware.bus, ()) if hardware is not None else ()
    for kernel in machine.boot.kernels:
        if not kernel.initramfs:
            continue
        held = drivers_of(kernel)
        if held is None:
            yield f"what the initramfs of {kernel.version} holds is not known"
        elif missing := [name for name in STORAGE_DRIVERS if name not in held]:
            needed = {name for group in groups if not group & held for name in group}
            why = [name for name in missing if name in needed]
            bus = f", which the target's {hardware.bus} disks need" if why and hardware is not None else ""
            shown = why or missing
            others = len(missing) - len(shown)
            more = f", and {others} more of other platforms" if others else ""
            yield f"the initramfs of {kernel.version} lacks {', '.join(shown)}{bus}{more}"


def named_nics(machine: Machine) -> list[tuple[str, str]]:
    """Name and address of every interface whose name has to last: it has an address of its own and is up or configured."""
    return [
        (nic.name, nic.mac.lower())
        for nic in machine.nics
        if re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", nic.mac.lower())
        and re.fullmatch(r"[A-Za-z0-9._-]{1,15}", nic.name)
        and (nic.configured_by or nic.addresses or nic.up)
    ]


def _network(machine: Machine) -> str:
    names = ", ".join(f"{name} ({mac})" for name, mac in named_nics(machine))
    return f"another slot would give another name: {names} kept by address" if names else ""


def _console(machine: Machine) -> str:
    serial = [console for console in machine.boot.consoles if console.startswith("ttyS")]
    if serial and all(_ONLY_FIRST_PORT.match(console) for console in serial):
        return f"the serial console is on {serial[0]}, and a virtual machine has one port only: it moves to ttyS0"
    return ""


def _efi(machine: Machine) -> str:
    if machine.firmware is not Firmware.UEFI:
        return ""
    return "a virtual machine with a fresh variable store starts \\EFI\\BOOT alone; the loader is copied there if there is none"
