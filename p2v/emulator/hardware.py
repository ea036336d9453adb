"""What QEMU is asked to be: the records from which its command line is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from formats.machine import Firmware


class Chipset(StrEnum):
    """The board: i440FX (``pc``) as BIOS-era hypervisors show it, or Q35 with PCI Express."""

    PC = "pc"
    Q35 = "q35"


class Controller(StrEnum):
    """What the disks hang on. The values are this module's own; ``arguments`` maps them to QEMU's device names."""

    IDE = "ide"  # PIIX3
    SATA = "sata"  # ICH9 AHCI
    VIRTIO_BLK = "virtio-blk"
    VIRTIO_SCSI = "virtio-scsi"
    NVME = "nvme"
    LSI53C895A = "lsi53c895a"
    MPTSAS1068 = "mptsas1068"
    MEGASAS = "megasas"
    PVSCSI = "pvscsi"


class NicModel(StrEnum):
    """The network card; the values are QEMU's device names."""

    E1000 = "e1000"
    E1000E = "e1000e"
    VIRTIO = "virtio-net-pci"
    VMXNET3 = "vmxnet3"
    RTL8139 = "rtl8139"
    PCNET = "pcnet"
    TULIP = "tulip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The kind of computer that is emulated. ``memory`` is bytes; None and 0 leave the choice to the boot.

    ``nic_slot`` is the network card's place on PCI bus 0, as QEMU writes it ("19", "1f.6"): guests name the card after it. "" is any.
    """

    firmware: Firmware = Firmware.BIOS
    chipset: Chipset = Chipset.PC
    controller: Controller = Controller.IDE
    nic: NicModel | None = NicModel.E1000
    memory: int = 0
    cpus: int = 0
    nic_slot: str = ""

    def describe(self) -> str:
        """One line for a person."""
        nic = str(self.nic) if self.nic else "no NIC"
        return f"{self.chipset}/{self.firmware}, disks on {self.controller}, {nic}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """One disk of the emulated machine; it is read only, all writes go to an overlay.

    Exactly one of ``uri`` (NBD, its content raw) and ``path`` with ``format`` (QEMU's name: raw, qcow2, vpc, ...) names it.
    A path must have passed ``formats.images.probe``: QEMU opens what the header of some formats (VMDK) names.
    ``overlay`` None is a throw-away overlay that has no name on disk; a path is a file that ``create_overlay`` made and that is
    kept. It names no backing file: whoever opens it later states the disk below it.
    """

    uri: str = ""
    path: Path | None = None
    format: str = "raw"
    overlay: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    serial: str = ""
    logical_sector: int = 512
    physical_sector: int = 512

    def __post_init__(self) -> None:
        if bool(self.uri) == (self.path is not None):
            raise ValueError("a drive is either an NBD URI or a path")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """User-mode network of the guest: no way out, and one way in per forwarded port.

    ``forwards`` are TCP ports of the guest; each gets a free port on 127.0.0.1. ``address`` (CIDR) is the IPv4 address that the guest
    gives itself, where it does not ask DHCP; the emulated network then takes its subnet, with ``gateway`` as the router.
    """

    mac: str = ""
    address: str = ""
    gateway: str = ""
    forwards: tuple[int, ...] = (22,)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectKernel:
    """A kernel that is started without the disk's boot loader."""

    image: Path
    initramfs: Path | None = None
    command_line: str = ""
