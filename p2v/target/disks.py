"""What lies on the disks that a machine does not boot from: a boot proves nothing about them, so each gets a proof of its own.

The proof reads the partition table, LVM's labels and the file systems' superblocks with their checksums, and holds them against the
machine's record: what was there when it was taken has to be there now. Free space and files are not read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from formats.block import BlockSource, Kind
from formats.layouts import lvm, partition
from formats.layouts.crc import crc32c
from formats.layouts.volumes import RestVolume, volumes
from formats.machine import Machine, PartitionTable, Volume
from p2v.plan import disks_of
from p2v.target.verdict import Finding, Result, Severity

_CHECKED = frozenset({"ext", "xfs", "swap", "LVM2_member"})
_NAMED = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "swap", "vfat"})  # contents whose UUID is known at rest
_FIX = "see whether the source's own disk is sound and an earlier point's is; `p2v-backup check --read-data` tests the stored bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskProof:
    """What was proven of one disk. ``holds`` says for a person what was found on it."""

    disk: str
    result: Result
    holds: str = ""
    findings: tuple[Finding, ...] = ()


def prove_data_disks(machine: Machine, sources: Mapping[str, BlockSource]) -> tuple[DiskProof, ...]:
    """A proof for every disk of the machine but the one it boots from. ``sources`` are by disk id. Raises what the sources raise."""
    disks = disks_of(machine)
    tables: dict[str, PartitionTable | None] = {}
    damages: dict[str, str] = {}
    for disk in disks:
        reading = partition.read(sources[disk.id], disk.logical_sector)
        tables[disk.id], damages[disk.id] = reading.table, reading.damage
    found = volumes({disk.id: sources[disk.id] for disk in disks}, tables)
    boot = machine.boot.disk or (disks[0].id if disks else "")
    return tuple(
        _proof(machine, disk.id, sources[disk.id], damages[disk.id], found) for disk in disks if disk.id != boot
    )


def _proof(machine: Machine, disk: str, source: BlockSource, damage: str, found: Sequence[RestVolume]) -> DiskProof:
    own = [volume for volume in found if volume.disk == disk]
    groups = {group for volume in own if (group := _group(volume))}
    own += [volume for volume in found if volume.name and volume.name.partition("/")[0] in groups]
    findings = [] if not damage else [_finding("partition-table-damaged", f"the partition table of {disk}: {damage}")]
    for volume in own:
        if problem := _problem(volume):
            findings.append(_finding("file-system-damaged", f"{_where(volume)}: {problem}"))
    findings += _missing(machine, disk, own, groups)
    holds = ", ".join(f"{_where(volume)}: {volume.content}" for volume in own if volume.content)
    if findings:
        return DiskProof(disk=disk, result=Result.FAIL, holds=holds, findings=tuple(findings))
    if any(volume.content in _CHECKED for volume in own):
        return DiskProof(disk=disk, result=Result.PASS, holds=holds)
    if not any(extent.kind is Kind.DATA for extent in source.extents(0, source.size)):
        return DiskProof(disk=disk, result=Result.PASS, holds="nothing: it is empty")
    what = f"only a signature is known of {holds}" if holds else "nothing on it was recognised"
    doubt = Finding(
        code="disk-unproven",
        severity=Severity.ERROR,
        message=f"disk {disk}: {what}",
        fix="add a probe that reads what lies on this disk (an SSH command, a marker file)",
    )
    return DiskProof(disk=disk, result=Result.UNPROVEN, holds=holds, findings=(doubt,))


def _finding(code: str, message: str) -> Finding:
    return Finding(code=code, severity=Severity.ERROR, message=message, fix=_FIX)


def _where(volume: RestVolume) -> str:
    return volume.name or (f"partition {volume.number}" if volume.number else "the whole disk")


def _group(volume: RestVolume) -> str:
    label = lvm.read_label(volume.source) if volume.content == "LVM2_member" else None
    return label.group.name if label is not None and label.group is not None else ""


def _missing(machine: Machine, disk: str, own: Sequence[RestVolume], groups: set[str]) -> Iterator[Finding]:
    """What the machine's record has on this disk and nothing on it is now."""
    there = {volume.uuid.lower() for volume in own if volume.uuid}
    for volume in _recorded(machine, disk):
        lost = volume.content in _NAMED and bool(volume.uuid) and volume.uuid.lower() not in there
        seen_through = volume.kind != "lvm" or bool(groups)
        if volume.content == "LVM2_member" and not any(v.content == "LVM2_member" for v in own):
            lost = True
        if lost and seen_through:
            mounted = f", mounted on {', '.join(volume.mountpoints)}" if volume.mountpoints else ""
            yield _finding(
                "file-system-missing",
                f"the machine had {volume.content} {volume.uuid}{mounted} on disk {disk}: it is not there",
            )


