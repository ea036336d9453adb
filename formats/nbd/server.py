"""The NBD server: block sources as exports that QEMU, qemu-img, nbdcopy and our own client open by URI.

One thread accepts; each client has up to ``_WORKERS`` threads that take turns: one receives a request, passes the turn on and answers.
So a client that keeps requests in flight gets them served in parallel (a remote source needs that), no request is queued in memory, and
memory is bounded: ``_PIECE`` bytes for each thread (a read that must be answered in one piece: at most 32 MiB).

Trust: a client is a local program, perhaps driven by an untrusted guest. It gets exactly the exports it was given; whatever it sends is
bounded; what it breaks is its own connection.
"""

from __future__ import annotations

import socket as sockets
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from formats.block import BlockSink, BlockSource, Extent, Kind
from formats.errors import NbdError, NoSpaceError
from formats.nbd import wire

_WORKERS = 8
_CLIENTS = 32  # more than QEMU, nbdcopy or qemu-img ever open
_PIECE = 1 << 20  # bytes of a reply part, and of a write that is held in memory
_MAX_STATES = 1024  # extents in one block status reply: the map stays lazy
_MAX_OPTIONS = 256
_HANDSHAKE = 30.0  # seconds
_ALLOCATION_ID = 1
_CONTEXT_REPLY = wire.U32.pack(_ALLOCATION_ID) + wire.ALLOCATION


class NbdServer:
    """Serves ``exports`` until it is closed; a context manager. The sources and sinks stay the caller's: they are not closed.

    An export is read-only unless ``sinks`` has a sink of the same name and size. The address is the Unix socket ``socket`` (made here, mode
    0600, removed at the end), without one a socket in a private folder, or with ``port`` TCP on the loopback address (0: any free port; TCP
    is open to every user of the computer). ``error`` keeps the first exception of a source or sink: the client sees an I/O error only.
    """

    def __init__(
        self,
        exports: Mapping[str, BlockSource],
        *,
        socket: Path | None = None,
        sinks: Mapping[str, BlockSink] | None = None,
        port: int | None = None,
    ) -> None:
        self._exports = {name: _Export(source, (sinks or {}).get(name)) for name, source in exports.items()}
        if unknown := (sinks or {}).keys() - exports.keys():
            raise ValueError(f"sinks without a source: {', '.join(sorted(unknown))}")
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._clients: set[_Client] = set()
        self._closing = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._path: Path | None = None
        try:
            self._listener = self._listen(socket, port)
        except OSError as error:
            self._remove()
            raise NbdError(
                f"no NBD server can be started at {self._path or port}: {error.strerror or error}",
                advice="Choose a socket path of less than 100 characters in a folder that can be written.",
            ) from error
        self._acceptor = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._acceptor.start()

    def uri(self, name: str) -> str:
        """The address of export ``name``; ``KeyError`` when it is not served."""
        _ = self._exports[name]
        if self._path is not None:
            return wire.NbdAddress(socket=str(self._path), export=name).uri
        host, port = self._listener.getsockname()
        return wire.NbdAddress(host=host, port=port, export=name).uri

    def bytes_read(self, name: str) -> int:
        """Bytes of export ``name`` that clients have read so far."""
        return self._exports[name].bytes_read

    @property
    def error(self) -> BaseException | None:
        """The first exception of a source or sink, which the client saw as an I/O error only; None when there was none."""
        return self._error

    def close(self) -> None:
        """Take no more clients, part from those there are, and return when every thread is gone (reads of a source are awaited)."""
        with self._lock:
            first, self._closing = not self._closing, True
            clients = list(self._clients)
        if first:
            with suppress(OSError):
                self._listener.shutdown(sockets.SHUT_RDWR)  # wakes accept
            self._acceptor.join()
            self._listener.close()
        for client in clients:
            client.end()
        for client in clients:
            client.join()
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def export(self, name: str) -> _Export | None:
        """The export called ``name``; the empty name is the only one there is."""
        if name == "" and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        return self._exports.get(name)

    def names(self) -> list[str]:
        """All exports' names."""
        return list(self._exports)

    def note(self, error: BaseException) -> None:
        """Keep the first error."""
        with self._lock:
            self._error = self._error or error

    def _listen(self, path: Path | None, port: int | None) -> sockets.socket:
        if port is not None:
            return sockets.create_server(("127.0.0.1", port), backlog=_CLIENTS)
        if path is None:
            self._folder = tempfile.TemporaryDirectory(prefix="nbd-")  # mode 0700
            path = Path(self._folder.name) / "socket"
        listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        try:
            listener.bind(str(path))
            self._path = path
            path.chmod(0o600)
            listener.listen(_CLIENTS)
        except BaseException:
            listener.close()
            raise
        return listener

    def _remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                if self._closing:
                    return
                continue  # a client that left before it was accepted
            with self._lock:
                self._clients = {client for client in self._clients if not client.gone}
                if self._closing or len(self._clients) >= _CLIENTS:
                    peer.close()
                    continue
                if peer.family != sockets.AF_UNIX:
                    peer.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
                client = _Client(self, peer)
                self._clients.add(client)
                client.start()


