"""Which emulated hardware stands in for a platform's, and what it cannot stand for.

The emulation has the same kind of firmware, disk controller and NIC as a platform's usual virtual machine, because that is
what a guest's drivers have to match; the board is not copied for BIOS guests. Where QEMU has no such device, the nearest one
that the guest's own system drives stands in and a finding says so: the verdict then proves the disks, not the drivers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from formats.errors import UsageError
from formats.machine import Bus, Firmware, Machine
from p2v.emulator import Chipset, Controller, Hardware, NicModel
from p2v.target.verdict import Finding, Severity


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedPlatform:
    """The hardware to boot on in place of a platform, and what that leaves unproven."""

    hardware: Hardware
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    chipset: Chipset
    controller: Controller
    nic: NicModel
    missing: str = ""


# The devices of a new virtual machine on each platform, or those that the toolkit's definitions ask for.
_KINDS: dict[tuple[str, Firmware], _Kind] = {}


def _both(name: str, kind: _Kind, uefi: _Kind | None = None) -> None:
    _KINDS[name, Firmware.BIOS] = kind
    _KINDS[name, Firmware.UEFI] = uefi or kind


_both("qemu", _Kind(chipset=Chipset.Q35, controller=Controller.VIRTIO_BLK, nic=NicModel.VIRTIO))
_both("libvirt", _Kind(chipset=Chipset.Q35, controller=Controller.VIRTIO_BLK, nic=NicModel.VIRTIO))
_both("proxmox", _Kind(chipset=Chipset.PC, controller=Controller.VIRTIO_SCSI, nic=NicModel.VIRTIO))
# QEMU has no LSI 53C1030, which the definition asks for, and Linux finds no disk behind its mptsas1068.
_both(
    "vmware-workstation",
    _Kind(
        chipset=Chipset.PC,
        controller=Controller.PVSCSI,
        nic=NicModel.E1000,
        missing="VMware's LSI Logic controller (mptspi); its paravirtual one (vmw_pvscsi) stands in",
    ),
)
_both("vsphere", _Kind(chipset=Chipset.PC, controller=Controller.PVSCSI, nic=NicModel.VMXNET3))
_both("virtualbox", _Kind(chipset=Chipset.PC, controller=Controller.SATA, nic=NicModel.E1000))
_both("parallels", _Kind(chipset=Chipset.Q35, controller=Controller.SATA, nic=NicModel.VIRTIO))
_both("virtualpc", _Kind(chipset=Chipset.PC, controller=Controller.IDE, nic=NicModel.TULIP))
_both(
    "hyperv",
    _Kind(
        chipset=Chipset.PC,
        controller=Controller.IDE,
        nic=NicModel.TULIP,
        missing="Hyper-V's own network card (hv_netvsc); its legacy card stands in",
    ),
    _Kind(
        chipset=Chipset.Q35,
        controller=Controller.SATA,
        nic=NicModel.E1000E,
        missing="Hyper-V's VMBus, which carries disks and network of generation 2 (hv_storvsc, hv_netvsc); SATA and e1000e stand in",
    ),
)
_both(
    "xen",
    _Kind(
        chipset=Chipset.PC,
        controller=Controller.IDE,
        nic=NicModel.RTL8139,
        missing="Xen's paravirtual disks and network (xen-blkfront, xen-netfront); the emulated ones of an HVM guest stand in",
    ),
)

# What a definition's bus is emulated by, where it asks for another than the platform's usual one.
_BUSES = {
    Bus.IDE: Controller.IDE,
    Bus.SATA: Controller.SATA,
    Bus.NVME: Controller.NVME,
    Bus.VIRTIO: Controller.VIRTIO_BLK,
    Bus.VIRTIO_SCSI: Controller.VIRTIO_SCSI,
    Bus.SAS: Controller.MPTSAS1068,
    Bus.SCSI: Controller.LSI53C895A,
}

PLATFORM_NAMES = tuple(sorted({name for name, _ in _KINDS}))


def platform_hardware(
    platform: str,
    machine: Machine | None = None,
    *,
    firmware: Firmware | None = None,
    bus: Bus | None = None,
    nic: NicModel | None = None,
    memory: int = 0,
    cpus: int = 0,
) -> EmulatedPlatform:
    """The kind of hardware that ``platform`` has, as far as QEMU can emulate it.

    ``firmware`` None is the machine's (BIOS when that is not known either). ``bus`` and ``nic`` override the platform's usual
    controller and card, as the definition that was written asks for them. ``memory`` in bytes; 0 leaves it to the boot.
    Raises ``UsageError`` for a platform that is not known.
    """
    kind_of_firmware = firmware or (machine.firmware if machine is not None else Firmware.BIOS)
    kind = _KINDS.get((platform, kind_of_firmware))
    if kind is None:
        raise UsageError(f"no platform named {platform!r}", advice=f"known are: {', '.join(PLATFORM_NAMES)}")
    controller = kind.controller if bus is None else _BUSES.get(bus, kind.controller)
    # BIOS guests boot on the i440FX whatever the platform's board: only there the screen stays readable text (see
    # emulator.arguments.display), and controller and NIC, which the guest's drivers have to match, are the same devices.
    chipset = Chipset.PC if kind_of_firmware is Firmware.BIOS else kind.chipset
    hardware = Hardware(
        firmware=kind_of_firmware,
        chipset=chipset,
        controller=controller,
        nic=nic or kind.nic,
        memory=memory,
        cpus=cpus,
    )
    return EmulatedPlatform(hardware=hardware, findings=tuple(_stand_ins(platform, kind)))


def _stand_ins(platform: str, kind: _Kind) -> list[Finding]:
    if not kind.missing:
        return []
    return [
        Finding(
            code="hardware-stands-in",
            severity=Severity.NOTE,
            message=f"the emulated {platform} has not {kind.missing}",
            fix="make sure that the guest's initramfs holds the drivers named here; the boot on the emulation does not prove them",
        )
    ]


def own_hardware(machine: Machine) -> EmulatedPlatform:
    """Hardware as near to the machine's own as QEMU has it: its initramfs may hold the drivers of that alone.

    What the record does not say, or QEMU does not have, is a virtual machine's usual device.
    """
    disk = next((disk for disk in machine.disks if disk.id == machine.boot.disk), None) or next(
        iter(machine.disks), None
    )
    drivers = {nic.driver for nic in machine.nics}
    card = next((model for driver, model in _CARDS.items() if driver in drivers), None)
    bus = disk.bus if disk is not None and disk.bus is not Bus.UNKNOWN else None
    target = platform_hardware("qemu", machine, bus=bus, nic=card)
    controller = _BY_DRIVER.get(disk.driver) if disk is not None else None
    hardware = replace(target.hardware, controller=controller or target.hardware.controller)
    main = min(machine.nics, key=lambda nic: (not nic.gateway, not nic.up, not nic.addresses), default=None)
    slot = _slot(main.name, hardware.chipset) if main is not None else ""
    return replace(target, hardware=replace(hardware, nic_slot=slot))


def _slot(name: str, chipset: Chipset) -> str:
    """The PCI slot that a card on bus 0 is named after (systemd.net-naming-scheme(7)): there it keeps its name and its settings.

    Slots below 8 are the board's own or given out by QEMU itself; the functions of slot 31 are on a Q35 alone, beside its own devices.
    """
    found = re.fullmatch(r"enp0s(\d+)(?:f(\d))?", name)
    if found is None:
        return ""
    slot, function = int(found[1]), int(found[2] or 0)
    if chipset is Chipset.Q35 and slot == 31:
        return f"1f.{function}" if function in (1, 4, 6, 7) else ""
    return f"{slot:x}" if 8 <= slot < (27 if chipset is Chipset.Q35 else 32) and not function else ""


# Linux drivers of network cards and of disk controllers that QEMU has; not those of a bus that `platform_hardware` knows by name.
_CARDS = {
    "virtio_net": NicModel.VIRTIO,
    "e1000": NicModel.E1000,
    "e1000e": NicModel.E1000E,
    "vmxnet3": NicModel.VMXNET3,
    "8139cp": NicModel.RTL8139,
    "pcnet32": NicModel.PCNET,
    "tulip": NicModel.TULIP,
}
_BY_DRIVER = {
    "vmw_pvscsi": Controller.PVSCSI,
    "megaraid_sas": Controller.MEGASAS,
    "mptsas": Controller.MPTSAS1068,
    "sym53c8xx": Controller.LSI53C895A,
}