def _recorded(machine: Machine, disk: str) -> list[Volume]:
    name = next((d.name for d in machine.disks if d.id == disk), "")
    below = {f"/dev/{name}"} if name else set()
    found: list[Volume] = []
    for _ in range(16):  # a bounded number of layers
        more = [v for v in machine.volumes if v not in found and (v.path in below or below & set(v.parents))]
        if not more:
            break
        found += more
        below |= {volume.path for volume in more}
    return found


def _problem(volume: RestVolume) -> str:
    """What is wrong with the head of a file system; empty when it adds up."""
    if volume.content == "ext":
        return _ext_problem(volume.source)
    if volume.content == "xfs":
        return _xfs_problem(volume.source)
    if volume.content == "LVM2_member":
        label = lvm.read_label(volume.source)
        return "LVM's label cannot be read" if label is None else label.damage
    return ""


def _ext_problem(source: BlockSource) -> str:
    """ext2/3/4's superblock (Linux, Documentation/filesystems/ext4/super.rst); a journal that must be replayed is no problem."""
    raw = _read(source, 1024, 1024)
    if len(raw) < 1024:
        return "it is cut short"
    blocks, block = struct.unpack_from("<I", raw, 4)[0], 1024 << min(struct.unpack_from("<I", raw, 0x18)[0], 20)
    incompat, read_only = struct.unpack_from("<2I", raw, 0x60)
    if incompat & 0x80:  # 64bit
        blocks |= struct.unpack_from("<I", raw, 0x150)[0] << 32
    if read_only & 0x400 and crc32c(0xFFFFFFFF, raw[:0x3FC]) != struct.unpack_from("<I", raw, 0x3FC)[0]:
        return "the superblock of its ext file system fails its checksum"
    if blocks * block > source.size:
        return f"its ext file system of {blocks * block} bytes is larger than the volume of {source.size}"
    if struct.unpack_from("<H", raw, 0x3A)[0] & 2:
        return "its ext file system is marked as having errors: it needs fsck"
    return ""


def _xfs_problem(source: BlockSource) -> str:
    """XFS' superblock (XFS Algorithms & Data Structures, "Superblocks"): big-endian, CRC-32C at 224, little-endian, over its sector."""
    raw = _read(source, 0, 512)
    if len(raw) < 512:
        return "it is cut short"
    block, blocks = struct.unpack_from(">IQ", raw, 4)
    version, sector = struct.unpack_from(">HH", raw, 100)
    if not 512 <= sector <= 32768 or sector & (sector - 1):
        return "its XFS superblock has an impossible sector size"
    if version & 15 == 5:
        whole = bytearray(_read(source, 0, sector))
        stored = struct.unpack_from("<I", whole, 224)[0]
        whole[224:228] = bytes(4)
        if crc32c(0xFFFFFFFF, bytes(whole)) ^ 0xFFFFFFFF != stored:
            return "the superblock of its XFS fails its checksum"
    if blocks * block > source.size:
        return f"its XFS of {blocks * block} bytes is larger than the volume of {source.size}"
    return ""


def _read(source: BlockSource, offset: int, length: int) -> bytes:
    if offset + length > source.size:
        return b""
    buffer = bytearray(length)
    source.readinto(memoryview(buffer), offset)
    return bytes(buffer)
