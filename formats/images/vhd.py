"""Header and footer of VHD images (QEMU calls the format ``vpc``).

Layout: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0. Which of the two stated sizes counts depends on the writer:
Virtual PC and old QEMU mean the geometry, every other writer the current size (QEMU >= 10 decides the same way; older
QEMU cuts the tail of images by writers it does not know, so it is told the rule by ``options``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from formats.images.header import Headers, ImageHeader, printable

COOKIE = b"conectix"
FOOTER = 512

_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_KINDS = {_FIXED: "fixed", _DYNAMIC: "dynamic", _DIFFERENCING: "differencing"}
_BY_GEOMETRY = (b"vpc ", b"qemu")
_LARGEST_GEOMETRY = (65535, 16, 255)
_LARGEST_BLOCK = 256 << 20
_LARGEST_TABLE = 4 * (2040 << 30) // (1 << 19)  # bytes of a block table: 2040 GiB in blocks of 512 KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """The fields of a VHD footer that a reader needs."""

    kind: int
    header_at: int
    creator: bytes
    current_size: int
    geometry: tuple[int, int, int]

    @property
    def by_geometry(self) -> bool:
        """Whether the geometry, not the stated size, is the size of the disk."""
        return self.creator in _BY_GEOMETRY and self.geometry != _LARGEST_GEOMETRY

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""
        cylinders, heads, sectors = self.geometry
        return cylinders * heads * sectors * 512 if self.by_geometry else self.current_size


def checksum(block: bytes, at: int) -> int:
    """One's complement of the sum of all bytes but the four of the sum itself, which lie at ``at``."""
    return ~(sum(block) - sum(block[at : at + 4])) & 0xFFFFFFFF


def parse_footer(block: bytes) -> Footer | None:
    """The footer in ``block`` (512 bytes, or 511 as some early writers left it); None when it is none or damaged."""
    if len(block) not in (FOOTER - 1, FOOTER) or not block.startswith(COOKIE):
        return None
    header_at, creator, current, c, h, s, kind, stated = struct.unpack(">16xQ4x4s8x8xQHBBII", block[:68])
    if stated != checksum(block, 64):
        return None
    return Footer(kind=kind, header_at=header_at, creator=creator, current_size=current, geometry=(c, h, s))


def find_footer(file: Headers) -> Footer | None:
    """The valid footer at the end of ``file``, or None; looks at the last 512 and the last 511 bytes."""
    end = file.some(max(0, file.size - FOOTER), FOOTER)
    return parse_footer(end) or parse_footer(end[1:])


def read_header(file: Headers) -> ImageHeader:
    """Read the header of ``file``, which has ``COOKIE`` at its start or in its last 512 bytes."""
    footer = find_footer(file)
    copy = parse_footer(file.some(0, FOOTER))
    unclean = "" if footer is not None else "its footer is missing or damaged; the copy at its start is used"
    footer = footer or copy
    if footer is None:
        raise file.error("neither of its VHD footers has a valid checksum")
    file.require(footer.kind in _KINDS, f"the unknown disk type {footer.kind}")
    size = file.checked_size(footer.size)
    block = 0
    backing = ""
    if footer.kind == _FIXED:
        file.require(size <= file.size, f"a fixed disk of {size} bytes in a file of {file.size}")
    else:
        file.require(copy is not None, "a dynamic disk without the copy of the footer at its start")
        block, backing = _dynamic(file, footer)
    return ImageHeader(
        format="vhd",
        subformat=_KINDS[footer.kind],
        size=size,
        block_size=block,
        backing=backing,
        unclean=unclean,
        features=(f"written by {printable(footer.creator).strip() or 'an unnamed program'}",),
        options={"force_size_calc": "chs" if footer.by_geometry else "current_size"},
    )


def _dynamic(file: Headers, footer: Footer) -> tuple[int, str]:
    header = file.at(footer.header_at, 1024)
    file.require(header.startswith(b"cxsparse"), f"no dynamic disk header at {footer.header_at}")
    table_at, _, entries, block, stated = struct.unpack(">16xQIIII", header[:40])
    file.require(stated == checksum(header, 36), "the checksum of the dynamic disk header is wrong")
    file.require(512 <= block <= _LARGEST_BLOCK and block & (block - 1) == 0, f"blocks of {block} bytes")
    file.require(entries * 4 <= _LARGEST_TABLE, f"a table of {entries} blocks")
    file.require(entries * block >= footer.size, f"{entries} blocks for a disk of {footer.size} bytes")
    file.require(table_at + entries * 4 <= file.size, f"a block table at {table_at}")
    if footer.kind != _DIFFERENCING:
        return block, ""
    name = header[64:576].decode("utf-16-be", "replace")
    return block, printable(name) or "(a parent without a name)"
