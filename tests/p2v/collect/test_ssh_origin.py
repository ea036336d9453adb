"""SshOrigin on the real machine: inspect and capture while it works, and what is left behind when things go wrong.

One machine is booted for all tests; each leaves it clean, and the last ones break it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from formats.block import BlockSource, Kind
from formats.capture import Capture, Consistency, Holdable, Origin
from formats.errors import Notice, ToolkitError
from formats.images.raw import RawFile, RawSink
from formats.layouts import lvm
from formats.layouts.window import Window
from formats.transfer import copy, fingerprint
from p2v.collect.ssh import SshOrigin
from p2v.config import Secret
from p2v.errors import ConsistencyError, PrivilegeError
from p2v.session import SshTarget
from tests.contracts.origin import OpenCaptureContract, ReleaseContract
from tests.machines.builder import BuiltMachine
from tests.machines.physical import PhysicalMachine
from tests.machines.writer import verify_command
from tests.requirement import needs

pytestmark = [pytest.mark.slow_boot, needs("e2fsck", "debugfs")]

SILENCE = 20
LEFTOVERS = (
    "lvs --noheadings -o lv_name | grep p2v-; "
    "ps ax -o args= | grep -E '^[^ ]*sh -c .*p2v-guard-|p2v-guard-[0-9a-f]{8}|exec.compile.s, .agent' | grep -v grep; "
    "ls /tmp /var/tmp /run /dev/shm | grep p2v"
)


def target(physical: PhysicalMachine, user: str = "root", password: str | None = None) -> SshTarget:
    return SshTarget.parse(
        f"ssh://{user}@127.0.0.1:{physical.ssh_port}",
        identity=physical.identity if password is None else None,
        known_hosts=physical.known_hosts,
        password=Secret(password) if password is not None else None,
    )


def wait_clean(physical: PhysicalMachine, seconds: float) -> None:
    """Return once nothing of ours is on the machine; what it is when that does not come true in time."""
    deadline = time.monotonic() + seconds
    while left := str(physical.run(LEFTOVERS, check=False).stdout).strip():
        assert time.monotonic() < deadline, left
        time.sleep(1)
    frozen = physical.run("touch /boot/thawed && rm /boot/thawed && touch /thawed && rm /thawed", check=False)
    assert frozen.returncode == 0


@pytest.fixture(scope="module")
def physical(bios_lvm_disk: BuiltMachine) -> Iterator[PhysicalMachine]:
    with PhysicalMachine(bios_lvm_disk) as machine:
        yield machine


@pytest.fixture(scope="module")
def notices() -> list[Notice]:
    return []


@pytest.fixture(scope="module")
def host(physical: PhysicalMachine, notices: list[Notice]) -> Iterator[SshOrigin]:
    with SshOrigin(target(physical), notice=notices.append, silence=SILENCE) as origin:
        origin.inspect()
        yield origin


def test_inspect_writes_nothing(physical: PhysicalMachine) -> None:
    # What a login itself writes (logs, utmp, sudo's memory, sessions of systemd) is not ours.
    look = (
        "find / -xdev -newer /dev/shm/mark -not -path '/proc' -not -path '/run' -not -path '/dev' "
        "-not -path '/var/log/*' -not -path '/dev/shm*'; "
        "find /boot /run /tmp /dev -newer /dev/shm/mark -not -type d -not -path '/run/utmp' -not -path '/run/systemd/*' "
        "-not -path '/run/log/*' "
        "-not -path '/run/user/*' -not -path '/run/sudo/*' -not -path '/run/udev/*' "
        "-not -path '/dev/pts/*' -not -path '/dev/shm/*' "
        "-not -path '/dev/ptmx' -not -path '/dev/null' -not -path '/dev/tty*' -not -path '/run/motd*'; "
        "dmesg | wc -l; md5sum /etc/lvm/backup/* /run/lvm/hints; "
        "vgs --noheadings -o seqno --readonly --config 'devices{hints=\"none\"}'"
    )
    before = physical.run(f"touch /dev/shm/mark; sleep 1; {look}", check=False).stdout
    with SshOrigin(target(physical)) as origin:
        machine = origin.inspect()
        inspection = origin.inspection
    after = physical.run(f"{look}; rm /dev/shm/mark", check=False).stdout
    assert after == before
    assert machine.name == "metal1"
    assert inspection is not None
    assert inspection.notices == ()
    assert machine.boot.kernels[0].drivers


class TestOpenCapture(OpenCaptureContract):
    @pytest.fixture
    def origin(self, host: SshOrigin) -> SshOrigin:
        return host

    @pytest.fixture(scope="class")
    def opened(self, host: SshOrigin) -> Iterator[Capture]:
        with host.capture() as capture:
            yield capture

    @pytest.fixture(autouse=True)
    def _physical(self, physical: PhysicalMachine) -> None:
        self.physical = physical

    def disturb(self) -> None:
        self.physical.run(
            "dd if=/dev/urandom of=/root/noise bs=1M count=8 conv=fsync 2>/dev/null; "
            "echo x >/boot/noise; sync; rm /root/noise /boot/noise; sync"
        )


class TestRelease(ReleaseContract):
    @pytest.fixture
    def origin(self, host: SshOrigin, physical: PhysicalMachine) -> SshOrigin:
        self.physical = physical
        return host

    def left_alone(self, origin: Origin) -> None:
        wait_clean(self.physical, 30)


def root_volume(disk: BlockSource) -> BlockSource:
    """The LV vg0/root of a copied disk."""
    pv = Window(disk, 301 << 20, disk.size - (301 << 20))
    label = lvm.read_label(pv)
    assert label is not None
    assert label.group is not None
    assert {volume.name for volume in label.group.logical} == {"root", "swap"}  # the copy never knew of the snapshot
    (physical,) = label.group.physical
    volume = next(volume for volume in label.group.logical if volume.name == "root")
    return lvm.lv_source(label.group, volume, {physical.name: pv})


def extract(source: BlockSource, path: Path) -> Path:
    sink = RawSink(path, source.size)
    copy(source, sink)
    sink.close()
    return path


def test_the_copy_is_one_instant_of_a_working_machine(
    physical: PhysicalMachine, host: SshOrigin, tmp_path: Path
) -> None:
    writer = physical.start_writer()
    time.sleep(2)
    acknowledged = writer.acknowledged[-1].number
    with host.capture() as capture:
        (disk,) = capture.disks.values()
        assert disk.consistency is Consistency.CRASH
        done = extract(disk.source, tmp_path / "disk.raw")
        first = fingerprint(Window(disk.source, 0, 301 << 20))
    assert physical.stop_writer()[-1].number > acknowledged
    wait_clean(physical, 30)
    image = RawFile(done)
    assert fingerprint(Window(image, 0, 301 << 20)) == first
    boot = extract(Window(image, 1 << 20, 300 << 20), tmp_path / "boot.raw")
    root = extract(root_volume(image), tmp_path / "root.raw")
    for volume in (boot, root):
        checked = subprocess.run(["e2fsck", "-fn", str(volume)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    folder = tmp_path / "writer"
    folder.mkdir()
    subprocess.run(["debugfs", "-R", f"rdump /srv/writer {folder}", str(root)], capture_output=True, check=True)
    verified = subprocess.run(
        verify_command(str(folder / "writer")), shell=True, capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stdout
    assert int(verified.stdout) >= acknowledged


_HELD = """
import sys, time
from pathlib import Path
from p2v.collect.ssh import SshOrigin
from p2v.session import SshTarget
target = SshTarget.parse(sys.argv[1], identity=Path(sys.argv[2]), known_hosts=Path(sys.argv[3]))
with SshOrigin(target, silence=int(sys.argv[4])) as origin, origin.capture() as capture:
    print("open", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def collector(physical: PhysicalMachine) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that holds a capture open."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        arguments = [
            f"ssh://root@127.0.0.1:{physical.ssh_port}",
            str(physical.identity),
            str(physical.known_hosts),
            str(SILENCE),
        ]
        process = subprocess.Popen([sys.executable, "-c", _HELD, *arguments], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_collector_leaves_nothing(
    physical: PhysicalMachine, collector: Callable[[], subprocess.Popen[str]], how: signal.Signals
) -> None:
    process = collector()
    assert "p2v-" in str(physical.run("lvs").stdout)
    os.kill(process.pid, how)
    wait_clean(physical, SILENCE + 60)


def test_a_silent_collector_is_taken_for_dead(
    physical: PhysicalMachine, collector: Callable[[], subprocess.Popen[str]]
) -> None:
    process = collector()
    os.kill(process.pid, signal.SIGSTOP)  # its connection stays up
    wait_clean(physical, 2 * SILENCE + 90)


def test_a_killed_guard_is_an_error_and_leaves_nothing(physical: PhysicalMachine, host: SshOrigin) -> None:
    with pytest.raises(ConsistencyError), host.capture() as capture:
        physical.run("for p in $(pgrep -f p2v-guard-); do [ $p = $$ ] || { kill -9 $p; break; }; done", check=False)
        (disk,) = capture.disks.values()
        extent = next(e for e in disk.source.extents(1 << 30, disk.source.size - (1 << 30)) if e.kind is Kind.DATA)
        for _ in range(600):
            disk.source.readinto(memoryview(bytearray(4096)), extent.start)
            time.sleep(0.1)
    wait_clean(physical, 3 * SILENCE + 60)


def test_leftovers_of_a_killed_run_are_removed_and_those_of_others_are_not(
    physical: PhysicalMachine, host: SshOrigin
) -> None:
    physical.run(
        "for n in p2v-0badcafe-0 mine; do lvcreate -qq -A n -s -pr -l 8 -n $n vg0/root; done; "
        "lvcreate -qq -A n -y -l 2 -n p2v-0badcafe-1 vg0"
    )
    try:
        assert host.cleanup() == ["LVM snapshot vg0/p2v-0badcafe-0"]
        left = str(physical.run("lvs --noheadings -o lv_name").stdout).split()
        assert sorted(left) == ["mine", "p2v-0badcafe-1", "root", "swap"]  # the second is no snapshot: not ours
    finally:
        physical.run("lvremove -qq -f -A n vg0/mine vg0/p2v-0badcafe-1")


def test_the_snapshots_of_a_living_run_stay(physical: PhysicalMachine, host: SshOrigin, notices: list[Notice]) -> None:
    with host.capture() as capture:
        assert host.cleanup() == []
        assert any(notice.code == "snapshot-left" for notice in notices)
        assert capture.disks
    wait_clean(physical, 30)


def test_a_snapshot_that_overflows_is_never_silent(
    physical: PhysicalMachine, host: SshOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2v.collect import consistency

    monkeypatch.setattr(consistency, "_rooms", lambda sizes, free, extent: dict.fromkeys(sizes, 2))
    with pytest.raises(ConsistencyError, match="overflowed"), host.capture() as capture:
        physical.run("dd if=/dev/urandom of=/root/noise bs=1M count=40 conv=fsync; rm /root/noise; sync")
        assert capture.disks
    wait_clean(physical, 30)


def test_no_sudo_is_a_privilege_error(physical: PhysicalMachine) -> None:
    with pytest.raises(PrivilegeError), SshOrigin(target(physical, "nosudo", "nosudo-pw")) as origin:
        origin.inspect()


def test_sudo_does(physical: PhysicalMachine) -> None:
    with SshOrigin(target(physical, "admin", "admin-pw")) as origin:
        assert origin.inspect().volume_groups


def test_a_missing_tool_is_a_notice(physical: PhysicalMachine) -> None:
    physical.run("mv /usr/bin/lscpu /usr/bin/lscpu.away")
    try:
        with SshOrigin(target(physical)) as origin:
            origin.inspect()
            assert origin.inspection is not None
            assert [notice.subject for notice in origin.inspection.notices] == ["lscpu"]
    finally:
        physical.run("mv /usr/bin/lscpu.away /usr/bin/lscpu")


def test_a_cut_link_is_an_error_and_the_source_cleans_up(physical: PhysicalMachine) -> None:
    with SshOrigin(target(physical), silence=SILENCE) as origin:
        try:
            with pytest.raises(ToolkitError), origin.capture() as capture:
                physical.set_link(up=False)
                (disk,) = capture.disks.values()
                fingerprint(disk.source)
        finally:
            physical.set_link(up=True)
    wait_clean(physical, 3 * SILENCE + 120)


def test_without_lvm_it_is_fuzzy_and_says_so(bios_plain_disk: BuiltMachine) -> None:
    notices: list[Notice] = []
    with PhysicalMachine(bios_plain_disk) as plain:
        with SshOrigin(target(plain), notice=notices.append) as origin, origin.capture() as capture:
            (disk,) = capture.disks.values()
            assert disk.consistency is Consistency.FUZZY
            assert [(n.code, n.subject) for n in capture.notices] == [("fuzzy-disk", capture.machine.boot.disk)]
            assert notices == []  # it is for whoever copies to tell, when it stays so
            assert isinstance(capture, Holdable)
            extents = list(disk.source.extents(0, disk.source.size))
            held = sum(extent.length for extent in extents if extent.kind is Kind.DATA)
            swap = next(v for v in capture.machine.volumes if v.content == "swap")
            assert held <= disk.source.size - swap.size + (1 << 20)  # of swap only the header
            head = bytearray(512)
            disk.source.readinto(memoryview(head), 0)
            assert head[510:] == b"\x55\xaa"
        wait_clean(plain, 30)


def test_a_vanished_disk_is_an_error(physical: PhysicalMachine) -> None:
    """The last test: the machine is of no use afterwards."""
    with (
        SshOrigin(target(physical), silence=SILENCE) as origin,
        pytest.raises(ToolkitError) as caught,
        origin.capture() as capture,
    ):
        physical.remove_disk("sda")
        (disk,) = capture.disks.values()
        fingerprint(disk.source)
    assert caught.value.exit_code in range(24, 38)
    assert re.search(r"sda|vanish|snapshot|read", caught.value.message)
