"""Raw images and block devices, read and written in place."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from formats.block import Extent, Kind, check_range, merged
from formats.errors import NoSpaceError, ReadError, ToolkitError, WriteError

_BLKGETSIZE64 = 0x80081272  # linux/fs.h: bytes of a block device
_BLKZEROOUT = 0x127F  # linux/fs.h: make a range read as zeroes; the kernel writes them where the device cannot
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h
_SECTOR = 4096  # a multiple of every device's logical sector: what BLKZEROOUT takes
_UNIT = 1 << 20  # bytes of a device that are remembered as written or not
_SPAN = 1 << 30  # bytes zeroed by one call: it cannot be interrupted
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Clear = Callable[[int, int], None]


class RawFile:
    """A raw image file or block device, read-only. Holes of a sparse file are ZERO; a device and a file system without holes are all DATA.

    Raises ``ReadError`` when the path cannot be opened or read.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = str(path)
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _read_error(self._path, error, "opened") from error
        try:
            self._size, self._sparse = _measure(self._descriptor, self._path)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._size

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        self._check(offset, len(buffer))
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:] if done else buffer], offset + done)
            except OSError as error:
                raise _read_error(self._path, error, f"read at byte {offset + done}") from error
            if count == 0:
                raise ReadError(
                    f"{self._path} ends at byte {offset + done}, it had {self._size} bytes when it was opened",
                    advice="Something shortened the file or took the device away while it was read.",
                    subject=self._path,
                )
            done += count

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA and ZERO, as the file system tells them apart (``SEEK_DATA``, ``SEEK_HOLE``)."""
        self._check(start, length)
        if not self._sparse:
            return iter([Extent(start, length, Kind.DATA)] if length else [])
        return merged(self._tiles(start, start + length))

    def _tiles(self, position: int, end: int) -> Iterator[Extent]:
        while position < end:
            data = min(self._seek(position, os.SEEK_DATA), end)
            if data > position:
                yield Extent(position, data - position, Kind.ZERO)
            if data == end:
                return
            position = min(self._seek(data, os.SEEK_HOLE), end)
            yield Extent(data, position - data, Kind.DATA)

    def _seek(self, position: int, what: int) -> int:
        # The descriptor's own position moves, but nothing uses it: every read states its offset.
        if self._closed:
            raise ValueError("the disk is closed")
        try:
            found = os.lseek(self._descriptor, position, what)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind this position
                return self._size
            raise _read_error(self._path, error, "mapped") from error
        if (
            what == os.SEEK_HOLE and found <= position
        ):  # a hole was punched between the two calls: call it DATA, it reads well
            return min(position + _SECTOR, self._size)
        return found

    def close(self) -> None:
        """Close the file."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self._size, start, length)


