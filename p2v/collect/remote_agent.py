# ruff: noqa: B904, N818, PLR0917, PTH116, RUF005, SIM105, UP031
"""The part of the disk agent that runs on the source: piped to its Python, never written there.

It must run on any Python from 3.4 on: no f-strings, no variable annotations. Of the standard library it uses only what is in the smallest
installations (Debian's python3-minimal has no json, queue, mmap or ctypes). It writes nothing, opens devices
read-only, and leaves when standard input closes or stays silent. ``p2v.collect.agent`` is the other side.

Request   op u8 | id u32 | device u16 | offset u64 | length u64 | extra u16, then ``extra`` bytes          (big-endian)
          OPEN extra = path, offset 1 = O_DIRECT wanted | READ | MAP | HASH offset..length, extra = block size u32 | CLOSE | PING
Reply     status u8 | flags u8 | id u32 | payload u32, then the payload
          READ: number of runs u32, each start u32, length u32 within the request; then their bytes, in one zlib stream when COMPRESSED.
                What lies between runs is zero. BUFFERED says that the page cache was used although O_DIRECT was wanted.
          MAP: next u64 (where to ask again), then start u64, length u64 of each run of data below it
          HASH: one 32-byte digest for each block; OPEN and the greeting: JSON
          ERROR: errno u32, offset u64, text | VANISHED: text
"""

import errno
import os
import select
import stat
import struct
import sys
import threading
import time
import zlib
from array import array
from collections import deque

try:
    from hashlib import blake2b

    HASH_NAME = "blake2b"
except ImportError:  # Python 3.4, 3.5
    from hashlib import sha256

    HASH_NAME = "sha256"

MAGIC = b"\0P2V-AGENT-1\0"
REQUEST = struct.Struct(">BIHQQH")
REPLY = struct.Struct(">BBII")
OPEN, READ, MAP, HASH, CLOSE, PING = 1, 2, 3, 4, 5, 6
OK, ERROR, VANISHED = 0, 1, 2
COMPRESSED, BUFFERED = 1, 2
PAGE = 4096
MAX_READ = 1 << 20
MAX_HASH = 256 << 20
MAX_EXTENTS = 512
MAX_QUEUE = 256
ZERO_PAGE = bytes(PAGE)
SAMPLE = 64 << 10  # bytes that are compressed now and then to learn what compression costs and saves
SAMPLE_EVERY = 24  # replies
WINDOW = 32 << 20  # bytes sent that the cost of sending is the mean of
WARM_UP = 6 << 20  # bytes sent before the cost is believed
GONE = (errno.ENXIO, errno.ENODEV, 123, errno.ESHUTDOWN)  # 123: ENOMEDIUM
BLKSSZGET, BLKPBSZGET = 0x1268, 0x127B  # linux/fs.h
F_SETPIPE_SZ = 1031


def as_json(facts: "dict[str, int | bool | str]") -> bytes:
    """A flat object of numbers, truths and plain words as JSON."""
    texts = []
    for name, value in sorted(facts.items()):
        texts.append('"%s": %s' % (name, '"%s"' % value if isinstance(value, str) else str(value).lower()))
    return ("{" + ", ".join(texts) + "}").encode()


def aligned(size: int) -> memoryview:
    """A buffer of ``size`` bytes that begins on a page, as O_DIRECT wants it."""
    room = array("B", bytes(size + PAGE))
    start = -room.buffer_info()[0] % PAGE
    return memoryview(room)[start : start + size]


class Todo:
    """Requests on their way to the workers; ``put`` waits while ``MAX_QUEUE`` are waiting."""

    def __init__(self) -> None:
        self.waiting = deque()  # type: deque[tuple[int, int, int, int, int, bytes]]
        self.changed = threading.Condition()

    def put(self, request: "tuple[int, int, int, int, int, bytes]") -> None:
        with self.changed:
            while len(self.waiting) >= MAX_QUEUE:
                self.changed.wait()
            self.waiting.append(request)
            self.changed.notify_all()

    def get(self) -> "tuple[int, int, int, int, int, bytes]":
        with self.changed:
            while not self.waiting:
                self.changed.wait()
            self.changed.notify_all()
            return self.waiting.popleft()


