"""The NBD protocol as bytes: constants, framing and addresses that client and server share.

Source of every number here: the NBD protocol specification (doc/proto.md of the nbd project): fixed newstyle negotiation, structured
replies, the metadata context ``base:allocation``. All integers are big-endian. Not spoken: TLS, oldstyle negotiation, 64-bit headers.
"""

from __future__ import annotations

import socket as sockets
import struct
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, quote, unquote, urlsplit

from formats.errors import NbdError, UsageError

MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

FIXED_NEWSTYLE: Final = 1 << 0
NO_ZEROES: Final = 1 << 1

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR_BIT: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_ERROR_BIT + 1
REP_ERR_INVALID: Final = REP_ERROR_BIT + 3
REP_ERR_TLS_REQD: Final = REP_ERROR_BIT + 5
REP_ERR_UNKNOWN: Final = REP_ERROR_BIT + 6

INFO_EXPORT: Final = 0
INFO_BLOCK_SIZE: Final = 3

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3

CHUNK_DONE: Final = 1 << 0
CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_OFFSET_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_ERROR_BIT + 1
CHUNK_ERROR_OFFSET: Final = CHUNK_ERROR_BIT + 2

STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1
ALLOCATION: Final = b"base:allocation"

MAX_PAYLOAD: Final = 32 << 20
"""Bytes of one read or write that every peer must take when no block sizes were agreed on."""
MAX_OPTION: Final = 64 << 10
"""Bytes of one option or option reply that are accepted; a name may have 4096 bytes."""
DEFAULT_PORT: Final = 10809

GREETING: Final = struct.Struct(">QQH")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
EXPORT: Final = struct.Struct(">HQH")
BLOCK_SIZES: Final = struct.Struct(">HIII")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
U64: Final = struct.Struct(">Q")
DESCRIPTOR: Final = struct.Struct(">II")

# The protocol's own error numbers; they happen to be Linux's.
EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdAddress:
    """Where an export is: a Unix ``socket`` path, or ``host`` and ``port``; ``export`` may be empty (the server's default)."""

    socket: str = ""
    host: str = ""
    port: int = DEFAULT_PORT
    export: str = ""

    @classmethod
    def parse(cls, uri: str) -> NbdAddress:
        """Read ``nbd://HOST[:PORT]/EXPORT`` or ``nbd+unix:///EXPORT?socket=PATH`` (NBD URI specification); else ``UsageError``."""
        try:
            parts = urlsplit(uri)
            port = parts.port or DEFAULT_PORT
        except ValueError as error:
            raise UsageError(f"{uri!r} is not an NBD address: {error}", advice=_ADVICE) from None
        export = unquote(parts.path.removeprefix("/"))
        if parts.scheme == "nbd+unix":
            paths = parse_qs(parts.query).get("socket", [])
            if len(paths) != 1 or not paths[0]:
                raise UsageError(f"{uri!r} names no socket", advice=_ADVICE)
            return cls(socket=paths[0], export=export)
        if parts.scheme == "nbd" and parts.hostname:
            return cls(host=parts.hostname, port=port, export=export)
        raise UsageError(f"{uri!r} is not an NBD address that can be read (TLS is not spoken)", advice=_ADVICE)

    @property
    def uri(self) -> str:
        """The address as a URI that ``parse``, QEMU and libnbd read."""
        export = quote(self.export, safe="")
        if self.socket:
            return f"nbd+unix:///{export}?socket={quote(self.socket, safe='/')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{export}"

    def open(self, timeout: float) -> sockets.socket:
        """Connect within ``timeout`` seconds and return a blocking socket; ``NbdError`` when nobody answers."""
        peer: sockets.socket | None = None
        try:
            if self.socket:
                peer = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
                peer.settimeout(timeout)
                peer.connect(self.socket)
            else:
                peer = sockets.create_connection((self.host, self.port), timeout)
                peer.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
            peer.settimeout(None)
        except OSError as error:
            if peer is not None:
                peer.close()
            raise NbdError(
                f"no NBD server answers at {self.uri}: {error.strerror or error}",
                advice="Check that the server that gives the disk is still running.",
                subject=self.uri,
            ) from error
        return peer


_ADVICE = "Write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH."


def set_timeout(peer: sockets.socket, seconds: float | None) -> None:
    """Let every receive and send on a blocking socket fail with ``TimeoutError`` after ``seconds``; None waits for ever.

    The kernel's timer is used, not ``settimeout``: that one makes the socket non-blocking, so that ``MSG_WAITALL`` is without effect and a
    large read takes many system calls.
    """
    whole = int(seconds or 0)
    value = struct.pack("@ll", whole, int(((seconds or 0) - whole) * 1_000_000))
    peer.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVTIMEO, value)
    peer.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDTIMEO, value)


def receive_into(peer: sockets.socket, buffer: memoryview) -> None:
    """Fill all of ``buffer``; ``EOFError`` when the peer is gone, ``TimeoutError`` or another ``OSError`` when it cannot be read."""
    done, size = 0, len(buffer)
    while done < size:
        try:
            count = peer.recv_into(buffer[done:] if done else buffer, 0, sockets.MSG_WAITALL)
        except BlockingIOError:
            raise TimeoutError("the peer sends nothing") from None
        if count == 0:
            raise EOFError("the peer closed the connection")
        done += count


def receive(peer: sockets.socket, size: int) -> bytes:
    """Return exactly ``size`` bytes; errors as of ``receive_into``. The caller has bounded ``size``."""
    if size == 0:
        return b""
    buffer = bytearray(size)
    receive_into(peer, memoryview(buffer))
    return bytes(buffer)


def send(peer: sockets.socket, header: bytes, payload: memoryview | None = None) -> None:
    """Send all of ``header`` and ``payload`` in as few system calls as can be; ``OSError`` when the peer is gone or stuck."""
    try:
        if payload is None:
            peer.sendall(header)
            return
        count = peer.sendmsg((header, payload))
        if count < len(header):
            peer.sendall(header[count:])
            count = len(header)
        if count < len(header) + len(payload):
            peer.sendall(payload[count - len(header) :])
    except BlockingIOError:
        raise TimeoutError("the peer takes nothing") from None
