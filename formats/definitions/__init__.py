"""VM definitions: one module a platform, one model and one table for all.

A machine, its disks as files and the hardware that it is going to see are rendered into the definition that a platform
opens:

    definition = render("libvirt", machine, disks, hardware, folder="/srv/vm/metal1")

``PLATFORMS`` says what each platform takes, and drives validation: to add a platform is to add a record there and a
module with ``render`` (and ``parse``, where the format can be read). Everything that came from the source is data and
never syntax: each module quotes for its format.

Definitions can be read back, within bounds and without reaching for any file: ``read`` gives the machine, the disks
and the hardware; ``locate`` then finds a disk's file, only beside the definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Protocol, cast

from formats.definitions.text import is_file_name
from formats.errors import ImageError, ImageUnsupportedError, UnsafeImageError, UsageError
from formats.machine import Bus, Firmware, Machine

_MIB, _GIB, _TIB = 1 << 20, 1 << 30, 1 << 40
_DEFINITION_MOST = 1 << 20

DEFAULT_MEMORY = 2 * _GIB
"""Memory of a machine whose own is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefinedDisk:
    """A disk as a definition names it.

    ``file`` is a name without folders, beside the definition; what a definition that was read says may be a path, see
    ``locate``. ``format`` is the toolkit's word (raw qcow2 vhd vhdx vmdk vdi parallels). ``size`` is bytes, 0 when the
    definition does not say.
    """

    file: str
    format: str
    size: int = 0
    logical_sector: int = 512
    boot: bool = False
    disk_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the machine is going to see.

    ``nic`` is one of the platform's ``nics``. ``secure_boot`` None leaves it to the platform, which then has it off.
    ``machine`` (chipset), ``video``, ``controller`` (the model behind ``bus``) and ``network`` (bridge, virtual
    network or switch) are the platform's words; empty takes its default. ``nvram`` is a file beside the definition
    that holds UEFI's variables; empty lets the platform make a fresh one.
    """

    bus: Bus
    nic: str
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool | None = None
    machine: str = ""
    video: str = ""
    controller: str = ""
    network: str = ""
    nvram: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """The text files of a definition by name; ``main`` is the one that is opened, and ``scripts`` those that need the
    execute bit.
    """

    files: Mapping[str, str]
    main: str
    scripts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedDefinition:
    """What a definition that was read says. ``machine`` has no ``disks``: a definition knows files, not the source's
    devices.
    """

    platform: str
    machine: Machine
    disks: tuple[DefinedDisk, ...]
    hardware: Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class BusTraits:
    """A disk bus of a platform: how many disks it takes, and whether they may have 4096-byte logical sectors."""

    slots: int
    large_sectors: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformProfile:
    """What a platform takes; in each tuple and mapping, the first is the default.

    ``formats`` are disk formats with the largest disk each takes there, in bytes; ``subformats`` the default subformat
    where a format has several; ``firmware_formats`` and ``boot_buses`` narrow formats and the boot disk's bus by
    firmware. ``memory_step`` is what memory is rounded up to. ``controllers`` are models that ``Hardware.controller``
    may name. ``hosted`` is whether it runs on top of a desktop's operating system.
    """

    name: str
    title: str
    module: str
    suffix: str
    hosted: bool
    formats: Mapping[str, int]
    buses: Mapping[Bus, BusTraits]
    nics: tuple[str, ...]
    firmwares: tuple[Firmware, ...] = (Firmware.BIOS, Firmware.UEFI)
    subformats: Mapping[str, str] = field(default_factory=dict)
    firmware_formats: Mapping[Firmware, tuple[str, ...]] = field(default_factory=dict)
    boot_buses: Mapping[Firmware, tuple[Bus, ...]] = field(default_factory=dict)
    controllers: tuple[str, ...] = ()
    secure_boot: bool = True
    cpus_most: int = 255
    memory_most: int = 4 * _TIB
    memory_step: int = _MIB
    readable: bool = False

    def format_names(self, firmware: Firmware) -> tuple[str, ...]:
        """Disk formats that it takes with this firmware, the default first."""
        return self.firmware_formats.get(firmware, tuple(self.formats))

    def bus_names(self, firmware: Firmware) -> tuple[Bus, ...]:
        """Buses that it boots from with this firmware, the default first."""
        return self.boot_buses.get(firmware, tuple(self.buses))

    def default_hardware(self, machine: Machine) -> Hardware:
        """The platform's first choice of everything for the machine, with the machine's own firmware."""
        return Hardware(bus=self.bus_names(machine.firmware)[0], nic=self.nics[0], firmware=machine.firmware)


# qcow2 with 64-KiB clusters ends where its first-level table reaches 32 MiB; the other limits are reference facts of
# each format.
_QEMU_FORMATS = {
    "qcow2": 2048 * _TIB,
    "raw": 8 << 60,
    "vmdk": 2 * _TIB,
    "vhdx": 64 * _TIB,
    "vhd": 2040 * _GIB,
    "vdi": 2048 * _TIB,
}
_QEMU_BUSES = {
    Bus.VIRTIO: BusTraits(slots=24, large_sectors=True),
    Bus.VIRTIO_SCSI: BusTraits(slots=255, large_sectors=True),
    Bus.SATA: BusTraits(slots=6),
    Bus.IDE: BusTraits(slots=4),
    Bus.NVME: BusTraits(slots=16, large_sectors=True),
    Bus.SCSI: BusTraits(slots=7, large_sectors=True),
    Bus.SAS: BusTraits(slots=8, large_sectors=True),
}

PLATFORMS: Mapping[str, PlatformProfile] = {
    profile.name: profile
    for profile in (
        PlatformProfile(
            name="qemu",
            title="QEMU, by a shell script",
            module="formats.definitions.qemu",
            suffix=".sh",
            hosted=True,
            formats=_QEMU_FORMATS,
            buses=_QEMU_BUSES,
            nics=("virtio-net-pci", "e1000", "e1000e", "rtl8139", "vmxnet3"),
            readable=True,
        ),
        PlatformProfile(
            name="libvirt",
            title="libvirt (KVM), by domain XML",
            module="formats.definitions.libvirt",
            suffix=".xml",
            hosted=False,
            formats=_QEMU_FORMATS,
            buses={bus: traits for bus, traits in _QEMU_BUSES.items() if bus is not Bus.NVME},
            nics=("virtio", "e1000", "e1000e", "rtl8139", "vmxnet3"),
            readable=True,
        ),
        PlatformProfile(
            name="proxmox",
            title="Proxmox VE, by a shell script",
            module="formats.definitions.proxmox",
            suffix=".proxmox.sh",
            hosted=False,
            formats=_QEMU_FORMATS,
            buses={
                Bus.VIRTIO_SCSI: BusTraits(slots=31),
                Bus.VIRTIO: BusTraits(slots=16),
                Bus.SATA: BusTraits(slots=6),
                Bus.IDE: BusTraits(slots=4),
            },
            nics=("virtio", "e1000", "rtl8139", "vmxnet3"),
            controllers=("virtio-scsi-single", "virtio-scsi-pci"),
        ),
        PlatformProfile(
            name="vmware-workstation",
            title="VMware Workstation, Player and Fusion",
            module="formats.definitions.vmx",
            suffix=".vmx",
            hosted=True,
            formats={"vmdk": 2 * _TIB},
            subformats={"vmdk": "monolithicSparse"},
            buses={
                Bus.SCSI: BusTraits(slots=60),
                Bus.SATA: BusTraits(slots=30),
                Bus.NVME: BusTraits(slots=15),
                Bus.SAS: BusTraits(slots=60),
                Bus.IDE: BusTraits(slots=4),
            },
            nics=("e1000", "vmxnet3", "e1000e"),
            controllers=("lsilogic", "lsisas1068", "pvscsi"),
            cpus_most=32,
            memory_most=128 * _GIB,
            memory_step=4 * _MIB,
            readable=True,
        ),
        PlatformProfile(
            name="vsphere",
            title="VMware vSphere and ESXi, by an OVF descriptor",
            module="formats.definitions.ovf",
            suffix=".ovf",
            hosted=False,
            formats={"vmdk": 62 * _TIB},
            subformats={"vmdk": "streamOptimized"},
            buses={
                Bus.SCSI: BusTraits(slots=60),
                Bus.SATA: BusTraits(slots=120),
                Bus.NVME: BusTraits(slots=60),
                Bus.SAS: BusTraits(slots=60),
                Bus.IDE: BusTraits(slots=4),
            },
            nics=("vmxnet3", "e1000", "e1000e"),
            controllers=("pvscsi", "lsilogic", "lsisas1068"),
            cpus_most=128,
            memory_most=6128 * _GIB,
            memory_step=4 * _MIB,
        ),
        PlatformProfile(
            name="hyperv",
            title="Hyper-V, by a PowerShell script",
            module="formats.definitions.hyperv",
            suffix=".ps1",
            hosted=False,
            formats={"vhdx": 64 * _TIB, "vhd": 2040 * _GIB},
            subformats={"vhdx": "dynamic", "vhd": "dynamic"},
            firmware_formats={Firmware.UEFI: ("vhdx",)},
            # Generation 1 boots from IDE, which has room for three; its further disks go to SCSI.
            buses={Bus.IDE: BusTraits(slots=67), Bus.SCSI: BusTraits(slots=64)},
            boot_buses={Firmware.BIOS: (Bus.IDE,), Firmware.UEFI: (Bus.SCSI,)},
            nics=("synthetic", "legacy"),
            cpus_most=64,
            memory_most=_TIB,
            memory_step=2 * _MIB,
        ),
        PlatformProfile(
            name="virtualbox",
            title="VirtualBox, by a shell script",
            module="formats.definitions.virtualbox",
            suffix=".virtualbox.sh",
            hosted=True,
            formats={"vdi": 2048 * _TIB, "vmdk": 2 * _TIB, "vhd": 2040 * _GIB},
            subformats={"vmdk": "monolithicSparse", "vhd": "dynamic"},
            buses={
                Bus.SATA: BusTraits(slots=30),
                Bus.SCSI: BusTraits(slots=15),
                Bus.SAS: BusTraits(slots=255),
                Bus.NVME: BusTraits(slots=255),
                Bus.VIRTIO_SCSI: BusTraits(slots=255),
                Bus.IDE: BusTraits(slots=4),
            },
            nics=("e1000", "virtio", "pcnet"),
            secure_boot=False,
            cpus_most=64,
            memory_most=_TIB,
        ),
        PlatformProfile(
            name="xen",
            title="Xen (HVM), by a configuration for xl",
            module="formats.definitions.xen",
            suffix=".cfg",
            hosted=False,
            formats={"qcow2": 2048 * _TIB, "raw": 8 << 60, "vhd": 2040 * _GIB},
            # The first four are emulated IDE disks too, until the guest's own drivers take over.
            buses={Bus.XEN: BusTraits(slots=16)},
            nics=("rtl8139", "e1000"),
            secure_boot=False,
            cpus_most=128,
            memory_most=_TIB,
        ),
    )
}
"""What each platform takes, by the name that the command line uses."""


class _Module(Protocol):
    """What a platform's module offers; ``parse`` only where its profile is ``readable``."""

    def render(
        self, machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str
    ) -> Definition: ...

    def parse(self, text: str) -> ParsedDefinition: ...


