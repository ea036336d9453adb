"""Header of Parallels expanding images (``.hds``). Layout: QEMU docs/interop/parallels.txt."""

from __future__ import annotations

import struct

from formats.images.header import Headers, ImageHeader

MAGICS = (b"WithoutFreeSpace", b"WithouFreSpacExt")

_IN_USE = 0x746F6E59


def read_header(file: Headers) -> ImageHeader:
    """Read the header of ``file``, which starts with one of ``MAGICS``."""
    magic = file.at(0, 16)
    version, _, _, tracks, entries, sectors, in_use, _, _, extension = struct.unpack("<IIIIIQIIIQ", file.at(16, 48))
    if version != 2:
        raise file.unsupported(f"is a Parallels image of the unknown version {version}")
    if magic == MAGICS[0]:
        sectors &= 0xFFFFFFFF  # the older kind has a 32-bit field there
    file.require(0 < tracks <= 0x7FFFFFFF // 513, f"clusters of {tracks} sectors")
    cluster = tracks * 512
    size = file.checked_size(sectors * 512)
    file.require(entries * cluster >= size, f"{entries} table entries for a disk of {size} bytes")
    file.require(64 + entries * 4 <= file.size, f"a table of {entries} entries")
    return ImageHeader(
        format="parallels",
        subformat="expanding",
        size=size,
        block_size=cluster,
        unclean="it was not closed by its last writer" if in_use == _IN_USE else "",
        features=("extension",) if extension and magic == MAGICS[1] else (),
    )
