"""LVM: what physical volumes say of their group, which ranges each logical volume occupies, and which extents are free.

Facts: lvm2 ``lib/format_text/layout.h``, ``lib/label/label.c``, ``lib/metadata``. The label lies in one of the first
four 512-byte sectors, metadata areas are ring buffers of text with a 512-byte header; their checksums are CRC-32
started at 0xf597a6cf, without inversions. All offsets and sizes here are bytes; LVM counts sectors of 512.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from formats.block import BlockSource, Extent, Kind, check_range, merged
from formats.layouts import lvmtext
from formats.layouts.lvmtext import LvmTextError, TextSection, number, subsections, text, words
from formats.layouts.used import Composite, Section, Uniform, UsedMap

SECTOR = 512
_LABEL_SECTORS = 4
_AREAS_MOST = 16
_CRC_START = 0xF597A6CF
_MDA_MAGIC = b" LVM2 x[5A%r0N*>"
_MDA_HEADER = 512
_IGNORED = 1
_LOGICAL_MOST = 65536
_SEGMENTS_MOST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """One place of a segment: ``start`` extents into the physical volume ``name``, or into a logical one if the group
    has no such PV.
    """

    name: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSegment:
    """``count`` extents of a logical volume from extent ``start``.

    ``kind`` is LVM's word; a linear segment is ``striped`` with one area. ``stripe_size`` is bytes, 0 with one area.
    ``references`` are all names that the segment mentions in whatever way: volumes below it.
    """

    start: int
    count: int
    kind: str
    areas: tuple[Area, ...] = ()
    stripe_size: int = 0
    references: frozenset[str] = frozenset()

    @property
    def striped(self) -> bool:
        """Whether it is linear or striped: the kinds whose bytes lie where the areas say, once."""
        return self.kind == "striped" and bool(self.areas) and self.count % len(self.areas) == 0

    @property
    def area_count(self) -> int:
        """Extents that each area holds."""
        return self.count // len(self.areas) if self.striped else self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalVolume:
    """A logical volume; ``size`` is in extents."""

    name: str
    uuid: str
    size: int
    segments: tuple[VolumeSegment, ...]
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalVolume:
    """A physical volume as its group knows it. ``start`` is the byte where its first extent lies, ``count`` its number
    of extents.
    """

    name: str
    uuid: str
    start: int
    count: int


Run: TypeAlias = tuple[int, int, tuple[LogicalVolume, VolumeSegment, int]]
"""Extents in use: (first, end, (whose, which of its segments, the number of the segment's area))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeGroupText:
    """A volume group as the metadata describes it; ``extent_size`` is bytes."""

    name: str
    uuid: str
    sequence: int
    extent_size: int
    physical: tuple[PhysicalVolume, ...]
    logical: tuple[LogicalVolume, ...]

    def by_name(self, name: str) -> PhysicalVolume | None:
        """The physical volume of that name inside the group."""
        return next((pv for pv in self.physical if pv.name == name), None)

    def occupied(self, pv: PhysicalVolume) -> list[Run] | None:
        """Runs of extents in use on the physical volume, ascending and apart.

        None when they cannot be told: a kind of segment that is not known here lies on it, or two occupy the same
        extent.
        """
        runs: list[Run] = []
        for volume in self.logical:
            for segment in volume.segments:
                if pv.name not in segment.references:
                    continue
                if segment.kind not in ("striped", "mirror") or (segment.kind == "striped" and not segment.striped):
                    return None
                runs += [
                    (area.start, area.start + segment.area_count, (volume, segment, index))
                    for index, area in enumerate(segment.areas)
                    if area.name == pv.name
                ]
        runs.sort(key=lambda run: run[0])
        position = 0
        for start, end, _ in runs:
            if start < position or end > pv.count:
                return None
            position = end
        return runs

    def free_extents(self, pv: PhysicalVolume) -> int:
        """Extents of the physical volume that no logical volume occupies; 0 when that cannot be told."""
        runs = self.occupied(pv)
        return 0 if runs is None else pv.count - sum(end - start for start, end, _ in runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalLabel:
    """What one physical volume says of itself: its id and, when its metadata area can be read, its group.

    ``damage`` is one sentence when the label is there but something in it is not sound; ``used`` must then be the
    whole volume.
    """

    uuid: str
    group: VolumeGroupText | None = None
    damage: str = ""


def read_label(source: BlockSource) -> PhysicalLabel | None:
    """The label and metadata of the physical volume that starts at the source's first byte; None when there is no
    label.

    A physical volume that belongs to no group, or whose metadata is kept on its peers alone, has no ``group`` and no
    damage.
    """
    if source.size < _LABEL_SECTORS * SECTOR:
        return None
    head = _read(source, 0, _LABEL_SECTORS * SECTOR)
    for index in range(_LABEL_SECTORS):
        raw = head[index * SECTOR : (index + 1) * SECTOR]
        if raw[:8] != b"LABELONE" or raw[24:32] != b"LVM2 001":
            continue
        if struct.unpack_from("<Q", raw, 8)[0] != index or struct.unpack_from("<I", raw, 16)[0] != checksum(raw[20:]):
            return PhysicalLabel(uuid="", damage="the label of the physical volume fails its checksum")
        try:
            return _read_header(source, raw)
        except (LvmTextError, struct.error, UnicodeDecodeError) as error:
            return PhysicalLabel(uuid="", damage=f"its metadata cannot be read: {error}")
    return None


def checksum(data: bytes) -> int:
    """LVM's checksum of ``data``."""
    return zlib.crc32(data, _CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _read_header(source: BlockSource, label: bytes) -> PhysicalLabel:
    offset = struct.unpack_from("<I", label, 20)[0]
    identity = _dashed(label[offset : offset + 32].decode("ascii"))
    position = offset + 40  # behind the id and the device's size
    _data, position = _locations(label, position)
    areas, position = _locations(label, position)
    found: list[VolumeGroupText] = []
    for start, size in areas:
        raw = _metadata(source, start, size)
        if raw is not None:
            found.append(parse_group(raw))
    if not found:
        return PhysicalLabel(uuid=identity)
    newest = max(found, key=lambda group: group.sequence)
    if any(group != newest for group in found):
        return PhysicalLabel(uuid=identity, damage="its metadata areas differ")
    return PhysicalLabel(uuid=identity, group=newest)


def _locations(label: bytes, position: int) -> tuple[list[tuple[int, int]], int]:
    """The list of (offset, size) at ``position``, which ends with a pair of zeroes, and the position behind it."""
    found: list[tuple[int, int]] = []
    while True:
        offset, size = struct.unpack_from("<QQ", label, position)
        position += 16
        if offset == 0:
            return found, position
        if len(found) == _AREAS_MOST:
            raise LvmTextError("the physical volume lists too many areas")
        found.append((offset, size))


def _metadata(source: BlockSource, start: int, size: int) -> str | None:
    """The committed text of the metadata area; None when it is empty or kept out of use."""
    if size <= _MDA_HEADER or start + size > source.size:
        raise LvmTextError("a metadata area lies outside the volume")
    header = _read(source, start, _MDA_HEADER)
    stored, magic, version, mine, _size = struct.unpack_from("<I16sIQQ", header, 0)
    if magic != _MDA_MAGIC or version != 1 or mine != start or stored != checksum(header[4:]):
        raise LvmTextError("the header of a metadata area fails its checksum")
    offset, length, text_checksum, flags = struct.unpack_from("<QQII", header, 40)
    if offset == 0 or flags & _IGNORED:
        return None
    if not _MDA_HEADER <= offset < size or not 0 < length <= min(size - _MDA_HEADER, lvmtext.TEXT_MOST):
        raise LvmTextError("the text of a metadata area lies outside it")
    first = min(length, size - offset)
    raw = _read(source, start + offset, first)
    if first < length:
        raw += _read(source, start + _MDA_HEADER, length - first)  # the ring goes on behind its header
    if checksum(raw) != text_checksum:
        raise LvmTextError("the text of a metadata area fails its checksum")
    return raw.rstrip(b"\0").decode("utf-8")


def parse_group(metadata: str) -> VolumeGroupText:
    """The volume group that the metadata text describes; ``LvmTextError`` when it does not make sense."""
    root = lvmtext.parse(metadata)
    if root.get("contents") != "Text Format Volume Group" or root.get("version") != 1:
        raise LvmTextError("the LVM metadata is of a kind that is not known here")
    groups = subsections(root)
    if len(groups) != 1:
        raise LvmTextError("the LVM metadata describes no single volume group")
    ((name, group),) = groups.items()
    physical = tuple(_physical(key, section) for key, section in subsections(group, "physical_volumes").items())
    logical = tuple(_logical(key, section) for key, section in subsections(group, "logical_volumes").items())
    if len(logical) > _LOGICAL_MOST:
        raise LvmTextError("the volume group has too many logical volumes")
    extent_size = number(group, "extent_size") * SECTOR
    if extent_size == 0:
        raise LvmTextError("the volume group's extents have no size")
    return VolumeGroupText(
        name=name,
        uuid=text(group, "id"),
        sequence=number(group, "seqno"),
        extent_size=extent_size,
        physical=physical,
        logical=logical,
    )


def _physical(name: str, section: TextSection) -> PhysicalVolume:
    start, count = number(section, "pe_start") * SECTOR, number(section, "pe_count")
    return PhysicalVolume(name=name, uuid=text(section, "id"), start=start, count=count)


def _logical(name: str, section: TextSection) -> LogicalVolume:
    wanted = number(section, "segment_count")
    if wanted > _SEGMENTS_MOST:
        raise LvmTextError("a logical volume has too many segments")
    inner = subsections(section)
    segments = []
    size = 0
    for index in range(1, wanted + 1):
        if f"segment{index}" not in inner:
            raise LvmTextError("a logical volume lacks a segment")
        segment = _segment(inner[f"segment{index}"])
        if segment.start != size or segment.count == 0:
            raise LvmTextError("the segments of a logical volume do not follow one another")
        size += segment.count
        segments.append(segment)
    flags = frozenset(words(section, "status")) | frozenset(words(section, "flags"))
    return LogicalVolume(name=name, uuid=text(section, "id"), size=size, segments=tuple(segments), flags=flags)


def _segment(section: TextSection) -> VolumeSegment:
    kind = text(section, "type").split("+")[0]  # flags of newer features follow a plus sign
    stripes = section.get("stripes") if kind == "striped" else section.get("mirrors") if kind == "mirror" else None
    areas: list[Area] = []
    if isinstance(stripes, list):
        for name, start in zip(stripes[::2], stripes[1::2], strict=True) if len(stripes) % 2 == 0 else ():
            if not isinstance(name, str) or not isinstance(start, int) or start < 0:
                raise LvmTextError("a segment's areas make no sense")
            areas.append(Area(name=name, start=start))
    if kind == "striped" and (not areas or len(areas) != number(section, "stripe_count")):
        raise LvmTextError("a segment's stripes do not add up")
    return VolumeSegment(
        start=number(section, "start_extent"),
        count=number(section, "extent_count"),
        kind=kind,
        areas=tuple(areas),
        stripe_size=number(section, "stripe_size") * SECTOR if len(areas) > 1 and kind == "striped" else 0,
        references=frozenset(_texts(section)),
    )


def _texts(section: TextSection) -> set[str]:
    found: set[str] = set()
    for value in section.values():
        if isinstance(value, dict):
            found |= _texts(value)
        else:
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)}
    return found


def plain_volumes(group: VolumeGroupText) -> list[LogicalVolume]:
    """The volumes that can be looked into: linear or striped over physical volumes, and no part or origin of another
    volume.

    The origin of a snapshot is none of them: what is free in it may be in use in the snapshot.
    """
    below = {name for lv in group.logical for segment in lv.segments for name in segment.references}
    names = {pv.name for pv in group.physical}
    if names & {lv.name for lv in group.logical}:
        return []
    return [
        lv
        for lv in group.logical
        if lv.name not in below and lv.segments and all(_is_plain(group, segment) for segment in lv.segments)
    ]


def _is_plain(group: VolumeGroupText, segment: VolumeSegment) -> bool:
    """Whether each byte of the segment lies where its areas on physical volumes say, once."""
    if not segment.striped or any(group.by_name(area.name) is None for area in segment.areas):
        return False
    return len(segment.areas) == 1 or (
        segment.stripe_size > 0 and (segment.area_count * group.extent_size) % segment.stripe_size == 0
    )


class LogicalSource:
    """A logical volume as a BlockSource over the sources of the physical volumes it lies on, which are only borrowed.

    ``pv_sources`` are by name inside the group; each starts at its volume's first byte. ``ValueError`` when one is
    missing or too short, or the volume is no ``plain`` one.
    """

    def __init__(self, group: VolumeGroupText, volume: LogicalVolume, pv_sources: Mapping[str, BlockSource]) -> None:
        self._group = group
        self._size = volume.size * group.extent_size
        self._segments = volume.segments
        self._starts = [segment.start * group.extent_size for segment in volume.segments]
        self._closed = False
        self._areas: list[tuple[tuple[BlockSource, int], ...]] = []
        for segment in volume.segments:
            if not _is_plain(group, segment):
                raise ValueError(f"{volume.name} is no linear or striped volume")
            self._areas.append(tuple(self._area(segment, area, pv_sources) for area in segment.areas))

    def _area(
        self, segment: VolumeSegment, area: Area, pv_sources: Mapping[str, BlockSource]
    ) -> tuple[BlockSource, int]:
        pv, source = self._group.by_name(area.name), pv_sources.get(area.name)
        if pv is None or source is None:
            raise ValueError(f"the physical volume {area.name} is missing")
        start = pv.start + area.start * self._group.extent_size
        if start + segment.area_count * self._group.extent_size > source.size:
            raise ValueError(f"the physical volume {area.name} is shorter than its group says")
        return source, start

    @property
    def size(self) -> int:
        """Bytes of the logical volume."""
        return self._size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        self._check(offset, len(buffer))
        done = 0
        for source, start, length in self._runs(offset, len(buffer)):
            source.readinto(buffer[done : done + length], start)
            done += length

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The physical volumes' extents, in the logical volume's order."""
        self._check(start, length)
        return merged(self._tiles(start, length))

    def _tiles(self, position: int, length: int) -> Iterator[Extent]:
        for source, start, run in self._runs(position, length):
            for extent in source.extents(start, run):
                yield Extent(position + extent.start - start, extent.length, extent.kind)
            position += run

    def _runs(self, position: int, length: int) -> Iterator[tuple[BlockSource, int, int]]:
        """Where the range lies: (source, offset there, length), in order."""
        end = position + length
        index = max(0, bisect_right(self._starts, position) - 1)
        while position < end:
            segment, base, areas = self._segments[index], self._starts[index], self._areas[index]
            stop = min(end, base + segment.count * self._group.extent_size)
            stripe = segment.stripe_size or segment.count * self._group.extent_size
            while position < stop:
                number, inside = divmod(position - base, stripe)
                row, column = divmod(number, len(areas))
                step = min(stripe - inside, stop - position)
                source, start = areas[column]
                yield source, start + row * stripe + inside, step
                position += step
            index += 1

    def close(self) -> None:
        """Refuse further reading."""
        self._closed = True

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the logical volume is closed")
        check_range(self._size, start, length)


def lv_source(group: VolumeGroupText, volume: LogicalVolume, pv_sources: Mapping[str, BlockSource]) -> LogicalSource:
    """The logical volume's bytes; see ``LogicalSource``."""
    return LogicalSource(group, volume, pv_sources)


class _StripeMap:
    """What one area of a striped segment uses, from the map of its logical volume."""

    def __init__(self, volume: UsedMap, base: int, segment: VolumeSegment, column: int, size: int) -> None:
        self._volume = volume
        self._base = base
        self._stripe = segment.stripe_size
        self._width = len(segment.areas)
        self._column = column
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of the area."""
        return self._size

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Stripe by stripe, each where it lies in the logical volume."""
        check_range(self._size, start, length)
        return merged(self._tiles(start, start + length))

    def _tiles(self, position: int, end: int) -> Iterator[Extent]:
        while position < end:
            row, inside = divmod(position, self._stripe)
            step = min(self._stripe - inside, end - position)
            there = self._base + (row * self._width + self._column) * self._stripe + inside
            for extent in self._volume.extents(there, step):
                yield Extent(position + extent.start - there, extent.length, extent.kind)
            position += step


def physical_map(
    group: VolumeGroupText, pv: PhysicalVolume, size: int, volumes: Mapping[str, UsedMap]
) -> UsedMap | None:
    """Which bytes of the physical volume, of ``size`` bytes, are in use; None when it has to be read whole.

    Free extents are free; an extent of a logical volume that ``volumes`` has a map for is what the map says; all else
    is in use: label, metadata, other volumes, and what lies behind the last extent.
    """
    runs = group.occupied(pv)
    extent = group.extent_size
    if runs is None or pv.start + pv.count * extent > size:
        return None
    parts: list[tuple[int, UsedMap]] = []
    position = 0
    for first, end, (volume, segment, column) in runs:
        if first > position:
            parts.append((pv.start + position * extent, Uniform((first - position) * extent, Kind.ZERO)))
        seen = volumes.get(volume.name)
        if seen is not None:
            parts.append((pv.start + first * extent, _area_map(group, seen, segment, column)))
        position = end
    if position < pv.count:
        parts.append((pv.start + position * extent, Uniform((pv.count - position) * extent, Kind.ZERO)))
    return Composite(size, parts)


def _area_map(group: VolumeGroupText, volume: UsedMap, segment: VolumeSegment, column: int) -> UsedMap:
    base = segment.start * group.extent_size
    size = segment.area_count * group.extent_size
    if len(segment.areas) == 1:
        return Section(volume, base, size)
    return _StripeMap(volume, base, segment, column, size)


def _dashed(identity: str) -> str:
    """An id as the text writes it: 32 characters with dashes after 6, 10, 14, 18, 22 and 26."""
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(identity[low:high] for low, high in pairwise(cuts))


def _read(source: BlockSource, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    source.readinto(memoryview(buffer), offset)
    return bytes(buffer)
