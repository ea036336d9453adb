# ruff: noqa: PTH116, SIM105, UP031
"""The part of ``p2v.device`` that runs on the host whose device is written: piped to its Python, never written there.

It must run on any Python from 3.4 on, with the standard library alone. A device that is mounted, or held by LVM, md or another, is
refused by the kernel (O_EXCL).

Request   op u8 | offset u64 | length u32                  (big-endian)
          WRITE, then ``length`` bytes | ZERO | FLUSH
Reply     status u8 | length u32, then the text: OK with the device's size at first, OK with nothing to each FLUSH;
          ERROR with errno u32 and text when something went wrong, and the end.
"""

import errno
import os
import stat
import struct
import sys

MAGIC = b"\0P2V-WRITER-1\0"
REQUEST = struct.Struct(">BQI")
REPLY = struct.Struct(">BI")
WRITE, ZERO, FLUSH = 1, 2, 3
OK, ERROR = 0, 1
MOST = 4 << 20  # bytes of one write
BLKGETSIZE64, BLKZEROOUT, BLKFLSBUF = 0x80081272, 0x127F, 0x1261  # linux/fs.h
STEP = 1 << 30  # bytes that are zeroed at once, so that the link does not look dead


def exactly(size: int) -> bytes:
    pieces = []
    while size:
        piece = os.read(0, size)
        if not piece:
            raise EOFError
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def reply(status: int, text: bytes) -> None:
    os.write(1, REPLY.pack(status, len(text)) + text)


class Target:
    def __init__(self, path: bytes) -> None:
        mode = os.stat(path).st_mode
        if not stat.S_ISBLK(mode):
            raise OSError(errno.ENOTBLK, "it is no block device")
        self.fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        self.zeroes = True  # until the kernel refuses

    def write(self, data: "bytes | memoryview", offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, offset)
            view = view[done:]
            offset += done

    def zero(self, offset: int, length: int) -> None:
        import fcntl

        while length:
            step = min(length, STEP)
            if self.zeroes:
                try:
                    fcntl.ioctl(self.fd, BLKZEROOUT, struct.pack("@QQ", offset, step))
                except OSError as error:
                    # EINVAL: the range is no whole number of sectors.
                    if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    self.fill(offset, step)
            else:
                self.fill(offset, step)
            offset += step
            length -= step

    def fill(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, 1 << 20)))
        while length:
            step = min(length, len(zeroes))
            self.write(zeroes[:step], offset)
            offset += step
            length -= step

    def flush(self) -> None:
        import fcntl

        os.fsync(self.fd)
        try:
            fcntl.ioctl(self.fd, BLKFLSBUF, 0)  # so that what is read later comes from the device
        except OSError:
            pass

    def do(self, op: int, offset: int, length: int) -> None:
        if op == WRITE:
            self.write(exactly(length), offset)
        elif op == ZERO:
            self.zero(offset, length)
        elif op == FLUSH:
            self.flush()
            reply(OK, b"")
        else:
            raise OSError(errno.EPROTO, "unknown request %d" % op)


def main() -> None:
    os.write(1, MAGIC)
    try:
        target = Target(os.fsencode(sys.argv[1]))
        reply(OK, struct.pack(">Q", target.size))
        while True:
            target.do(*REQUEST.unpack(exactly(REQUEST.size)))
    except EOFError:
        pass
    except OSError as error:
        try:
            reply(ERROR, struct.pack(">I", error.errno or 0) + (error.strerror or str(error)).encode())
        except OSError:
            pass


if __name__ == "__main__":
    main()
