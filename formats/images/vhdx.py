"""Header of VHDX images. Layout, checksums and rules: Microsoft [MS-VHDX]."""

from __future__ import annotations

import struct
from functools import cache
from uuid import UUID

from formats.images.header import Headers, ImageHeader, printable

MAGIC = b"vhdxfile"

_KIB = 1024
_HEADERS_AT = (64 * _KIB, 128 * _KIB)
_REGIONS_AT = (192 * _KIB, 256 * _KIB)
_REGION_TABLE = 64 * _KIB
_MAX_ENTRIES = 2047

_BAT = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
_METADATA = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
_PARAMETERS = UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_DISK_SIZE = UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_PAGE_83 = UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
_LOGICAL = UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
_PHYSICAL = UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
_PARENT = UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_ITEMS = {_PARAMETERS, _DISK_SIZE, _PAGE_83, _LOGICAL, _PHYSICAL, _PARENT}


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 - CRC-32C, reflected
        table.append(value)
    return tuple(table)


def _crc32c(block: bytes) -> int:
    """CRC-32C of ``block`` with its own checksum field (bytes 4 to 8) taken as zero."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in block[:4] + bytes(4) + block[8:]:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def read_header(file: Headers) -> ImageHeader:
    """Read the header of ``file``, which starts with ``MAGIC``."""
    unclean = _log_state(file)
    regions = _regions(file)
    metadata = _metadata(file, *regions[_METADATA])
    block, flags = struct.unpack("<II", _item(file, metadata, _PARAMETERS, 8))
    size = file.checked_size(int.from_bytes(_item(file, metadata, _DISK_SIZE, 8), "little"))
    sector = int.from_bytes(_item(file, metadata, _LOGICAL, 4), "little")
    file.require(1 << 20 <= block <= 256 << 20 and block & (block - 1) == 0, f"blocks of {block} bytes")
    file.require(sector in (512, 4096), f"sectors of {sector} bytes")
    bat_at, bat_length = regions[_BAT]
    file.require(bat_at + bat_length <= file.size, f"a block table at {bat_at}")
    file.require(bat_length // 8 >= -(-size // block), f"a block table of {bat_length} bytes for a disk of {size}")
    has_parent = bool(flags & 2)
    return ImageHeader(
        format="vhdx",
        subformat="differencing" if has_parent else "fixed" if flags & 1 else "dynamic",
        size=size,
        block_size=block,
        backing=_parent(file, metadata) if has_parent else "",
        unclean=unclean,
        features=(f"sectors of {sector} bytes",) if sector != 512 else (),
    )


def _log_state(file: Headers) -> str:
    """Of the two headers the valid one with the higher sequence number counts; a log it names must be replayed first."""
    best: tuple[int, bytes] | None = None
    for offset in _HEADERS_AT:
        block = file.at(offset, 4096)
        stated, sequence = struct.unpack("<IQ", block[4:16])
        if block.startswith(b"head") and stated == _crc32c(block) and (best is None or sequence > best[0]):
            best = sequence, block
    if best is None:
        raise file.error("neither of its headers has a valid checksum")
    version = int.from_bytes(best[1][66:68], "little")
    if version != 1:
        raise file.unsupported(f"is a VHDX image of the unknown version {version}")
    return "its log was not written back" if any(best[1][48:64]) else ""


def _regions(file: Headers) -> dict[UUID, tuple[int, int]]:
    for offset in _REGIONS_AT:
        table = file.at(offset, _REGION_TABLE)
        stated, count = struct.unpack("<II", table[4:12])
        if table.startswith(b"regi") and count <= _MAX_ENTRIES and stated == _crc32c(table):
            break
    else:
        raise file.error("neither of its region tables has a valid checksum")
    found: dict[UUID, tuple[int, int]] = {}
    for number in range(count):
        guid, start, length, required = struct.unpack_from("<16sQII", table, 16 + 32 * number)
        name = UUID(bytes_le=guid)
        if name in (_BAT, _METADATA):
            found[name] = (start, length)
        elif required & 1:
            raise file.unsupported(f"needs the unknown region {name}", "convert it where it was made")
    file.require(len(found) == 2, "its region table lacks the block table or the metadata")
    return found


def _metadata(file: Headers, start: int, length: int) -> dict[UUID, tuple[int, int]]:
    table = file.at(start, min(length, 64 * _KIB))
    file.require(table.startswith(b"metadata") and len(table) == 64 * _KIB, f"no metadata table at {start}")
    count = int.from_bytes(table[10:12], "little")
    file.require(count <= _MAX_ENTRIES, f"{count} metadata items")
    found: dict[UUID, tuple[int, int]] = {}
    for number in range(count):
        guid, offset, size, flags = struct.unpack_from("<16sIII", table, 32 + 32 * number)
        name = UUID(bytes_le=guid)
        if name in _ITEMS:
            file.require(offset + size <= length, f"metadata item {name} at {offset}")
            found[name] = (start + offset, size)
        elif flags & 4:
            raise file.unsupported(f"needs the unknown metadata item {name}", "convert it where it was made")
    return found


def _item(file: Headers, metadata: dict[UUID, tuple[int, int]], name: UUID, length: int) -> bytes:
    file.require(name in metadata and metadata[name][1] >= length, f"metadata item {name} is missing")
    return file.at(metadata[name][0], length)


def _parent(file: Headers, metadata: dict[UUID, tuple[int, int]]) -> str:
    """The most useful of the paths in the parent locator."""
    if _PARENT not in metadata:
        return "(a parent without a name)"
    start, length = metadata[_PARENT]
    locator = file.at(start, min(length, 64 * _KIB))
    if len(locator) < 20:
        return "(a parent without a name)"
    count = int.from_bytes(locator[18:20], "little")
    pairs: dict[str, str] = {}
    for number in range(min(count, (len(locator) - 20) // 12)):
        key_at, value_at, key_length, value_length = struct.unpack_from("<IIHH", locator, 20 + 12 * number)
        key, value = locator[key_at : key_at + key_length], locator[value_at : value_at + value_length]
        pairs[key.decode("utf-16-le", "replace")] = value.decode("utf-16-le", "replace")
    names = (pairs.get(key, "") for key in ("relative_path", "absolute_win32_path", "volume_path"))
    return next((printable(name) for name in names if name), "(a parent without a name)")
