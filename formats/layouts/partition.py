"""Partition tables: MBR with its chain of extended boot records, and GPT with its two copies.

Facts: UEFI specification 2.10 chapter 5 (GPT, protective MBR); the numbering and PARTUUIDs are Linux's: primary MBR
entries are 1-4, logical ones count from 5, and a partition's id is ``DISKSIGNATURE-NN`` for MBR, the entry's GUID for
GPT.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from formats.block import BlockSource
from formats.machine import Partition, PartitionTable, TableKind

_BOOT_SIGNATURE = b"\x55\xaa"
_ENTRIES = 0x1BE
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_LOGICAL_MOST = 128
_GPT_SIGNATURE = b"EFI PART"
_GPT_ENTRIES_MOST = 1024
_NIL = uuid.UUID(int=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReading:
    """What a disk's first and last sectors say. ``damage`` is empty when the table is sound, else one sentence for a
    person.

    A GPT of which one copy is lost is damaged and yet has a table; a table that contradicts itself is None.
    ``foreign`` are the byte ranges that a GPT disk's MBR names besides (hybrid MBR), where they are no GPT partition's.
    """

    table: PartitionTable | None
    damage: str = ""
    foreign: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One of the four entries of an MBR or extended boot record, in sectors."""

    status: int
    type: int
    start: int
    count: int


def read_table(source: BlockSource, sector: int = 512) -> PartitionTable | None:
    """The disk's partition table, or None when it has none that makes sense.

    ``sector`` is the disk's logical sector size: a table made with another one is not found. Starts and sizes are
    bytes, and lie inside the disk. An extended partition is listed with its type; its logical partitions follow.
    """
    return read(source, sector).table


def read(source: BlockSource, sector: int = 512) -> TableReading:
    """The disk's partition table with what is wrong with it; see ``read_table``."""
    if sector < 512 or sector & (sector - 1) or source.size < 2 * sector:
        return TableReading(table=None)
    boot = _sector(source, sector, 0)
    entries = _entries(boot)
    if any(entry.type == _PROTECTIVE for entry in entries):
        return _read_gpt(source, sector, entries)
    if not entries or boot[510:512] != _BOOT_SIGNATURE:
        return TableReading(table=None)
    return _read_mbr(source, sector, boot, entries)


def is_extended(partition: Partition) -> bool:
    """Whether the entry is the container of logical partitions."""
    return partition.type in {f"{kind:#04x}" for kind in _EXTENDED}


def _sector(source: BlockSource, sector: int, number: int, count: int = 1) -> bytes:
    buffer = bytearray(sector * count)
    source.readinto(memoryview(buffer), number * sector)
    return bytes(buffer)


def _entries(boot: bytes) -> tuple[_Entry, ...]:
    """The four entries; none at all when the sector is no boot record (a file system's boot sector ends in 55AA
    too).
    """
    if boot[510:512] != _BOOT_SIGNATURE:
        return ()
    found = []
    for number in range(4):
        raw = boot[_ENTRIES + 16 * number : _ENTRIES + 16 * (number + 1)]
        status, kind, start, count = struct.unpack("<B3xB3xII", raw)
        if status & 0x7F:
            return ()
        found.append(_Entry(status, kind, start, count))
    return tuple(found)


def _read_mbr(source: BlockSource, sector: int, boot: bytes, entries: tuple[_Entry, ...]) -> TableReading:
    sectors = source.size // sector
    signature = struct.unpack_from("<I", boot, 0x1B8)[0]
    partitions: list[Partition] = []
    damage = ""
    present = [entry for entry in entries if entry.type and entry.count]
    if len(present) == 1 and present[0].start == 0:
        return TableReading(table=None)  # mkfs.fat describes the whole disk so, for firmware that insists on a table
    for number, entry in enumerate(entries, 1):
        if entry.type == 0 or entry.count == 0:
            continue
        if entry.start == 0 or entry.start + entry.count > sectors:
            return TableReading(table=None, damage=f"partition {number} lies outside the disk")
        partitions.append(_mbr_partition(number, entry, entry.start, sector, signature))
    containers = [entry for entry in entries if entry.type in _EXTENDED and entry.count]
    if len(containers) > 1:
        damage = "there is more than one extended partition"
    for container in containers[:1]:
        chain = _Chain(source, sector, container)
        partitions += [_mbr_partition(5 + n, entry, start, sector, signature) for n, (entry, start) in enumerate(chain)]
        damage = damage or chain.damage
    table = PartitionTable(kind=TableKind.MBR, id=f"{signature:#010x}", partitions=tuple(partitions))
    return TableReading(table=table, damage=damage or overlap(table))


def _mbr_partition(number: int, entry: _Entry, start: int, sector: int, signature: int) -> Partition:
    return Partition(
        number=number,
        start=start * sector,
        size=entry.count * sector,
        type=f"{entry.type:#04x}",
        uuid=f"{signature:08x}-{number:02x}",
        bootable=entry.status == 0x80,
        logical=number >= 5,
    )


