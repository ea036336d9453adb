"""The NBD client: an export as a ``BlockSource``, and as a random-access ``BlockSink`` when it is writable.

A call owns one connection while it lasts and keeps several requests in flight on it; calls from other threads take other connections
of the pool. So there is no reader thread, no queue, and nothing that can deadlock: requests of one call are small or their replies are.

Trust: everything a server sends is bounded and checked against what was asked. A server that breaks the protocol, goes away or
falls silent gives ``NbdError`` and ends the whole disk; an error that it reports for one request gives ``ReadError``, ``WriteError`` or
``NoSpaceError`` and nothing else is lost.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NoReturn

from formats.block import Extent, Kind, check_range, clipped, merged
from formats.errors import ImageError, NbdError, NoSpaceError, ReadError, WriteError
from formats.nbd import wire

_PART = 256 << 10  # bytes of one read in flight
_WRITE_PART = 1 << 20  # bytes of one write in flight
_DEPTH = 16  # requests in flight on one connection; QEMU's server takes no more
_STATUS_SPAN = (1 << 32) - (1 << 20)  # bytes of one block status request: the length field has 32 bits
_ZERO_SPAN = 1 << 30
_MAX_STATUS = 16 << 20  # bytes of one block status reply; nbdkit sends up to 8 MiB, QEMU 1 MiB
_MAX_MESSAGE = 4096 + 64
_MAX_REPLIES = 64  # replies to one option


def connect(uri: str, *, connections: int = 4, timeout: float = 60.0, handshake_timeout: float = 10.0) -> NbdDisk:
    """Open the export at ``uri``; as many as ``connections`` are used when the server says that this is safe.

    ``handshake_timeout`` seconds bound the whole of each connection's negotiation; ``timeout`` bounds each wait for data.
    Raises ``UsageError`` for a URI that cannot be read, ``NbdError`` when the export cannot be had.
    """
    return NbdDisk(wire.NbdAddress.parse(uri), connections=connections, timeout=timeout, handshake=handshake_timeout)


class NbdDisk:
    """An NBD export. ``extents`` calls DATA whatever the server does not promise to read as zeroes ("hole" alone is DATA)."""

    random_access = True

    def __init__(self, address: wire.NbdAddress, *, connections: int, timeout: float, handshake: float) -> None:
        self._address = address
        self._timeouts = (timeout, handshake)
        self._changed = threading.Condition()
        self._edges = threading.Lock()  # read-modify-write of partial blocks, one at a time
        first = _Connection(address, timeout, handshake)
        self._export = first.export
        self._limit = connections if first.export.flags & wire.FLAG_CAN_MULTI_CONN else 1
        self._all = [first]
        self._idle = [first]
        self._opening = 0
        self._closed = False
        self._broken: NbdError | None = None

    @property
    def size(self) -> int:
        """Bytes of the export."""
        return self._export.size

    @property
    def writable(self) -> bool:
        """Whether the server takes writes."""
        return not self._export.flags & wire.FLAG_READ_ONLY

    @property
    def mapped(self) -> bool:
        """Whether the server tells data from zeroes; if not, all is DATA."""
        return self._export.allocation is not None

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; ``ReadError`` when the server reports an error, ``NbdError`` when it breaks."""
        self._check(offset, len(buffer))
        low, high = self._aligned(offset, len(buffer))
        if (low, high) == (offset, offset + len(buffer)):
            with self._connection() as connection:
                connection.read(buffer, offset)
            return
        bounce = memoryview(bytearray(high - low))
        with self._connection() as connection:
            connection.read(bounce, low)
        buffer[:] = bounce[offset - low : offset - low + len(buffer)]

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """DATA and ZERO, as the server answers for one span after the other."""
        self._check(start, length)
        if self._export.allocation is None:
            return iter([Extent(start, length, Kind.DATA)] if length else [])
        return merged(clipped(self._tiles(start, length), start, length))

    def _tiles(self, start: int, length: int) -> Iterator[Extent]:
        position, end = self._aligned(start, length)
        while position < end:
            with self._connection() as connection:
                states = connection.block_status(position, min(end - position, _STATUS_SPAN))
            for length_there, flags in states:
                size = min(length_there, end - position)  # the last one may reach past what was asked
                if size:
                    yield Extent(position, size, Kind.ZERO if flags & wire.STATE_ZERO else Kind.DATA)
                position += size

    def write(self, data: memoryview, offset: int) -> None:
        """Store ``data`` at ``offset``."""
        self._check(offset, len(data), write=True)
        low, high = self._aligned(offset, len(data))
        if (low, high) == (offset, offset + len(data)):
            with self._connection() as connection:
                connection.write(data, offset)
            return
        block = self._export.minimum
        with self._edges, self._connection() as connection:
            bounce = memoryview(bytearray(high - low))
            for edge in {low, max(low, high - block)}:
                connection.read(bounce[edge - low : edge - low + block], edge)
            bounce[offset - low : offset - low + len(data)] = data
            connection.write(bounce, low)

    def zero(self, start: int, length: int) -> None:
        """Make the range read as zeroes; holes where the server can."""
        self._check(start, length, write=True)
        block, end = self._export.minimum, start + length
        low = min(end, -(-start // block) * block)
        high = max(low, end // block * block) if end != self.size else end
        for first, last in ((start, low), (high, end)):
            if first < last:
                self.write(memoryview(bytes(last - first)), first)
        plain = not self._export.flags & wire.FLAG_SEND_WRITE_ZEROES
        step = _WRITE_PART if plain else _ZERO_SPAN
        for position in range(low, high, step):
            with self._connection() as connection:
                count = min(step, high - position)
                if plain:
                    connection.write(memoryview(bytes(count)), position)
                else:
                    connection.command(wire.CMD_WRITE_ZEROES, position, count)

    def flush(self) -> None:
        """Return when the server has everything on stable storage; without a flush command the server says it needs none."""
        self._check(0, 0)
        if self._export.flags & wire.FLAG_SEND_FLUSH:
            with self._connection() as connection:
                connection.command(wire.CMD_FLUSH, 0, 0)

    def close(self) -> None:
        """Take leave of the server; calls in progress fail."""
        with self._changed:
            self._closed = True
            everything, idle = self._all, self._idle
            self._all, self._idle = [], []
            self._changed.notify_all()
        for connection in everything:
            if connection in idle:
                connection.leave()
            else:
                connection.shut()  # its borrower closes it: a descriptor in use must not be freed for another file

    def _check(self, start: int, length: int, *, write: bool = False) -> None:
        if self._closed:
            raise ValueError("the disk is closed")
        check_range(self.size, start, length)
        if write and not self.writable:
            raise WriteError("the NBD export is read-only", subject=self._address.uri)

    def _aligned(self, start: int, length: int) -> tuple[int, int]:
        block = self._export.minimum
        if block == 1 or not length:
            return start, start + length
        return start // block * block, min(self.size, -(-(start + length) // block) * block)

    @contextmanager
    def _connection(self) -> Iterator[_Connection]:
        connection = self._borrow()
        try:
            yield connection
        except (ImageError, NoSpaceError) as error:
            if isinstance(error, NbdError):
                self._break(error, connection)
            else:
                self._give_back(connection)  # the server reported an error, every reply was taken
            raise
        except (OSError, EOFError) as error:
            broken = NbdError(
                f"the NBD connection broke: {error}",
                advice="Check that the server that gives the disk is still running, then run again.",
                subject=self._address.uri,
            )
            self._break(broken, connection)
            raise broken from error
        except BaseException:  # Ctrl-C between request and reply: what comes next on the connection is unknown
            given_up = NbdError("the NBD connection was given up after an interruption", subject=self._address.uri)
            self._break(given_up, connection)
            raise
        else:
            self._give_back(connection)

    def _borrow(self) -> _Connection:
        with self._changed:
            while True:
                if self._closed or self._broken is not None:
                    raise self._failure()
                if self._idle:
                    return self._idle.pop()
                if len(self._all) + self._opening < self._limit:
                    self._opening += 1
                    break
                self._changed.wait()
        return self._open_another()

    def _failure(self) -> Exception:
        """Why the disk cannot be used any more: a new exception for each caller."""
        broken = self._broken
        if self._closed or broken is None:
            return ValueError("the disk is closed")
        return NbdError(broken.message, advice=broken.advice, subject=broken.subject)

    def _open_another(self) -> _Connection:
        connection: _Connection | None = None
        try:
            connection = _Connection(self._address, *self._timeouts)
            if connection.export != self._export:
                connection.close()
                connection = None
                raise NbdError("the NBD export changed while it was in use", subject=self._address.uri)
        except NbdError as error:
            self._break(error)
            raise
        finally:
            with self._changed:
                self._opening -= 1
                ended = self._closed or self._broken is not None
                if connection is not None and not ended:
                    self._all.append(connection)
                self._changed.notify_all()
        if ended:  # close or a fault elsewhere came while this connection was made, and could not see it
            connection.close()
            raise self._failure()
        return connection

    def _give_back(self, connection: _Connection) -> None:
        with self._changed:
            usable = not self._closed and self._broken is None
            if usable:
                self._idle.append(connection)
            self._changed.notify()
        if not usable:
            connection.close()

    def _break(self, error: NbdError, connection: _Connection | None = None) -> None:
        with self._changed:
            self._broken = self._broken or error
            busy = [other for other in self._all if other not in self._idle and other is not connection]
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for other in busy:
            other.shut()
        for other in [*idle, connection] if connection else idle:
            other.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Export:
    """What the negotiation gave. ``minimum``: the block that requests must be aligned to; ``allocation``: id of the map's context."""

    size: int
    flags: int
    minimum: int = 1
    maximum: int = wire.MAX_PAYLOAD
    structured: bool = False
    allocation: int | None = None


@dataclass(slots=True)
class _Pending:
    """A request in flight. ``covered``: the parts of a read that came; ``states``: the answer to a block status request."""

    kind: int
    offset: int
    length: int
    buffer: memoryview | None = None
    covered: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[int, int]] | None = None
    failed: bool = False

    def complete(self) -> bool:
        """Whether every byte that was asked came, exactly once; nothing more is expected of a failed request."""
        if self.failed:
            return True
        if self.kind == wire.CMD_READ:
            position = self.offset
            for start, length in sorted(self.covered):
                if start != position:
                    return False
                position += length
            return position == self.offset + self.length
        return self.kind != wire.CMD_BLOCK_STATUS or self.states is not None


class _Connection:
    """One socket after its negotiation; used by one thread at a time."""

    def __init__(self, address: wire.NbdAddress, timeout: float, handshake: float) -> None:
        self._subject = address.uri
        self._peer = address.open(handshake)
        self._handle = 0
        self._pending: dict[int, _Pending] = {}
        self._failure: tuple[int, str, _Pending] | None = None
        # The timer bounds the negotiation as a whole: a server that trickles bytes cannot stretch it.
        watchdog = threading.Timer(handshake, self.shut)
        watchdog.daemon = True
        watchdog.start()
        try:
            self.export = _Negotiation(self._peer, address).run()
            wire.set_timeout(self._peer, timeout)
        except (OSError, EOFError) as error:
            self._peer.close()
            raise NbdError(
                f"the NBD server broke off the negotiation or took more than {handshake:g} s: {error}",
                advice="Check that an NBD server with this export listens there.",
                subject=self._subject,
            ) from error
        except BaseException:
            self._peer.close()
            raise
        finally:
            watchdog.cancel()
            watchdog.join()

    def leave(self) -> None:
        """Say goodbye and close."""
        with suppress(OSError):
            wire.send(self._peer, wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_DISC, 0, 0, 0))
        self.close()

    def shut(self) -> None:
        """Wake whoever waits on the socket: it fails."""
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; only by the thread that uses the connection."""
        self.shut()
        self._peer.close()

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``, several requests in flight."""
        step = min(_PART, self.export.maximum)
        position, size = 0, len(buffer)
        while position < size:
            requests = []
            while position < size and len(self._pending) < _DEPTH:
                part = buffer[position : position + step]
                requests.append(self._request(_Pending(wire.CMD_READ, offset + position, len(part), part)))
                position += len(part)
            wire.send(self._peer, b"".join(requests))
            self._take_replies(_DEPTH // 2 if position < size else 0)
        self._raise_failure()

    def write(self, data: memoryview, offset: int) -> None:
        """Store ``data``, several requests in flight."""
        step = min(_WRITE_PART, self.export.maximum)
        for position in range(0, len(data), step):
            part = data[position : position + step]
            wire.send(self._peer, self._request(_Pending(wire.CMD_WRITE, offset + position, len(part))), part)
            self._take_replies(_DEPTH - 1)
        self._take_replies(0)
        self._raise_failure()

    def command(self, kind: int, offset: int, length: int) -> None:
        """Send a command without payload and wait for its reply."""
        wire.send(self._peer, self._request(_Pending(kind, offset, length)))
        self._take_replies(0)
        self._raise_failure()

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return (length, state flags) from ``offset`` on: at least one, perhaps not to the end of what is asked."""
        pending = _Pending(wire.CMD_BLOCK_STATUS, offset, length)
        wire.send(self._peer, self._request(pending))
        self._take_replies(0)
        self._raise_failure()
        return pending.states or []

    def _request(self, pending: _Pending) -> bytes:
        self._handle += 1
        self._pending[self._handle] = pending
        return wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, pending.kind, self._handle, pending.offset, pending.length)

    def _take_replies(self, left: int) -> None:
        while len(self._pending) > left:
            self._take_reply()

    def _take_reply(self) -> None:
        header = wire.receive(self._peer, wire.SIMPLE_REPLY.size)
        magic, code, handle = wire.SIMPLE_REPLY.unpack(header)
        if magic == wire.SIMPLE_REPLY_MAGIC:
            self._simple(self._lookup(handle), code, handle)
        elif magic == wire.STRUCTURED_REPLY_MAGIC and self.export.structured:
            length = wire.U32.unpack(wire.receive(self._peer, 4))[0]
            self._chunk(self._lookup(handle), code >> 16, code & 0xFFFF, length)
            if code >> 16 & wire.CHUNK_DONE:
                self._finish(handle)
        else:
            self._broken(f"a reply begins with {magic:#x}")

    def _lookup(self, handle: int) -> _Pending:
        pending = self._pending.get(handle)
        if pending is None:
            self._broken("a reply belongs to no request")
        return pending

    def _simple(self, pending: _Pending, code: int, handle: int) -> None:
        if code:
            self._fail(pending, code, "")
        elif pending.kind == wire.CMD_READ:
            if self.export.structured or pending.buffer is None:
                self._broken("a read was answered without structure")
            wire.receive_into(self._peer, pending.buffer)
            pending.covered.append((pending.offset, pending.length))
        self._finish(handle)

    def _finish(self, handle: int) -> None:
        pending = self._pending.pop(handle)
        if not pending.complete():
            self._broken("a reply ended before everything came")

    def _chunk(self, pending: _Pending, flags: int, kind: int, length: int) -> None:
        if kind == wire.CHUNK_OFFSET_DATA and pending.kind == wire.CMD_READ:
            offset = wire.U64.unpack(self._exactly(8, length, at_least=9))[0]
            wire.receive_into(self._peer, self._place(pending, offset, length - 8))
        elif kind == wire.CHUNK_OFFSET_HOLE and pending.kind == wire.CMD_READ:
            offset, size = wire.U64.unpack(self._exactly(8, length, at_least=12))[0], 0
            size = wire.U32.unpack(self._exactly(4, length - 8, at_least=4, at_most=4))[0]
            self._place(pending, offset, size)[:] = bytes(size)
        elif kind == wire.CHUNK_BLOCK_STATUS and pending.kind == wire.CMD_BLOCK_STATUS:
            pending.states = self._states(length)
        elif kind & wire.CHUNK_ERROR_BIT:
            self._error_chunk(pending, length)
        elif kind == wire.CHUNK_NONE and flags & wire.CHUNK_DONE and length == 0:
            pass
        else:
            self._broken(f"a reply has the unexpected part {kind}, {length} bytes")

    def _exactly(self, size: int, length: int, *, at_least: int, at_most: int = wire.MAX_PAYLOAD + 8) -> bytes:
        if not at_least <= length <= at_most:
            self._broken(f"a part of a reply has {length} bytes")
        return wire.receive(self._peer, size)

    def _place(self, pending: _Pending, offset: int, length: int) -> memoryview:
        low = offset - pending.offset
        if pending.buffer is None or low < 0 or length < 1 or low + length > pending.length:
            self._broken("a reply holds bytes that were not asked for")
        pending.covered.append((offset, length))
        if len(pending.covered) > pending.length // 512 + 16:
            self._broken("a reply comes in too many parts")
        return pending.buffer[low : low + length]

    def _states(self, length: int) -> list[tuple[int, int]]:
        if not 12 <= length <= _MAX_STATUS or (length - 4) % wire.DESCRIPTOR.size:
            self._broken(f"a map has {length} bytes")
        payload = wire.receive(self._peer, length)
        if wire.U32.unpack_from(payload)[0] != self.export.allocation:
            self._broken("a map of a context that was not asked for")
        states = list(wire.DESCRIPTOR.iter_unpack(payload[4:]))
        if any(size == 0 for size, _ in states):
            self._broken("a map with an empty extent")
        return states

    def _error_chunk(self, pending: _Pending, length: int) -> None:
        if not 6 <= length <= _MAX_MESSAGE:
            self._broken(f"an error reply has {length} bytes")
        payload = wire.receive(self._peer, length)
        code, size = wire.U32.unpack_from(payload)[0], wire.U16.unpack_from(payload, 4)[0]
        if 6 + size > length or code == 0:
            self._broken("an error reply does not fit its length")
        self._fail(pending, code, _printable(payload[6 : 6 + size]))

    def _fail(self, pending: _Pending, code: int, message: str) -> None:
        if self._failure is None:
            self._failure = (code, message, pending)
        pending.failed = True

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        code, message, pending = self._failure
        self._failure = None
        reading = pending.kind in (wire.CMD_READ, wire.CMD_BLOCK_STATUS)
        text = f"the NBD server cannot {'read' if reading else 'serve'} {pending.length} bytes at {pending.offset}: "
        text += message or os.strerror(code)
        if code == wire.ENOSPC:
            raise NoSpaceError(text, advice="Make room where the server stores the disk.", subject=self._subject)
        error = ReadError if reading else WriteError
        raise error(text, advice="Look at the server's own messages for the cause.", subject=self._subject)

    def _broken(self, what: str) -> NoReturn:
        raise NbdError(
            f"the NBD server breaks the protocol: {what}",
            advice="Report this with the name and version of the server.",
            subject=self._subject,
        )


class _Negotiation:
    """Fixed newstyle negotiation up to the start of transmission."""

    def __init__(self, peer: socket.socket, address: wire.NbdAddress) -> None:
        self._peer, self._address = peer, address
        self._name = address.export.encode()

    def run(self) -> _Export:
        magic, option_magic, flags = wire.GREETING.unpack(wire.receive(self._peer, wire.GREETING.size))
        if magic != wire.MAGIC or option_magic != wire.OPTION_MAGIC or not flags & wire.FIXED_NEWSTYLE:
            self._refuse("does not speak NBD's fixed newstyle negotiation")
        wire.send(self._peer, wire.U32.pack(flags & (wire.FIXED_NEWSTYLE | wire.NO_ZEROES)))
        structured = self._ask(wire.OPT_STRUCTURED_REPLY, b"") is not None
        allocation = self._context() if structured else None
        return self._go(structured, allocation)

    def _context(self) -> int | None:
        query = wire.U32.pack(len(wire.ALLOCATION)) + wire.ALLOCATION
        payload = wire.U32.pack(len(self._name)) + self._name + wire.U32.pack(1) + query
        for kind, reply in self._ask(wire.OPT_SET_META_CONTEXT, payload) or []:
            if kind == wire.REP_META_CONTEXT and reply[4:] == wire.ALLOCATION:
                return int(wire.U32.unpack_from(reply)[0])
        return None

    def _go(self, structured: bool, allocation: int | None) -> _Export:
        payload = wire.U32.pack(len(self._name)) + self._name + wire.U16.pack(1) + wire.U16.pack(wire.INFO_BLOCK_SIZE)
        replies = self._ask(wire.OPT_GO, payload)
        if replies is None:
            self._refuse("does not know the option NBD_OPT_GO")
        size = flags = None
        minimum, maximum = 1, wire.MAX_PAYLOAD
        for kind, reply in replies:
            if kind != wire.REP_INFO or len(reply) < 2:
                continue
            info = wire.U16.unpack_from(reply)[0]
            if info == wire.INFO_EXPORT and len(reply) == wire.EXPORT.size:
                _, size, flags = wire.EXPORT.unpack(reply)
            elif info == wire.INFO_BLOCK_SIZE and len(reply) == wire.BLOCK_SIZES.size:
                _, minimum, _, maximum = wire.BLOCK_SIZES.unpack(reply)
        if size is None or flags is None or size >= 1 << 63:
            self._refuse("does not state the size of the export")
        if minimum == 0 or minimum & (minimum - 1) or minimum > 1 << 16 or maximum < max(minimum, 4096):
            self._refuse(f"states impossible block sizes ({minimum} to {maximum})")
        maximum = min(maximum, wire.MAX_PAYLOAD) // minimum * minimum
        return _Export(
            size=size, flags=flags, minimum=minimum, maximum=maximum, structured=structured, allocation=allocation
        )

    def _ask(self, option: int, payload: bytes) -> list[tuple[int, bytes]] | None:
        """Send an option; return its replies before the acknowledgement, or None when the server does not know the option."""
        wire.send(self._peer, wire.OPTION.pack(wire.OPTION_MAGIC, option, len(payload)) + payload)
        replies: list[tuple[int, bytes]] = []
        while True:
            if len(replies) == _MAX_REPLIES:
                self._refuse("answers an option without end")
            header = wire.receive(self._peer, wire.OPTION_REPLY.size)
            magic, answered, kind, length = wire.OPTION_REPLY.unpack(header)
            if magic != wire.OPTION_REPLY_MAGIC or answered != option or length > wire.MAX_OPTION:
                self._refuse("answers an option with nonsense")
            reply = wire.receive(self._peer, length)
            if kind == wire.REP_ACK:
                return replies
            if kind & wire.REP_ERROR_BIT:
                self._refused(option, kind, _printable(reply))
                return None
            replies.append((kind, reply))

    def _refused(self, option: int, kind: int, message: str) -> None:
        said = f": {message}" if message else ""
        if kind == wire.REP_ERR_TLS_REQD:
            self._refuse(f"wants TLS, which is not spoken{said}")
        if option == wire.OPT_GO and kind == wire.REP_ERR_UNKNOWN:
            self._refuse(f"has no export named {self._address.export!r}{said}")
        if option == wire.OPT_GO and kind != wire.REP_ERR_UNSUP:
            self._refuse(f"refuses the export {self._address.export!r} (reply {kind:#x}){said}")

    def _refuse(self, what: str) -> NoReturn:
        raise NbdError(
            f"the NBD server at {self._address.uri} {what}",
            advice="Check the address and the name of the export (nbdinfo --list shows what is there).",
            subject=self._address.uri,
        )


def _printable(text: bytes) -> str:
    """A peer's message, made safe for a terminal and a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:400].decode("utf-8", "replace"))
