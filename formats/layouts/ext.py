"""Which blocks an ext2, ext3 or ext4 file system uses.

Everything that may hold something is marked in the block bitmaps: backups of the superblock, reserved descriptor
blocks, inode tables and the journal too. So the map is the bitmaps, where they can be trusted, and DATA where not:

- ``used`` answers None for a file system whose bitmaps may lag what it holds: a journal that must be replayed
  (mounted, not frozen), errors, not cleanly unmounted without a journal, an external journal, a feature that is not
  known here, a superblock that does not add up.
- A group whose descriptor or bitmap fails its checksum, or whose number of free clusters differs from its
  descriptor's, is in use whole.
- The boot block in front of the first group and the bytes behind the last block are in use.

Bitmaps are read when a range asks for them, several groups at a time: with flex_bg those of 16 groups (2 GiB) lie
together and are one read.

Facts: Linux ``Documentation/filesystems/ext4`` (superblock, group descriptors, meta_bg, bigalloc, checksums).
"""

from __future__ import annotations

import struct
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from formats.block import BlockSource, Extent, Kind, check_range, merged
from formats.layouts.crc import crc16, crc32c
from formats.layouts.used import Content, UsedMap

_SUPERBLOCK = 1024  # bytes, and also its offset
_MAGIC = 0xEF53
_STATE_CLEAN, _STATE_ERROR, _STATE_ORPHANS = 1, 2, 4

_COMPAT_JOURNAL, _COMPAT_SPARSE_SUPER2 = 0x4, 0x200
_COMPAT_LAZY_BG = 0x40  # never released; its groups without a bitmap mean something else
_COMPAT_KNOWN = 0x1FFF & ~_COMPAT_LAZY_BG

_INCOMPAT_RECOVER, _INCOMPAT_JOURNAL_DEVICE = 0x4, 0x8
_INCOMPAT_META_BG, _INCOMPAT_64BIT = 0x10, 0x80
_INCOMPAT_CSUM_SEED = 0x2000
# filetype, recover, journal device, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, dirdata, csum_seed, largedir,
# inline_data, encrypt, casefold
_INCOMPAT_KNOWN = (
    0x2 | 0x4 | 0x8 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x30000
)

_RO_SPARSE_SUPER, _RO_GDT_CSUM, _RO_BIGALLOC, _RO_METADATA_CSUM = 0x1, 0x10, 0x200, 0x400
_RO_HAS_SNAPSHOT = 0x80  # never merged; snapshots own blocks that the bitmaps do not show
_RO_KNOWN = 0x1FFFF & ~_RO_HAS_SNAPSHOT

_GROUP_BLOCK_UNINIT = 0x2

_BATCH_GROUPS = 16  # at least so many groups' bitmaps are looked at together
_BATCH_GROUPS_MOST = 64
_BATCHES_KEPT = 32
_DESCRIPTOR_BLOCKS_KEPT = 64
_DESCRIPTOR_BLOCKS_READ = 16
_READ_MOST = 1 << 20
_READ_GAP = 32 * 1024  # bitmaps that lie closer than this are one read


class _UntrustedError(Exception):
    """The file system's bitmaps cannot be trusted; the text says why."""


def used(source: BlockSource) -> UsedMap | None:
    """The map of an ext2/3/4 file system that starts at the source's first byte; None when there is none that can be
    trusted.
    """
    content = look(source)
    return content.used if content is not None else None


def look(source: BlockSource) -> Content | None:
    """What ext file system starts at the source's first byte: None when there is none, else its kind with its map or
    the reason for none.
    """
    if source.size < 2 * _SUPERBLOCK:
        return None
    raw = _read(source, _SUPERBLOCK, _SUPERBLOCK)
    if int.from_bytes(raw[0x38:0x3A], "little") != _MAGIC:
        return None
    kind = _kind(raw)
    try:
        return Content(kind=kind, used=_ExtMap(source, _parse(raw, source.size)))
    except _UntrustedError as why:
        return Content(kind=kind, reason=str(why))


