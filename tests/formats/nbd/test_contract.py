"""The block waist over NBD: our client on our server, on qemu-nbd and on nbdkit, to read and to write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from formats.block import BlockSource
from formats.memory import MemoryDisk
from formats.nbd import NbdServer, connect
from tests.contracts.block_sink import SIZE, BlockSinkContract, Made
from tests.contracts.block_source import MIB, BlockSourceContract, Tape, read, write_sparse
from tests.formats.nbd.peer import nbdkit, qemu_nbd, run
from tests.requirement import needs


def memory(content: bytes) -> MemoryDisk:
    """The content, sparse."""
    disk = MemoryDisk(len(content))
    for start in range(0, len(content), 65536):
        if any(content[start : start + 65536]):
            disk.write(memoryview(content)[start : start + 65536], start)
    return disk


@pytest.mark.parametrize("port", [None, 0], ids=["unix", "tcp"])
@pytest.mark.parametrize("connections", [1, 4])
class TestOwnServer(BlockSourceContract):
    @pytest.fixture
    def source(self, content: bytes, port: int | None, connections: int) -> Iterator[BlockSource]:
        with NbdServer({"the disk/é": memory(content)}, port=port) as server:
            disk = connect(server.uri("the disk/é"), connections=connections)
            yield disk
            disk.close()
        assert server.error is None

    @pytest.fixture
    def vast(self, port: int | None, connections: int) -> Iterator[BlockSource]:
        tape = Tape()
        with NbdServer({"vast": tape}, port=port) as server:
            disk = connect(server.uri("vast"), connections=connections)
            yield disk
            disk.close()
        assert tape.taken < 5000


@needs("qemu-nbd", "qemu-img")
@pytest.mark.parametrize("form", ["raw", "qcow2"])
class TestQemuNbd(BlockSourceContract):
    @pytest.fixture
    def source(self, content: bytes, form: str, tmp_path: Path) -> Iterator[BlockSource]:
        image = write_sparse(tmp_path / "disk.raw", content)
        if form != "raw":
            image = tmp_path / f"disk.{form}"
            run("qemu-img", "convert", "-f", "raw", "-O", form, tmp_path / "disk.raw", image)
        with qemu_nbd(tmp_path, image, form) as uri:
            disk = connect(uri)
            yield disk
            disk.close()

    @pytest.fixture
    def vast(self, form: str, tmp_path: Path) -> Iterator[BlockSource]:
        image = tmp_path / f"vast.{form}"
        run("qemu-img", "create", "-f", form, image, "2T")
        with qemu_nbd(tmp_path, image, form) as uri:
            disk = connect(uri)
            yield disk
            disk.close()


@needs("nbdkit")
@pytest.mark.parametrize("options", [["--no-sr"], ["--filter=blocksize-policy"]], ids=["simple-replies", "sectors"])
class TestNbdkit(BlockSourceContract):
    """A server without structured replies (so without a map), and one that refuses what is not whole sectors."""

    tells_zeroes = False

    @pytest.fixture
    def source(self, content: bytes, options: list[str], tmp_path: Path) -> Iterator[BlockSource]:
        image = write_sparse(tmp_path / "disk.raw", content)
        with nbdkit(tmp_path, *options, "-r", "file", image, *_policy(options)) as uri:
            disk = connect(uri)
            yield disk
            disk.close()

    @pytest.fixture
    def vast(self, options: list[str], tmp_path: Path) -> Iterator[BlockSource]:
        with nbdkit(tmp_path, *options, "memory", "4T", *_policy(options)) as uri:
            disk = connect(uri)
            yield disk
            disk.close()


def _policy(options: list[str]) -> list[str]:
    if "--no-sr" in options:
        return []
    return ["blocksize-minimum=512", "blocksize-maximum=64K", "blocksize-error-policy=error"]


@pytest.mark.parametrize("connections", [1, 4])
class TestOwnServerSink(BlockSinkContract):
    @pytest.fixture
    def made(self, connections: int) -> Iterator[Made]:
        stored = MemoryDisk(SIZE)
        with NbdServer({"disk": stored}, sinks={"disk": stored}) as server:
            disk = connect(server.uri("disk"), connections=connections)
            yield Made(disk, lambda: read(stored, 0, SIZE))
            disk.close()
        assert server.error is None


@needs("qemu-nbd", "qemu-img")
@pytest.mark.parametrize("form", ["raw", "qcow2", "vhdx"])
class TestQemuNbdSink(BlockSinkContract):
    @pytest.fixture
    def made(self, form: str, tmp_path: Path) -> Iterator[Made]:
        image = tmp_path / f"disk.{form}"
        run("qemu-img", "create", "-f", form, image, str(SIZE))
        with qemu_nbd(tmp_path, image, form, writable=True) as uri:
            disk = connect(uri)

            def content() -> bytes:
                # Another connection to the same server: the image file is locked while it is served.
                other = tmp_path / "read.raw"
                run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, other)
                return other.read_bytes()

            yield Made(disk, content)
            disk.close()
        if form == "qcow2":
            run("qemu-img", "check", "-f", "qcow2", image)


@needs("nbdkit")
@pytest.mark.parametrize("filters", [["blocksize-policy"], ["blocksize-policy", "nozero"]], ids=["sectors", "no-zero"])
class TestNbdkitSink(BlockSinkContract):
    """Whole sectors only, 64 KiB at most, once without the command that zeroes."""

    @pytest.fixture
    def made(self, filters: list[str], tmp_path: Path) -> Iterator[Made]:
        chosen = [f"--filter={name}" for name in filters]
        image = write_sparse(tmp_path / "disk.raw", bytes(SIZE))
        with nbdkit(tmp_path, *chosen, "file", image, *_policy(chosen)) as uri:
            disk = connect(uri)
            yield Made(disk, image.read_bytes)
            disk.close()


def test_large_reads_and_writes_are_split(tmp_path: Path) -> None:
    stored = MemoryDisk(80 * MIB)
    data = bytes(range(256)) * (70 * MIB // 256)
    with NbdServer({"disk": stored}, sinks={"disk": stored}) as server:
        disk = connect(server.uri("disk"))
        disk.write(memoryview(data), 3 * MIB)
        assert read(disk, 3 * MIB, len(data)) == data
        disk.close()
    assert read(stored, 3 * MIB, len(data)) == data