def profile_of(platform: str) -> PlatformProfile:
    """The platform's profile; ``UsageError`` when there is none of that name."""
    try:
        return PLATFORMS[platform]
    except KeyError:
        names = ", ".join(PLATFORMS)
        raise UsageError(f"there is no platform {platform!r}", advice=f"choose one of: {names}") from None


def validate(platform: str, machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware) -> None:
    """Raise ``ImageUnsupportedError`` when the platform cannot take the machine, ``UsageError`` when the hardware is
    not of its kind.
    """
    profile = profile_of(platform)
    if hardware.firmware not in profile.firmwares:
        raise ImageUnsupportedError(f"{profile.title} has no {hardware.firmware} firmware")
    if hardware.bus not in profile.bus_names(hardware.firmware):
        raise UsageError(
            f"{profile.title} does not boot {hardware.firmware} machines from {hardware.bus}",
            advice=f"it takes: {', '.join(profile.bus_names(hardware.firmware))}",
        )
    if hardware.nic not in profile.nics:
        raise UsageError(
            f"{platform} has no network card {hardware.nic!r}", advice=f"it takes: {', '.join(profile.nics)}"
        )
    if hardware.controller and hardware.controller not in profile.controllers:
        raise UsageError(
            f"{platform} has no disk controller {hardware.controller!r}", advice="leave it to the platform"
        )
    if hardware.secure_boot and (hardware.firmware is not Firmware.UEFI or not profile.secure_boot):
        raise UsageError("secure boot needs UEFI firmware and a platform that has it")
    _validate_size(profile, machine, disks, hardware)
    for disk in disks:
        _validate_disk(profile, disk, hardware)
    if hardware.nvram and not is_file_name(hardware.nvram):
        raise UsageError(f"{hardware.nvram!r} is no name of a file beside the definition")


