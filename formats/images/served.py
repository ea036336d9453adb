"""Images that QEMU reads and writes, as a ``BlockSource`` and a ``BlockSink`` over a private qemu-nbd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from formats import qemu_img
from formats.block import Extent, check_range
from formats.errors import ImageError, ImageToolError, WriteError
from formats.images.ascending import Gatherer
from formats.nbd import NbdDisk, connect

_CONNECTIONS = 4
_PATIENCE = 600.0  # seconds for one request: a flush waits for everything that is cached above a slow disk
_CLUSTER = 64 << 10  # of qcow2, as qemu-img creates it
_BATCH = 16 * _CLUSTER  # bytes of disk in one compressed write


class ServedSource:
    """An image read through qemu-nbd; ``size`` bytes of it. Reads by several threads run at the same time."""

    def __init__(self, path: Path, driver: str, size: int, options: Mapping[str, object] | None = None) -> None:
        self._server = qemu_img.Server(path, driver, options=options)
        try:
            self._disk = connect(self._server.uri, connections=_CONNECTIONS, timeout=_PATIENCE)
        except BaseException:
            self._server.close()
            raise
        self._size = size
        self._closed = False
        if self._disk.size < size:
            found = self._disk.size
            self.close()
            raise ImageError(f"{path} states a disk of {size} bytes, QEMU finds {found} in it", subject=str(path))

    @property
    def size(self) -> int:
        """Bytes of the disk, as the image states them."""
        return self._size

    @property
    def uri(self) -> str:
        """The image as an NBD URI, for another program; valid until ``close``."""
        return self._server.uri

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        check_range(self._size, offset, len(buffer))
        self._disk.readinto(buffer, offset)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA and ZERO, as QEMU knows them."""
        check_range(self._size, start, length)
        return self._disk.extents(start, length)

    def close(self) -> None:
        """End the server."""
        if not self._closed:
            self._closed = True
            self._disk.close()
            self._server.close()


class ServedSink:
    """A new image written through qemu-nbd in any order. Rename it to its final name only after ``flush`` and ``close``: some formats
    are marked as in use until the server ends."""

    random_access = True

    def __init__(self, path: Path, driver: str, size: int, *, compressed: bool = False) -> None:
        self._path = path
        self._server = qemu_img.Server(path, driver, writable=True, compressed=compressed)
        try:
            self._disk: NbdDisk = connect(self._server.uri, connections=_CONNECTIONS, timeout=_PATIENCE)
        except BaseException:
            self._server.close()
            raise
        self._size = size
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def write(self, data: memoryview, offset: int) -> None:
        """Store ``data`` at ``offset``."""
        check_range(self._size, offset, len(data))
        self._disk.write(data, offset)

    def zero(self, start: int, length: int) -> None:
        """Make a range read as zeroes; it takes no room where the format can leave it out."""
        check_range(self._size, start, length)
        self._disk.zero(start, length)

    def flush(self) -> None:
        """Return when QEMU has everything on stable storage."""
        self._disk.flush()

    def close(self) -> None:
        """End the server; ``WriteError`` when it did not end well, for then the image is not whole."""
        if self._closed:
            return
        self._closed = True
        self._disk.close()
        try:
            self._server.close()
        except ImageToolError as error:
            raise WriteError(f"{self._path} was not finished: {error}", subject=str(self._path)) from error


class CompressedSink:
    """A new compressed qcow2: ascending writes, whole clusters, each once, compressed by QEMU.

    The image was created with ``size`` rounded up to whole clusters: QEMU's compress filter takes nothing less.
    """

    random_access = False

    def __init__(self, path: Path, size: int) -> None:
        rounded = -(-size // _CLUSTER) * _CLUSTER
        self._sink = ServedSink(path, "qcow2", rounded, compressed=True)
        self._size = size
        self._gatherer = Gatherer(rounded, _BATCH, lambda batch, offset: self._sink.write(memoryview(batch), offset))
        self._ended = self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the disk that can be written; the image may have up to 64 KiB more, which read as zeroes."""
        return self._size

    def write(self, data: memoryview, offset: int) -> None:
        """Take ``data`` at ``offset``, behind all that was written before."""
        self._check(offset, len(data))
        self._gatherer.write(data, offset)

    def zero(self, start: int, length: int) -> None:
        """Leave a range zero: it takes no room."""
        self._check(start, length)
        self._gatherer.skip(start, length)

    def flush(self) -> None:
        """Write what is gathered, and make all stable. Nothing can be written afterwards; a second call does nothing more."""
        if self._closed:
            raise ValueError("the image is closed")
        if not self._ended:
            self._ended = True
            self._gatherer.finish()
        self._sink.flush()

    def close(self) -> None:
        """End the server."""
        self._closed = True
        self._sink.close()

    def _check(self, start: int, length: int) -> None:
        if self._closed or self._ended:
            raise ValueError("the image is closed" if self._closed else "the end of the image is written")
        check_range(self._size, start, length)
