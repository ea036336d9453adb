"""Copies that are broken on purpose: a drill that judges one of them bootable has detectors that no longer work.

Everything happens in overlays in memory: no stored byte and no restored one is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum

from formats.layouts import lvm, partition
from formats.layouts.extfiles import ExtFiles
from formats.layouts.volumes import RestVolume, volumes
from formats.machine import Firmware, Machine, PartitionTable
from formats.overlay import Overlay
from p2v.plan import disks_of

_ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
_HEAD = (
    128 << 10
)  # where ext, XFS, btrfs and FAT have their superblocks; backups stay: what a kernel mounts is the first


class Sabotage(StrEnum):
    """What is broken."""

    BOOT_RECORD = "boot-record"  # BIOS: sector 0; UEFI: the head of the EFI system partition
    ROOT = "root"  # the superblock of the root file system
    DATA_DISK = "data-disk"  # the superblocks on every disk that is not booted from


def sabotage(kind: Sabotage, machine: Machine, disks: Mapping[str, Overlay]) -> list[str]:
    """Break the disks, given by id, and return what was done in a few words each; empty when there is nothing to break in this way."""
    tables = {disk.id: partition.read_table(disks[disk.id], disk.logical_sector) for disk in disks_of(machine)}
    boot = disks_of(machine)[0].id
    if kind is Sabotage.BOOT_RECORD:
        return list(_boot_record(machine, disks[boot], tables[boot]))
    found = volumes(disks, tables)
    if kind is Sabotage.ROOT:
        root = _root(machine, found)
        return [] if root is None else list(_heads(root, found, disks, tables))
    others = [v for v in found if v.disk and v.disk != boot and v.content]
    return [word for volume in others for word in _heads(volume, found, disks, tables)]


def _boot_record(machine: Machine, disk: Overlay, table: PartitionTable | None) -> Iterator[str]:
    if machine.firmware is Firmware.BIOS:
        disk.zero(0, min(512, disk.size))
        yield "the boot record was zeroed"
        return
    for entry in table.partitions if table is not None else ():
        if entry.type.lower() == _ESP:
            disk.zero(entry.start, min(entry.size, 1 << 20))
            yield "the head of the EFI system partition was zeroed"


def _root(machine: Machine, found: Sequence[RestVolume]) -> RestVolume | None:
    uuids = {v.uuid.lower() for v in machine.volumes if "/" in v.mountpoints and v.uuid}
    named = next((v for v in found if v.uuid and v.uuid.lower() in uuids), None)
    return named or next((v for v in found if v.content == "ext" and _holds_a_system(v)), None)


def _holds_a_system(volume: RestVolume) -> bool:
    try:
        return ExtFiles(volume.source).read("/etc/fstab", 1 << 20) is not None
    except (ValueError, OSError):
        return False


def _heads(
    volume: RestVolume,
    found: Sequence[RestVolume],
    disks: Mapping[str, Overlay],
    tables: Mapping[str, PartitionTable | None],
) -> Iterator[str]:
    """Zero the head of a volume where it lies."""
    for disk, start in _places(volume, found, tables):
        length = min(_HEAD, volume.source.size, disks[disk].size - start)
        disks[disk].zero(start, length)
        yield f"the superblock of {volume.name or f'partition {volume.number} of {disk}'} was zeroed"


def _places(
    volume: RestVolume, found: Sequence[RestVolume], tables: Mapping[str, PartitionTable | None]
) -> Iterator[tuple[str, int]]:
    """Disk and offset where the volume begins."""
    if volume.disk:
        table = tables[volume.disk]
        entries = {entry.number: entry.start for entry in table.partitions} if table is not None else {}
        yield volume.disk, entries.get(volume.number, 0)
        return
    group_name, _, name = volume.name.partition("/")
    labels = [(v, lvm.read_label(v.source)) for v in found if v.content == "LVM2_member"]
    group = next((x.group for _, x in labels if x is not None and x.group and x.group.name == group_name), None)
    logical = next((v for v in group.logical if v.name == name), None) if group is not None else None
    first = min(logical.segments, key=lambda s: s.start, default=None) if logical is not None else None
    if group is None or first is None or not first.areas:
        return
    physical = group.by_name(first.areas[0].name)
    for member, label in labels:
        if physical is not None and label is not None and label.uuid == physical.uuid:
            for disk, start in _places(member, found, tables):
                yield disk, start + physical.start + first.areas[0].start * group.extent_size
