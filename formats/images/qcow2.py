"""Header of qcow2 images. Layout: QEMU docs/interop/qcow2.txt; bounds are those of QEMU's own driver."""

from __future__ import annotations

import struct

from formats.images.header import Headers, ImageHeader, printable

MAGIC = b"QFI\xfb"

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED = 1, 2, 4, 8, 16
_KNOWN = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED
_END, _DATA_FILE_NAME = 0, 0x44415441  # header extensions
_CIPHERS = {0: "", 1: "aes", 2: "luks"}
_COMPRESSIONS = {0: "zlib", 1: "zstd"}


def read_header(file: Headers) -> ImageHeader:
    """Read the header of ``file``, which starts with ``MAGIC``."""
    version = int.from_bytes(file.at(4, 4), "big")
    if version == 1:
        raise file.unsupported("is a qcow image of version 1", "convert it with qemu-img convert -f qcow -O qcow2")
    if version not in (2, 3):
        raise file.unsupported(f"is a qcow2 image of the unknown version {version}")
    backing_at, backing_length, cluster_bits, size, cipher, l1_entries, l1_at, _, _, snapshots, _ = struct.unpack(
        ">QIIQIIQQIIQ", file.at(8, 64)
    )
    incompatible, header_length, compression = 0, 72, 0
    if version == 3:
        incompatible, _, _, refcount_order, header_length = struct.unpack(">QQQII", file.at(72, 32))
        file.require(refcount_order <= 6, f"reference counts of 2^{refcount_order} bits")
        file.require(header_length >= 104 and header_length % 8 == 0, f"a header of {header_length} bytes")
        compression = file.at(104, 1)[0] if header_length > 104 else 0
    if unknown := incompatible & ~_KNOWN:
        raise file.unsupported(
            f"uses features of a later qcow2 that are not known here (bits {unknown:#x})",
            "convert it where it was made",
        )
    file.require(9 <= cluster_bits <= 21, f"clusters of 2^{cluster_bits} bytes")
    cluster = 1 << cluster_bits
    file.require(header_length <= cluster, f"a header of {header_length} bytes in clusters of {cluster}")
    file.checked_size(size)
    _check_tables(file, cluster, size, l1_entries, l1_at, extended=bool(incompatible & _EXTENDED))
    file.require(snapshots <= 65536, f"{snapshots} internal snapshots")
    file.require(cipher in _CIPHERS, f"the unknown encryption {cipher}")
    file.require(compression in _COMPRESSIONS, f"the unknown compression {compression}")
    backing = _backing(file, backing_at, backing_length, cluster)
    end = min(backing_at, cluster) if backing_at else cluster
    data_file = _extension(file, header_length, end, _DATA_FILE_NAME)
    references = (printable(data_file) or "(a data file without a name)",) if incompatible & _DATA_FILE else ()
    return ImageHeader(
        format="qcow2",
        subformat="compat=1.1" if version == 3 else "compat=0.10",
        size=size,
        block_size=cluster,
        backing=backing,
        references=references,
        encrypted=cipher != 0,
        unclean="it is marked as corrupt" if incompatible & _CORRUPT else "",
        features=_features(incompatible, compression, _CIPHERS[cipher], snapshots),
    )


def _features(incompatible: int, compression: int, cipher: str, snapshots: int) -> tuple[str, ...]:
    names = [
        "dirty reference counts" if incompatible & _DIRTY else "",
        "external data file" if incompatible & _DATA_FILE else "",
        "extended L2 entries" if incompatible & _EXTENDED else "",
        f"{_COMPRESSIONS[compression]} compression" if compression else "",
        f"{cipher} encryption" if cipher else "",
        f"{snapshots} internal snapshots" if snapshots else "",
    ]
    return tuple(name for name in names if name)


def _check_tables(file: Headers, cluster: int, size: int, entries: int, offset: int, *, extended: bool) -> None:
    covered = cluster * (cluster // (16 if extended else 8))  # bytes of disk below one L1 entry
    file.require(entries * 8 <= 32 << 20, f"a table of {entries} L1 entries")
    file.require(entries >= -(-size // covered), f"{entries} L1 entries cannot hold a disk of {size} bytes")
    file.require(offset % cluster == 0 and offset + entries * 8 <= max(file.size, cluster), f"an L1 table at {offset}")


def _backing(file: Headers, offset: int, length: int, cluster: int) -> str:
    if offset == 0:
        return ""
    file.require(length <= min(1023, cluster - offset), f"a backing file name of {length} bytes at {offset}")
    return printable(file.at(offset, length)) or "(a parent without a name)"


def _extension(file: Headers, offset: int, end: int, wanted: int) -> bytes:
    """Content of the first header extension of type ``wanted``; empty when there is none."""
    while offset + 8 <= end:
        kind, length = struct.unpack(">II", file.at(offset, 8))
        if kind == _END:
            break
        file.require(length <= end - offset - 8, f"a header extension of {length} bytes")
        if kind == wanted:
            return file.at(offset + 8, length)
        offset += 8 + (length + 7) // 8 * 8
    return b""
