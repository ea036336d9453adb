"""Compressed qcow2 as it is written here: clean to qemu-img's check, and the same disk to every reader."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import qemu_img
from formats.errors import NoSpaceError, WriteError
from formats.images.qcow2_stream import CLUSTER, CompressedQcow2Sink, create_compressed
from formats.memory import MemoryDisk
from formats.transfer import copy
from tests.contracts.block_sink import noise
from tests.contracts.block_source import MIB, TIB
from tests.formats.images import disks
from tests.requirement import needs

pytestmark = needs("qemu-img")

TABLE = CLUSTER * (CLUSTER // 8)


def by_qemu(path: Path) -> bytes:
    """What qemu-img reads, after it found nothing to complain of."""
    report = qemu_img.check(path, "qcow2")
    assert report.clean and not report.leaks, report.text
    raw = path.with_suffix(".by-qemu")
    qemu_img.convert(path, "qcow2", raw, "raw")
    return raw.read_bytes()


def strictly(image: bytes) -> bytearray:
    """The disk of a zlib image, by a reader that takes the format at its word: a window of 4 KiB, fed in small pieces."""
    size, l1_entries, l1_at = struct.unpack_from(">QxxxxIQ", image, 24)
    disk = bytearray(size)
    for number, entry in enumerate(struct.unpack_from(f">{l1_entries}Q", image, l1_at)):
        table_at = entry & 0x00FFFFFFFFFFFE00
        if not table_at:
            continue
        for place, cluster in enumerate(struct.unpack_from(f">{CLUSTER // 8}Q", image, table_at)):
            start = (number * (CLUSTER // 8) + place) * CLUSTER
            if not cluster:
                continue
            if cluster >> 62 & 1:
                offset = cluster & ((1 << 54) - 1)
                sectors = (cluster >> 54 & 0xFF) + 1
                packed = image[offset : offset // 512 * 512 + sectors * 512]
                engine = zlib.decompressobj(-12)
                content = b"".join(engine.decompress(packed[at : at + 100]) for at in range(0, len(packed), 100))
                assert engine.eof
            else:
                offset = cluster & 0x00FFFFFFFFFFFE00
                content = image[offset : offset + CLUSTER]
            assert len(content) == CLUSTER
            disk[start : start + CLUSTER] = content[: size - start]
    return disk


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("shape", ["empty", "sparse", "dense", "odd", "incompressible-end", "short-end"])
def test_qemu_finds_nothing_to_complain_of(tmp_path: Path, shape: str, compression: str) -> None:
    content = disks.shape(shape)
    path = disks.write(tmp_path / "disk.qcow2", "qcow2", content, compress=compression)
    assert by_qemu(path) == content
    if compression == "zlib":
        assert strictly(path.read_bytes()) == content


@pytest.mark.parametrize("version", [2, 3])
def test_versions(tmp_path: Path, version: int) -> None:
    content = disks.shape("dense")
    path = tmp_path / "disk.qcow2"
    sink = create_compressed(path, len(content), "zlib", version=version)
    sink.write(memoryview(content), 0)
    sink.flush()
    sink.close()
    assert struct.unpack_from(">I", path.read_bytes(), 4) == (version,)
    assert by_qemu(path) == content


def test_many_tables_with_gaps(tmp_path: Path) -> None:
    size = 5 * TABLE + 3 * CLUSTER + 512
    disk = MemoryDisk(size)
    for at in (0, TABLE - CLUSTER, TABLE, 3 * TABLE - 512, 5 * TABLE - 512, size - 512):
        disk.write(memoryview(noise(512, at)), at)
    path = tmp_path / "disk.qcow2"
    sink = create_compressed(path, size, "zlib")
    copy(disk, sink)
    sink.flush()
    sink.close()
    expected = bytearray(size)
    disk.readinto(memoryview(expected), 0)
    assert by_qemu(path) == expected


def test_16_tib_with_bytes_at_both_ends(tmp_path: Path) -> None:
    path, size = tmp_path / "disk.qcow2", 16 * TIB
    sink = create_compressed(path, size, "zstd")
    sink.write(memoryview(noise(MIB, 1)), 0)
    sink.write(memoryview(noise(512, 2)), size - 512)
    sink.flush()
    sink.close()
    assert path.stat().st_size < 4 * MIB
    assert qemu_img.info(path, "qcow2").virtual_size == size
    report = qemu_img.check(path, "qcow2")
    assert report.clean and not report.leaks


def test_tiny_clusters_share_one_of_the_file_by_the_hundred(tmp_path: Path) -> None:
    """Reference counts above 255, and a table of counts that is written behind them."""
    content = b"".join(bytes((1 + n % 250,)) * CLUSTER for n in range(1500))
    path = disks.write(tmp_path / "disk.qcow2", "qcow2", content, compress="zstd")
    assert path.stat().st_size < 10 * CLUSTER
    assert by_qemu(path) == content


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 80),
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(0, 3 * CLUSTER), st.integers(0, 2 * MIB), st.sampled_from("ntz")), max_size=12),
)
def test_any_ascending_writes(tmp_path: Path, clusters: int, sectors: int, writes: list[tuple[int, int, str]]) -> None:
    size = clusters * CLUSTER + sectors * 512
    expected, position = bytearray(size), 0
    path = tmp_path / "disk.qcow2"
    sink = create_compressed(path, size, "zlib", threads=2)
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
    assert strictly(path.read_bytes()) == expected
    report = qemu_img.check(path, "qcow2")
    assert report.clean and not report.leaks, report.text


def test_the_file_does_not_hang_on_the_threads(tmp_path: Path) -> None:
    content = disks.shape("dense") + disks.shape("sparse")
    files = []
    for threads in (1, 7):
        path = tmp_path / f"{threads}.qcow2"
        sink = create_compressed(path, len(content), "zlib", threads=threads)
        copy(MemoryDisk(len(content), content), sink)
        sink.flush()
        sink.close()
        files.append(path.read_bytes())
    assert files[0] == files[1]


class Failing(io.BytesIO):
    """An output whose device fails after some bytes."""

    def __init__(self, room: int, error: int) -> None:
        super().__init__()
        self.room, self.error = room, error

    def write(self, data: object) -> int:
        if self.tell() + len(memoryview(data)) > self.room:  # type: ignore[arg-type]
            raise OSError(self.error, "failed")
        return super().write(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EIO, WriteError)])
def test_a_device_that_fails_gives_up_the_image(number: int, kind: type[Exception]) -> None:
    output = Failing(3 * MIB, number)
    sink = CompressedQcow2Sink(output, 64 * MIB, threads=2)
    with pytest.raises(kind):
        for at in range(0, 64 * MIB, MIB):
            sink.write(memoryview(noise(MIB, at)), at)
        sink.flush()
    with pytest.raises((kind, WriteError)):
        sink.flush()
    sink.close()
    assert output.getvalue()[:4] != b"QFI\xfb"  # no header: nobody takes it for an image