def _validate_size(
    profile: PlatformProfile, machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware
) -> None:
    if machine.cpu.architecture not in ("x86_64", "i686", "i586", "i486", "i386"):
        raise ImageUnsupportedError(f"machines of architecture {machine.cpu.architecture} are not handled yet")
    if machine.cpu.count > profile.cpus_most:
        raise ImageUnsupportedError(
            f"{machine.cpu.count} processors are more than {profile.title} takes ({profile.cpus_most})"
        )
    if machine.memory > profile.memory_most:
        raise ImageUnsupportedError(
            f"{machine.memory} bytes of memory are more than {profile.title} takes ({profile.memory_most})"
        )
    slots = profile.buses[hardware.bus].slots
    if len(disks) > slots:
        raise ImageUnsupportedError(
            f"{len(disks)} disks are more than {profile.title} takes on {hardware.bus} ({slots})",
            advice="choose another bus",
        )
    if not disks:
        raise ImageUnsupportedError("a machine without disks cannot be defined")


def _validate_disk(profile: PlatformProfile, disk: DefinedDisk, hardware: Hardware) -> None:
    if not is_file_name(disk.file):
        raise UsageError(f"{disk.file!r} is no name of a file beside the definition")
    names = profile.format_names(hardware.firmware)
    if disk.format not in names:
        raise ImageUnsupportedError(
            f"{profile.title} takes no {disk.format} disks for {hardware.firmware} machines",
            advice=f"use {names[0]}",
            subject=disk.file,
        )
    if disk.size > profile.formats[disk.format]:
        larger = [name for name in names if profile.formats[name] >= disk.size]
        raise ImageUnsupportedError(
            f"a disk of {disk.size} bytes is larger than {disk.format} takes there ({profile.formats[disk.format]})",
            advice=f"use {' or '.join(larger)}" if larger else "",
            subject=disk.file,
        )
    if disk.logical_sector not in (512, 4096):
        raise ImageUnsupportedError(
            f"logical sectors of {disk.logical_sector} bytes are not handled", subject=disk.file
        )
    if disk.logical_sector != 512 and not profile.buses[hardware.bus].large_sectors:
        raise ImageUnsupportedError(
            f"{profile.title} shows no disk with 4096-byte sectors on {hardware.bus}",
            advice="a disk partitioned with 4096-byte sectors boots only where the platform shows such sectors",
            subject=disk.file,
        )


