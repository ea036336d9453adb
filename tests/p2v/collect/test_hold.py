"""The frozen final pass on a real file system: a loop device here, reached over a real sshd, while a thread keeps writing to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from formats.images import create_sink, open_source
from formats.layers import UsedOnly
from formats.layouts.disk import used_of_disk
from formats.machine import Bus, Disk, Machine, Volume
from formats.transfer import copy
from p2v.collect.agent import Agent
from p2v.collect.blockdev import RemoteDisk
from p2v.collect.consistency import DiskPlan
from p2v.collect.hold import held
from p2v.emit import refill
from p2v.errors import ConsistencyError
from p2v.session import Session
from tests.loop import loop_device
from tests.p2v.sshd import SshServer
from tests.requirement import needs, needs_root

pytestmark = [needs_root(), needs("losetup", "mkfs.ext4", "e2fsck", "debugfs", "fsfreeze", "qemu-img", "qemu-nbd")]

MIB = 1 << 20


class Writer:
    """Appends numbers to a file, each on stable storage before it counts."""

    def __init__(self, path: Path) -> None:
        self.acknowledged = 0
        self._stopped = threading.Event()
        self._file = path.open("ab", buffering=0)
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        while not self._stopped.wait(0.005):
            self._file.write(b"%08d\n" % (self.acknowledged + 1))
            os.fsync(self._file.fileno())
            self.acknowledged += 1

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._file.close()


@dataclass(frozen=True, slots=True)
class Host:
    session: Session
    machine: Machine
    plans: list[DiskPlan]
    disk: RemoteDisk
    mount: Path

    def held(self, freeze: int = 60) -> contextlib.AbstractContextManager[object]:
        return held(self.session, self.machine, self.plans, {"one": self.disk}, silence=30, freeze=freeze)


@pytest.fixture
def host(sshd: SshServer) -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="p2v-hold-"))
    image, mount = folder / "disk", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        device = stack.enter_context(loop_device(image, writable=True))
        session = stack.enter_context(Session.connect(sshd.target()))
        # The server has a name space of its own: what is mounted there is seen through /proc.
        session.run(["mount", device, str(mount)], check=True)
        stack.callback(session.run, ["umount", str(mount)], check=True)
        inside = Path(f"/proc/{sshd.process.pid}/root{mount}")
        assert inside.stat().st_dev != folder.stat().st_dev, "not mounted there: another file system would be frozen"
        (inside / "still").write_bytes(os.urandom(20 * MIB))
        os.sync()
        disk = Disk(id="one", size=64 * MIB, name=device.removeprefix("/dev/"), bus=Bus.SATA)
        root = Volume(path=device, kind="disk", size=disk.size, content="ext4", mountpoints=(str(mount),))
        machine = Machine(name="m", disks=(disk,), volumes=(root,))
        agent = stack.enter_context(Agent.start(session))
        plans = [DiskPlan(disk=disk, regions=(), reason="it is no LVM volume")]
        yield Host(session, machine, plans, agent.disk(device), inside)


def test_a_live_copy_becomes_one_instant(host: Host, tmp_path: Path) -> None:
    image = tmp_path / "copy.qcow2"
    writer = Writer(host.mount / "journal")
    try:
        with contextlib.closing(create_sink(image, "qcow2", host.disk.size)) as sink:
            copy(UsedOnly(host.disk, used_of_disk(host.disk).extents), sink)
            sink.flush()
        (host.mount / "late").write_bytes(os.urandom(3 * MIB))  # not in the live copy
        with held(host.session, host.machine, host.plans, {"one": host.disk}, silence=30, freeze=60) as frozen:
            before = writer.acknowledged
            copied = refill(image, "qcow2", frozen["one"])
            assert writer.acknowledged <= before + 1  # one may have been on its way
        assert copied.kept > 18 * MIB
        assert 3 * MIB <= copied.done.read - copied.kept < 12 * MIB
        deadline = threading.Event()
        while writer.acknowledged <= before + 1:  # thawed: it goes on
            deadline.wait(0.01)
    finally:
        writer.stop()
    raw = tmp_path / "copy.raw"
    with contextlib.closing(open_source(image, format="qcow2")) as source, raw.open("wb") as file:
        content = bytearray(source.size)
        source.readinto(memoryview(content), 0)
        file.write(content)
    checked = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    for name in ("journal", "late"):
        subprocess.run(["debugfs", "-R", f"dump {name} {tmp_path / name}", raw], capture_output=True, check=True)
    assert (tmp_path / "late").read_bytes() == (host.mount / "late").read_bytes()
    assert len((tmp_path / "journal").read_bytes()) >= 9 * before


def test_too_long_a_freeze_is_refused_before_anything_is_frozen(host: Host) -> None:
    with pytest.raises(ConsistencyError, match="5 s are allowed") as caught, host.held(freeze=5):
        raise AssertionError
    assert "--freeze-limit" in caught.value.advice
    (host.mount / "thawed").write_text("")


def test_a_freeze_that_ends_early_is_told(host: Host) -> None:
    with pytest.raises(ConsistencyError, match="did not last"), host.held():
        host.session.run(["fsfreeze", "-u", host.machine.volumes[0].mountpoints[0]], check=True)


def test_an_error_within_thaws(host: Host) -> None:
    with pytest.raises(ZeroDivisionError), host.held():
        raise ZeroDivisionError
    (host.mount / "thawed").write_text("")
