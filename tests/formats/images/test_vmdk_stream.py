"""streamOptimized VMDK: its rules, and what qemu-img and 7-Zip make of it."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import qemu_img
from formats.errors import NoSpaceError, WriteError
from formats.images.vmdk_stream import GRAIN, StreamOptimizedSink, create_stream
from formats.memory import MemoryDisk
from formats.transfer import copy
from tests.contracts.block_sink import SIZE, BlockSinkContract, Made, noise
from tests.contracts.block_source import MIB, TIB
from tests.formats.images import disks
from tests.formats.images.walker import walk
from tests.requirement import needs

SHAPES = ["empty", "sparse", "dense", "odd", "incompressible-end", "short-end"]
TABLE = 512 * GRAIN
"""Bytes of disk below one grain table."""


def streamed(content: bytes, threads: int = 0) -> bytes:
    """The file for a disk."""
    output = io.BytesIO()
    sink = StreamOptimizedSink(output, len(content), threads=threads)
    copy(MemoryDisk(len(content), content), sink)
    sink.flush()
    assert sink.file_size == len(output.getvalue())
    sink.close()
    return output.getvalue()


class TestContract(BlockSinkContract):
    @pytest.fixture
    def made(self, tmp_path: Path) -> Iterator[Made]:
        path = tmp_path / "disk.vmdk"
        sink = create_stream(path, SIZE)
        yield Made(sink, lambda: bytes(walk(path.read_bytes()).disk))
        sink.close()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_markers_tell_the_whole_disk(shape: str) -> None:
    content = disks.shape(shape)
    found = walk(streamed(content))
    assert found.disk == content
    if shape == "empty":
        assert found.order == ["directory", "footer"]


@needs("qemu-img", "7zz")
@pytest.mark.parametrize("shape", SHAPES)
def test_qemu_and_7zip_read_the_same(tmp_path: Path, shape: str) -> None:
    content = disks.shape(shape)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(streamed(content))
    (tmp_path / "disk.raw").write_bytes(content)
    assert qemu_img.check(path, "vmdk").clean
    assert qemu_img.compare(path, "vmdk", tmp_path / "disk.raw", "raw").equal
    tested = subprocess.run(["7zz", "t", "-tvmdk", path], capture_output=True, text=True, check=False)
    assert "Everything is Ok" in tested.stdout, tested.stdout
    assert not re.search("warning|error", tested.stdout, re.IGNORECASE)
    assert subprocess.run(["7zz", "x", "-so", "-tvmdk", path], capture_output=True, check=True).stdout == content


@needs("qemu-img")
def test_a_disk_of_many_tables_with_gaps(tmp_path: Path) -> None:
    size = 5 * TABLE + 3 * GRAIN
    disk = MemoryDisk(size)
    for at in (0, TABLE - GRAIN, TABLE, 3 * TABLE - 512, 5 * TABLE - 512, size - 512):
        disk.write(memoryview(noise(512, at)), at)
    path = tmp_path / "disk.vmdk"
    sink = create_stream(path, size)
    copy(disk, sink)
    sink.flush()
    sink.close()
    found = walk(path.read_bytes())
    expected = bytearray(size)
    disk.readinto(memoryview(expected), 0)
    assert found.disk == expected
    assert found.order.count("table") == 5  # the fourth table's disk is all zero: the directory has 0 there
    with qemu_img.serve(path, "vmdk") as uri:
        raw = tmp_path / "raw"
        qemu_img.convert(uri, "raw", raw, "raw")
    assert raw.read_bytes() == expected


@needs("qemu-img")
def test_16_tib_with_bytes_at_both_ends(tmp_path: Path) -> None:
    path, size = tmp_path / "disk.vmdk", 16 * TIB
    sink = create_stream(path, size)
    sink.write(memoryview(noise(MIB, 1)), 0)
    sink.write(memoryview(noise(512, 2)), size - 512)
    sink.flush()
    sink.close()
    assert path.stat().st_size < 8 * MIB
    assert qemu_img.info(path, "vmdk").virtual_size == size
    assert qemu_img.check(path, "vmdk").clean


@given(
    st.integers(1, 80),
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(0, 3 * GRAIN), st.integers(0, 2 * MIB), st.sampled_from("ntz")), max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_any_ascending_writes(grains: int, sectors: int, writes: list[tuple[int, int, str]]) -> None:
    size = grains * GRAIN + sectors * 512
    expected, position = bytearray(size), 0
    output = io.BytesIO()
    sink = StreamOptimizedSink(output, size, threads=2)
    for gap, wanted, kind in writes:
        start = min(position + gap, size)
        length = min(wanted, size - start)
        if kind == "z":
            sink.zero(start, length)
        else:
            piece = noise(length, start) if kind == "n" else (b"abc" * length)[:length]
            sink.write(memoryview(piece), start)
            expected[start : start + length] = piece
        position = start + length
    sink.flush()
    sink.close()
    assert walk(output.getvalue()).disk == expected


def test_the_order_does_not_hang_on_the_threads() -> None:
    content = disks.shape("dense") + disks.shape("sparse")
    one, many = streamed(content, threads=1), streamed(content, threads=7)
    assert one[21 * 512 :] == many[21 * 512 :]  # the descriptor holds random ids


def test_the_descriptor_says_each_key_once() -> None:
    text = walk(streamed(disks.shape("odd"))).descriptor
    keys = [line.split("=")[0].strip() for line in text.splitlines() if "=" in line]
    assert len(keys) == len(set(keys))
    values = dict(re.findall(r'^([\w.]+) *= *"?([^"\n]*)"?$', text, re.MULTILINE))
    assert values["createType"] == "streamOptimized"
    assert values["parentCID"] == "ffffffff"
    assert values["ddb.longContentID"].endswith(values["CID"])
    assert values["ddb.adapterType"] == "lsilogic"
    assert f"RW {len(disks.shape('odd')) // 512} SPARSE" in text


def test_a_pipe_takes_it_too() -> None:
    content = disks.shape("sparse")
    reader, writer = os.pipe()
    received: list[bytes] = []

    def drain() -> None:
        with open(reader, "rb") as file:
            received.append(file.read())

    thread = threading.Thread(target=drain)
    thread.start()
    with open(writer, "wb", buffering=0) as output:
        sink = StreamOptimizedSink(output, len(content))
        copy(MemoryDisk(len(content), content), sink)
        sink.flush()
        sink.close()
        assert not output.closed
    thread.join()
    assert walk(received[0]).disk == content


class Failing(io.BytesIO):
    """An output whose device fails after some bytes."""

    def __init__(self, room: int, number: int) -> None:
        super().__init__()
        self.room, self.number = room, number

    def write(self, data: object, /) -> int:
        block = memoryview(data)[:100_000]  # type: ignore[arg-type]
        if self.tell() + len(block) > self.room:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(block)


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, NoSpaceError), (errno.EIO, WriteError)])
@pytest.mark.parametrize("room", [0, 70_000, 1_000_000])
def test_a_failing_output_is_told(number: int, expected: type[Exception], room: int) -> None:
    content = noise(4 * MIB)
    sink = StreamOptimizedSink(Failing(room, number), len(content))
    with pytest.raises(expected):
        copy(MemoryDisk(len(content), content), sink)
        sink.flush()
    sink.close()


def test_short_writes_are_completed() -> None:
    content = disks.shape("dense")
    output = Failing(1 << 30, 0)
    sink = StreamOptimizedSink(output, len(content))
    copy(MemoryDisk(len(content), content), sink)
    sink.flush()
    assert walk(output.getvalue()).disk == content


@pytest.mark.parametrize("room", [0, 70_000, 300_000])
def test_after_an_error_nothing_is_said_to_be_stored(room: int) -> None:
    output = Failing(room, errno.ENOSPC)
    sink = StreamOptimizedSink(output, 4 * MIB, threads=1)
    sink.write(memoryview(noise(300_000)), 0)
    for _ in range(2):
        with pytest.raises(NoSpaceError):
            sink.flush()
    output.room = 1 << 30
    with pytest.raises(NoSpaceError):
        sink.write(memoryview(noise(512)), 3 * MIB)
    with pytest.raises(NoSpaceError):
        sink.flush()
    sink.close()


@pytest.mark.parametrize("size", [0, 511, 513, -512])
def test_sizes_that_no_vmdk_has(size: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        StreamOptimizedSink(io.BytesIO(), size)
