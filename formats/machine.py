"""The record of a machine: one model that every collector fills and every definition is rendered from.

All sizes are bytes. Names of devices are the source's own (``sda``, ``enp0s3``): facts to be mapped, never to be relied on
in the target. What could not be learnt is None or empty, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Firmware(StrEnum):
    """What starts the boot loader."""

    BIOS = "bios"
    UEFI = "uefi"


class Bus(StrEnum):
    """What a disk hangs on, at the source or in a definition."""

    IDE = "ide"
    SATA = "sata"
    SCSI = "scsi"
    SAS = "sas"
    NVME = "nvme"
    VIRTIO = "virtio"
    VIRTIO_SCSI = "virtio-scsi"
    USB = "usb"
    MMC = "mmc"
    XEN = "xen"
    UNKNOWN = "unknown"


class TableKind(StrEnum):
    """Kind of a partition table."""

    MBR = "mbr"
    GPT = "gpt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One entry of a partition table. ``type`` is the MBR type byte as ``0x83`` or the GPT type GUID, lower case."""

    number: int
    start: int
    size: int
    type: str
    uuid: str = ""
    label: str = ""
    bootable: bool = False
    logical: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionTable:
    """A disk's partition table. ``id`` is the MBR disk signature as ``0x1234abcd`` or the GPT disk GUID."""

    kind: TableKind
    id: str
    partitions: tuple[Partition, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A block device of the machine.

    ``id`` is stable across boots and probing order: WWN, serial with model, or disk signature, in that order of preference.
    ``name`` is the kernel's name at the source; ``links`` its persistent names below /dev/disk.
    """

    id: str
    size: int
    name: str = ""
    logical_sector: int = 512
    physical_sector: int = 512
    bus: Bus = Bus.UNKNOWN
    driver: str = ""
    model: str = ""
    serial: str = ""
    wwn: str = ""
    rotational: bool | None = None
    removable: bool = False
    links: tuple[str, ...] = ()
    table: PartitionTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A node of the storage tree: partition, LVM volume, md array, opened crypt device, or a whole disk with a file system.

    ``path`` is its device at the source, ``parents`` the paths it lies on. ``kind`` is lsblk's type (disk, part, lvm, raid1, crypt...);
    ``content`` is what blkid finds inside (ext4, xfs, swap, LVM2_member, crypto_LUKS, linux_raid_member, vfat, ...).
    """

    path: str
    kind: str
    size: int
    parents: tuple[str, ...] = ()
    content: str = ""
    uuid: str = ""
    label: str = ""
    mountpoints: tuple[str, ...] = ()
    used: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeGroup:
    """An LVM volume group; extents are counted, ``extent_size`` is bytes."""

    name: str
    uuid: str
    extent_size: int
    extent_count: int
    free_extents: int
    physical_volumes: tuple[str, ...]
    logical_volumes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network interface with hardware behind it. ``mac`` is the permanent address where known, lower case with colons.

    ``configured_by`` names what sets it up (ifupdown, NetworkManager, systemd-networkd, netplan, ifcfg, ...); ``addresses`` are
    CIDR texts; ``dhcp`` is None when not known.
    """

    name: str
    mac: str
    driver: str = ""
    model: str = ""
    addresses: tuple[str, ...] = ()
    gateway: str = ""
    dhcp: bool | None = None
    configured_by: str = ""
    up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """Processors as the machine sees them; ``architecture`` as uname prints it (x86_64, aarch64)."""

    architecture: str = "x86_64"
    vendor: str = ""
    model: str = ""
    sockets: int = 1
    cores_per_socket: int = 1
    threads_per_core: int = 1
    flags: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Logical processors."""
        return self.sockets * self.cores_per_socket * self.threads_per_core


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A bootable kernel. ``drivers`` are the module names its initramfs holds, without .ko; None when it could not be read.

    ``host_only`` is whether the initramfs was made for the source's hardware alone; None when not known.
    """

    version: str
    image: str
    initramfs: str = ""
    initramfs_kind: str = ""
    drivers: tuple[str, ...] | None = None
    host_only: bool | None = None
    builtin: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EfiVariable:
    """One UEFI variable, whole: ``data`` without the 4 attribute bytes that efivarfs puts in front."""

    name: str
    guid: str
    attributes: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """How the machine starts. ``disk`` is the id of the disk that holds boot record or ESP; ``consoles`` as on the command line."""

    loader: str = ""
    loader_config: str = ""
    disk: str = ""
    command_line: str = ""
    consoles: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    running_kernel: str = ""
    secure_boot: bool | None = None
    efi_variables: tuple[EfiVariable, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingSystem:
    """The operating system. ``id`` and ``version`` as in os-release (debian, 12); ``family`` linux or windows."""

    family: str = ""
    id: str = ""
    version: str = ""
    name: str = ""
    init: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """The hardware's maker as SMBIOS tells it. ``virtualization`` is empty on bare metal."""

    vendor: str = ""
    product: str = ""
    serial: str = ""
    uuid: str = ""
    virtualization: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A computer: everything that definitions, preflight and adaptation need to know of it."""

    name: str
    firmware: Firmware = Firmware.BIOS
    cpu: Cpu = field(default_factory=Cpu)
    memory: int = 0
    disks: tuple[Disk, ...] = ()
    volumes: tuple[Volume, ...] = ()
    volume_groups: tuple[VolumeGroup, ...] = ()
    nics: tuple[Nic, ...] = ()
    system: OperatingSystem = field(default_factory=OperatingSystem)
    boot: Boot = field(default_factory=Boot)
    platform: Platform = field(default_factory=Platform)
    clock_utc: bool | None = None

    def belongs(self, disk: Disk) -> bool:
        """Whether the disk is part of the machine: fixed, not on USB - or the one that it boots from, whatever that is."""
        return disk.id == self.boot.disk or not (disk.removable or disk.bus is Bus.USB)

    def disk(self, disk_id: str) -> Disk:
        """The disk with this stable id; ``KeyError`` if there is none."""
        for disk in self.disks:
            if disk.id == disk_id:
                return disk
        raise KeyError(disk_id)