class RawSink:
    """A raw image or block device to write, random access.

    A file is made new (an old one of that name is emptied) and stays sparse. A block device must have at least ``size`` bytes; what nobody
    wrote on it is zeroed by ``flush``, so that K4 holds for old disks without writing everything twice.
    With ``keep`` it is written in place instead: what nobody writes stays as it is, and a file must be there, of at least ``size`` bytes.
    Raises ``NoSpaceError`` when ``size`` does not fit, ``WriteError`` when the path cannot be written.
    """

    random_access = True

    def __init__(self, path: Path | str, size: int, *, keep: bool = False) -> None:
        check_range(size, 0, size)
        self._path, self._size, self._keep = str(path), size, keep
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            self._device = Path(self._path).is_block_device()
            made = 0 if keep else os.O_CREAT | os.O_TRUNC
            self._descriptor = os.open(self._path, flags | (os.O_EXCL if self._device else made), 0o600)
        except OSError as error:
            raise _write_error(self._path, error, "opened for writing") from error
        self._closed = False
        self._untouched: Untouched | None = None
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        if self._device or self._keep:
            held, _ = _measure(self._descriptor, self._path)
            if held < self._size:
                raise NoSpaceError(
                    f"{self._path} holds {held} bytes, the disk has {self._size}",
                    advice="Choose a device that is at least as large as the disk.",
                    subject=self._path,
                )
            if not self._keep:
                self._untouched = Untouched(self._size)
            return
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError as error:
            raise _write_error(self._path, error, f"made {self._size} bytes large") from error

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def write(self, data: memoryview, offset: int) -> None:
        """Store ``data`` at ``offset``."""
        self._check(offset, len(data))
        if self._untouched is not None:
            self._untouched.touch(offset, len(data), self._clear)
        self._store(data, offset)

    def zero(self, start: int, length: int) -> None:
        """Punch a hole in a file; on a device let the kernel zero the range."""
        self._check(start, length)
        if self._untouched is not None:
            self._untouched.touch(start, length, self._clear)
        self._clear(start, length)

    def flush(self) -> None:
        """Write everything to stable storage; a device's untouched ranges are zeroed first, once."""
        self._check(0, 0)
        if self._untouched is not None:
            self._untouched.finish(self._clear)
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _write_error(self._path, error, "written to stable storage") from error

    def close(self) -> None:
        """Close the file."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def _check(self, start: int, length: int) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self._size, start, length)

    def _store(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor, data[done:] if done else data, offset + done)
            except OSError as error:
                raise _write_error(self._path, error, f"written at byte {offset + done}") from error

    def _clear(self, start: int, length: int) -> None:
        """Zero the range by the cheapest means that the file or device has."""
        low, high = -(-start // _SECTOR) * _SECTOR, (start + length) // _SECTOR * _SECTOR
        if low >= high:
            self._store_zeroes(start, length)
            return
        self._store_zeroes(start, low - start)
        for position in range(low, high, _SPAN):
            count = min(_SPAN, high - position)
            if not (self._zero_device if self._device else self._punch)(position, count):
                self._store_zeroes(position, count)
        self._store_zeroes(high, start + length - high)

    def _store_zeroes(self, start: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, 1 << 20)))
        for position in range(start, start + length, 1 << 20):
            self._store(zeroes[: min(1 << 20, start + length - position)], position)

    def _zero_device(self, start: int, length: int) -> bool:
        try:
            fcntl.ioctl(self._descriptor, _BLKZEROOUT, struct.pack("@QQ", start, length))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
                return False
            raise _write_error(self._path, error, f"zeroed at byte {start}") from error
        return True

    def _punch(self, start: int, length: int) -> bool:
        call = _libc().fallocate
        while call(self._descriptor, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(length)) != 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return False
            raise _write_error(self._path, OSError(code, os.strerror(code)), f"zeroed at byte {start}")
        return True


class Untouched:
    """Which units of a device nobody has written yet: one byte for each MiB, whatever its size."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._touched = bytearray(-(-size // _UNIT))
        self._lock = threading.Lock()

    def touch(self, start: int, length: int, clear: Clear) -> None:
        """Before the range is written: units of which only a part will be are cleared whole."""
        if not length:
            return
        first, last = start // _UNIT, (start + length - 1) // _UNIT
        if self._touched.find(0, first, last + 1) < 0:
            return
        with self._lock:
            for unit in {first, last}:
                low, high = unit * _UNIT, min((unit + 1) * _UNIT, self._size)
                if not self._touched[unit] and not (start <= low and high <= start + length):
                    clear(low, high - low)
            self._touched[first : last + 1] = b"\1" * (last + 1 - first)

    def finish(self, clear: Clear) -> None:
        """Clear every unit that is left."""
        with self._lock:
            unit = self._touched.find(0)
            while unit >= 0:
                behind = self._touched.find(1, unit)
                behind = len(self._touched) if behind < 0 else behind
                clear(unit * _UNIT, min(behind * _UNIT, self._size) - unit * _UNIT)
                self._touched[unit:behind] = b"\1" * (behind - unit)
                unit = self._touched.find(0, behind)


def _measure(descriptor: int, path: str) -> tuple[int, bool]:
    """Return the size of an open file or block device, and whether it can have holes."""
    state = os.fstat(descriptor)
    if stat.S_ISBLK(state.st_mode):
        answer = fcntl.ioctl(descriptor, _BLKGETSIZE64, bytes(8))
        return int(struct.unpack("@Q", answer)[0]), False
    if not stat.S_ISREG(state.st_mode):
        raise ReadError(f"{path} is neither a file nor a block device", subject=path)
    sparse = state.st_size > 0
    if sparse:
        try:
            os.lseek(descriptor, 0, os.SEEK_HOLE)
        except OSError:
            sparse = False
    return state.st_size, sparse


@functools.cache
def _libc() -> ctypes.CDLL:
    # The standard library has fallocate for reserving space only, not for punching holes.
    return ctypes.CDLL(None, use_errno=True)


def _read_error(path: str, error: OSError, what: str) -> ToolkitError:
    advice = {
        errno.ENOENT: "Check the path.",
        errno.EACCES: "Run as a user who may read it.",
        errno.EPERM: "Run as a user who may read it.",
        errno.EIO: "The device reports an error: look at the kernel log (dmesg) and the disk's SMART state.",
    }.get(error.errno or 0, "Check that the file or device is still there.")
    return ReadError(f"{path} cannot be {what}: {error.strerror}", advice=advice, subject=path)


def _write_error(path: str, error: OSError, what: str) -> ToolkitError:
    if error.errno in _FULL:
        advice = "Make room there, or choose another destination."
        if error.errno == errno.EFBIG:
            advice = "The file system does not hold a file of that size: choose another one (XFS, tmpfs, ZFS)."
        return NoSpaceError(f"{path} cannot be {what}: {error.strerror}", advice=advice, subject=path)
    advice = "Check the path and the rights on it."
    if error.errno == errno.EBUSY:
        advice = "The device is in use (mounted, or part of LVM or RAID): release it first."
    if error.errno == errno.EIO:
        advice = "The device reports an error: look at the kernel log (dmesg)."
    return WriteError(f"{path} cannot be {what}: {error.strerror}", advice=advice, subject=path)
