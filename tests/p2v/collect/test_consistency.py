"""The plan: what is snapshotted, what is staged, and the reason when a disk can only be fuzzy."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.capture import Consistency
from formats.layouts.lvm import Area, LogicalVolume, PhysicalLabel, PhysicalVolume, VolumeGroupText, VolumeSegment
from formats.machine import Boot, Bus, Disk, Machine, Partition, PartitionTable, TableKind, Volume
from p2v.collect import consistency
from p2v.collect.consistency import Treatment
from p2v.collect.guard import Guard, SnapshotPlan, script
from p2v.collect.hold import standstill
from p2v.errors import ConsistencyError
from p2v.session import Session
from tests.p2v.sshd import SshServer

MIB = 1 << 20
EXTENT = 4 * MIB


def partition(number: int, start: int, size: int) -> Partition:
    return Partition(number=number, start=start * MIB, size=size * MIB, type="0x83")


def volume(
    path: str,
    *parents: str,
    kind: str = "part",
    size: int = 1000,
    content: str = "",
    mount: str = "",
    used: int | None = None,
) -> Volume:
    return Volume(
        path=path,
        kind=kind,
        size=size * MIB,
        parents=parents,
        content=content,
        mountpoints=(mount,) if mount else (),
        used=None if used is None else used * MIB,
    )


def linear(name: str, start: int, size: int, kind: str = "striped") -> LogicalVolume:
    segment = VolumeSegment(
        start=0, count=size, kind=kind, areas=(Area(name="pv0", start=start),), references=frozenset({"pv0"})
    )
    return LogicalVolume(name=name, uuid=f"uuid-{name}", size=size, segments=(segment,))


def label(*volumes: LogicalVolume, count: int = 1000) -> PhysicalLabel:
    pv = PhysicalVolume(name="pv0", uuid="pv-uuid", start=MIB, count=count)
    group = VolumeGroupText(
        name="vg-0", uuid="vg-uuid", sequence=3, extent_size=EXTENT, physical=(pv,), logical=volumes
    )
    return PhysicalLabel(uuid="pv-uuid", group=group)


DISK = Disk(
    id="one",
    size=6000 * MIB,
    name="sda",
    bus=Bus.SATA,
    table=PartitionTable(kind=TableKind.MBR, id="0x1", partitions=(partition(1, 1, 300), partition(2, 301, 5000))),
)
ROOT = volume("/dev/mapper/vg--0-root", "/dev/sda2", kind="lvm", content="ext4", mount="/")
SWAP = volume("/dev/mapper/vg--0-swap", "/dev/sda2", kind="lvm", content="swap", mount="[SWAP]")
BOOT = volume("/dev/sda1", "/dev/sda", size=300, content="ext4", mount="/boot", used=50)
PV = volume("/dev/sda2", "/dev/sda", size=5000, content="LVM2_member")
MACHINE = Machine(name="m", disks=(DISK,), volumes=(BOOT, PV, SWAP, ROOT), boot=Boot(disk="one"))
LABEL = label(linear("swap", 0, 100), linear("root", 100, 400))


def planned(machine: Machine = MACHINE, found: PhysicalLabel = LABEL) -> consistency.Plan:
    return consistency.plan(machine, {"/dev/sda2": found}, "0123abcd")


def with_volumes(*volumes: Volume) -> Machine:
    return dataclasses.replace(MACHINE, volumes=volumes)


def test_volumes_by_snapshot_boot_by_freeze() -> None:
    plan = planned()
    (disk,) = plan.disks
    assert disk.consistency is Consistency.CRASH
    assert plan.notices == ()
    assert [(r.path, r.treatment) for r in disk.regions] == [
        ("/dev/sda1", Treatment.STAGED),
        ("/dev/sda2", Treatment.PHYSICAL_VOLUME),
    ]
    assert plan.mounts == ("/boot",)
    (snapshot,) = plan.snapshots  # swap needs none
    assert (snapshot.group, snapshot.volume, snapshot.name) == ("vg-0", "root", "p2v-0123abcd-0")
    assert snapshot.path == "/dev/mapper/vg--0-p2v--0123abcd--0"
    assert 16 <= snapshot.extents <= 500


def test_no_free_extents_is_fuzzy_and_says_what_to_do() -> None:
    plan = planned(found=label(linear("swap", 0, 100), linear("root", 100, 900)))
    assert plan.disks[0].consistency is Consistency.FUZZY
    assert not plan.snapshots
    assert not plan.mounts
    (notice,) = plan.notices
    assert (notice.code, notice.subject) == ("fuzzy-disk", "one")
    assert "64 MiB" in notice.advice


@pytest.mark.parametrize(
    ("volumes", "word"),
    [
        ((volume("/dev/sda1", "/dev/sda", content="ext4", mount="/"),), "root file system"),
        ((volume("/dev/sda1", "/dev/sda", size=9000, content="xfs", mount="/data"),), "too large"),
        ((volume("/dev/sda1", "/dev/sda", size=300, content="ntfs", mount="/win"),), "cannot be frozen"),
        ((volume("/dev/sda1", "/dev/sda", content="crypto_LUKS"), volume("/dev/mapper/c", "/dev/sda1", kind="crypt", mount="/")), "crypt"),
        ((volume("/dev/sda1", "/dev/sda", content="linux_raid_member"), volume("/dev/md0", "/dev/sda1", kind="raid1")), "raid1"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_still_has_a_reason(volumes: tuple[Volume, ...], word: str) -> None:
    plan = planned(with_volumes(*volumes))
    assert plan.disks[0].consistency is Consistency.FUZZY
    assert word in plan.disks[0].reason
    assert plan.mounts == ()


def test_vfat_is_read_twice_and_unmounted_partitions_as_they_are() -> None:
    esp = volume("/dev/sda1", "/dev/sda", size=300, content="vfat", mount="/boot/efi")
    plan = planned(with_volumes(esp, volume("/dev/sda2", "/dev/sda", content="ntfs")))
    assert [r.treatment for r in plan.disks[0].regions] == [Treatment.STAGED_TWICE, Treatment.LIVE]
    assert plan.disks[0].consistency is Consistency.CRASH
    assert plan.mounts == ()


def test_other_kinds_of_logical_volumes_are_fuzzy() -> None:
    plan = planned(found=label(linear("root", 0, 10, kind="raid1")))
    assert "neither linear nor striped" in plan.disks[0].reason


def test_a_removable_disk_is_left_out_by_name() -> None:
    stick = Disk(id="stick", size=MIB, name="sdb", removable=True)
    plan = planned(dataclasses.replace(MACHINE, disks=(stick, DISK)))
    assert [p.disk.id for p in plan.disks] == ["one"]
    assert [(n.code, n.subject) for n in plan.notices] == [("disk-left-out", "stick")]


def test_the_boot_disk_comes_first() -> None:
    machine = dataclasses.replace(MACHINE, disks=(Disk(id="two", size=MIB, name="sdb"), DISK))
    assert [p.disk.id for p in planned(machine).disks] == ["one", "two"]


@given(
    sizes=st.dictionaries(st.text("abc", min_size=1), st.integers(1, 1 << 20), min_size=1, max_size=9),
    free=st.integers(0, 1 << 21),
)
def test_rooms_never_exceed_what_is_free(sizes: dict[str, int], free: int) -> None:
    rooms = consistency._rooms(sizes, free, EXTENT)
    least = {name: min(size, 16) for name, size in sizes.items()}
    if rooms is None:
        assert sum(least.values()) > free
    else:
        assert sum(rooms.values()) <= free
        assert all(rooms[name] >= least[name] for name in sizes)


PLAIN = volume("/dev/sda2", "/dev/sda", size=5000, content="ext4", mount="/")
THREE = PartitionTable(
    kind=TableKind.MBR, id="0x1", partitions=(partition(1, 1, 300), partition(2, 301, 5000), partition(3, 5400, 100))
)
MEMBER = volume("/dev/sda2", "/dev/sda", size=5000, content="linux_raid_member")
ARRAY = volume("/dev/md0", "/dev/sda2", kind="raid1", content="ext4", mount="/")


@pytest.mark.parametrize(
    ("volumes", "mounts", "restless"),
    [
        ((BOOT, PLAIN), ("/boot", "/"), []),
        ((dataclasses.replace(BOOT, content="vfat"), PLAIN), ("/",), ["/boot"]),
        ((BOOT, PV, SWAP, ROOT), ("/boot", "/"), []),
    ],
)
def test_what_has_to_be_held_for_a_fuzzy_machine_to_stand_still(
    volumes: tuple[Volume, ...], mounts: tuple[str, ...], restless: list[str]
) -> None:
    machine = with_volumes(*volumes)
    full = label(linear("swap", 0, 100), linear("root", 100, 900))
    still = standstill(machine, planned(machine, full).disks)
    assert still.mounts == mounts
    assert [region.mount for _, region in still.restless] == restless


@pytest.mark.parametrize(
    ("volumes", "why"),
    [
        ((BOOT, dataclasses.replace(PLAIN, content="exfat")), "/ holds exfat, which cannot be frozen"),
        (
            (
                BOOT,
                MEMBER,
                ARRAY,
            ),
            "kind raid1",
        ),
        ((BOOT, PLAIN, volume("/dev/sda3", "/dev/sda", content="zfs_member")), "in use without being mounted"),
    ],
)
def test_what_cannot_be_held_still_is_refused(volumes: tuple[Volume, ...], why: str) -> None:
    disk = dataclasses.replace(
        DISK,
        table=PartitionTable(
            kind=TableKind.MBR,
            id="0x1",
            partitions=(partition(1, 1, 300), partition(2, 301, 5000), partition(3, 5400, 100)),
        ),
    )
    machine = dataclasses.replace(MACHINE, disks=(disk,), volumes=volumes)
    plans = [dataclasses.replace(p, reason=p.reason or "fuzzy") for p in planned(machine).disks]
    with pytest.raises(ConsistencyError, match=why):
        standstill(machine, plans)


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh"])
@pytest.mark.parametrize("mounts", [(), ("/boot", '/it\'s $(touch pwned) `here`; "now"\nx')])
def test_the_guard_is_posix_shell_and_quotes_mount_points(shell: str, mounts: tuple[str, ...]) -> None:
    plan = SnapshotPlan(group="vg", volume="root", name="p2v-01234567-0", extents=7)
    text = script(mounts, [plan])
    probe = text.partition("self() {")[0] + "mount_of 1; printf %s \"$M\"; plan_of 0; printf ' %s' $V $L $S $D $E"
    try:
        assert (
            subprocess.run([*shell.split(), "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""
        )
        shown = subprocess.run([*shell.split(), "-c", probe], text=True, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip(f"not installed: {shell}")
    assert shown == (mounts[1] if mounts else "") + " vg root p2v-01234567-0 vg-p2v--01234567--0 7"


@pytest.mark.parametrize(("act", "ends"), [(60, "done sync 0"), (5, "bye")])
def test_an_act_may_last_longer_than_the_silence_but_not_for_ever(tmp_path: Path, act: int, ends: str) -> None:
    """On a busy server ``sync`` takes minutes, and the collector cannot be heard meanwhile; one that hangs must not hold the guard."""
    slow = tmp_path / "sync"
    slow.write_text("#!/bin/sh\nsleep 17\n")
    slow.chmod(0o755)
    guard = subprocess.Popen(
        ["sh", "-c", script([], [], silence=5, act=act), "p2v-guard-01234567"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guard.stdin is not None and guard.stdout is not None
    with guard:
        assert guard.stdout.readline() == "ready\n"
        guard.stdin.write("sync\n")
        guard.stdin.flush()
        assert guard.stdout.readline() == ends + "\n"
        if ends != "bye":  # the collector says nothing from here on
            assert guard.stdout.readline() == "bye\n"


def test_a_guard_that_was_killed_is_said_to_have_ended(sshd: SshServer) -> None:
    """Whether the answer does not come or the question can no longer be sent: the same is said."""
    with Session.connect(sshd.target()) as session:
        guard = Guard.start(session, "01234567", [], [])
        session.run(["pkill", "-KILL", "-f", "p2v-guard-[0]1234567"], check=True)
        with guard:
            for _ in range(2):
                with pytest.raises(ConsistencyError, match=r"the guard on .* ended"):
                    guard.sync()


@pytest.mark.parametrize("name", ["a b", "$(x)", "", "-x", "a;b", "a'b"])
def test_a_name_that_lvm_would_not_take_never_reaches_the_shell(name: str) -> None:
    with pytest.raises(ValueError, match="LVM name"):
        script([], [SnapshotPlan(group="vg", volume=name, name="p2v-01234567-0", extents=7)])
