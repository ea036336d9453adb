"""Images that QEMU reads and writes, as a ``BlockSource`` and a ``BlockSink`` over a private qemu-nbd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from formats import qemu_img
from formats.block import Extent, check_range
from formats.errors import ImageError, ImageToolError, WriteError
from formats.nbd import NbdDisk, connect

_CONNECTIONS = 4
_PATIENCE = 600.0  # seconds for one request: a flush waits for everything that is cached above a slow disk


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

    def __init__(self, path: Path, driver: str, size: int) -> None:
        self._path = path
        self._server = qemu_img.Server(path, driver, writable=True)
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
