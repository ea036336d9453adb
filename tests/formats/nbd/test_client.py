"""The client against qemu-nbd with any content, and against servers that lie, stall or go away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.block import Kind
from formats.errors import ImageError, NbdError, ReadError, UsageError
from formats.memory import MemoryDisk
from formats.nbd import NbdServer, connect, wire
from formats.nbd.wire import NbdAddress
from tests.contracts.block_sink import noise
from tests.contracts.block_source import MIB, read, write_sparse
from tests.formats.nbd.peer import qemu_nbd, run
from tests.requirement import needs


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


_RUN = st.tuples(st.booleans(), st.integers(1, 30))


@needs("qemu-nbd", "qemu-img")
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(_RUN, min_size=1, max_size=12), form=st.sampled_from(["raw", "qcow2"]))
def test_any_image_of_qemu_reads_the_same(runs: list[tuple[bool, int]], form: str, tmp_path: Path) -> None:
    content = b"".join(noise(n << 14, n) if data else bytes(n << 14) for data, n in runs)
    image = write_sparse(tmp_path / "disk.raw", content, step=65536)
    if form == "qcow2":
        image = tmp_path / "disk.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "disk.raw", image)
    with qemu_nbd(tmp_path, image, form) as uri:
        disk = connect(uri)
        assert disk.mapped
        assert read(disk, 0, disk.size) == content
        extents = list(disk.extents(0, disk.size))
        disk.close()
    assert sum(extent.length for extent in extents) == len(content)
    for extent in extents:
        assert extent.kind is Kind.DATA or not any(content[extent.start : extent.end])
    # A run of zeroes as long as a cluster, on the grid, is told.
    told = {n for e in extents if e.kind is Kind.ZERO for n in range(-(-e.start // 65536), e.end // 65536)}
    whole = range(len(content) // 65536)
    assert told >= {n for n in whole if not any(content[n << 16 : (n + 1) << 16])}


@needs("qemu-nbd", "qemu-img")
def test_a_backing_files_part_is_data_not_hole(tmp_path: Path) -> None:
    """An overlay's clusters that only its parent has read as the parent's: base:allocation follows the chain."""
    parent = tmp_path / "parent.raw"
    parent.write_bytes(noise(MIB))
    run("qemu-img", "create", "-f", "qcow2", "-b", parent, "-F", "raw", tmp_path / "child.qcow2")
    with qemu_nbd(tmp_path, tmp_path / "child.qcow2", "qcow2") as uri:
        disk = connect(uri)
        assert [extent.kind for extent in disk.extents(0, MIB)] == [Kind.DATA]
        assert read(disk, 0, MIB) == noise(MIB)
        disk.close()


@needs("qemu-nbd", "qemu-img")
def test_a_server_that_dies_is_an_nbd_error(tmp_path: Path) -> None:
    image = write_sparse(tmp_path / "disk.raw", noise(MIB))
    with qemu_nbd(tmp_path, image, "raw") as uri:
        disk = connect(uri)
        read(disk, 0, MIB)
    for _ in range(2):
        with pytest.raises(NbdError, match="broke") as caught:
            read(disk, 0, MIB)
        assert caught.value.advice
    disk.close()
    with pytest.raises(NbdError, match="no NBD server answers"):
        connect(uri)


def test_an_unknown_export_is_refused_by_name() -> None:
    with (
        NbdServer({"one": MemoryDisk(512), "two": MemoryDisk(512)}) as server,
        pytest.raises(NbdError, match="no export named 'three'"),
    ):
        connect(server.uri("one").replace("one", "three"))


@pytest.mark.parametrize(
    "uri",
    [
        "/a/path",
        "http://host/x",
        "nbds://host/x",
        "nbd+unix:///x",
        "nbd://",
        "nbd://host:port/x",
        "nbd+unix:///?socket=",
    ],
)
def test_addresses_that_cannot_be_read(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        NbdAddress.parse(uri)
    assert caught.value.advice


@given(
    export=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    path=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30),
)
def test_addresses_survive_the_way_there_and_back(export: str, path: str) -> None:
    for address in (
        NbdAddress(socket=path, export=export),
        NbdAddress(host="127.0.0.1", port=1234, export=export),
        NbdAddress(host="::1", export=export),
    ):
        assert NbdAddress.parse(address.uri) == address


def test_close_wakes_a_call_that_waits() -> None:
    started = threading.Event()

    class Stuck(MemoryDisk):
        go = threading.Event()

        def readinto(self, buffer: memoryview, offset: int) -> None:
            started.set()
            self.go.wait(30)

    source = Stuck(MIB)
    with NbdServer({"disk": source}) as server:
        disk = connect(server.uri("disk"))
        failed: list[Exception] = []

        def work() -> None:
            try:
                read(disk, 0, 512)
            except (NbdError, ValueError) as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(6)]  # more than there are connections
        for thread in threads:
            thread.start()
        assert started.wait(30)
        disk.close()
        for thread in threads:
            thread.join(30)
        assert len(failed) == 6
        source.go.set()


@contextmanager
def scripted(script: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does what ``script`` says with each client, then hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            if over.is_set():
                peer.close()
                return
            with peer, suppress(OSError, EOFError):
                peer.settimeout(10)
                script(peer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"nbd://127.0.0.1:{listener.getsockname()[1]}/disk"
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def negotiate(peer: socket.socket, *, size: int = MIB, flags: int = 1, info: bytes | None = None) -> None:
    """The server's part of a good negotiation: structured replies and a map with the id 5."""
    peer.sendall(wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3))
    wire.receive(peer, 4)
    while True:
        _, option, length = wire.OPTION.unpack(wire.receive(peer, wire.OPTION.size))
        wire.receive(peer, length)
        if option == wire.OPT_SET_META_CONTEXT:
            answer(peer, option, wire.REP_META_CONTEXT, wire.U32.pack(5) + wire.ALLOCATION)
        if option == wire.OPT_GO:
            answer(peer, option, wire.REP_INFO, info or wire.EXPORT.pack(wire.INFO_EXPORT, size, flags))
        answer(peer, option, wire.REP_ACK, b"")
        if option == wire.OPT_GO:
            return