class Vanished(Exception):
    """The device went away or has another size than when it was opened."""


class Link:
    """What sending a byte costs, what compressing one costs and saves: says whether compression pays.

    It pays when the time that it saves on the link is more than the time it takes: on a fast link it stays off.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.send_cost = 0.0  # seconds for each byte on the wire
        self.compress_cost = 1.0  # seconds for each byte
        self.ratio = 1.0
        self.on = mode == "always"
        self.replies = 0
        self.amount = 0

    def sent(self, amount: int, seconds: float) -> None:
        # The mean of all at first, then of about the last 32 MiB: a moment without a processor is no slow link.
        self.amount += amount
        self.send_cost += (seconds / amount - self.send_cost) * amount / min(self.amount, max(amount, WINDOW))

    def compressed(self, before: int, after: int, seconds: float) -> None:
        weight = 0.25 if self.compress_cost < 1.0 else 1.0
        self.compress_cost += (seconds / before - self.compress_cost) * weight
        self.ratio += (float(after) / before - self.ratio) * weight

    def decide(self, view: memoryview) -> bool:
        if self.mode != "auto":
            return self.on
        if self.amount < WARM_UP:
            return False
        self.replies += 1
        if self.replies % SAMPLE_EVERY == 1 and len(view) >= SAMPLE:
            started = time.perf_counter()
            after = len(zlib.compress(view[:SAMPLE], 1))
            self.compressed(SAMPLE, after, time.perf_counter() - started)
        saved = self.send_cost * (1.0 - self.ratio)
        self.on = saved > self.compress_cost * (0.7 if self.on else 1.2)
        return self.on


class Output:
    """Standard output as a sequence of whole frames, from several threads."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.lock = threading.Lock()

    def send(self, status: int, flags: int, number: int, parts: "list[bytes | memoryview]") -> None:
        size = sum(len(part) for part in parts)
        views = [memoryview(part) for part in [REPLY.pack(status, flags, number, size)] + parts if len(part)]
        with self.lock:
            started = time.perf_counter()
            while views:
                done = os.writev(1, views[:64])
                while done:
                    if done < len(views[0]):
                        views[0] = views[0][done:]
                        break
                    done -= len(views.pop(0))
            if size >= SAMPLE:
                self.link.sent(size, time.perf_counter() - started)


