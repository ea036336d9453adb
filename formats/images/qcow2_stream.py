"""Compressed qcow2, written front to back.

Layout: QEMU docs/interop/qcow2.txt, version 3, clusters of 64 KiB. Compressed clusters lie one behind the other, whatever sectors they
begin in; each L2 table follows the clusters that it describes; L1 table, reference counts and last the header end the file. qemu-img
writes the same with its own compressor, many times slower.

zlib clusters are raw deflate with a window of 4 KiB, as the format has it: readers that take it at its word (a window of 12 bits) read
no other.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from formats.errors import UsageError, WriteError
from formats.images.stream import Compress, CompressedStream, zlib_compressor

CLUSTER = 64 << 10
"""Bytes of disk, and of the file, in one cluster."""

_SECTOR = 512
_ENTRIES = CLUSTER // 8  # of an L2 table, and of a cluster of the refcount table
_COUNTS = CLUSTER // 2  # of a refcount block: 16 bits each
_BATCH = 1 << 20
_ZEROES = bytes(CLUSTER)
_WINDOW = -12
_ZSTD_LEVEL = 1
_COPIED, _COMPRESSED = 1 << 63, 1 << 62
_OFFSET_BITS = 62 - (16 - 8)  # of a compressed cluster's descriptor, for clusters of 2^16
_COMPRESSION_FEATURE = 1 << 3  # the header says what compresses
_KINDS = {"zlib": 0, "zstd": 1}


class _Piece(NamedTuple):
    """A cluster of the disk that holds data; ``raw``: it does not get smaller."""

    number: int
    content: bytes
    raw: bool


class CompressedQcow2Sink(CompressedStream[Sequence[_Piece]]):
    """A sequential ``BlockSink`` that writes one compressed qcow2 to ``output``, a file that can be sought; see ``CompressedStream``.

    ``size`` is a multiple of 512. ``compression``: zlib, for every reader, or zstd, for QEMU 5.1 and later. ``version`` 2 (compat=0.10)
    takes zlib only. Memory grows by 2 bytes for each 64 KiB of the file.
    """

    def __init__(
        self,
        output: BinaryIO,
        size: int,
        *,
        compression: str = "zlib",
        version: int = 3,
        threads: int = 0,
        owned: bool = False,
    ) -> None:
        if size <= 0 or size % _SECTOR:
            raise ValueError(f"a qcow2 of {size} bytes: not a positive multiple of {_SECTOR}")
        super().__init__(output, size, batch=_BATCH, threads=threads, owned=owned)
        if version == 2 and compression != "zlib":
            raise ValueError("version 2 has no compression but zlib")
        self._kind, self._version = _KINDS[compression], version
        self._compress: Compress = zlib_compressor(_WINDOW) if compression == "zlib" else _zstd_compressor()
        self._end = 0  # of the file
        self._counts = array("H")
        self._table: dict[int, int] = {}  # entries of the L2 table that is being filled
        self._table_number = 0
        clusters = -(-size // CLUSTER)
        self._tables = [0] * -(-clusters // _ENTRIES)  # where each L2 table lies

    def _pack(self, batch: bytes | bytearray, offset: int) -> list[_Piece]:
        pieces = []
        for start in range(0, len(batch), CLUSTER):
            cluster = bytes(batch[start : start + CLUSTER])
            if len(cluster) < CLUSTER:  # the disk's end: the image's last cluster is whole
                cluster = cluster.ljust(CLUSTER, b"\0")
            if cluster == _ZEROES:
                continue
            packed = self._compress(cluster)
            raw = len(packed) >= CLUSTER
            pieces.append(_Piece((offset + start) // CLUSTER, cluster if raw else packed, raw))
        return pieces

    def _append(self, packed: Sequence[_Piece]) -> None:
        self._begin()
        waiting: list[bytes] = []
        for number, content, raw in packed:
            table, entry = divmod(number, _ENTRIES)
            if table != self._table_number:
                self._put(b"".join(waiting))
                waiting.clear()
                self._end_table()
                self._table_number = table
            if raw:
                waiting.append(self._padding())
                self._table[entry] = self._end | _COPIED
                self._count(self._end, CLUSTER)
            else:
                # How many sectors it reaches into, behind the one that it begins in.
                first, last = self._end // _SECTOR, (self._end + len(content) - 1) // _SECTOR
                self._table[entry] = _COMPRESSED | (last - first) << _OFFSET_BITS | self._end
                self._count(first * _SECTOR, (last - first + 1) * _SECTOR)
            self._end += len(content)
            waiting.append(content)
        self._put(b"".join(waiting))

    def _begin(self) -> None:
        if self._end == 0:  # room for the header, which comes last: without it the file is no image
            self._put(_ZEROES)
            self._end = CLUSTER

    def _padding(self) -> bytes:
        """What is missing to a whole cluster; counted as written."""
        gap = -self._end % CLUSTER
        self._end += gap
        return bytes(gap)

    def _count(self, start: int, length: int) -> None:
        """One more reference to each cluster of the file that the range touches."""
        first, last = start // CLUSTER, (start + length - 1) // CLUSTER
        if last >= len(self._counts):
            self._counts.extend([0] * (last + 1 - len(self._counts)))
        for number in range(first, last + 1):
            self._counts[number] += 1

    def _own(self, content: bytes) -> int:
        """Append clusters of the format's own, and return where they lie."""
        self._put(self._padding())
        at = self._end
        self._put(content.ljust(-(-len(content) // CLUSTER) * CLUSTER, b"\0"))
        self._end += -(-len(content) // CLUSTER) * CLUSTER
        self._count(at, self._end - at)
        return at

    def _end_table(self) -> None:
        if self._table:
            entries = [self._table.get(number, 0) for number in range(_ENTRIES)]
            self._tables[self._table_number] = self._own(struct.pack(f">{_ENTRIES}Q", *entries)) | _COPIED
            self._table = {}

    def _finish(self) -> None:
        self._begin()
        self._count(0, CLUSTER)
        self._end_table()
        l1_at = self._own(struct.pack(f">{len(self._tables)}Q", *self._tables))
        table_at, table_clusters = self._write_counts()
        header = struct.pack(
            ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", self._version, 0, 0, 16, self._size, 0, len(self._tables), l1_at, table_at,
            table_clusters, 0, 0, _COMPRESSION_FEATURE if self._kind else 0, 0, 0, 4, 112,
        )  # fmt: skip
        # Version 2 ends with the snapshots' place; behind version 3's come the compression type, its padding, and no extensions.
        header = header[:72] + bytes(8) if self._version == 2 else header + bytes((self._kind,)) + bytes(15)
        try:
            self._output.flush()
            self._output.seek(0)
        except OSError as error:
            raise self._failure(error) from error
        self._put(header)

    def _write_counts(self) -> tuple[int, int]:
        """Append the reference counts, their own clusters included; where their table lies, and its clusters."""
        self._put(self._padding())
        first = self._end // CLUSTER
        blocks = tables = 0
        while True:
            total = first + blocks + tables
            more = -(-total // _COUNTS)
            if (blocks, tables) == (more, -(-more // _ENTRIES)):
                break
            blocks, tables = more, -(-more // _ENTRIES)
        self._counts.extend([0] * (first - len(self._counts)))
        self._counts.extend([1] * (blocks + tables))
        self._counts.extend([0] * (blocks * _COUNTS - len(self._counts)))
        if sys.byteorder == "little":
            self._counts.byteswap()
        self._put(self._counts.tobytes())
        places = [(first + number) * CLUSTER for number in range(blocks)]
        self._put(struct.pack(f">{blocks}Q", *places).ljust(tables * CLUSTER, b"\0"))
        return (first + blocks) * CLUSTER, tables


def create_compressed(
    path: Path, size: int, compression: str, *, version: int = 3, threads: int = 0
) -> CompressedQcow2Sink:
    """A sink that writes a new compressed qcow2 to ``path``; an existing file is overwritten."""
    if version == 2 and compression != "zlib":
        raise UsageError("qcow2 of version 2 (compat=0.10) has no compression but zlib", advice="take compat=1.1")
    try:
        output = open(path, "wb", buffering=0)  # noqa: SIM115 - the sink owns it
    except OSError as error:
        raise WriteError(f"{path} cannot be created: {error.strerror}", subject=str(path)) from error
    return CompressedQcow2Sink(output, size, compression=compression, version=version, threads=threads, owned=True)


def _zstd_compressor() -> Compress:
    import threading

    import zstandard

    local = threading.local()  # a compressor is not safe from several threads

    def compress(content: bytes) -> bytes:
        if not hasattr(local, "engine"):
            local.engine = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        packed: bytes = local.engine.compress(content)
        return packed

    return compress