class _Export:
    """A source, the sink that takes its writes, and the count of what was read."""

    def __init__(self, source: BlockSource, sink: BlockSink | None) -> None:
        if sink is not None and sink.size != source.size:
            raise ValueError(f"the sink has {sink.size} bytes, the source {source.size}")
        self.source, self.sink = source, sink
        self.workers = _WORKERS if sink is None or sink.random_access else 1
        self.flags = wire.FLAG_HAS_FLAGS | wire.FLAG_SEND_DF
        if sink is None or sink.random_access:  # several connections would mix up the order of a sequential sink
            self.flags |= wire.FLAG_CAN_MULTI_CONN
        if sink is None:
            self.flags |= wire.FLAG_READ_ONLY
        else:
            self.flags |= wire.FLAG_SEND_FLUSH | wire.FLAG_SEND_TRIM | wire.FLAG_SEND_WRITE_ZEROES
        self.bytes_read = 0
        self._lock = threading.Lock()

    def count(self, amount: int) -> None:
        """``amount`` more bytes were read."""
        with self._lock:
            self.bytes_read += amount


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A request off the wire, inside the export. ``code``: why it is refused already, or 0."""

    flags: int
    kind: int
    handle: int
    offset: int
    length: int
    code: int = 0


class _BrokenClientError(Exception):
    """The client breaks the protocol; its connection ends."""


class _Client:
    """One connection and its threads."""

    def __init__(self, server: NbdServer, peer: sockets.socket) -> None:
        self._server, self._peer = server, peer
        self._turn = threading.Lock()  # who receives
        self._voice = threading.Lock()  # who sends
        self._state = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._living = 0
        self._waiting = 0
        self._over = False
        self._structured = self._mapped = False

    def start(self) -> None:
        """Begin with one thread: it negotiates first."""
        self._spawn(self._begin)

    @property
    def gone(self) -> bool:
        """Whether no thread is left."""
        with self._state:
            return not any(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        """Part from the client; its threads leave when their source lets them."""
        self._over = True
        with suppress(OSError):
            self._peer.shutdown(sockets.SHUT_RDWR)

    def join(self) -> None:
        """Return when all threads are gone."""
        while True:
            with self._state:
                thread = self._threads.pop() if self._threads else None
            if thread is None:
                return
            thread.join()

    def _spawn(self, target: Callable[[], None]) -> None:
        with self._state:
            if self._over:
                return
            self._living += 1
            thread = threading.Thread(target=target, name="nbd-client", daemon=True)
            self._threads.append(thread)
            thread.start()  # inside: who joins must find it started

    def _begin(self) -> None:
        watchdog = threading.Timer(_HANDSHAKE, self.end)
        watchdog.daemon = True
        watchdog.start()
        export: _Export | None = None
        try:
            negotiation = _Negotiation(self._server, self._peer)
            export = negotiation.run()
            self._structured, self._mapped = negotiation.structured, negotiation.context is export
        except (OSError, EOFError, _BrokenClientError):
            pass
        finally:
            watchdog.cancel()
            watchdog.join()
        self._work(export)

    def _work(self, export: _Export | None) -> None:
        try:
            if export is not None:
                self._serve(export)
        except (OSError, EOFError, _BrokenClientError):
            pass
        except BaseException as error:  # a fault of this module: the owner shall hear of it
            self._server.note(error)
        finally:
            self.end()
            with self._state:
                self._living -= 1
                if self._living == 0:
                    self._peer.close()

    def _serve(self, export: _Export) -> None:
        buffer = memoryview(bytearray(_PIECE))
        while True:
            with self._state:
                self._waiting += 1
            with self._turn:
                if self._over:
                    return
                request = self._receive(export, buffer)
            with self._state:
                self._waiting -= 1
                alone = self._waiting == 0 and self._living < export.workers
            if request is None:
                return
            if alone:
                self._spawn(lambda: self._work(export))
            self._answer(export, request, buffer)

    def _receive(self, export: _Export, buffer: memoryview) -> _Request | None:
        header = wire.receive(self._peer, wire.REQUEST.size)
        magic, flags, kind, handle, offset, length = wire.REQUEST.unpack(header)
        if magic != wire.REQUEST_MAGIC:
            raise _BrokenClientError("a request begins with another number")
        if kind == wire.CMD_DISC:
            return None
        code = self._refusal(export, kind, offset, length)
        if kind == wire.CMD_WRITE:
            code = self._receive_payload(export, code, offset, length, buffer)
        return _Request(flags=flags, kind=kind, handle=handle, offset=offset, length=length, code=code)

    def _refusal(self, export: _Export, kind: int, offset: int, length: int) -> int:
        changes = kind in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES)
        if kind in (wire.CMD_READ, wire.CMD_WRITE) and length > wire.MAX_PAYLOAD:
            if kind == wire.CMD_WRITE:
                raise _BrokenClientError("a write of more than 32 MiB")
            return wire.EOVERFLOW
        if changes and export.sink is None:
            return wire.EPERM
        if kind == wire.CMD_BLOCK_STATUS and not (self._mapped and length):
            return wire.EINVAL
        if offset + length > export.source.size:
            return wire.ENOSPC if changes else wire.EINVAL
        return 0

    def _receive_payload(self, export: _Export, code: int, offset: int, length: int, buffer: memoryview) -> int:
        """Take a write's data. One piece is stored by ``_answer``, in parallel; a longer one here, piece by piece, to bound memory."""
        position = 0
        while position < length:
            piece = buffer[: min(_PIECE, length - position)]
            wire.receive_into(self._peer, piece)
            if length > _PIECE and not code and export.sink is not None:
                code = self._attempt(export.sink.write, piece, offset + position)
            position += len(piece)
        return code

    def _attempt(self, action: Callable[..., None], *arguments: object) -> int:
        """Run a part of a source or sink; the code for the client when it fails, which is noted."""
        try:
            action(*arguments)
        except NoSpaceError as error:
            self._server.note(error)
            return wire.ENOSPC
        except Exception as error:
            self._server.note(error)
            return wire.EINVAL if isinstance(error, ValueError) else wire.EIO
        return 0

    def _answer(self, export: _Export, request: _Request, buffer: memoryview) -> None:
        sink, code = export.sink, request.code
        if code:
            self._reply(request, code)
        elif request.kind == wire.CMD_READ:
            self._answer_read(export, request, buffer)
        elif request.kind == wire.CMD_BLOCK_STATUS:
            self._answer_status(export, request)
        elif request.kind == wire.CMD_WRITE and sink is not None:
            if request.length <= _PIECE:
                code = self._attempt(sink.write, buffer[: request.length], request.offset)
            self._reply(request, code)
        elif request.kind in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES) and sink is not None:
            self._reply(request, self._attempt(sink.zero, request.offset, request.length))
        elif request.kind == wire.CMD_FLUSH:
            self._reply(request, self._attempt(sink.flush) if sink is not None else 0)
        else:
            self._reply(request, wire.EINVAL)

    def _answer_read(self, export: _Export, request: _Request, buffer: memoryview) -> None:
        whole = not self._structured or request.flags & wire.CMD_FLAG_DF
        if whole and request.length > _PIECE:
            buffer = memoryview(bytearray(request.length))
        end = request.offset + request.length
        if request.length == 0:
            self._reply(request, 0)
        for position in range(request.offset, end, len(buffer)):
            piece = buffer[: min(len(buffer), end - position)]
            code = self._attempt(export.source.readinto, piece, position)
            if code:
                self._reply(request, code)
                return
            export.count(len(piece))
            if self._structured:
                flags = wire.CHUNK_DONE if position + len(piece) == end else 0
                size = len(piece) + wire.U64.size
                header = wire.CHUNK.pack(
                    wire.STRUCTURED_REPLY_MAGIC, flags, wire.CHUNK_OFFSET_DATA, request.handle, size
                ) + wire.U64.pack(position)
            else:
                header = wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, request.handle)
            self._send(header, piece)

    def _answer_status(self, export: _Export, request: _Request) -> None:
        limit = 1 if request.flags & wire.CMD_FLAG_REQ_ONE else _MAX_STATES
        states: list[bytes] = []

        def walk() -> None:
            for extent in islice(export.source.extents(request.offset, request.length), limit):
                states.append(wire.DESCRIPTOR.pack(extent.length, _state(extent)))

        code = self._attempt(walk)
        if code and not states:
            self._reply(request, code)
            return
        payload = wire.U32.pack(_ALLOCATION_ID) + b"".join(states)
        kind = wire.CHUNK_BLOCK_STATUS
        header = wire.CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, wire.CHUNK_DONE, kind, request.handle, len(payload))
        self._send(header + payload)

    def _reply(self, request: _Request, code: int) -> None:
        """Answer without data; an error to a read or a map must be structured once that was agreed on."""
        if not self._structured:
            self._send(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, code, request.handle))
            return
        payload = wire.U32.pack(code) + wire.U16.pack(0) if code else b""
        kind = wire.CHUNK_ERROR if code else wire.CHUNK_NONE
        header = wire.CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, wire.CHUNK_DONE, kind, request.handle, len(payload))
        self._send(header + payload)

    def _send(self, header: bytes, payload: memoryview | None = None) -> None:
        with self._voice:
            wire.send(self._peer, header, payload)