class Device:
    """One device or file, opened read-only."""

    def __init__(self, path: bytes, direct: bool) -> None:
        self.path = path
        self.notice = ""
        self.lock = threading.Lock()
        mode = os.stat(path).st_mode
        self.is_block = stat.S_ISBLK(mode)
        if not self.is_block and not stat.S_ISREG(mode):
            raise OSError(errno.ENOTBLK, "not a block device and not a file")
        self.direct = direct and self.is_block
        self.wanted = self.direct
        try:
            self.fd = os.open(path, self.open_flags())
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise
            self.direct = False
            self.fd = os.open(path, self.open_flags())
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        self.sector = self.ask(BLKSSZGET)
        self.physical = self.ask(BLKPBSZGET)

    def open_flags(self) -> int:
        return os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)

    def ask(self, request: int) -> int:
        if not self.is_block:
            return 512
        import fcntl

        answer = fcntl.ioctl(self.fd, request, bytes(4))
        return int(struct.unpack("i", answer)[0])

    def facts(self) -> bytes:
        return as_json(
            {
                "size": self.size,
                "sector": self.sector,
                "physical": self.physical,
                "block": self.is_block,
                "direct": self.direct,
            }
        )

    def read(self, view: memoryview, offset: int, length: int) -> int:
        """Read at least the asked range into ``view``, from an aligned place on; returns where in ``view`` the range begins."""
        if offset + length > self.size:
            raise OSError(errno.EINVAL, "range outside the disk")
        low = offset - offset % PAGE
        high = offset + length
        high += -high % PAGE
        got = 0
        while low + got < offset + length:
            direct = self.direct  # before the read: another worker may give it up meanwhile
            try:
                step = self.pread(view[got : high - low], low + got)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self.refuse_direct()
                    continue
                self.raise_if_gone(error)
                error.filename = max(low + got, offset)  # carries the place to the reply
                raise
            if step == 0 or (direct and step % 512):
                raise Vanished("it ends at byte %d now, it had %d" % (low + got + step, self.size))
            got += step
        return offset - low

    def pread(self, view: memoryview, place: int) -> int:
        if self.wanted and not self.direct:
            # Second best to O_DIRECT: what the cache holds unchanged is dropped, so that it is read again.
            os.posix_fadvise(self.fd, place, len(view), os.POSIX_FADV_DONTNEED)
        if hasattr(os, "preadv"):
            return os.preadv(self.fd, [view], place)
        with self.lock:
            os.lseek(self.fd, place, os.SEEK_SET)
            return os.readv(self.fd, [view])

    def refuse_direct(self) -> None:
        with self.lock:
            if self.direct:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                os.dup2(fd, self.fd)
                os.close(fd)
                self.direct = False  # last: whoever sees it reads through the new descriptor

    def raise_if_gone(self, error: OSError) -> None:
        if error.errno in GONE:
            raise Vanished(os.strerror(error.errno or 0))
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as second:
            raise Vanished(os.strerror(second.errno or 0))
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
        if size != self.size:
            raise Vanished("its size is %d now, it was %d" % (size, self.size))

    def map(self, offset: int, length: int) -> "tuple[int, list[tuple[int, int]]]":
        """Runs of data from ``offset`` on, and where the answer stops."""
        end = min(offset + length, self.size)
        if self.is_block:
            return end, [(offset, end - offset)]
        found = []  # type: list[tuple[int, int]]
        with self.lock:
            try:
                while offset < end and len(found) < MAX_EXTENTS:
                    start = os.lseek(self.fd, offset, os.SEEK_DATA)
                    if start >= end:
                        return end, found
                    offset = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
                    found.append((start, offset - start))
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data from here on
                    return end, found
                if error.errno == errno.EINVAL:  # a file system without maps
                    return end, found + [(offset, end - offset)]
                raise
        return offset, found


def find_runs(buffer: memoryview, start: int, length: int, offset: int) -> "list[tuple[int, int]]":
    """Runs of pages that are not all zero, as (start, length) within the range; pages are those of the disk."""
    runs = []
    position, end = start, start + length
    run = -1
    step = PAGE - offset % PAGE
    while position < end:
        stop = min(position + step, end)
        # Most data is told by a byte at either end, without a copy.
        zero = not buffer[position] and not buffer[stop - 1]
        if zero and bytes(buffer[position:stop]) == ZERO_PAGE[: stop - position]:
            if run >= 0:
                runs.append((run - start, position - run))
                run = -1
        elif run < 0:
            run = position
        position = stop
        step = PAGE
    if run >= 0:
        runs.append((run - start, end - run))
    return runs


