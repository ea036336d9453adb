"""The server against other people's clients, and against clients that misbehave."""

from __future__ import annotations

import json
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.block import Extent, Kind
from formats.errors import NbdError, NoSpaceError, ReadError, WriteError
from formats.layers import Fault, Faulty
from formats.memory import MemoryDisk
from formats.nbd import NbdServer, connect, wire
from formats.nbd.wire import NbdAddress
from formats.overlay import Overlay
from tests.contracts.block_sink import noise
from tests.contracts.block_source import MIB, TIB, Tape, read
from tests.formats.nbd.peer import run
from tests.requirement import needs


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def raw_client(server: NbdServer, name: str, *, structured: bool = True) -> socket.socket:
    """A negotiated connection, for requests made by hand."""
    peer = NbdAddress.parse(server.uri(name)).open(5)
    peer.settimeout(20)
    wire.receive(peer, wire.GREETING.size)
    peer.sendall(wire.U32.pack(3))
    if structured:
        peer.sendall(wire.OPTION.pack(wire.OPTION_MAGIC, wire.OPT_STRUCTURED_REPLY, 0))
        assert wire.OPTION_REPLY.unpack(wire.receive(peer, 20))[2] == wire.REP_ACK
        query = wire.U32.pack(len(name)) + name.encode() + wire.U32.pack(1) + wire.U32.pack(15) + wire.ALLOCATION
        peer.sendall(wire.OPTION.pack(wire.OPTION_MAGIC, wire.OPT_SET_META_CONTEXT, len(query)) + query)
        wire.receive(peer, 20 + 4 + 15 + 20)
    option = wire.U32.pack(len(name)) + name.encode() + wire.U16.pack(0)
    peer.sendall(wire.OPTION.pack(wire.OPTION_MAGIC, wire.OPT_GO, len(option)) + option)
    wire.receive(peer, 20 + 12 + 20)
    return peer


def ask(peer: socket.socket, kind: int, offset: int, length: int, *, flags: int = 0, payload: bytes = b"") -> None:
    """Send a request."""
    peer.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, kind, 7, offset, length) + payload)


def chunk(peer: socket.socket) -> tuple[int, int, bytes]:
    """Receive one part of a structured reply: flags, kind, payload."""
    magic, flags, kind, handle, length = wire.CHUNK.unpack(wire.receive(peer, wire.CHUNK.size))
    assert (magic, handle) == (wire.STRUCTURED_REPLY_MAGIC, 7)
    return flags, kind, wire.receive(peer, length)


def error_of(peer: socket.socket) -> int:
    """The code of an error reply."""
    flags, kind, payload = chunk(peer)
    assert flags & wire.CHUNK_DONE
    assert kind & wire.CHUNK_ERROR_BIT
    return int(wire.U32.unpack_from(payload)[0])


_RUN = st.tuples(st.sampled_from([0, 1, 2]), st.integers(1, 40))
_SLOW = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def laid_out(runs: list[tuple[int, int]]) -> tuple[MemoryDisk, bytes]:
    """A disk of runs of 0: hole, 1: data, 2: stored zeroes; lengths in units of 16 KiB."""
    content = b"".join(noise(n << 14, n) if kind == 1 else bytes(n << 14) for kind, n in runs)
    disk, position = MemoryDisk(len(content)), 0
    for kind, units in runs:
        if kind:
            disk.write(memoryview(content)[position : position + (units << 14)], position)
        position += units << 14
    return disk, content


@needs("qemu-img")
@_SLOW
@given(runs=st.lists(_RUN, min_size=1, max_size=12))
def test_qemu_img_sees_every_byte_and_the_map(runs: list[tuple[int, int]], tmp_path: Path) -> None:
    disk, content = laid_out(runs)
    plain = tmp_path / "plain.raw"
    plain.write_bytes(content)
    with NbdServer({"disk": disk}) as server:
        uri = server.uri("disk")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "out.qcow2")
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "out.qcow2", plain)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, plain)
        found = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
        assert server.error is None
    told = [(entry["start"], entry["length"], entry["data"], entry["zero"]) for entry in found]
    data = [e.kind is Kind.DATA for e in disk.extents(0, disk.size)]
    expected = [(e.start, e.length, here, not here) for e, here in zip(disk.extents(0, disk.size), data, strict=True)]
    assert told == expected


