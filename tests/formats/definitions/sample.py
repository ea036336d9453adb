"""Machines whose definitions are kept in tests/data/definitions.

``python -m tests.formats.definitions.sample`` writes the kept files anew; the difference is then to be read before it
is committed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from formats.definitions import DefinedDisk, Definition, Hardware, render
from formats.machine import Boot, Bus, Cpu, Disk, Firmware, Machine, Nic, OperatingSystem, Platform

FOLDER = Path(__file__).parents[2] / "data" / "definitions"
GIB = 1 << 30

METAL = Machine(
    name="metal1",
    firmware=Firmware.BIOS,
    cpu=Cpu(sockets=1, cores_per_socket=2, threads_per_core=2),
    memory=4 * GIB - 300 * 1024,
    disks=(Disk(id="wwn-1", size=6 * GIB, name="sda", serial="P2VSRC 0001"), Disk(id="wwn-2", size=GIB, name="sdb")),
    nics=(Nic(name="enp0s25", mac="52:54:00:A1:00:01"), Nic(name="enp3s0", mac="")),
    system=OperatingSystem(family="linux", id="debian", version="12"),
    boot=Boot(consoles=("tty0", "ttyS0,115200")),
    platform=Platform(uuid="4c4c4544-0042-3510-8054-b4c04f4d3132"),
    clock_utc=True,
)
MODERN = replace(
    METAL,
    name="Büro-Server (alt)",
    firmware=Firmware.UEFI,
    cpu=Cpu(sockets=2, cores_per_socket=4),
    memory=16 * GIB,
    nics=(Nic(name="eno1", mac="3c:ec:ef:00:11:22"),),
    platform=Platform(),
    boot=Boot(),
    clock_utc=False,
)

FORMATS = {
    "proxmox": "qcow2",
    "vsphere": "vmdk",
    "virtualbox": "vdi",
    "xen": "qcow2",
    "qemu": "qcow2",
    "libvirt": "qcow2",
    "vmware-workstation": "vmdk",
    "hyperv": "vhdx",
}
SUFFIXES = {"qcow2": "qcow2", "vmdk": "vmdk", "vhdx": "vhdx"}
CHOICES: dict[str, tuple[str, Machine, Hardware]] = {
    "qemu-bios": ("qemu", METAL, Hardware(bus=Bus.SATA, nic="e1000")),
    "qemu-uefi": ("qemu", MODERN, Hardware(bus=Bus.VIRTIO, nic="virtio-net-pci", firmware=Firmware.UEFI)),
    "libvirt-bios": ("libvirt", METAL, Hardware(bus=Bus.SATA, nic="e1000")),
    "libvirt-uefi": (
        "libvirt",
        MODERN,
        Hardware(bus=Bus.VIRTIO_SCSI, nic="virtio", firmware=Firmware.UEFI, secure_boot=True, network="lan"),
    ),
    "vmware-workstation-bios": ("vmware-workstation", METAL, Hardware(bus=Bus.SCSI, nic="e1000")),
    "vmware-workstation-uefi": (
        "vmware-workstation",
        MODERN,
        Hardware(bus=Bus.NVME, nic="vmxnet3", firmware=Firmware.UEFI, network="bridged"),
    ),
    "proxmox-bios": ("proxmox", METAL, Hardware(bus=Bus.SATA, nic="e1000")),
    "proxmox-uefi": (
        "proxmox",
        MODERN,
        Hardware(bus=Bus.VIRTIO_SCSI, nic="virtio", firmware=Firmware.UEFI, network="vmbr7"),
    ),
    "vsphere-bios": ("vsphere", METAL, Hardware(bus=Bus.SCSI, nic="e1000", controller="lsilogic")),
    "vsphere-uefi": (
        "vsphere",
        MODERN,
        Hardware(bus=Bus.NVME, nic="vmxnet3", firmware=Firmware.UEFI, secure_boot=True, network="LAN"),
    ),
    "virtualbox-bios": ("virtualbox", METAL, Hardware(bus=Bus.IDE, nic="e1000")),
    "virtualbox-uefi": (
        "virtualbox",
        MODERN,
        Hardware(bus=Bus.SATA, nic="virtio", firmware=Firmware.UEFI, network="eth0"),
    ),
    "xen-bios": ("xen", METAL, Hardware(bus=Bus.XEN, nic="e1000")),
    "xen-uefi": ("xen", MODERN, Hardware(bus=Bus.XEN, nic="rtl8139", firmware=Firmware.UEFI, network="br0")),
    "hyperv-bios": ("hyperv", METAL, Hardware(bus=Bus.IDE, nic="synthetic")),
    "hyperv-uefi": (
        "hyperv",
        MODERN,
        Hardware(bus=Bus.SCSI, nic="synthetic", firmware=Firmware.UEFI, secure_boot=True, network="LAN switch"),
    ),
}


def disks_of(platform: str, stem: str = "metal1") -> list[DefinedDisk]:
    """Two disks, of which the second one boots."""
    kind = FORMATS[platform]
    return [
        DefinedDisk(file=f"{stem}-data.{kind}", format=kind, size=GIB, disk_id="wwn-2"),
        DefinedDisk(file=f"{stem}.{kind}", format=kind, size=6 * GIB, disk_id="wwn-1", boot=True),
    ]


def sample(name: str) -> Definition:
    """The definition that is kept under this name."""
    platform, machine, hardware = CHOICES[name]
    return render(platform, machine, disks_of(platform), hardware, folder="/srv/vm")


def main() -> None:
    """Write all kept definitions anew."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in CHOICES:
        definition = sample(name)
        suffix = Path(definition.main).suffix
        (FOLDER / f"{name}{suffix}").write_text(definition.files[definition.main], encoding="utf-8", newline="")


if __name__ == "__main__":
    main()
