"""A device of another host, written over a real sshd."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from formats.errors import NoSpaceError, ToolkitError, UsageError, WriteError
from formats.memory import MemoryDisk
from formats.progress import Silence
from p2v.collect.agent import Agent
from p2v.device import DeviceSink, parse_device, verify
from p2v.errors import CommandError, DiskVanishedError, PrivilegeError, PythonMissingError
from p2v.session import Session
from tests.contracts.block_sink import SIZE, BlockSinkContract, Made, noise
from tests.contracts.block_source import MIB
from tests.loop import loop_device
from tests.p2v.sshd import PLAIN, SUDOER, SshServer
from tests.requirement import needs, needs_root

pytestmark = [needs_root(), needs("losetup", "sshd")]

EXTRA = 2 * MIB - 512


@pytest.fixture(scope="module")
def session(sshd: SshServer) -> Iterator[Session]:
    with Session.connect(sshd.target()) as made:
        yield made


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A block device full of old data, a little larger than the disk."""
    backing = tmp_path / "device"
    backing.write_bytes(noise(SIZE + EXTRA, 77))
    with loop_device(backing, writable=True) as made:
        yield made


class TestDeviceSink(BlockSinkContract):
    @pytest.fixture
    def made(self, session: Session, device: str) -> Iterator[Made]:
        sink = DeviceSink.open(session, device, SIZE)
        yield Made(sink, lambda: Path(device).read_bytes()[:SIZE])
        sink.close()

    def test_what_lies_behind_the_disk_is_left_alone(self, made: Made, device: str) -> None:
        made.sink.write(memoryview(noise(4096)), SIZE - 4096)
        made.stored()
        assert Path(device).read_bytes()[SIZE:] == noise(SIZE + EXTRA, 77)[SIZE:]


def test_a_device_that_is_too_small(session: Session, device: str) -> None:
    with pytest.raises(NoSpaceError, match=f"holds {SIZE + EXTRA} bytes"):
        DeviceSink.open(session, device, SIZE + 4 * MIB)


def test_a_device_in_use(session: Session, device: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    (mount := tmp_path / "mount").mkdir()
    subprocess.run(["mount", device, mount], check=True)
    try:
        before = (tmp_path / "device").read_bytes()
        with pytest.raises(WriteError, match="cannot be written") as caught:
            DeviceSink.open(session, device, SIZE)
        assert "in use" in caught.value.advice
        assert (tmp_path / "device").read_bytes() == before
    finally:
        subprocess.run(["umount", mount], check=True)


def test_what_is_no_device(session: Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(WriteError, match="no block device"):
        DeviceSink.open(session, str(tmp_path / "file"), 8)
    assert (tmp_path / "file").read_bytes() == b"precious"
    with pytest.raises(DiskVanishedError):
        DeviceSink.open(session, "/dev/nonesuch", 8)


def test_rights_and_python(sshd: SshServer, device: str, monkeypatch: pytest.MonkeyPatch, session: Session) -> None:
    with Session.connect(sshd.target(PLAIN.name)) as plain, pytest.raises(PrivilegeError):
        DeviceSink.open(plain, device, SIZE)
    target = sshd.target(SUDOER.name, sudo_password=sshd.password(SUDOER.name))
    with Session.connect(target) as sudoer, DeviceSink.open(sudoer, device, SIZE) as sink:
        sink.write(memoryview(b"x" * 512), 0)
        sink.flush()
    assert Path(device).read_bytes()[:512] == b"x" * 512
    monkeypatch.setattr("p2v.session.interpreter._NAMES", "nothing-of-this-name")
    with pytest.raises(PythonMissingError, match="has no python3"):
        DeviceSink.open(session, device, SIZE)


def test_a_device_that_fails_is_said_at_the_latest_by_flush(session: Session, device: str, tmp_path: Path) -> None:
    with DeviceSink.open(session, device, SIZE) as sink:
        os.truncate(tmp_path / "device", MIB)  # what lies behind cannot be written any more
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        with pytest.raises(ToolkitError, match="cannot be written"):
            for start in range(0, SIZE - MIB, MIB):
                sink.write(memoryview(noise(MIB)), start)
            sink.flush()


def test_a_writer_that_is_killed(session: Session, device: str) -> None:
    with DeviceSink.open(session, device, SIZE) as sink:
        found = subprocess.run(["pgrep", "-f", f"exec.compile.*{device}"], capture_output=True, text=True, check=True)
        for line in found.stdout.split():
            os.kill(int(line), signal.SIGKILL)
        with pytest.raises(CommandError, match="ended"):
            for _ in range(1000):
                sink.write(memoryview(noise(65536)), 0)
            sink.flush()


def test_what_was_written_is_read_back(session: Session, device: str) -> None:
    source = MemoryDisk(SIZE)
    source.write(memoryview(noise(MIB)), 3 * MIB)
    with DeviceSink.open(session, device, SIZE) as sink:
        sink.write(memoryview(noise(MIB)), 3 * MIB)
        sink.flush()
    with Agent.start(session) as agent:
        disk = agent.disk(device)
        assert verify(source, disk, Silence()) == MIB
        with open(device, "r+b") as file:
            file.seek(3 * MIB + 70_000)
            file.write(b"!")
        with pytest.raises(WriteError, match="reads back differently"):
            verify(source, disk, Silence())


@pytest.mark.parametrize(
    ("text", "host", "path"),
    [
        ("ssh://root@rescue/dev/sda", "ssh://root@rescue", "/dev/sda"),
        ("ssh://root@[::1]:2222/dev/disk/by-id/ata-X", "ssh://root@[::1]:2222", "/dev/disk/by-id/ata-X"),
    ],
)
def test_names_of_devices(text: str, host: str, path: str) -> None:
    assert parse_device(text) == (host, path)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "ssh://root@rescue",
            "ssh://root@rescue/etc/passwd",
            "ssh://root@rescue/dev/../etc/passwd",
            "sftp://a@b/dev/sda",
        ),
        *(
            "ssh://root:pw@rescue/dev/sda",
            "ssh:///dev/sda",
            "ssh://root@rescue/dev/sda?x",
            "ssh://root@rescue/dev/s\nda",
        ),
    ],
)
def test_what_names_no_device(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_device(text)
    assert "pw" not in str(caught.value)
