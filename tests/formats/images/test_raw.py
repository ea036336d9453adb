"""Raw files and block devices, on the file system that the tests run on and on loop devices."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.block import BlockSource, Kind
from formats.errors import NoSpaceError, ReadError, WriteError
from formats.images.raw import RawFile, RawSink
from tests.contracts.block_sink import SIZE, BlockSinkContract, Made, noise
from tests.contracts.block_source import MIB, TIB, BlockSourceContract, read, write_sparse
from tests.requirement import needs, needs_root


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A block device full of old data, a little larger than the disks of the suites."""
    backing = tmp_path / "device"
    backing.write_bytes(noise(SIZE + 2 * MIB - 512, 77))
    found = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"no loop device here: {found.stderr.strip()}")
    yield Path(found.stdout.strip())
    subprocess.run(["losetup", "--detach", found.stdout.strip()], check=True)


class TestRawFile(BlockSourceContract):
    @pytest.fixture
    def source(self, content: bytes, tmp_path: Path) -> Iterator[BlockSource]:
        file = RawFile(write_sparse(tmp_path / "disk.raw", content))
        yield file
        file.close()

    @pytest.fixture
    def vast(self, tmp_path: Path) -> Iterator[BlockSource]:
        path = tmp_path / "vast.raw"
        with path.open("wb") as sparse:
            sparse.truncate(8 * TIB)
            sparse.seek(5 * TIB)
            sparse.write(b"x")
        file = RawFile(path)
        yield file
        file.close()


@needs_root()
@needs("losetup")
class TestRawDevice(BlockSourceContract):
    tells_zeroes = False

    @pytest.fixture
    def source(self, content: bytes, loop: Path, tmp_path: Path) -> Iterator[BlockSource]:
        os.truncate(tmp_path / "device", len(content))
        (tmp_path / "device").write_bytes(content)
        subprocess.run(["losetup", "--set-capacity", loop], check=True)
        device = RawFile(loop)
        yield device
        device.close()

    @pytest.fixture
    def vast(self, loop: Path, tmp_path: Path) -> Iterator[BlockSource]:
        os.truncate(tmp_path / "device", 2 * TIB)
        subprocess.run(["losetup", "--set-capacity", loop], check=True)
        device = RawFile(loop)
        yield device
        device.close()


class TestRawSink(BlockSinkContract):
    @pytest.fixture
    def made(self, tmp_path: Path) -> Iterator[Made]:
        path = tmp_path / "disk.raw"
        path.write_bytes(b"what was there before" * 1000)
        sink = RawSink(path, SIZE)
        yield Made(sink, path.read_bytes)
        sink.close()


@needs_root()
@needs("losetup")
class TestRawDeviceSink(BlockSinkContract):
    """K4 is the point here: the device is full of old data, and holds more than the disk."""

    @pytest.fixture
    def made(self, loop: Path) -> Iterator[Made]:
        def content() -> bytes:
            with loop.open("rb") as device:
                return device.read(SIZE)

        sink = RawSink(loop, SIZE)
        yield Made(sink, content)
        sink.close()

    def test_what_lies_behind_the_disk_is_left_alone(self, made: Made, tmp_path: Path) -> None:
        made.sink.zero(SIZE - 4096, 4096)
        made.stored()
        old = noise(SIZE + 2 * MIB - 512, 77)
        assert (tmp_path / "device").read_bytes()[SIZE:] == old[SIZE:]

    def test_a_device_that_is_too_small_is_refused(self, loop: Path) -> None:
        with pytest.raises(NoSpaceError, match="holds"):
            RawSink(loop, SIZE + 4 * MIB)


def test_zeroed_ranges_of_a_file_take_no_space(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    sink = RawSink(path, 8 * MIB)
    sink.write(memoryview(noise(8 * MIB)), 0)
    sink.flush()
    full = path.stat().st_blocks
    sink.zero(MIB, 6 * MIB)
    sink.close()
    if full == path.stat().st_blocks:
        pytest.skip("no holes on this file system")
    assert path.stat().st_blocks * 512 <= 3 * MIB


def test_a_vast_sink_is_sparse() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no tmpfs here, and ext4 refuses the size")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "vast.raw"
        sink = RawSink(path, 16 * TIB)
        sink.write(memoryview(b"end"), 16 * TIB - 3)
        sink.zero(0, 16 * TIB - 4096)
        sink.close()
        assert path.stat().st_blocks < 2048


def test_a_file_that_shrinks_is_a_read_error(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "disk.raw", noise(MIB))
    file = RawFile(path)
    os.truncate(path, 4096)
    with pytest.raises(ReadError, match="ends at byte 4096"):
        read(file, 0, MIB)
    file.close()


def test_a_missing_file_is_a_read_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="No such file") as caught:
        RawFile(tmp_path / "nothing")
    assert caught.value.advice
    assert caught.value.subject == str(tmp_path / "nothing")


def test_a_folder_is_no_disk(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="neither"):
        RawFile(tmp_path)
    with pytest.raises(WriteError):
        RawSink(tmp_path, 512)


def test_a_file_above_the_limit_of_the_process_is_no_space(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(NoSpaceError, match="large"):
            RawSink(tmp_path / "disk.raw", 2 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_device_is_no_space() -> None:
    # /dev/full is a character device: opened as a file it takes no length, so the real ENOSPC comes from the write path below.
    with pytest.raises((NoSpaceError, WriteError)):
        RawSink("/dev/full", 512)


@needs_root()
@needs("mount", "umount")
def test_a_full_file_system_is_no_space(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False).returncode:
        pytest.skip("no mount here")
    try:
        sink = RawSink(place / "disk.raw", 64 * MIB)
        with pytest.raises(NoSpaceError, match="written") as caught:
            sink.write(memoryview(noise(4 * MIB)), 0)
        sink.close()
        assert caught.value.exit_code == 13
    finally:
        subprocess.run(["umount", place], check=True)


def test_holes_are_zero(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "disk.raw", noise(65536) + bytes(MIB) + noise(65536))
    with path.open("rb") as file:
        try:
            os.lseek(file.fileno(), 65536, os.SEEK_HOLE)
        except OSError as error:
            assert error.errno == errno.EINVAL
            pytest.skip("no holes on this file system")
    source = RawFile(path)
    assert [(e.start, e.length, e.kind) for e in source.extents(0, source.size)] == [
        (0, 65536, Kind.DATA),
        (65536, MIB, Kind.ZERO),
        (65536 + MIB, 65536, Kind.DATA),
    ]
    source.close()


_CHANGE = st.tuples(st.booleans(), st.integers(0, 300_000), st.integers(0, 150_000), st.integers(0, 255))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 300_000), changes=st.lists(_CHANGE, max_size=12))
def test_any_changes_read_back(
    size: int, changes: list[tuple[bool, int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "disk.raw"
    sink, expected = RawSink(path, size), bytearray(size)
    for wipe, anywhere, wanted, seed in changes:
        start = min(anywhere, size)
        length = min(wanted, size - start)
        if wipe:
            sink.zero(start, length)
            expected[start : start + length] = bytes(length)
        else:
            data = noise(length, seed)
            sink.write(memoryview(data), start)
            expected[start : start + length] = data
    sink.close()
    source = RawFile(path)
    assert read(source, 0, size) == expected
    for extent in source.extents(0, size):
        assert extent.kind is Kind.DATA or not any(expected[extent.start : extent.end])
    source.close()
    path.unlink()
