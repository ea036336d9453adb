"""The volumes of a machine at rest, to be read: partitions, whole disks and plain logical volumes, each with what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from formats.block import BlockSource
from formats.layouts import lvm, partition
from formats.layouts.signature import signatures
from formats.layouts.window import Window
from formats.machine import PartitionTable

_UUID_AT = {"ext": (0x468, 16), "xfs": (0x20, 16), "btrfs": (0x10020, 16), "swap": (0x40C, 16)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RestVolume:
    """One volume: of ``disk`` the partition ``number`` (0: the disk itself), or the logical volume ``name`` ("group/volume").

    ``content`` is libblkid's word (``ext`` for ext2, ext3 and ext4), "" when nothing or more than one thing was recognised; ``uuid`` is
    written as in /etc/fstab, "" when not known.
    """

    source: BlockSource
    content: str
    uuid: str
    disk: str = ""
    number: int = 0
    name: str = ""


def volumes(sources: Mapping[str, BlockSource], tables: Mapping[str, PartitionTable | None]) -> list[RestVolume]:
    """The volumes of a machine's disks, by the keys of ``tables``. Raises what the sources raise.

    Only groups whose volumes are plain and whole are seen through; a group that appears twice is left out.
    """
    found = [volume for key, source in sources.items() for volume in _of_disk(key, source, tables.get(key))]
    return [*found, *_logical([volume for volume in found if volume.content == "LVM2_member"])]


def _of_disk(key: str, source: BlockSource, table: PartitionTable | None) -> Iterator[RestVolume]:
    if table is None or not table.partitions:
        yield _volume(source, disk=key)
        return
    for entry in table.partitions:
        if not partition.is_extended(entry) and entry.start + entry.size <= source.size:
            yield _volume(Window(source, entry.start, entry.size), disk=key, number=entry.number)


def _volume(source: BlockSource, *, disk: str = "", number: int = 0, name: str = "") -> RestVolume:
    kinds = signatures(source)
    content = next(iter(kinds)) if len(kinds) == 1 else ""
    return RestVolume(source=source, content=content, uuid=_uuid(source, content), disk=disk, number=number, name=name)


def _uuid(source: BlockSource, content: str) -> str:
    if content == "vfat":
        head = _read(source, 0, 512)
        raw = head[0x43:0x47] if head[0x52:0x57] == b"FAT32" else head[0x27:0x2B]
        digits = raw[::-1].hex().upper()
        return f"{digits[:4]}-{digits[4:]}"
    offset, length = _UUID_AT.get(content, (0, 0))
    digits = _read(source, offset, length).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])) if digits else ""


def _logical(members: list[RestVolume]) -> Iterator[RestVolume]:
    labels = [(member, label) for member in members if (label := lvm.read_label(member.source)) and not label.damage]
    groups: dict[str, lvm.VolumeGroupText] = {}
    for _, label in labels:
        if label.group is not None:
            groups.setdefault(label.group.uuid, label.group)
    for group in groups.values():
        present = {pv.name: m.source for pv in group.physical for m, label in labels if label.uuid == pv.uuid}
        if len(present) != len(group.physical) or len(labels) != len({label.uuid for _, label in labels}):
            continue
        for logical in lvm.plain_volumes(group):
            yield _volume(lvm.lv_source(group, logical, present), name=f"{group.name}/{logical.name}")


def _read(source: BlockSource, offset: int, length: int) -> bytes:
    if offset + length > source.size:
        return b""
    buffer = bytearray(length)
    source.readinto(memoryview(buffer), offset)
    return bytes(buffer)