def answer(peer: socket.socket, option: int, kind: int, payload: bytes, *, length: int | None = None) -> None:
    """Send an option reply, perhaps one that lies about its length."""
    length = len(payload) if length is None else length
    peer.sendall(wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, length) + payload)


def reply(peer: socket.socket, kind: int, payload: bytes, *, done: int = 1, handle: int | None = None) -> None:
    """Take a request and send one part of an answer."""
    _, _, _, asked, _, _ = wire.REQUEST.unpack(wire.receive(peer, wire.REQUEST.size))
    number = asked if handle is None else handle
    peer.sendall(wire.CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, done, kind, number, len(payload)) + payload)


def _hang(peer: socket.socket) -> None:
    with suppress(OSError):
        peer.recv(1 << 20)
        peer.recv(1 << 20)


def _trickle(peer: socket.socket) -> None:
    greeting = wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3)
    for _ in range(100):
        peer.sendall(greeting[:1])
        time.sleep(0.05)


def _options_without_end(peer: socket.socket) -> None:
    peer.sendall(wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3))
    wire.receive(peer, 4 + wire.OPTION.size)
    for _ in range(1000):
        answer(peer, wire.OPT_STRUCTURED_REPLY, wire.REP_INFO, b"x")


def _huge_option(peer: socket.socket) -> None:
    peer.sendall(wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3))
    wire.receive(peer, 4 + wire.OPTION.size)
    answer(peer, wire.OPT_STRUCTURED_REPLY, wire.REP_ACK, b"", length=1 << 31)
    _hang(peer)


def _tls(peer: socket.socket) -> None:
    peer.sendall(wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3))
    wire.receive(peer, 4 + wire.OPTION.size)
    answer(peer, wire.OPT_STRUCTURED_REPLY, wire.REP_ERR_TLS_REQD, b"\x1b[31mTLS please")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda peer: None, "broke off"),
        (lambda peer: peer.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n"), "newstyle"),
        (lambda peer: peer.sendall(b"NBDMAGIC" + bytes(8) + bytes(136)), "newstyle"),
        (_hang, "broke off the negotiation or took more than 1 s"),
        (_trickle, "newstyle|took more than 1 s"),
        (_options_without_end, "without end"),
        (_huge_option, "nonsense"),
        (_tls, r"TLS.*: \?\[31mTLS please"),
        (lambda peer: negotiate(peer, info=b"\0\0"), "size"),
        (lambda peer: negotiate(peer, size=1 << 63), "size"),
    ],
)
def test_bad_negotiations(script: Callable[[socket.socket], None], message: str) -> None:
    with scripted(script) as uri, pytest.raises(NbdError, match=message) as caught:
        connect(uri, handshake_timeout=1)
    assert "\x1b" not in str(caught.value)


