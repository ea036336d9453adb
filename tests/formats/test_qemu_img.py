"""qemu-img and qemu-nbd, started for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from formats import qemu_img
from formats.block import Kind
from formats.errors import ImageToolError, InterruptedRunError
from formats.memory import MemoryDisk
from formats.nbd import NbdServer, connect
from formats.transfer import copy, fingerprint
from tests.contracts.block_sink import noise
from tests.contracts.block_source import MIB, read
from tests.requirement import needs

pytestmark = needs("qemu-img", "qemu-nbd", "qemu-io")

ODD = 'a,b:c "d" %41 é.img'
"""A file name with what QEMU, NBD URIs and JSON take for something else."""


def io(path: Path, image_format: str, *commands: str) -> None:
    """Change an image by another program."""
    subprocess.run(
        ["qemu-io", "-f", image_format, *(part for command in commands for part in ("-c", command)), path],
        check=True,
        capture_output=True,
    )


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within half a minute."""
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Counted:
    """A progress that adds up."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.done = 0
        self.finished = False

    def start(self, label: str, total: int | None) -> None:
        """Keep the total."""
        self.total = total

    def advance(self, amount: int) -> None:
        """Add."""
        assert amount > 0
        self.done += amount

    def finish(self) -> None:
        """Keep that it ended."""
        self.finished = True


def test_version() -> None:
    assert qemu_img.version() >= (5, 2, 0)


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vpc", "vhdx", "vmdk", "vdi", "parallels"])
def test_create_info_check_serve_under_an_odd_name(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / ODD
    qemu_img.create(path, image_format, 8 * MIB, {"force_size": "on"} if image_format == "vpc" else None)
    assert list(tmp_path.iterdir()) == [path]
    found = qemu_img.info(path, image_format)
    assert (found.virtual_size, found.format) == (8 * MIB, image_format)
    with qemu_img.serve(path, image_format, writable=True) as uri:
        disk = connect(uri)
        disk.write(memoryview(noise(MIB)), MIB)
        disk.flush()
        disk.close()
    report = qemu_img.check(path, image_format)
    assert report.clean
    assert report.supported is (image_format not in ("raw", "vpc"))
    with qemu_img.serve(path, image_format) as uri:
        disk = connect(uri)
        assert not disk.writable
        assert read(disk, 0, 3 * MIB) == bytes(MIB) + noise(MIB) + bytes(MIB)
        disk.close()


def test_check_tells_corruption_and_repairs_leaks(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img.create(path, "qcow2", 8 * MIB)
    io(path, "qcow2", "write 0 1M")
    content = bytearray(path.read_bytes())
    table = int.from_bytes(content[48:56], "big")
    block = int.from_bytes(content[table : table + 8], "big")
    leaky, corrupt = bytearray(content), bytearray(content)
    leaky[block + 2 * 100 : block + 2 * 100 + 2] = b"\0\1"
    corrupt[block + 2 * 6 : block + 2 * 6 + 2] = b"\0\0"
    path.write_bytes(leaky.ljust(101 * 65536, b"\0"))
    report = qemu_img.check(path, "qcow2")
    assert (report.clean, report.leaks, report.corruptions) == (False, 1, 0)
    assert qemu_img.check(path, "qcow2", repair="leaks").supported
    assert qemu_img.check(path, "qcow2").clean
    path.write_bytes(corrupt)
    report = qemu_img.check(path, "qcow2")
    assert not report.clean
    assert report.corruptions > 0
    path.write_bytes(b"no image")
    with pytest.raises(ImageToolError):
        qemu_img.check(path, "qcow2")


def test_compare_finds_the_difference(tmp_path: Path) -> None:
    first, second = tmp_path / "a.qcow2", tmp_path / "b.raw"
    qemu_img.create(first, "qcow2", 8 * MIB)
    qemu_img.create(second, "raw", 9 * MIB)
    progress = Counted()
    assert qemu_img.compare(first, "qcow2", second, "raw", progress=progress, total=8 * MIB).equal
    assert progress.finished
    assert 0 < progress.done <= 8 * MIB
    io(second, "raw", "write -P 1 5M 512")
    found = qemu_img.compare(first, "qcow2", second, "raw")
    assert (found.equal, found.offset) == (False, 5 * MIB)
    with qemu_img.serve(second, "raw") as uri:
        assert qemu_img.compare(uri, "raw", second, "raw").equal
    with pytest.raises(ImageToolError, match="No such file"):
        qemu_img.compare(first, "qcow2", tmp_path / "none", "raw")


def test_convert_between_paths_and_servers(tmp_path: Path) -> None:
    raw, first, second = tmp_path / "a.raw", tmp_path / ODD, tmp_path / "b.qcow2"
    raw.write_bytes(noise(MIB) + bytes(MIB) + noise(MIB, 2))
    progress = Counted()
    qemu_img.convert(raw, "raw", first, "vdi", any_order=True, progress=progress, total=3 * MIB)
    assert progress.done == progress.total == 3 * MIB
    qemu_img.convert(first, "vdi", second, "qcow2", compress=True, options={"compression_type": "zstd"})
    assert qemu_img.compare(second, "qcow2", raw, "raw").equal
    for image_format in ("qcow2", "raw"):
        target = tmp_path / f"target,{image_format}"
        qemu_img.create(target, image_format, 3 * MIB)
        with qemu_img.serve(target, image_format, writable=True) as uri:
            qemu_img.convert(second, "qcow2", uri, "raw", existing=True)
        assert qemu_img.compare(target, image_format, raw, "raw").equal
        qemu_img.create(target, image_format, 3 * MIB)
        qemu_img.convert(second, "qcow2", target, image_format, existing=True)
        assert qemu_img.compare(target, image_format, raw, "raw").equal


def test_an_image_in_use_is_told(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img.create(path, "qcow2", MIB)
    with qemu_img.serve(path, "qcow2", writable=True), pytest.raises(ImageToolError) as caught:
        qemu_img.check(path, "qcow2")
    assert "another program" in caught.value.advice


def test_a_missing_program_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for start in (qemu_img.version, lambda: qemu_img.Server(tmp_path / "x", "raw")):
        with pytest.raises(ImageToolError) as caught:
            start()
        assert "qemu-utils" in caught.value.advice


def test_an_image_that_cannot_be_served_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"something else")
    before = set(Path(tempfile.gettempdir()).glob("p2v-nbd-*"))
    with pytest.raises(ImageToolError, match="not in qcow2 format"):
        qemu_img.Server(path, "qcow2")
    assert set(Path(tempfile.gettempdir()).glob("p2v-nbd-*")) <= before


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A qemu-img that misbehaves as the real one cannot be made to."""
    program = folder / "qemu-img"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_stop_and_timeout_end_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "pid"
    fake(tmp_path, monkeypatch, f"echo $$ > {mark}; exec sleep 600")
    stop = threading.Event()
    timer = threading.Timer(0.5, stop.set)
    timer.start()
    with pytest.raises(InterruptedRunError):
        qemu_img.check(tmp_path / "x", "qcow2", stop=stop)
    timer.join()
    assert not alive(int(mark.read_text()))
    with pytest.raises(ImageToolError, match="in time"):
        qemu_img.check(tmp_path / "x", "qcow2", timeout=0.5)
    assert not alive(int(mark.read_text()))