class _Chain:
    """The logical partitions of an extended one, as (entry, first sector). Ends at damage, and says which."""

    def __init__(self, source: BlockSource, sector: int, container: _Entry) -> None:
        self._source = source
        self._sector = sector
        self._container = container
        self.damage = ""

    def __iter__(self) -> Iterator[tuple[_Entry, int]]:
        container = self._container
        end = container.start + container.count
        here, seen = container.start, set[int]()
        while True:
            if here in seen or len(seen) >= _LOGICAL_MOST:
                self.damage = "the chain of logical partitions does not end"
                return
            seen.add(here)
            entries = _entries(_sector(self._source, self._sector, here))
            if not entries:
                self.damage = "the chain of logical partitions is broken"
                return
            data, link = entries[0], entries[1]
            if data.type and data.count:
                start = here + data.start  # relative to this record
                if data.start == 0 or start + data.count > end:
                    self.damage = "a logical partition leaves its extended one"
                    return
                yield data, start
            if link.type not in _EXTENDED or link.count == 0:
                return
            here = container.start + link.start  # relative to the extended partition
            if here >= end:
                self.damage = "the chain of logical partitions leaves the extended one"
                return


def _read_gpt(source: BlockSource, sector: int, entries: tuple[_Entry, ...]) -> TableReading:
    last = source.size // sector - 1
    first_copy = _gpt_copy(source, sector, 1)
    second_copy = _gpt_copy(source, sector, last)
    damage = ""
    if first_copy is None and second_copy is None:
        return TableReading(table=None, damage="both copies of the GPT are damaged")
    if first_copy is None:
        damage = "the first copy of the GPT is damaged; the second one was used"
    elif second_copy is None:
        # Also a disk that grew behind its table: the second copy is then where the first one says, not at the end.
        damage = "the second copy of the GPT is missing at the end of the disk"
    elif first_copy != second_copy:
        damage = "the two copies of the GPT differ; the first one was used"
    table = first_copy or second_copy
    assert table is not None  # noqa: S101 - one of the two is there, see above
    crossing = overlap(table)
    if crossing:
        return TableReading(table=None, damage=crossing)
    known = {(p.start, p.size) for p in table.partitions}
    ranges = [
        (e.start * sector, e.count * sector)
        for e in entries
        if e.type not in (0, _PROTECTIVE) and e.start <= last and e.count
    ]
    foreign = tuple((start, min(size, source.size - start)) for start, size in ranges if (start, size) not in known)
    return TableReading(table=table, damage=damage, foreign=foreign)


def _gpt_copy(source: BlockSource, sector: int, at: int) -> PartitionTable | None:
    """The table whose header lies in sector ``at``; None when header or entries are damaged."""
    last = source.size // sector - 1
    if at > last:
        return None
    header = _sector(source, sector, at)
    (
        signature,
        _revision,
        size,
        checksum,
        _zero,
        mine,
        _other,
        low,
        high,
        guid,
        where,
        count,
        width,
        entries_checksum,
    ) = struct.unpack_from("<8s4I4Q16sQ3I", header, 0)
    if signature != _GPT_SIGNATURE or not 92 <= size <= sector or mine != at:
        return None
    if zlib.crc32(header[:16] + bytes(4) + header[20:size]) != checksum:
        return None
    if width not in (128, 256, 512, 1024) or not 0 < count <= _GPT_ENTRIES_MOST or not low <= high <= last:
        return None
    sectors = -(-count * width // sector)
    if not 1 < where <= last + 1 - sectors:
        return None
    entries = _sector(source, sector, where, sectors)[: count * width]
    if zlib.crc32(entries) != entries_checksum:
        return None
    partitions = []
    for index in range(count):
        partition = _gpt_partition(index + 1, entries[index * width : (index + 1) * width], sector)
        if partition is None:
            continue
        if (
            partition.start < low * sector
            or partition.start + partition.size > (high + 1) * sector
            or partition.size <= 0
        ):
            return None
        partitions.append(partition)
    return PartitionTable(kind=TableKind.GPT, id=str(uuid.UUID(bytes_le=guid)), partitions=tuple(partitions))


def _gpt_partition(number: int, raw: bytes, sector: int) -> Partition | None:
    kind, unique, first, last, attributes, name = struct.unpack_from("<16s16sQQQ72s", raw, 0)
    if uuid.UUID(bytes_le=kind) == _NIL:
        return None
    return Partition(
        number=number,
        start=first * sector,
        size=(last + 1 - first) * sector,
        type=str(uuid.UUID(bytes_le=kind)),
        uuid=str(uuid.UUID(bytes_le=unique)),
        label=name.decode("utf-16-le", "replace").split("\0", 1)[0],
        bootable=bool(attributes & 4),  # legacy BIOS bootable
    )


def overlap(table: PartitionTable) -> str:
    """Which partitions of the table overlap, as one sentence; empty when none do. Logical ones are held against one
    another.
    """
    leaves = sorted((p for p in table.partitions if not is_extended(p)), key=lambda p: p.start)
    for one, other in pairwise(leaves):
        if one.start + one.size > other.start:
            return f"partitions {one.number} and {other.number} overlap"
    return ""
