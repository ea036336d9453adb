"""What sequential, compressed formats share: ascending writes are cut into batches, compressed by several threads, appended in order."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, Generic, TypeVar

from formats.errors import NoSpaceError, WriteError
from formats.images.ascending import Gatherer

_LEVEL = 1

Packed = TypeVar("Packed")
"""What a format makes of a batch."""


Compress = Callable[[bytes], bytes]


class CompressedStream(ABC, Generic[Packed]):
    """A sequential ``BlockSink`` that appends to ``output``. A format says how a batch is packed and appended, and what ends the file.

    ``output`` is flushed (to stable storage where it is a file), and closed only with ``owned``. ``threads`` compress (0: one for each
    processor, 8 at most); memory is about three batches for each. Until ``flush`` returns, what was written is no image.
    """

    random_access = False

    def __init__(self, output: BinaryIO, size: int, *, batch: int, threads: int, owned: bool) -> None:
        self._output, self._size, self._owned = output, size, owned
        self._gatherer = Gatherer(size, batch, self._submit)
        self._workers = threads or min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="compress")
        self._pending: deque[Future[Packed]] = deque()
        self._ended = self._closed = False
        # After an error the file has a hole: nothing more may be said to be stored.
        self._broken: NoSpaceError | WriteError | None = None

    @abstractmethod
    def _pack(self, batch: bytes | bytearray, offset: int) -> Packed:
        """Compress a batch; called from several threads."""

    @abstractmethod
    def _append(self, packed: Packed) -> None:
        """Write a batch behind all before it."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what ends the file."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def write(self, data: memoryview, offset: int) -> None:
        """Take ``data`` at ``offset``, behind all that was written before."""
        self._check_open()
        self._gatherer.write(data, offset)

    def zero(self, start: int, length: int) -> None:
        """Leave a range zero: it takes no room."""
        self._check_open()
        self._gatherer.skip(start, length)

    def flush(self) -> None:
        """Write the end of the file and make it stable. Nothing can be written afterwards; a second call does nothing."""
        if self._closed:
            raise ValueError("the image is closed")
        if self._broken is not None:
            raise self._broken
        if not self._ended:
            self._ended = True
            self._gatherer.finish()
            while self._pending:
                self._take()
            self._finish()
            self._pool.shutdown()
        self._stabilise()

    def close(self) -> None:
        """Stop the threads, and close an owned file. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        if self._owned:
            try:
                self._output.close()
            except OSError as error:
                raise self._failure(error) from error

    def _check_open(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._closed or self._ended:
            raise ValueError("the image is closed" if self._closed else "the end of the image is written")

    def _submit(self, batch: bytes | bytearray, offset: int) -> None:
        self._pending.append(self._pool.submit(self._pack, batch, offset))
        while len(self._pending) > 2 * self._workers or (self._pending and self._pending[0].done()):
            self._take()

    def _take(self) -> None:
        """Write the oldest batch when it is compressed; whatever goes wrong there leaves a hole, so the image is given up."""
        try:
            self._append(self._pending.popleft().result())
        except BaseException:
            self._broken = self._broken or WriteError("the image was given up after an error")
            raise

    def _put(self, data: bytes | memoryview) -> None:
        """Append to the file."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._output.write(view) :]
        except OSError as error:
            raise self._failure(error) from error

    def _stabilise(self) -> None:
        try:
            self._output.flush()
            if (file := _stable_file(self._output)) is not None:
                os.fsync(file)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> NoSpaceError | WriteError:
        subject = str(getattr(self._output, "name", "the image"))
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            self._broken = NoSpaceError(
                f"no space is left for {subject}", advice="free space there or name another place"
            )
        else:
            self._broken = WriteError(f"{subject} cannot be written: {error.strerror}", subject=subject)
        return self._broken


def _stable_file(output: BinaryIO) -> int | None:
    """The descriptor of an output that has stable storage below it: not that of a pipe or of something without one."""
    try:
        file = output.fileno()
    except (OSError, AttributeError):
        return None
    mode = os.fstat(file).st_mode
    return file if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else None


def zlib_compressor(window: int = 15) -> Compress:
    """A deflate compressor as zlib's ``wbits`` says: 8 to 15 with a zlib header, -8 to -15 without.

    isal is four times as fast as zlib at nearly its ratio, and its streams are zlib's; zlib where it has no build.
    """
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        def compress(content: bytes) -> bytes:
            engine = zlib.compressobj(_LEVEL, zlib.DEFLATED, window, 9)
            return engine.compress(content) + engine.flush()

        return compress
    return lambda content: isal_zlib.compress(content, _LEVEL, window)
