"""What a conversion is going to write: every name, format and size, decided before a byte is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from formats.definitions import DefinedDisk, Hardware, PlatformProfile, validate
from formats.images import image_format, image_size
from formats.machine import Disk, Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """One disk to write: ``file`` is its final name in the folder, ``size`` the virtual size in bytes."""

    disk_id: str
    file: str
    format: str
    subformat: str
    size: int
    logical_sector: int
    boot: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be written, known before a byte is read."""

    name: str
    folder: Path
    platform: PlatformProfile
    hardware: Hardware
    disks: tuple[DiskPlan, ...]

    @property
    def definition(self) -> str:
        """Name of the file that the platform opens."""
        return f"{self.name}{self.platform.suffix}"

    def defined_disks(self) -> list[DefinedDisk]:
        """The disks as definitions name them."""
        return [
            DefinedDisk(
                file=d.file,
                format=d.format,
                size=d.size,
                logical_sector=d.logical_sector,
                boot=d.boot,
                disk_id=d.disk_id,
            )
            for d in self.disks
        ]


def disks_of(machine: Machine) -> tuple[Disk, ...]:
    """The disks that a conversion takes: those that belong to the machine, the boot disk first."""
    own = [disk for disk in machine.disks if machine.belongs(disk)]
    return tuple(sorted(own, key=lambda disk: disk.id != machine.boot.disk))


def plan(
    machine: Machine, platform: PlatformProfile, hardware: Hardware, *, folder: Path, name: str, disk_format: str
) -> Plan:
    """Decide every name and format; the platform's validation refuses what it cannot take.

    ``disk_format`` is a format, or ``format:subformat``; empty takes the platform's default. Raises what
    ``validate`` raises.
    """
    kind, _, subformat = (disk_format or platform.format_names(hardware.firmware)[0]).partition(":")
    chosen = image_format(kind)
    layout = chosen.subformat(subformat or platform.subformats.get(kind, ""))
    disks = tuple(
        DiskPlan(
            disk_id=disk.id,
            file=f"{name}-disk{number}{chosen.suffix}",
            format=kind,
            subformat=layout.name,
            size=image_size(kind, disk.size, layout.name),
            logical_sector=disk.logical_sector,
            boot=number == 0,
        )
        for number, disk in enumerate(disks_of(machine))
    )
    made = Plan(name=name, folder=folder, platform=platform, hardware=hardware, disks=disks)
    validate(platform.name, machine, made.defined_disks(), hardware)
    return made