@pytest.mark.parametrize("script", ["echo '[1]'", "echo nonsense", "exit 0", "echo '{}'"])
def test_answers_of_unknown_shape_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake(tmp_path, monkeypatch, script)
    with pytest.raises(ImageToolError):
        qemu_img.info(tmp_path / "x", "qcow2")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    """The owner is killed outright, also while the thread that started the server has already ended."""
    path = tmp_path / "disk.qcow2"
    qemu_img.create(path, "qcow2", MIB)
    script = (
        "import sys, threading, time; from pathlib import Path; from formats import qemu_img\n"
        "def start():\n"
        "    global server; server = qemu_img.Server(Path(sys.argv[1]), 'qcow2', writable=True)\n"
        "thread = threading.Thread(target=start); thread.start(); thread.join(); time.sleep(0.2)\n"
        "print(server.pid, server.uri.rpartition('=')[2], server._process.popen.poll(), flush=True); time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, socket, ended = owner.stdout.readline().split()
    assert ended == "None"
    assert alive(int(pid))
    os.kill(owner.pid, how)
    owner.wait()
    owner.stdout.close()
    assert until(lambda: not alive(int(pid)))
    assert until(lambda: not Path(socket).parent.exists())


def test_a_server_is_closed_twice_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    server = qemu_img.Server(path, "raw")
    folder = Path(server.uri.rpartition("=")[2]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    server.close()
    server.close()
    assert not folder.exists()
    assert not alive(server.pid)


@needs("qemu-img", "qemu-nbd")
def test_an_overlay_is_served_over_the_disk_that_the_caller_names(tmp_path: Path) -> None:
    base = MemoryDisk(64 << 20)
    base.write(memoryview(b"below" * 1000), 1 << 20)
    base.write(memoryview(b"below" * 1000), 32 << 20)
    overlay = tmp_path / "overlay.qcow2"
    qemu_img.create(overlay, "qcow2", base.size)
    with NbdServer({"0": base}) as lower:
        with qemu_img.Server(overlay, "qcow2", writable=True, backing=lower.uri("0")) as upper:
            disk = connect(upper.uri)
            disk.write(memoryview(b"above" * 1000), 32 << 20)
            disk.flush()
            disk.close()
        with qemu_img.Server(overlay, "qcow2", backing=lower.uri("0")) as upper:
            disk = connect(upper.uri)
            expected = MemoryDisk(base.size)
            copy(base, expected)
            expected.write(memoryview(b"above" * 1000), 32 << 20)
            assert fingerprint(disk) == fingerprint(expected)
            assert (
                sum(e.length for e in disk.extents(0, disk.size) if e.kind is Kind.DATA) < 1 << 20
            )  # lower holes stay holes
            disk.close()
    buffer = memoryview(bytearray(5000))
    base.readinto(buffer, 32 << 20)
    assert bytes(buffer) == b"below" * 1000
