"""Which bytes of a whole disk are in use, seen through partition tables, LVM, ext and swap.

What is not understood is DATA. That holds for the space in front of the first partition (boot loaders keep their core
there), between and behind partitions (extended boot records, second GPT, RAID metadata, what was never partitioned):
nothing proves it free, and where it is zeroes it costs little. A volume with signs of more than one kind of content,
or partitions that overlap, are DATA too.

The maps are as old as the moment they are made for: make them from the frozen view that is going to be copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from formats.block import BlockSource, Extent, check_range
from formats.layouts import ext, lvm, partition, swap
from formats.layouts.signature import signatures
from formats.layouts.used import Composite, Content, UsedMap
from formats.layouts.window import Window
from formats.machine import PartitionTable, TableKind

_SECTORS = (512, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A volume of a disk and what is known of it; sizes and starts are bytes.

    ``number`` is the partition's, 0 for a disk without a table. ``content`` is libblkid's word, empty when nothing was
    recognised. ``reason`` says why it is read whole, and is empty when it is not. ``volumes`` are the logical volumes,
    by ``group/name``, that the part holds a piece of.
    """

    number: int
    start: int
    size: int
    content: str = ""
    reason: str = ""
    volumes: Mapping[str, Content] = field(default_factory=dict)


class DiskMap:
    """Which bytes of a disk are in use: a ``UsedMap`` that says how it came about."""

    def __init__(self, used: UsedMap, table: PartitionTable | None, parts: tuple[Part, ...], damage: str) -> None:
        self._used = used
        self.table = table
        self.parts = parts
        self.damage = damage

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._used.size

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Bytes in use are DATA, free ones ZERO."""
        check_range(self.size, start, length)
        return self._used.extents(start, length)


@dataclass(slots=True, kw_only=True)
class _Volume:
    """A partition or whole disk while it is being looked at."""

    number: int
    start: int
    source: BlockSource
    content: Content
    label: lvm.PhysicalLabel | None = None
    volumes: dict[str, Content] = field(default_factory=dict)


def used_of_disk(source: BlockSource, sector: int | None = None) -> DiskMap:
    """The map of one disk on its own; see ``used_of_disks``."""
    return used_of_disks({"": source}, {} if sector is None else {"": sector})[""]


def used_of_disks(sources: Mapping[str, BlockSource], sectors: Mapping[str, int] | None = None) -> dict[str, DiskMap]:
    """The maps of a machine's disks, by the same keys; volume groups that span disks are seen through.

    ``sectors`` are logical sector sizes; for a disk without one, 512 and 4096 are tried. Reads tables, signatures,
    superblocks and LVM's metadata now, bitmaps when the maps are asked. Raises what the sources raise.
    """
    disks = {key: _Disk(source, (sectors or {}).get(key)) for key, source in sources.items()}
    _see_through([volume for disk in disks.values() for volume in disk.volumes])
    return {key: disk.map() for key, disk in disks.items()}


class _Disk:
    """A disk while its map is being made: its table, and what its volumes hold."""

    def __init__(self, source: BlockSource, sector: int | None) -> None:
        self._source = source
        readings = [partition.read(source, size) for size in ((sector,) if sector else _SECTORS)]
        self._reading = next((r for r in readings if r.table is not None), readings[0])
        self.volumes = list(self._find())

    def _find(self) -> Iterator[_Volume]:
        table = self._reading.table
        if table is None or (table.kind is TableKind.MBR and not table.partitions):
            # The boot record of a file system without partitions looks like an MBR whose table is empty.
            if not self._reading.damage:
                yield _volume(0, 0, self._source)
            return
        # A file system or physical volume right at the start of a disk with partitions is one of an earlier or later
        # life: which, nobody can tell.
        if table.partitions and signatures(self._source) - {"vfat", "ntfs", "iso9660", "zfs_member"}:
            return
        containers = [p for p in table.partitions if partition.is_extended(p)]
        for entry in table.partitions:
            if entry in containers:
                continue
            end = entry.start + entry.size
            crossed = any(start < end and entry.start < start + size for start, size in self._reading.foreign)
            if not crossed and not partition.overlap(table):
                yield _volume(entry.number, entry.start, Window(self._source, entry.start, entry.size))

    def map(self) -> DiskMap:
        """The map of the disk, once all volumes have been looked at."""
        volumes = sorted(self.volumes, key=lambda volume: volume.start)
        used = Composite(self._source.size, [(v.start, v.content.used) for v in volumes if v.content.used is not None])
        parts = tuple(
            Part(
                number=v.number,
                start=v.start,
                size=v.source.size,
                content=v.content.kind,
                reason=v.content.reason,
                volumes=v.volumes,
            )
            for v in volumes
        )
        return DiskMap(used, self._reading.table, parts, self._reading.damage)


def _volume(number: int, start: int, source: BlockSource) -> _Volume:
    content = look(source)
    label = lvm.read_label(source) if content.kind == "LVM2_member" else None
    return _Volume(number=number, start=start, source=source, content=content, label=label)


def look(source: BlockSource) -> Content:
    """What the volume holds, with its map if it can be told which bytes are in use. A physical volume gets no map
    here.
    """
    kinds = signatures(source)
    if len(kinds) > 1:
        return Content(kind="+".join(sorted(kinds)), reason="it shows signs of more than one kind of content")
    for kind, looker in (("ext", ext.look), ("swap", swap.look), ("swsuspend", swap.look)):
        if kind in kinds:
            return looker(source) or Content(kind=kind, reason="its header does not add up")
    if not kinds:
        return Content(kind="", reason="nothing was recognised in it")
    (kind,) = kinds
    return Content(kind=kind, reason=f"the free space of {kind} is not known here")


def _see_through(volumes: list[_Volume]) -> None:
    """Give the physical volumes among ``volumes`` their maps, each group from all of its members that are there."""
    members = [volume for volume in volumes if volume.label is not None]
    identities = [volume.label.uuid for volume in members if volume.label]
    groups: dict[str, lvm.VolumeGroupText] = {}
    doubted = set[str]()
    for volume in members:
        group = volume.label.group if volume.label else None
        if group is not None and groups.setdefault(group.uuid, group) != group:
            doubted.add(group.uuid)
    for volume in members:
        assert volume.label is not None  # noqa: S101 - members were chosen so
        volume.content = Content(
            kind="LVM2_member", reason=volume.label.damage or "no metadata of its volume group was found"
        )
    for group in groups.values():
        present = {
            pv.name: v
            for pv in group.physical
            for v in members
            if v.label and v.label.uuid == pv.uuid and not v.label.damage
        }
        if group.uuid in doubted or any(identities.count(pv.uuid) > 1 for pv in group.physical):
            for volume in present.values():
                volume.content = Content(
                    kind="LVM2_member", reason="the physical volumes of its group contradict one another"
                )
            continue
        _map_group(group, present)


def _map_group(group: lvm.VolumeGroupText, present: Mapping[str, _Volume]) -> None:
    sources = {name: volume.source for name, volume in present.items()}
    contents: dict[str, Content] = {}
    # A group whose extents contradict one another says nothing certain of any of its volumes.
    sound = all(group.occupied(pv) is not None for pv in group.physical)
    for logical in lvm.plain_volumes(group) if sound else ():
        if all(area.name in sources for segment in logical.segments for area in segment.areas):
            try:
                contents[logical.name] = look(lvm.lv_source(group, logical, sources))
            except ValueError as error:
                contents[logical.name] = Content(kind="", reason=str(error))
    maps = {name: content.used for name, content in contents.items() if content.used is not None}
    for pv in group.physical:
        volume = present.get(pv.name)
        if volume is None:
            continue
        used = lvm.physical_map(group, pv, volume.source.size, maps)
        reason = "" if used is not None else "which of its extents are in use cannot be told"
        volume.content = Content(kind="LVM2_member", used=used, reason=reason)
        for logical in group.logical:
            if any(area.name == pv.name for segment in logical.segments for area in segment.areas):
                unseen = Content(kind="", reason="it is no plain volume, or a part of it is missing")
                volume.volumes[f"{group.name}/{logical.name}"] = contents.get(logical.name, unseen)