@needs("nbdcopy", "nbdinfo")
@_SLOW
@given(runs=st.lists(_RUN, min_size=1, max_size=12), connections=st.sampled_from([1, 4]))
def test_nbdcopy_reads_and_writes_every_byte(runs: list[tuple[int, int]], connections: int, tmp_path: Path) -> None:
    disk, content = laid_out(runs)
    target = MemoryDisk(disk.size, noise(disk.size, 99))
    with NbdServer({"from": disk, "to": target}, sinks={"to": target}) as server:
        copied = tmp_path / "copied.raw"
        copied.unlink(missing_ok=True)
        run("nbdcopy", f"--connections={connections}", server.uri("from"), copied)
        assert copied.read_bytes() == content
        run("nbdcopy", "--flush", f"--connections={connections}", copied, server.uri("to"))
        shown = json.loads(run("nbdinfo", "--map", "--json", server.uri("from")))
        assert server.error is None
    assert read(target, 0, target.size) == content
    assert [entry["type"] for entry in shown] == [0 if e.kind is Kind.DATA else 3 for e in disk.extents(0, disk.size)]


@needs("qemu-io")
def test_a_writable_overlay_leaves_its_parent_alone() -> None:
    parent = MemoryDisk(MIB, noise(MIB))
    overlay = Overlay(parent)
    with NbdServer({"disk": overlay}, sinks={"disk": overlay}) as server:
        commands = ["write -P 0x42 4096 8192", "write -z 65536 65536", "discard 131072 65536", "flush"]
        run("qemu-io", "-f", "raw", *[part for command in commands for part in ("-c", command)], server.uri("disk"))
        assert server.error is None
    expected = bytearray(noise(MIB))
    expected[4096:12288] = b"\x42" * 8192
    expected[65536:196608] = bytes(131072)
    assert read(overlay, 0, MIB) == expected
    assert read(parent, 0, MIB) == noise(MIB)


@needs("nbdinfo")
def test_every_export_is_listed() -> None:
    with NbdServer({"one": MemoryDisk(MIB), "zwei Räder": MemoryDisk(2 * MIB)}, port=0) as server:
        address = NbdAddress.parse(server.uri("one"))
        listed = json.loads(run("nbdinfo", "--list", "--json", f"nbd://{address.host}:{address.port}"))
    assert {e["export-name"]: e["export-size"] for e in listed["exports"]} == {"one": MIB, "zwei Räder": 2 * MIB}


@needs("qemu-img")
def test_a_broken_source_is_an_io_error_and_the_cause_is_kept(tmp_path: Path) -> None:
    fault = Fault(start=300_000, length=1, error=lambda: ReadError("sector 585 is bad"), times=None)
    disk = MemoryDisk(MIB, noise(MIB))
    with NbdServer({"disk": Faulty(disk, [fault])}) as server:
        with pytest.raises(AssertionError, match="Input/output error"):
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri("disk"), tmp_path / "out")
        assert isinstance(server.error, ReadError)
        assert str(server.error) == "sector 585 is bad"
        ours = connect(server.uri("disk"))
        with pytest.raises(ReadError, match="cannot read"):
            read(ours, 0, MIB)
        assert read(ours, 0, 250_000) == noise(MIB)[:250_000]  # the connection lives on
        ours.close()


def test_a_broken_map_is_an_error_and_the_cause_is_kept() -> None:
    fault = Fault(start=0, length=1, error=lambda: ReadError("no map"), times=None, map=True)
    with NbdServer({"disk": Faulty(MemoryDisk(MIB), [fault])}) as server:
        ours = connect(server.uri("disk"))
        with pytest.raises(ReadError, match="cannot read"):
            list(ours.extents(0, MIB))
        assert read(ours, 0, 10) == bytes(10)
        ours.close()
        assert str(server.error) == "no map"


