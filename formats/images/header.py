"""What the header of an image says, and bounded reading of it.

Headers are untrusted input: every read goes through ``Headers``, which never reads more than ``LIMIT`` bytes of an image in all,
never a single piece longer than ``PIECE``, and turns whatever lies outside the file into an ``ImageError``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from formats.errors import ImageError, ImageUnsupportedError, ReadError

PIECE = 1 << 20
"""Bytes of the longest piece of a header; no format's descriptor or region table needs more."""

LIMIT = 16 << 20
"""Bytes that are read of one image's headers in all."""

SIZE_LIMIT = 1 << 62
"""A disk of this many bytes or more is not believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """What an image says of itself, before any of its content was read.

    ``format`` is one of ``formats.images.FORMATS``; ``size`` the bytes of the virtual disk. ``backing`` is the parent disk that it
    names, as written in it ("" for none); ``references`` every other file it names (extents, data file), as written.
    ``unclean`` says why its content may be out of date or damaged ("" when it was closed well). ``options`` are the
    run-time options with which QEMU reads it right.
    """

    format: str
    subformat: str = ""
    size: int
    block_size: int = 0
    backing: str = ""
    references: tuple[str, ...] = ()
    encrypted: bool = False
    unclean: str = ""
    features: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


class Headers:
    """An image file opened for its headers; a context manager. Raises ``ReadError`` when it is no file or device, or cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = LIMIT
        try:
            # O_NONBLOCK: a named pipe must not make the tool wait for ever.
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ReadError(f"{path} cannot be opened: {error.strerror}", subject=str(path)) from error
        try:
            mode = os.fstat(self._file).st_mode
            if stat.S_ISDIR(mode):
                raise ImageUnsupportedError(
                    f"{path} is a folder, not a disk image", advice="name the image file inside it", subject=str(path)
                )
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise ReadError(f"{path} is neither a file nor a block device", subject=str(path))
            self.size = os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:  # files of /proc call themselves regular
            os.close(self._file)
            raise ReadError(f"{path} cannot be read like a disk: {error.strerror}", subject=str(path)) from error
        except BaseException:
            os.close(self._file)
            raise

    def at(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``; ``ImageError`` when the file ends before, or the header asks for too much."""
        if length > PIECE or length > self._left or length < 0:
            raise self.error(f"its header is larger than any real one ({length} bytes at {offset})")
        if offset < 0 or offset + length > self.size:
            raise self.error(f"its header points behind the end of the file ({length} bytes at {offset})")
        return self.some(offset, length)

    def some(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset``: fewer where the file ends."""
        length = max(0, min(length, self.size - offset, PIECE, self._left))
        self._left -= length
        content = b""
        try:
            while len(content) < length:
                piece = os.pread(self._file, length - len(content), offset + len(content))
                if not piece:
                    raise self.error("it became shorter while it was read")
                content += piece
        except OSError as error:
            raise ReadError(f"{self.path} cannot be read: {error.strerror}", subject=str(self.path)) from error
        return content

    def error(self, what: str) -> ImageError:
        """The error that says what is wrong with this image."""
        return ImageError(
            f"{self.path} is damaged or not the image it seems to be: {what}",
            advice="if it is the plain content of a disk, say that its format is raw",
            subject=str(self.path),
        )

    def unsupported(self, what: str, advice: str = "") -> ImageUnsupportedError:
        """The error for an image that is well but cannot be handled."""
        return ImageUnsupportedError(f"{self.path} {what}", advice=advice, subject=str(self.path))

    def require(self, holds: bool, what: str) -> None:
        """Raise ``error(what)`` unless ``holds``."""
        if not holds:
            raise self.error(what)

    def checked_size(self, size: int) -> int:
        """``size`` when a disk can have it; ``ImageError`` otherwise."""
        self.require(0 <= size < SIZE_LIMIT, f"it states a disk of {size} bytes")
        return size

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def printable(text: bytes | str, limit: int = 1023) -> str:
    """A name out of an image, fit for a message: bounded, without control characters."""
    decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return "".join(c if c.isprintable() else "?" for c in decoded.split("\0", 1)[0][:limit])
