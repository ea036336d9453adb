"""Reading files of an ext2, ext3 or ext4 file system: by path, bounded, without a kernel.

For the few files that say how a machine at rest starts. What is read is what lies on the disk: a journal is not replayed, so
a file that was being written when the machine stopped may be older than the machine would find it. Checksums are not looked at;
everything is bounded, and whatever does not add up is an ``ImageError``.

Facts: Linux ``Documentation/filesystems/ext4`` (superblock, group descriptors, inodes, extents, block map, directory entries).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from formats.block import BlockSource
from formats.errors import ImageError

_SUPERBLOCK = 1024
_MAGIC = 0xEF53
_ROOT = 2

# filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, casefold
_INCOMPAT_READABLE = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x20000
_INCOMPAT_META_BG, _INCOMPAT_64BIT = 0x10, 0x80
_FLAG_ENCRYPTED, _FLAG_EXTENTS, _FLAG_INLINE = 0x800, 0x80000, 0x10000000
_EXTENT_MAGIC = 0xF30A
_DIRECT, _LEVELS = 12, 3

_LINKS_MOST = 40  # as Linux's path lookup
_DIRECTORY_MOST = 64 << 20
_DEPTH_MOST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inode:
    """What reading needs; ``map`` is the 60 bytes of i_block."""

    mode: int
    size: int
    flags: int
    map: bytes


class ExtFiles:
    """The files of the file system that starts at the source's first byte. Not thread-safe; it holds no resource.

    Raises ``ImageError`` when there is none, or it has features that are not known here.
    """

    def __init__(self, source: BlockSource) -> None:
        if source.size < 2 * _SUPERBLOCK:
            raise ImageError("there is no ext file system: too small")
        self._source = source
        raw = self._bytes(_SUPERBLOCK, _SUPERBLOCK)
        log_block = _u32(raw, 0x18)
        incompat = _u32(raw, 0x60) if _u32(raw, 0x4C) else 0
        if _u16(raw, 0x38) != _MAGIC or log_block > 6:
            raise ImageError("there is no ext file system")
        if unknown := incompat & ~_INCOMPAT_READABLE:
            raise ImageError(f"the ext file system has features that are not read here ({unknown:#x})")
        if incompat & _INCOMPAT_META_BG:
            raise ImageError("the ext file system has its group descriptors apart (meta_bg), which is not read here")
        self._block = 1024 << log_block
        self._blocks = source.size // self._block
        self._inode_count = _u32(raw, 0x0)
        self._per_group = _u32(raw, 0x28)
        self._inode_size = _u16(raw, 0x58) if _u32(raw, 0x4C) else 128
        self._descriptor = _u16(raw, 0xFE) if incompat & _INCOMPAT_64BIT else 32
        self._table = (_SUPERBLOCK // self._block + 1) * self._block
        self.uuid = _uuid(raw[0x68:0x78])
        self.label = raw[0x78:0x88].split(b"\0")[0].decode("utf-8", "replace")
        if not self._per_group or not 128 <= self._inode_size <= self._block or not 32 <= self._descriptor <= 1024:
            raise ImageError("the ext file system's superblock does not add up")

    def read(self, path: str, most: int) -> bytes | None:
        """The content of a regular file, symbolic links followed within this file system; None when there is no such file.

        ``ImageError`` when it is larger than ``most`` bytes or damaged.
        """
        inode = self._find(path)
        if inode is None or not stat.S_ISREG(inode.mode):
            return None
        if inode.size > most:
            raise ImageError(f"{path} is larger than {most} bytes")
        return b"".join(self._content(inode))

    def names(self, path: str) -> list[str]:
        """The names in a directory, in order, without ``.`` and ``..``; empty when there is no such directory."""
        inode = self._find(path)
        if inode is None or not stat.S_ISDIR(inode.mode):
            return []
        return sorted(name for name, _ in self._entries(inode) if name not in {".", ".."})

    # -- paths -----------------------------------------------------------------------------------------------------

    def _find(self, path: str) -> _Inode | None:
        """The inode of a path; a link that leads nowhere or around in a circle is no file."""
        todo = [part for part in reversed(path.split("/")) if part]
        trail = [self._inode(_ROOT)]
        links = 0
        while todo:
            part = todo.pop()
            if part == ".":
                continue
            if part == "..":
                del trail[1 if len(trail) == 1 else -1 :]
                continue
            if not stat.S_ISDIR(trail[-1].mode):
                return None
            number = next((number for name, number in self._entries(trail[-1]) if name == part), None)
            if number is None:
                return None
            inode = self._inode(number)
            if not stat.S_ISLNK(inode.mode):
                trail.append(inode)
                continue
            links += 1
            if links > _LINKS_MOST:
                return None
            target = self._target(inode)
            if target.startswith("/"):
                del trail[1:]
            todo += [part for part in reversed(target.split("/")) if part]
        return trail[-1]

    def _target(self, inode: _Inode) -> str:
        if inode.size > 4096:
            raise ImageError("a symbolic link is longer than a path may be")
        # A short target lies in the inode itself.
        raw = inode.map[: inode.size] if inode.size < 60 else b"".join(self._content(inode))
        return raw.decode("utf-8", "surrogateescape")

    def _entries(self, inode: _Inode) -> Iterator[tuple[str, int]]:
        """Name and inode of every entry. An index (htree) hides in entries of inode 0, so a linear walk sees all names."""
        if inode.size > _DIRECTORY_MOST:
            raise ImageError(f"a directory is larger than {_DIRECTORY_MOST} bytes")
        for block in self._content(inode):
            position = 0
            while position + 8 <= len(block):
                number, length, name_length = struct.unpack_from("<IHB", block, position)
                if length == 0 and self._block == 65536:
                    length = 65536
                if length < 8 or position + length > len(block) or 8 + name_length > length:
                    break
                if number and name_length:
                    name = block[position + 8 : position + 8 + name_length]
                    yield name.decode("utf-8", "surrogateescape"), number
                position += length

    # -- inodes ----------------------------------------------------------------------------------------------------

    def _inode(self, number: int) -> _Inode:
        if not 1 <= number <= self._inode_count:
            raise ImageError(f"there is no inode {number}")
        group, index = divmod(number - 1, self._per_group)
        descriptor = self._bytes(self._table + group * self._descriptor, self._descriptor)
        table = _u32(descriptor, 0x8) | (_u32(descriptor, 0x28) << 32 if self._descriptor >= 64 else 0)
        raw = self._bytes(table * self._block + index * self._inode_size, 128)
        mode, flags = _u16(raw, 0x0), _u32(raw, 0x20)
        size = _u32(raw, 0x4) | (_u32(raw, 0x6C) << 32)
        if flags & _FLAG_ENCRYPTED:
            raise ImageError("a file is encrypted")
        if flags & _FLAG_INLINE and not stat.S_ISLNK(mode):
            raise ImageError("a file lies in its inode (inline_data), which is not read here")
        return _Inode(mode=mode, size=size, flags=flags, map=raw[0x28:0x64])

    def _content(self, inode: _Inode) -> Iterator[bytes]:
        """The content, block by block; the last one cut to the size."""
        count = -(-inode.size // self._block)
        runs = self._extents(inode.map, None) if inode.flags & _FLAG_EXTENTS else self._mapped(inode.map, count)
        position = 0
        for logical, physical, length in runs:
            if logical < position:
                raise ImageError("the blocks of a file overlap")
            for _ in range(position, min(logical, count)):
                yield self._cut(bytes(self._block), inode, position)
                position += 1
            for step in range(min(length, count - position)):
                found = self._read_block(physical + step) if physical else bytes(self._block)
                yield self._cut(found, inode, position)
                position += 1
        for _ in range(position, count):
            yield self._cut(bytes(self._block), inode, position)
            position += 1

    def _cut(self, block: bytes, inode: _Inode, number: int) -> bytes:
        return block[: inode.size - number * self._block]

    def _extents(self, node: bytes, expected: int | None) -> Iterator[tuple[int, int, int]]:
        """(first block of the file, its place or 0 for zeroes, how many) in order."""
        magic, entries, _, level = struct.unpack_from("<4H", node)
        if (
            magic != _EXTENT_MAGIC
            or level > _DEPTH_MOST
            or expected not in {None, level}
            or 12 + 12 * entries > len(node)
        ):
            raise ImageError("the extents of a file do not add up")
        for index in range(entries):
            entry = node[12 + 12 * index : 24 + 12 * index]
            if level:
                leaf = _u32(entry, 4) | _u16(entry, 8) << 32
                yield from self._extents(self._read_block(leaf), level - 1)
                continue
            logical, length, high, low = struct.unpack("<IHHI", entry)
            if not length:
                raise ImageError("the extents of a file do not add up")
            # Above 32768 it was allocated and never written: zeroes.
            written = length <= 32768
            yield logical, (high << 32 | low) if written else 0, length if written else length - 32768

    def _mapped(self, table: bytes, count: int) -> Iterator[tuple[int, int, int]]:
        """The same for the block map of ext2 and ext3: 12 direct blocks, then one, two and three levels of tables."""
        places = struct.unpack("<15I", table)
        position = 0
        for place in places[:_DIRECT]:
            yield position, place, 1
            position += 1
        for level in range(1, _LEVELS + 1):
            if position >= count:
                return
            for place in self._indirect(places[_DIRECT + level - 1], level, count - position):
                yield position, place, 1
                position += 1

    def _indirect(self, place: int, level: int, most: int) -> Iterator[int]:
        per_block = self._block // 4
        if not place:
            yield from (0 for _ in range(min(per_block**level, most)))
            return
        given = 0
        for inner in struct.unpack(f"<{per_block}I", self._read_block(place)):
            if given >= most:
                return
            if level == 1:
                yield inner
                given += 1
            else:
                for found in self._indirect(inner, level - 1, most - given):
                    yield found
                    given += 1

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _read_block(self, number: int) -> bytes:
        if not 0 < number < self._blocks:
            raise ImageError("a block of a file lies outside the file system")
        return self._bytes(number * self._block, self._block)

    def _bytes(self, offset: int, length: int) -> bytes:
        if offset + length > self._source.size:
            raise ImageError("the ext file system is larger than its volume")
        buffer = bytearray(length)
        self._source.readinto(memoryview(buffer), offset)
        return bytes(buffer)


def _u16(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 2], "little")


def _u32(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 4], "little")


def _uuid(raw: bytes) -> str:
    digits = raw.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