def test_a_full_sink_is_no_space_at_the_client() -> None:
    overlay = Overlay(MemoryDisk(8 * MIB), limit=MIB)
    with NbdServer({"disk": overlay}, sinks={"disk": overlay}) as server:
        ours = connect(server.uri("disk"))
        with pytest.raises(NoSpaceError):
            ours.write(memoryview(noise(4 * MIB)), 0)
        ours.close()
        assert isinstance(server.error, NoSpaceError)


def test_an_export_without_a_sink_takes_no_writes() -> None:
    disk = MemoryDisk(MIB)
    with NbdServer({"disk": disk}) as server:
        ours = connect(server.uri("disk"))
        assert not ours.writable
        attempts: list[Callable[[], None]] = [lambda: ours.write(memoryview(b"x"), 0), lambda: ours.zero(0, 512)]
        for attempt in attempts:
            with pytest.raises(WriteError, match="read-only"):
                attempt()
        ours.close()
        peer = raw_client(server, "disk")  # a client that does not care
        ask(peer, wire.CMD_WRITE, 0, 4, payload=b"evil")
        assert error_of(peer) == wire.EPERM
        ask(peer, wire.CMD_WRITE_ZEROES, 0, 4)
        assert error_of(peer) == wire.EPERM
        ask(peer, wire.CMD_READ, 0, 4)
        assert chunk(peer)[2][8:] == bytes(4)
        peer.close()
    assert list(disk.extents(0, MIB)) == [Extent(0, MIB, Kind.ZERO)]


def test_requests_out_of_bounds_are_refused_and_the_connection_lives_on() -> None:
    disk = MemoryDisk(64 * MIB)
    with NbdServer({"disk": disk}, sinks={"disk": disk}) as server:
        peer = raw_client(server, "disk")
        for kind, offset, length, code in [
            (wire.CMD_READ, 64 * MIB - 1, 2, wire.EINVAL),
            (wire.CMD_READ, 1 << 63, 512, wire.EINVAL),
            (wire.CMD_READ, 0, 32 * MIB + 1, wire.EOVERFLOW),
            (wire.CMD_WRITE_ZEROES, 64 * MIB, 1, wire.ENOSPC),
            (wire.CMD_BLOCK_STATUS, 0, 0, wire.EINVAL),
            (wire.CMD_BLOCK_STATUS, 64 * MIB, 1, wire.EINVAL),
            (99, 0, 0, wire.EINVAL),
        ]:
            ask(peer, kind, offset, length)
            assert error_of(peer) == code, (kind, offset, length)
        ask(peer, wire.CMD_WRITE, 64 * MIB - 2, 4, payload=b"over")
        assert error_of(peer) == wire.ENOSPC
        ask(peer, wire.CMD_READ, 64 * MIB - 4, 4)
        assert chunk(peer)[2][8:] == bytes(4)
        ask(peer, wire.CMD_WRITE, 0, 32 * MIB + 1)  # nobody waits for that much: the connection ends
        assert peer.recv(1) == b""
        peer.close()
        assert server.error is None


@pytest.mark.parametrize("flags", [0, wire.CMD_FLAG_DF])
def test_the_largest_read_comes_in_bounded_parts_or_whole_when_asked(flags: int) -> None:
    disk = MemoryDisk(32 * MIB)
    disk.write(memoryview(noise(MIB)), 5 * MIB - 1000)
    with NbdServer({"disk": disk}) as server:
        peer = raw_client(server, "disk")
        ask(peer, wire.CMD_READ, 0, 32 * MIB, flags=flags)
        content, parts, done = bytearray(32 * MIB), 0, 0
        while not done:
            done, _, payload = chunk(peer)
            (offset,) = struct.unpack(">Q", payload[:8])
            content[offset : offset + len(payload) - 8] = payload[8:]
            parts += 1
        peer.close()
    assert content == read(disk, 0, 32 * MIB)
    assert parts == (1 if flags else 32)