def render(
    platform: str, machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str = ""
) -> Definition:
    """The definition of the machine for the platform, validated first.

    ``disks`` are in the machine's order, the boot disk marked or first. ``folder`` is the absolute folder that the
    files are going to lie in: libvirt wants absolute names. Without it names are relative.
    """
    validate(platform, machine, disks, hardware)
    module = cast("_Module", import_module(profile_of(platform).module))
    return module.render(machine, disks, hardware, folder=folder)


def read(path: Path) -> ParsedDefinition:
    """The definition in the file, told by its suffix.

    ``ImageUnsupportedError`` when no such definition can be read, ``ImageError`` when it is malformed,
    ``UnsafeImageError`` when it is out of bounds. Opens no other file.
    """
    profile = next((p for p in PLATFORMS.values() if p.readable and p.suffix == path.suffix.lower()), None)
    if profile is None:
        raise ImageUnsupportedError(f"definitions of the kind {path.suffix!r} cannot be read", subject=str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(_DEFINITION_MOST + 1)
    except OSError as error:
        raise ImageError(f"the definition cannot be read: {error.strerror}", subject=str(path)) from error
    if len(raw) > _DEFINITION_MOST:
        raise UnsafeImageError(f"the definition is larger than {_DEFINITION_MOST} bytes", subject=str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImageError("the definition is not UTF-8 text", subject=str(path)) from error
    return cast("_Module", import_module(profile.module)).parse(text)


def locate(folder: Path, disk: DefinedDisk) -> Path:
    """The file of a disk that a definition in ``folder`` names: only ever a file in that folder.

    An absolute name counts by its last part, so that a moved folder still works. ``UnsafeImageError`` when there is no
    such file there, or when it is a link that leads out of the folder.
    """
    path = PurePosixPath(disk.file.replace("\\", "/"))
    name = path.name
    beside = folder / name if is_file_name(name) and (path.is_absolute() or len(path.parts) == 1) else None
    if beside is None or not beside.exists() or beside.resolve().parent != folder.resolve():
        raise UnsafeImageError(
            f"the definition names the disk {disk.file!r}, which is no file beside it",
            advice="put the disk's file into the definition's folder, or name the image file itself",
            subject=disk.file,
        )
    return beside


def ordered(disks: Sequence[DefinedDisk]) -> list[DefinedDisk]:
    """The disks with the boot disk first, else in their order."""
    return sorted(disks, key=lambda disk: not disk.boot)
