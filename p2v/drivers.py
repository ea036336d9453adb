"""Which kernel modules find which disks, and which of them a kernel has before its root file system is mounted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from formats.machine import Bus, Kernel
from p2v.emulator import Controller

BUS_DRIVERS: Mapping[Bus, tuple[frozenset[str], ...]] = {
    Bus.VIRTIO: (frozenset({"virtio_blk"}), frozenset({"virtio_pci"})),
    Bus.VIRTIO_SCSI: (frozenset({"virtio_scsi"}), frozenset({"virtio_pci"}), frozenset({"sd_mod"})),
    Bus.SATA: (frozenset({"ahci"}), frozenset({"sd_mod"})),
    Bus.IDE: (frozenset({"ata_piix", "ata_generic"}), frozenset({"sd_mod"})),
    Bus.NVME: (frozenset({"nvme"}),),
    Bus.SCSI: (frozenset({"mptspi", "sym53c8xx", "vmw_pvscsi", "BusLogic"}), frozenset({"sd_mod"})),
    Bus.SAS: (frozenset({"mptsas"}), frozenset({"sd_mod"})),
    Bus.XEN: (frozenset({"xen_blkfront", "ata_piix", "ata_generic"}),),  # the first disks are emulated IDE too
}
"""Modules without which the disks on a bus are not found: of each set one. The kernel's own names, without .ko, with "_"."""

_SCSI_DISK = frozenset({"sd_mod"})

CONTROLLER_DRIVERS: Mapping[Controller, tuple[frozenset[str], ...]] = {
    Controller.VIRTIO_BLK: BUS_DRIVERS[Bus.VIRTIO],
    Controller.VIRTIO_SCSI: BUS_DRIVERS[Bus.VIRTIO_SCSI],
    Controller.NVME: BUS_DRIVERS[Bus.NVME],
    Controller.SATA: BUS_DRIVERS[Bus.SATA],
    Controller.IDE: (frozenset({"ata_piix"}), _SCSI_DISK),
    Controller.MPTSAS1068: (frozenset({"mptsas"}), _SCSI_DISK),
    Controller.MEGASAS: (frozenset({"megaraid_sas"}), _SCSI_DISK),
    Controller.PVSCSI: (frozenset({"vmw_pvscsi"}), _SCSI_DISK),
    Controller.LSI53C895A: (frozenset({"sym53c8xx"}), _SCSI_DISK),
}
"""The same for the controllers that QEMU has, the cheapest to emulate first."""


def word(module: str) -> str:
    """A module's name with one spelling: the kernel takes ``-`` and ``_`` for the same."""
    return module.replace("-", "_")


def drivers_of(kernel: Kernel) -> frozenset[str] | None:
    """Every module that this kernel can have before its root file system: in its initramfs or built in. None when not known."""
    if kernel.drivers is None:
        return None
    return frozenset(word(name) for name in (*kernel.drivers, *(kernel.builtin or ())))


def lacking(kernel: Kernel, groups: Iterable[frozenset[str]]) -> list[str]:
    """Of which sets this kernel has no module before its root file system, each as "a or b"; none when not known what it has."""
    held = drivers_of(kernel)
    return [] if held is None else [" or ".join(sorted(group)) for group in groups if not group & held]