def test_the_map_is_lazy_and_bounded() -> None:
    tape = Tape()
    with NbdServer({"disk": tape}) as server:
        peer = raw_client(server, "disk")
        ask(peer, wire.CMD_BLOCK_STATUS, 0, (1 << 32) - 1)
        _, kind, payload = chunk(peer)
        assert kind == wire.CHUNK_BLOCK_STATUS
        assert len(payload) == 4 + 8 * 1024
        assert tape.taken <= 1026
        ask(peer, wire.CMD_BLOCK_STATUS, TIB, (1 << 32) - 1, flags=wire.CMD_FLAG_REQ_ONE)
        assert struct.unpack(">III", chunk(peer)[2])[1:] == (4096, 0)
        peer.close()


def test_a_client_that_wants_no_structure_is_served() -> None:
    disk = MemoryDisk(4 * MIB, noise(4 * MIB))
    with NbdServer({"disk": disk}) as server:
        peer = raw_client(server, "disk", structured=False)
        ask(peer, wire.CMD_READ, 100, 3 * MIB)
        assert wire.SIMPLE_REPLY.unpack(wire.receive(peer, 16)) == (wire.SIMPLE_REPLY_MAGIC, 0, 7)
        assert wire.receive(peer, 3 * MIB) == noise(4 * MIB)[100 : 100 + 3 * MIB]
        ask(peer, wire.CMD_READ, 4 * MIB, 1)
        assert wire.SIMPLE_REPLY.unpack(wire.receive(peer, 16)) == (wire.SIMPLE_REPLY_MAGIC, wire.EINVAL, 7)
        peer.close()


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_client_that_knows_only_the_old_option_is_served(zeroes: bool) -> None:
    with NbdServer({"disk": MemoryDisk(MIB, b"old")}) as server:
        peer = NbdAddress.parse(server.uri("disk")).open(5)
        wire.receive(peer, wire.GREETING.size)
        peer.sendall(wire.U32.pack(1 if zeroes else 3))
        peer.sendall(wire.OPTION.pack(wire.OPTION_MAGIC, wire.OPT_EXPORT_NAME, 4) + b"disk")
        reply = wire.receive(peer, 10 + (124 if zeroes else 0))
        assert reply[:8] == wire.U64.pack(MIB)
        ask(peer, wire.CMD_READ, 0, 3)
        assert wire.receive(peer, 19)[16:] == b"old"
        peer.close()


def test_clients_that_vanish_do_no_harm() -> None:
    disk = MemoryDisk(64 * MIB, b"here")
    with NbdServer({"disk": disk}, sinks={"disk": disk}) as server:
        address = NbdAddress.parse(server.uri("disk"))
        address.open(5).close()
        for _ in range(3):
            peer = raw_client(server, "disk")
            for _ in range(20):  # many large replies that nobody takes
                ask(peer, wire.CMD_READ, 0, 32 * MIB)
            peer.close()
            peer = raw_client(server, "disk")
            peer.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_WRITE, 7, 4, MIB) + bytes(1000))
            peer.close()
        ours = connect(server.uri("disk"))
        assert read(ours, 0, 4) == b"here"
        ours.close()
        assert server.error is None


def test_close_parts_from_clients_that_are_at_work() -> None:
    server = NbdServer({"disk": MemoryDisk(64 * MIB)})
    stuck = raw_client(server, "disk")
    for _ in range(20):
        ask(stuck, wire.CMD_READ, 0, 32 * MIB)
    undecided = NbdAddress.parse(server.uri("disk")).open(5)
    ours = connect(server.uri("disk"))
    path = Path(NbdAddress.parse(server.uri("disk")).socket)
    server.close()
    server.close()
    assert not path.exists()
    assert not path.parent.exists()
    with pytest.raises(NbdError):
        read(ours, 0, 512)
    for peer in (stuck, undecided):
        peer.close()
    ours.close()


