"""Header and descriptor of VMDK images.

Layout: VMware, "Virtual Disk Format 5.0" technical note. A descriptor is text that can name other files; QEMU reads it with
``sscanf`` line by line, so a line that begins like an extent and is not exactly one is refused here rather than understood differently.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from formats.errors import UnsafeImageError
from formats.images.header import PIECE, Headers, ImageHeader, printable

MAGIC = b"KDMV"
DESCRIPTOR = b"# Disk DescriptorFile"

_GD_AT_END = 0xFFFFFFFFFFFFFFFF
_HAS_MARKERS = 0x20000
_SECTOR = 512
_MAX_EXTENTS = 4096
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS)[ \t]+(\d{1,18})[ \t]+([A-Z]+)(?:[ \t]+"([^"]*)"(?:[ \t]+(\d{1,18}))?)?')
_WITH_FILE = ("FLAT", "SPARSE", "VMFS")
_OTHER_KINDS = ("VMFSSPARSE", "VMFSRDM", "VMFSRAW", "SESPARSE")
_DEVICES = ("fullDevice", "partitionedDevice", "vmfsRaw", "vmfsRawDeviceMap", "vmfsPassthroughRawDeviceMap")
_ORPHAN = "ffffffff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One extent line: ``sectors`` of 512 bytes of the disk, in ``file`` from its sector ``start`` ("" for a ZERO extent)."""

    access: str
    sectors: int
    kind: str
    file: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What a descriptor says: ``parent`` is the name of the parent disk, "" for none."""

    create_type: str
    extents: tuple[Extent, ...]
    parent: str


def read_header(file: Headers) -> ImageHeader:
    """Read the header of ``file``, which starts with ``MAGIC`` (sparse, streamOptimized) or is a descriptor of its own."""
    return _sparse(file) if file.at(0, 4) == MAGIC else _described(file)


def read_extent(file: Headers) -> ImageHeader:
    """Read the header of a sparse extent that a descriptor names. It may be no descriptor again, nor the child of another disk."""
    file.require(file.at(0, 4) == MAGIC, "no sparse extent")
    header = _sparse(file)
    file.require(not header.backing, "an extent that is based on another file")
    return header


def _sparse(file: Headers) -> ImageHeader:
    fields = _HEADER.unpack(file.at(0, _HEADER.size))
    _, version, flags, capacity, grain, text_at, text_size, entries, _, directory, _, _, _, _ = fields
    if version not in (1, 2, 3):
        raise file.unsupported(f"is a VMDK image of the unknown version {version}")
    # A capacity of zero sends a reader to the extents of the embedded descriptor; no writer makes such a file with content.
    file.require(capacity > 0, "a sparse extent without capacity")
    size = file.checked_size(capacity * _SECTOR)
    file.require(8 <= grain <= 128 << 10 and grain & (grain - 1) == 0, f"grains of {grain} sectors")
    file.require(0 < entries <= 512, f"grain tables of {entries} entries")
    tables = -(-capacity // (grain * entries))
    if directory == _GD_AT_END:
        _check_footer(file, fields)
    else:
        file.require(directory * _SECTOR + tables * 4 <= file.size, f"a grain directory at sector {directory}")
    descriptor = None
    if text_at:
        file.require(text_size * _SECTOR <= PIECE, f"a descriptor of {text_size} sectors")
        descriptor = parse_descriptor(file, file.at(text_at * _SECTOR, text_size * _SECTOR))
        named = [extent for extent in descriptor.extents if extent.kind != "SPARSE"]
        file.require(not named, "its embedded descriptor names extents of another kind")
    kind = descriptor.create_type if descriptor else "extent"
    return ImageHeader(
        format="vmdk",
        subformat=kind or "monolithicSparse",
        size=size,
        block_size=grain * _SECTOR,
        backing=descriptor.parent if descriptor else "",
        features=(f"version {version}", *(["markers"] if flags & _HAS_MARKERS else [])),
    )


def _check_footer(file: Headers, header: tuple[object, ...]) -> None:
    """A streamed file says at its end where its grain directory is: nothing else may differ from the header."""
    file.require(file.size >= 3 * _SECTOR, "a streamed image that ends before its footer")
    footer = _HEADER.unpack(file.at(file.size - 2 * _SECTOR, _HEADER.size))
    file.require(
        footer[:9] == header[:9] and footer[10:] == header[10:], "its footer is missing or not like its header"
    )
    directory = footer[9]
    file.require(isinstance(directory, int) and directory * _SECTOR < file.size, "its footer names no grain directory")


def _described(file: Headers) -> ImageHeader:
    file.require(file.size <= PIECE, "a descriptor of more than 1 MiB")
    descriptor = parse_descriptor(file, file.at(0, file.size))
    kind = descriptor.create_type
    if kind in _DEVICES:
        raise UnsafeImageError(f"{file.path} names a device of its host ({kind})", subject=str(file.path))
    file.require(bool(descriptor.extents), "a descriptor without extents")
    # QEMU leaves out extents that are not RW, which would shift all that follow.
    file.require(all(extent.access == "RW" for extent in descriptor.extents), "an extent that is not RW")
    sectors = sum(extent.sectors for extent in descriptor.extents)
    return ImageHeader(
        format="vmdk",
        subformat=kind,
        size=file.checked_size(sectors * _SECTOR),
        backing=descriptor.parent,
        references=tuple(dict.fromkeys(e.file for e in descriptor.extents if e.file)),
        features=("descriptor",),
    )


def parse_descriptor(file: Headers, content: bytes) -> Descriptor:
    """Read descriptor text; names of extents are returned as they are written, for the caller to judge."""
    text = content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    values: dict[str, str] = {}
    extents: list[Extent] = []
    for raw in text.split("\n"):
        line = raw.strip()
        first = re.split(r"[\s\"]", line, maxsplit=1)[0].upper()
        if first in ("RW", "RDONLY", "NOACCESS"):
            extents.append(_extent(file, line))
            file.require(len(extents) <= _MAX_EXTENTS, f"more than {_MAX_EXTENTS} extents")
        elif "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            values.setdefault(key.strip().lower(), value.strip().strip('"'))
    parent = values.get("parentfilenamehint", "")
    if values.get("parentcid", _ORPHAN).lower() != _ORPHAN or "parentfilenamehint" in text.lower():
        parent = printable(parent) or "(a parent without a name)"
    create_type = printable(values.get("createtype", ""), 64)
    return Descriptor(create_type=create_type, extents=tuple(extents), parent=parent)


def _extent(file: Headers, line: str) -> Extent:
    found = _EXTENT.fullmatch(line)
    if found is None:
        raise file.error(f"an extent line that cannot be read: {printable(line, 80)}")
    access, sectors, kind, name, start = found.groups()
    if kind in _OTHER_KINDS:
        raise file.unsupported(
            f"has extents of kind {kind}, which only ESXi reads", "clone it there with vmkfstools -i"
        )
    file.require(kind == "ZERO" or (kind in _WITH_FILE and bool(name)), f"an extent of kind {printable(kind, 20)}")
    return Extent(access=access, sectors=int(sectors), kind=kind, file=name or "", start=int(start or 0))