def _state(extent: Extent) -> int:
    # Below an exported disk there is no parent that could decide: a HOLE reads as zeroes.
    return 0 if extent.kind is Kind.DATA else wire.STATE_HOLE | wire.STATE_ZERO


class _Negotiation:
    """Fixed newstyle negotiation, the server's part; ``context`` is the export that the client has chosen the map of."""

    def __init__(self, server: NbdServer, peer: sockets.socket) -> None:
        self._server, self._peer = server, peer
        self._no_zeroes = False
        self.structured = False
        self.context: _Export | None = None

    def run(self) -> _Export | None:
        """Return the export that the client takes, or None when it leaves."""
        flags = wire.FIXED_NEWSTYLE | wire.NO_ZEROES
        wire.send(self._peer, wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, flags))
        chosen = wire.U32.unpack(wire.receive(self._peer, 4))[0]
        if chosen & ~flags:
            raise _BrokenClientError("unknown client flags")
        self._no_zeroes = bool(chosen & wire.NO_ZEROES)
        for _ in range(_MAX_OPTIONS):
            magic, option, length = wire.OPTION.unpack(wire.receive(self._peer, wire.OPTION.size))
            if magic != wire.OPTION_MAGIC or length > wire.MAX_OPTION:
                raise _BrokenClientError("an option out of bounds")
            payload = wire.receive(self._peer, length)
            if option == wire.OPT_EXPORT_NAME:
                return self._plain(payload)
            if option == wire.OPT_ABORT:
                self._answer(option, wire.REP_ACK)
                return None
            export = self._option(option, payload)
            if export is not None:
                return export
        raise _BrokenClientError("options without end")

    def _option(self, option: int, payload: bytes) -> _Export | None:
        try:
            if option in (wire.OPT_GO, wire.OPT_INFO):
                export = self._inform(option, payload)
                return export if option == wire.OPT_GO else None
            if option in (wire.OPT_SET_META_CONTEXT, wire.OPT_LIST_META_CONTEXT):
                self._contexts(option, payload)
            elif option == wire.OPT_STRUCTURED_REPLY and not payload:
                self.structured = True
                self._answer(option, wire.REP_ACK)
            elif option == wire.OPT_LIST and not payload:
                for name in self._server.names():
                    self._answer(option, wire.REP_SERVER, wire.U32.pack(len(name.encode())) + name.encode())
                self._answer(option, wire.REP_ACK)
            else:
                known = option in (wire.OPT_STRUCTURED_REPLY, wire.OPT_LIST)
                self._answer(option, wire.REP_ERR_INVALID if known else wire.REP_ERR_UNSUP)
        except (ValueError, IndexError):
            self._answer(option, wire.REP_ERR_INVALID)
        return None

    def _plain(self, payload: bytes) -> _Export | None:
        """The old way to choose an export: it cannot say no, but by leaving."""
        export = self._server.export(payload.decode("utf-8", "replace"))
        if export is not None:
            zeroes = b"" if self._no_zeroes else bytes(124)
            wire.send(self._peer, wire.EXPORT.pack(0, export.source.size, export.flags)[2:] + zeroes)
        return export

    def _inform(self, option: int, payload: bytes) -> _Export | None:
        fields = _Fields(payload)
        name = fields.text()
        wanted = [fields.u16() for _ in range(fields.u16())]
        fields.done()
        export = self._server.export(name)
        if export is None:
            self._answer(option, wire.REP_ERR_UNKNOWN)
            return None
        info = wire.EXPORT.pack(wire.INFO_EXPORT, export.source.size, export.flags)
        self._answer(option, wire.REP_INFO, info)
        if wire.INFO_BLOCK_SIZE in wanted:
            sizes = wire.BLOCK_SIZES.pack(wire.INFO_BLOCK_SIZE, 1, 64 << 10, wire.MAX_PAYLOAD)
            self._answer(option, wire.REP_INFO, sizes)
        self._answer(option, wire.REP_ACK)
        return export

    def _contexts(self, option: int, payload: bytes) -> None:
        fields = _Fields(payload)
        name = fields.text()
        queries = [fields.text() for _ in range(min(fields.u32(), wire.MAX_OPTION))]
        fields.done()
        export = self._server.export(name)
        if export is None:
            self._answer(option, wire.REP_ERR_UNKNOWN)
            return
        if not self.structured:
            self._answer(option, wire.REP_ERR_INVALID)
            return
        listing = option == wire.OPT_LIST_META_CONTEXT
        found = wire.ALLOCATION.decode() in queries or (listing and (not queries or "base:" in queries))
        if not listing:
            self.context = export if found else None
        if found:
            self._answer(option, wire.REP_META_CONTEXT, _CONTEXT_REPLY)
        self._answer(option, wire.REP_ACK)

    def _answer(self, option: int, kind: int, payload: bytes = b"") -> None:
        header = wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(payload))
        wire.send(self._peer, header + payload)


class _Fields:
    """Reads an option's payload; ``ValueError`` when it ends early or late, or a text is not UTF-8."""

    def __init__(self, payload: bytes) -> None:
        self._rest = payload

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size > len(self._rest):
            raise ValueError("the option ends early")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def u16(self) -> int:
        """The next 16-bit number."""
        return int(wire.U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        """The next 32-bit number."""
        return int(wire.U32.unpack(self.take(4))[0])

    def text(self) -> str:
        """The next text, after its 32-bit length."""
        return self.take(self.u32()).decode()

    def done(self) -> None:
        """Nothing may be left."""
        if self._rest:
            raise ValueError("the option has bytes left over")