def test_more_clients_than_the_server_takes_are_sent_away() -> None:
    with NbdServer({"disk": MemoryDisk(MIB)}) as server:
        kept = [raw_client(server, "disk") for _ in range(32)]
        with pytest.raises(NbdError):
            connect(server.uri("disk"), handshake_timeout=5)
        for peer in kept:
            peer.close()
    assert server.error is None


def test_a_sequential_sink_gets_its_writes_in_order() -> None:
    class Ascending(MemoryDisk):
        random_access = False
        position = 0

        def write(self, data: memoryview, offset: int) -> None:
            if offset < self.position:
                raise ValueError("a write goes back")
            super().write(data, offset)
            self.position = offset + len(data)

    sink = Ascending(16 * MIB)
    with NbdServer({"disk": sink}, sinks={"disk": sink}) as server:
        ours = connect(server.uri("disk"))
        ours.write(memoryview(noise(16 * MIB)), 0)
        with pytest.raises(WriteError):
            ours.write(memoryview(b"x"), 0)
        ours.close()
    assert read(sink, 0, 16 * MIB) == noise(16 * MIB)


def test_bytes_read_are_counted_by_export() -> None:
    with NbdServer({"a": MemoryDisk(MIB), "b": MemoryDisk(MIB)}) as server:
        ours = connect(server.uri("a"))
        read(ours, 0, 700_000)
        ours.close()
        assert (server.bytes_read("a"), server.bytes_read("b")) == (700_000, 0)


def test_the_socket_is_private_and_a_taken_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "here.socket"
    with NbdServer({"disk": MemoryDisk(512)}, socket=path) as server:
        assert server.uri("disk") == f"nbd+unix:///disk?socket={path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(NbdError, match="in use"):
            NbdServer({"disk": MemoryDisk(512)}, socket=path)
        assert path.exists()
        ours = connect(server.uri("disk"))
        ours.close()
    assert not path.exists()
    with pytest.raises(NbdError, match="long"):
        NbdServer({}, socket=tmp_path / ("x" * 120))


def test_a_sink_must_fit_its_source() -> None:
    with pytest.raises(ValueError, match="without a source"):
        NbdServer({}, sinks={"disk": MemoryDisk(1)})
    with pytest.raises(ValueError, match="sink has"):
        NbdServer({"disk": MemoryDisk(2)}, sinks={"disk": MemoryDisk(1)})


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stage=st.sampled_from(["greeting", "option", "request"]),
    garbage=st.binary(max_size=200),
    framed=st.tuples(st.integers(0, 12), st.integers(0, 70_000)),
)
def test_no_bytes_harm_the_server(stage: str, garbage: bytes, framed: tuple[int, int]) -> None:
    disk = MemoryDisk(MIB, b"safe")
    with NbdServer({"disk": disk}) as server:
        if stage == "request":
            peer = raw_client(server, "disk")
            kind, offset = framed
            peer.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0xFFFF, kind, 7, offset, len(garbage)) + garbage)
        else:
            peer = NbdAddress.parse(server.uri("disk")).open(5)
            wire.receive(peer, wire.GREETING.size)
            if stage == "option":
                option, _ = framed
                peer.sendall(wire.U32.pack(3) + wire.OPTION.pack(wire.OPTION_MAGIC, option, len(garbage)))
            peer.sendall(garbage)
        peer.shutdown(socket.SHUT_WR)
        peer.settimeout(20)
        with suppress(ConnectionResetError):  # how a socket ends whose last bytes nobody read
            while peer.recv(65536):
                pass
        peer.close()
        ours = connect(server.uri("disk"))
        assert read(ours, 0, 4) == b"safe"
        ours.close()
        assert server.error is None
    assert read(disk, 0, 4) == b"safe"