_DATA = wire.CHUNK_OFFSET_DATA


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda peer: reply(peer, _DATA, bytes(8) + bytes(4096), handle=999), "no request"),
        (lambda peer: reply(peer, _DATA, wire.U64.pack(4096) + bytes(4096)), "not asked for"),
        (lambda peer: reply(peer, _DATA, wire.U64.pack(1) + bytes(4096)), "not asked for"),
        (lambda peer: reply(peer, _DATA, wire.U64.pack(0) + bytes(4095)), "before everything came"),
        (lambda peer: reply(peer, _DATA, bytes(8)), "part of a reply has 8 bytes"),
        (lambda peer: reply(peer, _DATA, bytes(3)), "part of a reply has 3 bytes"),
        (lambda peer: reply(peer, wire.CHUNK_NONE, b""), "before everything came"),
        (lambda peer: reply(peer, wire.CHUNK_OFFSET_HOLE, wire.U64.pack(0) + wire.U32.pack(1 << 31)), "not asked for"),
        (lambda peer: reply(peer, wire.CHUNK_OFFSET_HOLE, wire.U64.pack(0)), "8 bytes"),
        (lambda peer: reply(peer, wire.CHUNK_BLOCK_STATUS, bytes(12)), "unexpected"),
        (lambda peer: reply(peer, wire.CHUNK_ERROR, bytes(6)), "error reply"),
        (lambda peer: reply(peer, wire.CHUNK_ERROR, wire.U32.pack(5) + b"\xff\xff"), "error reply"),
        (lambda peer: reply(peer, 77, b""), "unexpected"),
        (lambda peer: peer.sendall(bytes(20)), "begins with"),
        (lambda peer: peer.sendall(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 1)), "without structure"),
        (_hang, "sends nothing"),
        (lambda peer: None, "closed"),
    ],
)
def test_bad_replies_to_a_read(script: Callable[[socket.socket], None], message: str) -> None:
    def serve(peer: socket.socket) -> None:
        negotiate(peer)
        script(peer)
        if message != "closed":
            _hang(peer)

    with scripted(serve) as uri:
        disk = connect(uri, timeout=1)
        with pytest.raises(NbdError, match=message):
            read(disk, 0, 4096)
        with pytest.raises(NbdError):  # and the disk stays broken
            read(disk, 0, 512)
        disk.close()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (wire.U32.pack(6) + wire.DESCRIPTOR.pack(4096, 0), "context"),
        (wire.U32.pack(5) + wire.DESCRIPTOR.pack(0, 0), "empty"),
        (wire.U32.pack(5), "4 bytes"),
        (wire.U32.pack(5) + bytes(9), "13 bytes"),
    ],
)
def test_bad_maps(payload: bytes, message: str) -> None:
    def serve(peer: socket.socket) -> None:
        negotiate(peer)
        reply(peer, wire.CHUNK_BLOCK_STATUS, payload)
        _hang(peer)

    with scripted(serve) as uri:
        disk = connect(uri, timeout=1)
        with pytest.raises(NbdError, match=message):
            list(disk.extents(0, disk.size))
        disk.close()


def test_a_map_may_reach_past_the_range_and_a_hole_alone_is_data() -> None:
    def serve(peer: socket.socket) -> None:
        negotiate(peer)
        states = [(4096, 1), (4096, 3), (4096, 2), (1 << 30, 0)]
        payload = wire.U32.pack(5) + b"".join(wire.DESCRIPTOR.pack(*state) for state in states)
        reply(peer, wire.CHUNK_BLOCK_STATUS, payload)
        _hang(peer)

    with scripted(serve) as uri:
        disk = connect(uri, timeout=5)
        found = [(e.start, e.length, e.kind) for e in disk.extents(0, MIB)]
        disk.close()
    assert found == [(0, 4096, Kind.DATA), (4096, 8192, Kind.ZERO), (12288, MIB - 12288, Kind.DATA)]


def test_an_error_after_a_part_of_the_data_is_a_read_error() -> None:
    def serve(peer: socket.socket) -> None:
        negotiate(peer)
        reply(peer, _DATA, wire.U64.pack(0) + b"x" * 512, done=0)
        text = b"\x1b]0;title\x07bad sector"
        payload = wire.U32.pack(5) + wire.U16.pack(len(text)) + text + wire.U64.pack(512)
        peer.sendall(
            wire.CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, 1, wire.CHUNK_ERROR_OFFSET, 1, len(payload)) + payload
        )
        reply(peer, _DATA, wire.U64.pack(0) + b"y" * 512)
        _hang(peer)

    with scripted(serve) as uri:
        disk = connect(uri, timeout=5)
        with pytest.raises(ReadError, match="bad sector") as caught:
            read(disk, 0, 4096)
        assert "\x1b" not in str(caught.value)
        assert read(disk, 0, 512) == b"y" * 512  # the connection lives on
        disk.close()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 700), flip=st.integers(1, 255), cut=st.booleans())
def test_a_corrupted_stream_ends_in_an_error_of_the_tree_or_not_at_all(position: int, flip: int, cut: bool) -> None:
    """Any byte of what our own server sends may change, or the stream may end there: no hang, no stray exception."""
    with NbdServer({"disk": MemoryDisk(MIB, b"x" * 300)}) as server:
        real = NbdAddress.parse(server.uri("disk"))

        def relay(peer: socket.socket) -> None:
            behind = real.open(5)
            there = threading.Thread(target=_pump, args=(peer, behind, -1, 0, False))
            there.start()
            _pump(behind, peer, position, flip, cut)
            there.join()
            behind.close()

        with scripted(relay) as uri, suppress(ImageError):
            disk = connect(uri, connections=1, timeout=0.3, handshake_timeout=0.5)
            try:
                read(disk, 0, 300)
                list(disk.extents(0, min(disk.size, MIB)))
            except ValueError as error:
                assert "outside" in str(error)  # the size itself was changed
            finally:
                disk.close()


def _pump(source: socket.socket, target: socket.socket, position: int, flip: int, cut: bool) -> None:
    done = 0
    with suppress(OSError):
        while data := bytearray(source.recv(65536)):
            if done <= position < done + len(data):
                if cut:
                    target.sendall(data[: position - done])
                    break
                data[position - done] ^= flip
            done += len(data)
            target.sendall(data)
    for peer in (source, target):
        with suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)
