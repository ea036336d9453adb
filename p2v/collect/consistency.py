"""What consistency a live host can give, disk by disk: a plan made from its record and its LVM metadata. Pure functions.

A disk is one instant (``crash``) when everything on it that changes can be held still: logical volumes by snapshots, small mounted
partitions by a freeze for as long as they are copied aside, partitions that nobody has mounted by themselves. Else it is ``fuzzy``,
with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from formats.capture import Consistency
from formats.errors import Notice
from formats.layouts import lvm
from formats.layouts.partition import is_extended
from formats.machine import Disk, Machine, Volume
from p2v.collect.guard import SnapshotPlan

STAGE_MOST = 1 << 30
"""A mounted partition is copied aside under a freeze if it has at most this many bytes to copy."""

_ROOM_LEAST = 64 << 20  # a snapshot with less room for changes overflows before it is of use
FREEZABLE = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "reiserfs", "nilfs2", "gfs2"})
_MAPPED = frozenset({"ext2", "ext3", "ext4"})  # only what is used is copied
SWAP = "[SWAP]"
# Contents that nobody changes unless they are mounted, opened or switched on, which shows elsewhere.
INERT = frozenset(
    {"", "ext2", "ext3", "ext4", "xfs", "vfat", "exfat", "ntfs", "swap", "iso9660", "crypto_LUKS", "BitLocker"}
)


class Treatment(Enum):
    """How a region of a disk is held still."""

    LIVE = "live"  # nothing changes it: it is read when it is wanted
    STAGED = "staged"  # copied aside while its file system is frozen
    STAGED_TWICE = "staged twice"  # cannot be frozen (vfat): synced and copied until two copies are equal
    PHYSICAL_VOLUME = "physical volume"  # its metadata copied aside, its logical volumes by snapshot or live


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A partition, or a whole disk with content of its own; ``mount`` is where it is mounted."""

    path: str
    start: int
    size: int
    treatment: Treatment
    mount: str = ""
    content: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """How one disk is captured. ``reason`` says why it is FUZZY, ``advice`` what would change that."""

    disk: Disk
    regions: tuple[Region, ...]
    reason: str = ""
    advice: str = ""

    @property
    def consistency(self) -> Consistency:
        """What this plan gives when it succeeds."""
        return Consistency.FUZZY if self.reason else Consistency.CRASH


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the machine is captured: its disks (boot disk first), the snapshots to be made, the mount points to be frozen."""

    disks: tuple[DiskPlan, ...]
    snapshots: tuple[SnapshotPlan, ...]
    mounts: tuple[str, ...]
    notices: tuple[Notice, ...]


def captured(machine: Machine) -> tuple[tuple[Disk, ...], tuple[Notice, ...]]:
    """The disks that belong to the machine, the boot disk first, and a notice for each that is left out (C1)."""
    taken: list[Disk] = []
    notices: list[Notice] = []
    for disk in sorted(machine.disks, key=lambda d: d.id != machine.boot.disk):
        if not machine.belongs(disk):
            notices.append(
                Notice(
                    code="disk-left-out",
                    message=f"{disk.name} ({disk.model or disk.id}) is removable and is not captured",
                    subject=disk.id,
                )
            )
        else:
            taken.append(disk)
    return tuple(taken), tuple(notices)


def top_volumes(machine: Machine, disk: Disk) -> Iterator[tuple[Volume, int]]:
    """The volumes that lie right on the disk, with the byte where each starts."""
    whole = f"/dev/{disk.name}"
    starts = {p.number: p.start for p in disk.table.partitions if not is_extended(p)} if disk.table else {}
    for volume in machine.volumes:
        if volume.path == whole and not starts:
            yield volume, 0
        elif whole in volume.parents and volume.kind == "part":
            match = re.fullmatch(rf"{re.escape(whole)}p?(\d+)", volume.path)
            if match is not None and int(match[1]) in starts:
                yield volume, starts[int(match[1])]


def plan(machine: Machine, labels: Mapping[str, lvm.PhysicalLabel], run: str) -> Plan:
    """The plan for a machine; ``labels`` are those of its physical volumes, by path; ``run`` names the snapshots."""
    disks, notices = captured(machine)
    groups = {label.group.uuid: label.group for label in labels.values() if label.group is not None}
    wanted, blocked = _group_plans(machine, groups)
    plans = [_disk_plan(machine, disk, labels, blocked) for disk in disks]
    held = [p for p in plans if not p.reason]
    used = {
        label.group.uuid
        for p in held
        for region in p.regions
        if region.treatment is Treatment.PHYSICAL_VOLUME and (label := labels[region.path]).group is not None
    }
    snapshots = [
        SnapshotPlan(group=group.name, volume=name, name="", extents=extents)
        for uuid, group in groups.items()
        if uuid in used
        for name, extents in wanted.get(uuid, {}).items()
    ]
    named = tuple(
        SnapshotPlan(group=s.group, volume=s.volume, name=f"p2v-{run}-{number}", extents=s.extents)
        for number, s in enumerate(snapshots)
    )
    mounts = tuple(region.mount for p in held for region in p.regions if region.treatment is Treatment.STAGED)
    return Plan(disks=tuple(plans), snapshots=named, mounts=mounts, notices=(*notices, *_fuzzy(plans)))


def _fuzzy(plans: Sequence[DiskPlan]) -> Iterator[Notice]:
    for p in plans:
        if p.reason:
            yield Notice(
                code="fuzzy-disk",
                message=f"{p.disk.name} is read while it changes, so the copy is of no single instant: {p.reason}",
                advice=p.advice
                or "Stop what writes there while the copy runs, or shut the machine down and copy its disks.",
                subject=p.disk.id,
            )


def _disk_plan(
    machine: Machine, disk: Disk, labels: Mapping[str, lvm.PhysicalLabel], blocked: Mapping[str, tuple[str, str]]
) -> DiskPlan:
    regions: list[Region] = []
    reason = advice = ""
    for volume, start in top_volumes(machine, disk):
        treatment, why, what = _treatment(machine, volume, labels, blocked)
        if why and not reason:
            reason, advice = why, what
        mount = next((m for m in volume.mountpoints if m != SWAP), "")
        regions.append(
            Region(
                path=volume.path,
                start=start,
                size=volume.size,
                treatment=treatment,
                mount=mount,
                content=volume.content,
            )
        )
    return DiskPlan(disk=disk, regions=tuple(sorted(regions, key=lambda r: r.start)), reason=reason, advice=advice)


def _treatment(
    machine: Machine, volume: Volume, labels: Mapping[str, lvm.PhysicalLabel], blocked: Mapping[str, tuple[str, str]]
) -> tuple[Treatment, str, str]:
    """The treatment of a volume right on a disk; with the reason and advice when it cannot be held still."""
    children = [v for v in machine.volumes if volume.path in v.parents]
    if volume.content == "LVM2_member":
        label = labels.get(volume.path)
        if label is not None and label.group is not None and not label.damage:
            return Treatment.PHYSICAL_VOLUME, *blocked.get(label.group.uuid, ("", ""))
        why = label.damage if label is not None else "its label was not found"
        return Treatment.LIVE, f"the LVM metadata of {volume.path} cannot be used: {why}" if children else "", ""
    if children:
        return (
            Treatment.LIVE,
            f"{volume.path} carries {children[0].kind} {children[0].path}, which cannot be snapshotted from below",
            "",
        )
    mounts = [m for m in volume.mountpoints if m != SWAP]
    if not mounts:
        # No mount point does not mean that nobody writes: pools, arrays and data bases hold devices without one.
        if volume.content in INERT or SWAP in volume.mountpoints:
            return Treatment.LIVE, "", ""
        return Treatment.LIVE, f"{volume.path} holds {volume.content}, which may be in use without being mounted", ""
    amount = volume.used if volume.content in _MAPPED and volume.used is not None else volume.size
    if "/" in mounts:
        return Treatment.LIVE, f"the root file system is on {volume.path}, which is no LVM volume", ""
    if amount > STAGE_MOST:
        return (
            Treatment.LIVE,
            f"{volume.path} ({mounts[0]}) is no LVM volume and too large to be copied under a freeze",
            "",
        )
    if volume.content == "vfat":
        return Treatment.STAGED_TWICE, "", ""
    if volume.content in FREEZABLE:
        return Treatment.STAGED, "", ""
    return (
        Treatment.LIVE,
        f"{volume.path} ({mounts[0]}) holds {volume.content or 'something unknown'}, which cannot be frozen",
        "",
    )


def _group_plans(
    machine: Machine, groups: Mapping[str, lvm.VolumeGroupText]
) -> tuple[dict[str, dict[str, int]], dict[str, tuple[str, str]]]:
    """For each group by UUID: room in extents for a snapshot of each volume that needs one; or (reason, advice) why there can be none."""
    wanted: dict[str, dict[str, int]] = {}
    blocked: dict[str, tuple[str, str]] = {}
    paths = {volume.path: volume for volume in machine.volumes}
    for uuid, group in groups.items():
        plain = {volume.name for volume in lvm.plain_volumes(group)}
        sizes: dict[str, int] = {}
        for volume in group.logical:
            path = f"/dev/mapper/{group.name.replace('-', '--')}-{volume.name.replace('-', '--')}"
            seen = paths.get(path)
            if volume.name not in plain:
                blocked.setdefault(
                    uuid, (f"the logical volume {group.name}/{volume.name} is neither linear nor striped", "")
                )
            elif seen is not None and seen.content != "swap" and SWAP not in seen.mountpoints:
                sizes[volume.name] = volume.size
        if uuid not in blocked:
            free = sum(group.free_extents(pv) for pv in group.physical)
            room = _rooms(sizes, free, group.extent_size)
            if room is None:
                blocked[uuid] = _no_room(group, sizes, free)
            else:
                wanted[uuid] = room
    return wanted, blocked


def _rooms(sizes: Mapping[str, int], free: int, extent: int) -> dict[str, int] | None:
    """Share free extents among volumes by their sizes; None when the least that each needs is not there."""
    least = {name: min(size, -(-_ROOM_LEAST // extent)) for name, size in sizes.items()}
    spare = free - sum(least.values())
    if spare < 0:
        return None
    total = sum(sizes.values())
    # a snapshot never needs more than its origin and the map of what is in it
    most = {name: size + size // 64 + 2 for name, size in sizes.items()}
    return {
        name: min(least[name] + spare * size // total, max(most[name], least[name])) for name, size in sizes.items()
    }


def _no_room(group: lvm.VolumeGroupText, sizes: Mapping[str, int], free: int) -> tuple[str, str]:
    need = sum(min(size, -(-_ROOM_LEAST // group.extent_size)) for size in sizes.values()) - free
    mib = need * group.extent_size >> 20
    return (
        f"the volume group {group.name} has {free} free extents, too few for snapshots",
        f"Free at least {mib} MiB in {group.name} (better 10 % of it): add a disk with vgextend, or shrink or remove a volume; "
        "then run the command again.",
    )
