"""Drills of small machines that really boot: verdicts, data disks, copies broken on purpose, groups, what is stored and what is left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from backup.check import records
from backup.drill import Drilled, DrillOptions, DrillRun, history
from backup.job import DrillGroup, DrillJob, DrillTarget, read_job
from backup.report import write_report
from backup.repository import Repository
from backup.sabotage import Sabotage
from backup.workfolder import sweep, work_folder
from formats.errors import UsageError
from formats.machine import Volume
from formats.memory import MemoryDisk
from formats.overlay import Overlay
from formats.progress import Silence
from p2v.target.disks import prove_data_disks
from p2v.target.probe import HttpProbe, MarkerProbe, ScriptProbe, SerialProbe, SshProbe, TcpProbe
from p2v.target.verdict import Result
from tests.backup.drills import MIB, PANICS, QUICK, WORKS, SmallMachine, file_system, stored, uuid_of
from tests.requirement import needs

pytestmark = needs("qemu-system-x86_64", "qemu-img")


def drilled(
    folder: Path,
    repository: Repository,
    *targets: DrillTarget,
    sabotages: Sequence[Sabotage] = (),
    full_restore: bool = False,
    timeout: float = 0.0,
) -> list[Drilled]:
    """One run with one group."""
    with work_folder(folder) as work:
        options = DrillOptions(
            folder=work,
            full_restore=full_restore,
            sabotages=sabotages,
            patience=QUICK,
            timeout=timeout,
        )
        job = DrillJob(groups=(DrillGroup(name="all", targets=targets),))
        done = list(DrillRun(repository, options, listen=lambda _: None, progress=Silence).run(job))
        done = write_report(folder / "report", repository, done)
    assert [path.name for path in folder.glob("p2v-drill-*")] == []
    return done


def test_a_machine_that_comes_up_passes_and_the_record_says_so(tmp_path: Path) -> None:
    _, repository, [point] = stored(tmp_path / "repository", SmallMachine("web", WORKS))
    [done] = drilled(tmp_path, repository, DrillTarget(machine="web"))
    assert (done.result, done.mode, done.machine) == (Result.PASS, "repository", "web")
    assert done.rto == pytest.approx(sum(step.seconds for step in done.steps), abs=0.1)
    assert done.rto >= done.verdict.seconds > 0
    assert 512 <= done.bytes_read <= 2 * MIB
    assert Path(done.verdict.console).read_bytes().endswith(b"metal1 login: ")
    assert all(Path(shot.path).read_bytes().startswith(b"\x89PNG") for shot in done.verdict.screenshots)
    assert done.verdict.screenshots
    [document] = records(repository, point)
    assert (document["kind"], document["result"], document["rto"]) == ("drill", "pass", done.rto)
    assert isinstance(document["evidence"], dict)
    assert len(document["evidence"]["console.log"]) == 64
    [past] = history(repository, "web")
    assert (past.point, past.rto, past.result) == (point.name, done.rto, "pass")


@pytest.mark.parametrize(
    ("machine", "result", "code"),
    [
        (SmallMachine("web", PANICS), Result.FAIL, "kernel-panic"),
        (SmallMachine("web", [("screen", "Loading initial ramdisk ...")]), Result.UNPROVEN, "no-signal"),
    ],
)
def test_what_does_not_come_up_does_not_pass(tmp_path: Path, machine: SmallMachine, result: Result, code: str) -> None:
    _, repository, _ = stored(tmp_path / "repository", machine)
    [done] = drilled(tmp_path, repository, DrillTarget(machine="web"))
    assert (done.result, done.rto) == (result, 0.0)
    assert code in {finding.code for finding in done.findings}
    if code == "kernel-panic":
        assert "No working init found" in done.reason


def test_a_full_restore_boots_what_was_written(tmp_path: Path) -> None:
    _, repository, _ = stored(tmp_path / "repository", SmallMachine("web", WORKS))
    [done] = drilled(tmp_path, repository, DrillTarget(machine="web"), full_restore=True)
    assert (done.result, done.mode) == (Result.PASS, "full-restore")
    assert "restore" in {step.name for step in done.steps}
    assert not list((tmp_path / "report").rglob("*.raw"))


def test_all_time_spent_leaves_the_rest_unproven(tmp_path: Path) -> None:
    slow = SmallMachine("slow", [("wait", 200), *WORKS])
    _, repository, _ = stored(tmp_path / "repository", slow, SmallMachine("web", WORKS))
    done = drilled(tmp_path, repository, DrillTarget(machine="slow"), DrillTarget(machine="web"), timeout=1.0)
    assert [d.result for d in done] == [Result.UNPROVEN, Result.UNPROVEN]
    assert [f.code for f in done[1].findings] == ["not-drilled"]


def test_a_group_ends_with_the_first_that_does_not_pass(tmp_path: Path) -> None:
    machines = (SmallMachine("db", PANICS), SmallMachine("app", WORKS))
    _, repository, points = stored(tmp_path / "repository", *machines)
    done = drilled(tmp_path, repository, DrillTarget(machine="db"), DrillTarget(machine="app"))
    assert [(d.machine, d.result) for d in done] == [("db", Result.FAIL), ("app", Result.UNPROVEN)]
    assert "db" in done[1].reason
    assert records(repository, points[1]) == []


def test_the_sample_chooses_the_point(tmp_path: Path) -> None:
    _, repository, [old, new] = stored(tmp_path / "repository", SmallMachine("web", WORKS), SmallMachine("web", PANICS))
    [done] = drilled(tmp_path, repository, DrillTarget(machine="web", sample="oldest"))
    assert (done.point, done.result) == (old.name, Result.PASS)
    [done] = drilled(tmp_path, repository, DrillTarget(machine="web", sample="newest"))
    assert (done.point, done.result) == (new.name, Result.FAIL)
    with pytest.raises(UsageError, match="no point of"):
        drilled(tmp_path, repository, DrillTarget(machine="mail"))
    with pytest.raises(UsageError, match="of web"):
        drilled(tmp_path, repository, DrillTarget(machine="mail", point=old.name))


# -- broken on purpose -----------------------------------------------------------------------------------------------


def test_a_copy_broken_on_purpose_is_seen_failing(tmp_path: Path) -> None:
    machine = SmallMachine("web", WORKS, data={"data": file_system(tmp_path)})
    store, repository, _ = stored(tmp_path / "repository", machine)
    before = sorted(stored.name for stored in store.list(""))
    [done] = drilled(tmp_path, repository, DrillTarget(machine="web"), sabotages=list(Sabotage))
    assert done.result is Result.PASS
    # A boot sector has no root file system: that copy cannot be made.
    assert [d.sabotage for d in done.detectors] == [Sabotage.BOOT_RECORD, Sabotage.DATA_DISK]
    assert all(d.held and d.result is Result.FAIL for d in done.detectors)
    assert [
        name for name in sorted(stored.name for stored in store.list("")) if not name.startswith("records/")
    ] == before


def test_blind_detectors_fail_the_drill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, repository, _ = stored(tmp_path / "repository", SmallMachine("web", WORKS))
    monkeypatch.setattr("backup.drill.sabotage", lambda kind, machine, disks: ["nothing was broken"])
    [done] = drilled(tmp_path, repository, DrillTarget(machine="web"), sabotages=[Sabotage.BOOT_RECORD])
    assert (done.verdict.result, done.result) == (Result.PASS, Result.FAIL)
    assert "detectors no longer work" in done.reason


# -- data disks ------------------------------------------------------------------------------------------------------


def _volume(content: bytes, kind: str = "ext4") -> Volume:
    return Volume(
        path="/dev/sdb", kind="disk", size=len(content), content=kind, uuid=uuid_of(content), mountpoints=("/data",)
    )


@needs("mkfs.ext4")
@pytest.mark.parametrize(
    ("damage", "recorded", "result", "code"),
    [
        (None, True, Result.PASS, ""),
        ((0, 4096), True, Result.FAIL, "file-system-missing"),
        ((0, 4096), False, Result.UNPROVEN, "disk-unproven"),
        ((1024 + 0x78, 1), True, Result.FAIL, "file-system-damaged"),  # the label: under the superblock's checksum
        ((0, 8 * MIB), False, Result.PASS, ""),  # an empty disk
    ],
)
def test_a_disk_that_is_not_booted_from_has_a_proof_of_its_own(
    tmp_path: Path, damage: tuple[int, int] | None, recorded: bool, result: Result, code: str
) -> None:
    whole = file_system(tmp_path)
    content = bytearray(whole)
    if damage is not None:
        start, length = damage
        content[start : start + length] = b"\x01" if length == 1 else bytes(length)
    machine = SmallMachine(
        "web", WORKS, data={"data": bytes(content)}, volumes=(_volume(whole),) if recorded else ()
    )  # fmt: skip
    _, repository, _ = stored(tmp_path / "repository", machine)
    [done] = drilled(tmp_path, repository, DrillTarget(machine="web"))
    assert done.verdict.result is Result.PASS
    assert [proof.result for proof in done.disks] == [result]
    assert done.result is result
    assert [f.code for f in done.findings] == ([code] if code else [])


@needs("mkfs.xfs")
def test_xfs_is_proven_by_its_checksum(tmp_path: Path) -> None:
    content = file_system(tmp_path, "xfs", 300 * MIB)
    machine = SmallMachine("web", WORKS, data={"data": bytes(1 << 16)}).inspect()
    disk = MemoryDisk(len(content), content)
    sources = {"boot": MemoryDisk(MIB, bytes(MIB)), "data": disk}
    assert [proof.result for proof in prove_data_disks(machine, sources)] == [Result.PASS]
    overlay = Overlay(disk)
    overlay.write(memoryview(b"\x01"), 108)  # the label
    [proof] = prove_data_disks(machine, {**sources, "data": overlay})
    assert (proof.result, [f.code for f in proof.findings]) == (Result.FAIL, ["file-system-damaged"])


# -- what killed runs leave ------------------------------------------------------------------------------------------


def test_only_folders_of_runs_that_are_gone_are_removed(tmp_path: Path) -> None:
    other = tmp_path / "p2v-drill-not-a-folder"
    other.write_text("a file")
    empty = tmp_path / "p2v-drill-newborn"
    empty.mkdir()
    with work_folder(tmp_path) as mine:
        gone = tmp_path / "p2v-drill-gone"
        gone.mkdir()
        (gone / "lock").touch()
        (gone / "disk-0.raw").touch()
        assert sweep(tmp_path) == [gone]
        assert mine.is_dir()
        long_ago = time.time() - 3600
        os.utime(empty, (long_ago, long_ago))
        assert sweep(tmp_path) == [empty]
    assert sorted(tmp_path.iterdir()) == [other]


# -- job files -------------------------------------------------------------------------------------------------------

_JOB = """
timeout = 7200
[[group]]
name = "shop"
[[group.machine]]
machine = "db1"
sample = "oldest"
timeout = 900
[[group.machine.probe]]
kind = "tcp"
port = 5432
[[group.machine.probe]]
kind = "ssh"
command = "systemctl is-system-running --wait"
identity = "key"
expect = "running|degraded"
[[group.machine.probe]]
kind = "marker"
path = "/srv/marker"
sha256 = "{hash}"
identity = "key"
[[group.machine]]
machine = "app1"
platform = "proxmox"
[[group.machine.probe]]
kind = "http"
tls = true
contains = "Welcome"
[[group.machine.probe]]
kind = "script"
command = "./look --deep"
ports = [25, 143]
[[group.machine.probe]]
kind = "serial"
user = "admin"
password = "DRILL_PASSWORD"
command = "true"
[[group.machine.probe]]
kind = "agent"
"""


def test_a_job_file_says_what_is_drilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRILL_PASSWORD", "very secret")
    (tmp_path / "key").touch()
    path = tmp_path / "job.toml"
    path.write_text(_JOB.format(hash="0" * 64))
    job = read_job(path)
    assert (job.timeout, [group.name for group in job.groups]) == (7200, ["shop"])
    database, application = job.groups[0].targets
    assert (database.machine, database.sample, database.timeout) == ("db1", "oldest", 900)
    tcp, ssh, marker = database.probes
    assert isinstance(tcp, TcpProbe)
    assert isinstance(ssh, SshProbe)
    assert ssh.identity == tmp_path / "key"
    assert isinstance(marker, MarkerProbe)
    http, script, serial, agent = application.probes
    assert isinstance(http, HttpProbe)
    assert http.port == 443
    assert isinstance(script, ScriptProbe)
    assert script.command == (str(tmp_path / "look"), "--deep")
    assert isinstance(serial, SerialProbe)
    assert "very secret" not in repr(serial)
    assert agent.kind == "agent"


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("port = 5432", "prot = 5432", "$.group[0].machine[0].probe[0]"),
        ("port = 5432", "port = 0", "$.group[0].machine[0].probe[0].port"),
        ('kind = "agent"', 'kind = "ping"', "probe[3]"),
        ("timeout = 900", "timeout = -1", "$.group[0].machine[0].timeout"),
        ('sample = "oldest"', 'sample = "best"', "$.group[0].machine[0].sample"),
        ('platform = "proxmox"', 'platform = "cloud"', "$.group[0].machine[1].platform"),
        ('expect = "running|degraded"', 'expect = "("', "$.group[0].machine[0].probe[1].expect"),
        ('identity = "key"', 'identity = "no-key"', "$.group[0].machine[0].probe[1].identity"),
        ('"DRILL_PASSWORD"', '"NOT_SET"', "$.group[0].machine[1].probe[2].password"),
        ("timeout = 7200", "retries = 3", "retries"),
        ("[[group]]", "[[group", "job.toml"),
    ],
)
def test_what_a_job_file_may_not_say_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, place: str
) -> None:
    monkeypatch.setenv("DRILL_PASSWORD", "x")
    (tmp_path / "key").touch()
    path = tmp_path / "job.toml"
    path.write_text(_JOB.format(hash="0" * 64).replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        read_job(path)
    assert place in caught.value.message
