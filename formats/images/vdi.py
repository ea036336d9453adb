"""Header of VirtualBox disk images. Layout: QEMU block/vdi.c as documentation of the format, version 1.1."""

from __future__ import annotations

import struct

from formats.images.header import Headers, ImageHeader

SIGNATURE = (0xBEDA107F).to_bytes(4, "little")
SIGNATURE_AT = 64

_KINDS = {1: "dynamic", 2: "static", 3: "undo", 4: "differencing"}
_BLOCK = 1 << 20


def read_header(file: Headers) -> ImageHeader:
    """Read the header of ``file``, which has ``SIGNATURE`` at ``SIGNATURE_AT``."""
    version, header_size, kind = struct.unpack("<III", file.at(68, 12))
    if version >> 16 != 1:
        raise file.unsupported(f"is a VDI image of the unknown version {version >> 16}.{version & 0xFFFF}")
    file.require(header_size >= 384, f"a header of {header_size} bytes")
    map_at, data_at, _, _, _, sector, _, size, block, _, blocks, allocated = struct.unpack(
        "<IIIIIIIQIIII", file.at(340, 52)
    )
    file.checked_size(size)
    file.require(kind in _KINDS, f"the unknown kind {kind}")
    file.require(sector == 512, f"sectors of {sector} bytes")
    file.require(block == _BLOCK, f"blocks of {block} bytes")
    file.require(blocks >= -(-size // block) and allocated <= blocks, f"{blocks} blocks for a disk of {size} bytes")
    file.require(map_at + blocks * 4 <= file.size and data_at >= map_at, f"a block map of {blocks} entries at {map_at}")
    linked = file.at(424, 32)  # UUIDs of the parent's image and its parent
    backing = "(its parent is known by UUID only)" if kind in (3, 4) or any(linked) else ""
    return ImageHeader(format="vdi", subformat=_KINDS[kind], size=size, block_size=block, backing=backing)