class Worker(threading.Thread):
    """Answers requests, one at a time, with a page-aligned buffer of its own."""

    def __init__(self, agent: "Agent") -> None:
        threading.Thread.__init__(self)
        self.daemon = True
        self.agent = agent
        self.view = aligned(MAX_READ + 2 * PAGE)

    def run(self) -> None:
        while True:
            op, number, device, offset, length, extra = self.agent.todo.get()
            try:
                self.answer(op, number, device, offset, length, extra)
            except Vanished as error:
                self.agent.output.send(VANISHED, 0, number, [str(error).encode()])
            except OSError as error:
                if error.errno == errno.EPIPE:
                    os._exit(0)
                place = error.filename if isinstance(error.filename, int) else offset
                head = struct.pack(">IQ", error.errno or 0, place)
                self.agent.output.send(ERROR, 0, number, [head, (error.strerror or str(error)).encode()])
            except Exception as error:
                text = "%s: %s" % (type(error).__name__, error)
                self.agent.output.send(ERROR, 0, number, [struct.pack(">IQ", 0, offset), text.encode()])

    def answer(self, op: int, number: int, device: int, offset: int, length: int, extra: bytes) -> None:
        agent = self.agent
        if op == OPEN:
            agent.devices[device] = opened = Device(extra, bool(offset))
            agent.output.send(OK, 0, number, [opened.facts()])
        elif op == READ:
            self.read(agent.devices[device], number, offset, length)
        elif op == MAP:
            after, runs = agent.devices[device].map(offset, length)
            agent.output.send(
                OK, 0, number, [struct.pack(">Q", after) + b"".join([struct.pack(">QQ", *run) for run in runs])]
            )
        elif op == HASH:
            self.hash(agent.devices[device], number, offset, length, struct.unpack(">I", extra)[0])
        elif op == CLOSE:
            os.close(agent.devices.pop(device).fd)
            agent.output.send(OK, 0, number, [])
        else:
            raise ValueError("unknown request %d" % op)

    def read(self, device: Device, number: int, offset: int, length: int) -> None:
        if length > MAX_READ:
            raise ValueError("more than %d bytes asked" % MAX_READ)
        begin = device.read(self.view, offset, length)
        runs = find_runs(self.view, begin, length, offset)
        flags = BUFFERED if device.wanted and not device.direct else 0
        head = struct.pack(">I", len(runs)) + b"".join([struct.pack(">II", *run) for run in runs])
        parts = [self.view[begin + start : begin + start + size] for start, size in runs]
        if parts and self.agent.link.decide(parts[0]):
            packed = self.pack(parts)
            if packed is not None:
                self.agent.output.send(OK, flags | COMPRESSED, number, [head, packed])
                return
        self.agent.output.send(OK, flags, number, [head] + parts)

    def pack(self, parts: "list[memoryview]") -> "bytes | None":
        started = time.perf_counter()
        before = sum(len(part) for part in parts)
        engine = zlib.compressobj(1)
        packed = b"".join([engine.compress(part) for part in parts] + [engine.flush()])
        self.agent.link.compressed(before, len(packed), time.perf_counter() - started)
        return packed if len(packed) < before * 0.9 else None

    def hash(self, device: Device, number: int, offset: int, length: int, block: int) -> None:
        if not 0 < block <= MAX_READ or length > MAX_HASH or length > block << 16:
            raise ValueError("hash request out of bounds")
        digests = []
        end = offset + length
        while offset < end:
            size = min(block, end - offset)
            begin = device.read(self.view, offset, size)
            piece = self.view[begin : begin + size]
            digests.append(
                blake2b(piece, digest_size=32).digest() if HASH_NAME == "blake2b" else sha256(piece).digest()
            )
            offset += size
        self.agent.output.send(OK, 0, number, [b"".join(digests)])


class Agent:
    """Reads requests; answers pings itself, so that a hanging disk is not taken for a lost link."""

    def __init__(self, silence: float, workers: int, mode: str) -> None:
        self.silence = silence
        self.link = Link(mode)
        self.output = Output(self.link)
        self.devices = {}  # type: dict[int, Device]
        self.todo = Todo()
        self.workers = [Worker(self) for _ in range(workers)]

    def serve(self) -> None:
        self.widen()
        greeting = {
            "python": "%d.%d" % sys.version_info[:2],
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "hash": HASH_NAME,
        }  # type: dict[str, int | bool | str]
        os.write(1, MAGIC)
        self.output.send(OK, 0, 0, [as_json(greeting)])
        for worker in self.workers:
            worker.start()
        while True:
            op, number, device, offset, length, size = REQUEST.unpack(self.exactly(REQUEST.size))
            extra = self.exactly(size)
            if op == PING:
                self.output.send(OK, 0, number, [])
            else:
                self.todo.put((op, number, device, offset, length, extra))

    def widen(self) -> None:
        import fcntl

        try:
            fcntl.fcntl(1, F_SETPIPE_SZ, 1 << 20)
        except OSError:
            pass  # a socket, or an old kernel: slower, nothing else

    def exactly(self, size: int) -> bytes:
        pieces = []
        while size:
            if not select.select([0], [], [], self.silence)[0]:
                raise EOFError
            piece = os.read(0, size)
            if not piece:
                raise EOFError
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


def main() -> None:
    try:
        Agent(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]).serve()
    except (EOFError, OSError):
        pass
    finally:
        # Threads may hang in a read of a dying disk; nothing of ours needs an orderly end.
        os._exit(0)


if __name__ == "__main__":
    main()