def _kind(raw: bytes) -> str:
    compat, incompat, read_only = struct.unpack_from("<3I", raw, 0x5C)
    if incompat & ~0x16 or read_only & ~0x7:
        return "ext4"
    return "ext3" if compat & _COMPAT_JOURNAL else "ext2"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Super:
    """What the map needs of the superblock; blocks are numbered from the start of the volume."""

    block: int  # bytes
    ratio: int  # blocks of a cluster
    blocks: int
    first_block: int
    clusters_per_group: int
    groups: int
    flex: int
    descriptor: int  # bytes
    inode_table_blocks: int
    reserved_gdt: int
    first_meta_bg: int | None
    sparse_super: bool
    backups: tuple[int, ...] | None  # the groups sparse_super2 names
    checksum_seed: int | None
    crc16_seed: int | None

    @property
    def group_blocks(self) -> int:
        return self.clusters_per_group * self.ratio

    @property
    def descriptors_per_block(self) -> int:
        return self.block // self.descriptor

    @property
    def gdt_blocks(self) -> int:
        return -(-self.groups // self.descriptors_per_block)

    @property
    def gdt_start(self) -> int:
        # Behind the block that holds byte 1024: also when bigalloc puts the first block of 1 KiB file systems at 0.
        return _SUPERBLOCK // self.block + 1

    def group_start(self, group: int) -> int:
        """First block of the group."""
        return self.first_block + group * self.group_blocks

    def group_clusters(self, group: int) -> int:
        """Clusters of the group: fewer in the last one."""
        blocks = min(self.blocks - self.group_start(group), self.group_blocks)
        return -(-blocks // self.ratio)

    def has_backup(self, group: int) -> bool:
        """Whether the group begins with a superblock."""
        if group == 0:
            return True
        if self.backups is not None:
            return group in self.backups
        if group == 1 or not self.sparse_super:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def leading_blocks(self, group: int) -> int:
        """Blocks at the group's start that hold superblock, descriptors and what is reserved for more of them."""
        backup = int(self.has_backup(group))
        meta_group, inside = divmod(group, self.descriptors_per_block)
        if self.first_meta_bg is None or meta_group < self.first_meta_bg:
            table = self.gdt_blocks if self.first_meta_bg is None else self.first_meta_bg
            return backup * (1 + table + self.reserved_gdt)
        return backup + int(inside in (0, 1, self.descriptors_per_block - 1))

    def descriptor_block(self, number: int) -> int:
        """Where the ``number``-th block of group descriptors lies."""
        if self.first_meta_bg is None or number < self.first_meta_bg:
            return self.gdt_start + number
        if number == 0:
            return self.gdt_start
        group = number * self.descriptors_per_block
        return self.group_start(group) + int(self.has_backup(group))


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def _check(condition: bool, reason: str) -> None:
    if not condition:
        raise _UntrustedError(reason)


def _parse(raw: bytes, size: int) -> _Super:
    """Read the superblock; ``_UntrustedError`` when the bitmaps cannot be trusted with it."""
    (
        blocks,
        _reserved,
        _free,
        _free_inodes,
        first_block,
        log_block,
        log_cluster,
        per_group,
        clusters_per_group,
        inodes_per_group,
    ) = struct.unpack_from("<10I", raw, 0x4)
    revision = struct.unpack_from("<I", raw, 0x4C)[0]
    inode_size, compat, incompat, read_only = 128, 0, 0, 0
    if revision >= 1:
        inode_size = struct.unpack_from("<H", raw, 0x58)[0]
        compat, incompat, read_only = struct.unpack_from("<3I", raw, 0x5C)
    _check_state(raw, compat, incompat, read_only)
    if incompat & _INCOMPAT_64BIT:
        blocks |= struct.unpack_from("<I", raw, 0x150)[0] << 32
    bigalloc = bool(read_only & _RO_BIGALLOC)
    _check(log_block <= 6 and log_cluster <= 20 and log_cluster >= log_block, "its block size is not plausible")
    block, ratio = 1024 << log_block, 1 << (log_cluster - log_block)
    _check(
        bigalloc or (ratio == 1 and clusters_per_group == per_group),
        "its cluster size needs bigalloc, which it does not have",
    )
    _check(clusters_per_group * ratio == per_group, "its groups do not add up")
    _check(0 < clusters_per_group <= 8 * block and clusters_per_group % 8 == 0, "its group size is not plausible")
    _check(first_block in (0, 1) and first_block < blocks, "its first block is not plausible")
    _check(blocks * block <= size, "it is larger than its volume")
    _check(
        inode_size >= 128 and inode_size & (inode_size - 1) == 0 and inode_size <= block,
        "its inode size is not plausible",
    )
    _check(0 < inodes_per_group <= 8 * block, "its number of inodes is not plausible")
    descriptor = struct.unpack_from("<H", raw, 0xFE)[0] if incompat & _INCOMPAT_64BIT else 32
    _check(
        descriptor >= 32 and descriptor & (descriptor - 1) == 0 and descriptor <= 1024,
        "its descriptors are not plausible",
    )
    _check(not incompat & _INCOMPAT_64BIT or descriptor >= 64, "its descriptors are not plausible")
    seed, seed16 = _seeds(raw, incompat, read_only)
    log_flex = raw[0x174]
    return _Super(
        block=block,
        ratio=ratio,
        blocks=blocks,
        first_block=first_block,
        clusters_per_group=clusters_per_group,
        groups=-(-(blocks - first_block) // per_group),
        flex=1 << log_flex if log_flex <= 20 else 1,
        descriptor=descriptor,
        inode_table_blocks=-(-inodes_per_group * inode_size // block),
        reserved_gdt=struct.unpack_from("<H", raw, 0xCE)[0],
        first_meta_bg=struct.unpack_from("<I", raw, 0x104)[0] if incompat & _INCOMPAT_META_BG else None,
        sparse_super=bool(read_only & _RO_SPARSE_SUPER),
        backups=struct.unpack_from("<2I", raw, 0x24C) if compat & _COMPAT_SPARSE_SUPER2 else None,
        checksum_seed=seed,
        crc16_seed=seed16,
    )


def _check_state(raw: bytes, compat: int, incompat: int, read_only: int) -> None:
    state = struct.unpack_from("<H", raw, 0x3A)[0]
    _check(not incompat & _INCOMPAT_JOURNAL_DEVICE, "it is the journal of another file system")
    _check(
        not incompat & _INCOMPAT_RECOVER,
        "its journal must be replayed (it is mounted and not frozen, or was not unmounted)",
    )
    _check(not state & _STATE_ERROR, "it is marked as having errors")
    _check(not state & _STATE_ORPHANS, "its orphans are being cleaned up")
    _check(bool(state & _STATE_CLEAN), "it is mounted or was not unmounted cleanly")
    unknown = (compat & ~_COMPAT_KNOWN, incompat & ~_INCOMPAT_KNOWN, read_only & ~_RO_KNOWN)
    _check(not any(unknown), "it has features that are not known here ({:#x}, {:#x}, {:#x})".format(*unknown))
    if compat & _COMPAT_JOURNAL:
        inode, device = struct.unpack_from("<2I", raw, 0xE0)
        _check(inode != 0 and device == 0, "its journal lies on another device")


def _seeds(raw: bytes, incompat: int, read_only: int) -> tuple[int | None, int | None]:
    """What the checksums of descriptors and bitmaps start from: CRC-32C, or CRC-16, or neither."""
    uuid = raw[0x68:0x78]
    if read_only & _RO_METADATA_CSUM:
        _check(raw[0x175] == 1, "its kind of checksum is not known here")
        stored = struct.unpack_from("<I", raw, 0x3FC)[0]
        _check(crc32c(0xFFFFFFFF, raw[:0x3FC]) == stored, "its superblock fails its checksum")
        if incompat & _INCOMPAT_CSUM_SEED:
            return struct.unpack_from("<I", raw, 0x270)[0], None
        return crc32c(0xFFFFFFFF, uuid), None
    if read_only & _RO_GDT_CSUM:
        return None, crc16(0xFFFF, uuid)
    return None, None


@dataclass(frozen=True, slots=True)
class _Group:
    """A group's descriptor. ``trusted`` is whether its checksum fits and its bitmap lies inside the file system."""

    bitmap: int
    inode_bitmap: int
    inode_table: int
    free: int
    uninitialised: bool
    bitmap_checksum: int
    trusted: bool


@dataclass(frozen=True, slots=True)
class _Batch:
    """The runs of clusters in use of some neighbouring groups, relative to the first one's first cluster."""

    starts: array[int]
    ends: array[int]


class _ExtMap:
    """The used map of one file system; bitmaps are read when they are asked for, and the last ones kept."""

    def __init__(self, source: BlockSource, super_: _Super) -> None:
        self._source = source
        self._super = super_
        self._batch_groups = min(max(super_.flex, _BATCH_GROUPS), _BATCH_GROUPS_MOST)
        self._batches: OrderedDict[int, _Batch] = OrderedDict()
        self._descriptor_blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the volume: the file system and whatever lies behind it."""
        return self._source.size

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Blocks in use are DATA, free ones ZERO."""
        check_range(self.size, start, length)
        return merged(self._tiles(start, start + length))

    def _tiles(self, position: int, end: int) -> Iterator[Extent]:
        fs = self._super
        low, high = fs.first_block * fs.block, fs.blocks * fs.block
        span = self._batch_groups * fs.group_blocks * fs.block
        if position < min(low, end):
            yield Extent(position, min(low, end) - position, Kind.DATA)
            position = min(low, end)
        while position < min(high, end):
            number = (position - low) // span
            base = low + number * span
            stop = min(base + span, high, end)
            yield from self._batch_tiles(self._batch(number), base, position, stop)
            position = stop
        if position < end:
            yield Extent(position, end - position, Kind.DATA)

    def _batch_tiles(self, batch: _Batch, base: int, position: int, stop: int) -> Iterator[Extent]:
        cluster = self._super.ratio * self._super.block
        index = max(0, bisect_right(batch.starts, (position - base) // cluster) - 1)
        while index < len(batch.starts) and position < stop:
            low = max(base + batch.starts[index] * cluster, position)
            high = min(base + batch.ends[index] * cluster, stop)
            index += 1
            if low >= high:
                continue
            if low > position:
                yield Extent(position, low - position, Kind.ZERO)
            yield Extent(low, high - low, Kind.DATA)
            position = high
        if position < stop:
            yield Extent(position, stop - position, Kind.ZERO)

    def _batch(self, number: int) -> _Batch:
        with self._lock:
            batch = self._batches.get(number)
            if batch is None:
                batch = self._batches[number] = self._read_batch(number)
                while len(self._batches) > _BATCHES_KEPT:
                    self._batches.popitem(last=False)
            self._batches.move_to_end(number)
            return batch

    def _read_batch(self, number: int) -> _Batch:
        fs = self._super
        first = number * self._batch_groups
        groups = {g: self._group(g) for g in range(first, min(first + self._batch_groups, fs.groups))}
        wanted = sorted(g.bitmap for g in groups.values() if g.trusted and not g.uninitialised)
        bitmaps = dict(_read_blocks(self._source, fs.block, wanted))
        batch = _Batch(array("Q"), array("Q"))
        for group, described in groups.items():
            bits = self._bits(group, described, bitmaps)
            shift = (group - first) * fs.clusters_per_group
            for start, end in _ones(bits):
                if batch.ends and batch.ends[-1] == shift + start:
                    batch.ends[-1] = shift + end
                else:
                    batch.starts.append(shift + start)
                    batch.ends.append(shift + end)
        return batch

    def _bits(self, group: int, described: _Group, bitmaps: dict[int, bytes]) -> str:
        """The group's clusters in order: 1 for in use, 0 for free."""
        clusters = self._super.group_clusters(group)
        whole = "1" * clusters
        if not described.trusted:
            return whole
        if described.uninitialised:
            bits = self._bits_of_uninitialised(group, described)
        else:
            bitmap = bitmaps[described.bitmap][: self._super.clusters_per_group // 8]
            if not self._bitmap_fits(bitmap, described.bitmap_checksum):
                return whole
            value = int.from_bytes(bitmap, "little") & ((1 << clusters) - 1)
            bits = format(value, f"0{clusters}b")[::-1]
        # Descriptor and bitmap are written in one transaction: where they differ, one of them is not to be believed.
        return bits if bits.count("0") == described.free else whole

    def _bits_of_uninitialised(self, group: int, described: _Group) -> str:
        """A group that was never allocated from has no bitmap on the disk: only its own metadata is in use."""
        fs = self._super
        start, clusters = fs.group_start(group), fs.group_clusters(group)
        bits = bytearray(b"0" * clusters)
        runs = (
            (start, fs.leading_blocks(group)),
            (described.bitmap, 1),
            (described.inode_bitmap, 1),
            (described.inode_table, fs.inode_table_blocks),
        )
        for block, count in runs:
            low = max(block - start, 0) // fs.ratio
            high = min(-(-(block + count - start) // fs.ratio), clusters)
            if count and low < high:
                bits[low:high] = b"1" * (high - low)
        return bits.decode("ascii")

    def _bitmap_fits(self, bitmap: bytes, stored: int) -> bool:
        fs = self._super
        if fs.checksum_seed is None:
            return True
        mask = 0xFFFFFFFF if fs.descriptor >= 64 else 0xFFFF
        return crc32c(fs.checksum_seed, bitmap) & mask == stored & mask

    def _group(self, group: int) -> _Group:
        fs = self._super
        number, index = divmod(group, fs.descriptors_per_block)
        raw = self._descriptor_block(number)[index * fs.descriptor : (index + 1) * fs.descriptor]
        bitmap, inode_bitmap, inode_table, free = struct.unpack_from("<3IH", raw, 0)
        flags = struct.unpack_from("<H", raw, 0x12)[0]
        bitmap_checksum = struct.unpack_from("<H", raw, 0x18)[0]
        if fs.descriptor >= 64:
            high = struct.unpack_from("<3IH", raw, 0x20)
            bitmap, inode_bitmap, inode_table = (
                bitmap | high[0] << 32,
                inode_bitmap | high[1] << 32,
                inode_table | high[2] << 32,
            )
            free |= high[3] << 16
            bitmap_checksum |= struct.unpack_from("<H", raw, 0x38)[0] << 16
        checksummed = fs.checksum_seed is not None or fs.crc16_seed is not None
        return _Group(
            bitmap,
            inode_bitmap,
            inode_table,
            free,
            checksummed and bool(flags & _GROUP_BLOCK_UNINIT),  # without checksums the flags mean nothing
            bitmap_checksum,
            self._descriptor_fits(group, raw) and fs.first_block < bitmap < fs.blocks,
        )

    def _descriptor_fits(self, group: int, raw: bytes) -> bool:
        fs = self._super
        stored: int = struct.unpack_from("<H", raw, 0x1E)[0]
        number = struct.pack("<I", group)
        if fs.checksum_seed is not None:
            return crc32c(fs.checksum_seed, number + raw[:0x1E] + b"\0\0" + raw[0x20:]) & 0xFFFF == stored
        if fs.crc16_seed is not None:
            return crc16(fs.crc16_seed, number + raw[:0x1E] + raw[0x20:]) == stored
        return True

    def _descriptor_block(self, number: int) -> bytes:
        block = self._descriptor_blocks.get(number)
        if block is None:
            for nearby, content in self._read_descriptor_blocks(number):
                self._descriptor_blocks[nearby] = content
            while len(self._descriptor_blocks) > _DESCRIPTOR_BLOCKS_KEPT:
                self._descriptor_blocks.popitem(last=False)
            block = self._descriptor_blocks[number]
        return block

    def _read_descriptor_blocks(self, number: int) -> Iterator[tuple[int, bytes]]:
        """The block of that number; where the table lies in one piece, those behind it that the next groups need
        too.
        """
        fs = self._super
        count = 1
        if fs.first_meta_bg is None:
            count = min(_DESCRIPTOR_BLOCKS_READ, fs.gdt_blocks - number)
        position = fs.descriptor_block(number)
        if position + count > fs.blocks:
            # Only when the superblock lies: zeroes make descriptors that nothing trusts.
            yield number, bytes(fs.block)
            return
        for block, raw in _read_blocks(self._source, fs.block, list(range(position, position + count))):
            yield block - position + number, raw


def _ones(bits: str) -> Iterator[tuple[int, int]]:
    """The runs of 1 in the text, as (first, end)."""
    start = bits.find("1")
    while start >= 0:
        end = bits.find("0", start)
        if end < 0:
            end = len(bits)
        yield start, end
        start = bits.find("1", end)


def _read(source: BlockSource, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    source.readinto(memoryview(buffer), offset)
    return bytes(buffer)


def _read_blocks(source: BlockSource, size: int, numbers: list[int]) -> Iterator[tuple[int, bytes]]:
    """Read the blocks of these ascending numbers; those that lie close together in one piece."""
    index = 0
    while index < len(numbers):
        first, last, index = numbers[index], numbers[index], index + 1
        members = [first]
        while (
            index < len(numbers)
            and (numbers[index] - last) * size <= _READ_GAP
            and (numbers[index] + 1 - first) * size <= _READ_MOST
        ):
            last = numbers[index]
            members.append(last)
            index += 1
        piece = _read(source, first * size, (last + 1 - first) * size)
        for number in members:
            yield number, piece[(number - first) * size : (number - first + 1) * size]
