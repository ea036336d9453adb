"""The main job on a real machine: taken while it runs, seen to boot, copied, defined; and what is left when it is stopped.

The source runs under emulation as every machine here does, so each conversion takes minutes: few tests, each looking at much.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from formats import qemu_img
from p2v.errors import LinkLostError
from tests.machines.physical import PhysicalMachine
from tests.p2v.conversion import address, disturbed, final_names, interrupted, left_on, p2v
from tests.requirement import needs, needs_root

pytestmark = [
    pytest.mark.slow_boot,
    needs("qemu-system-x86_64", "qemu-img", "qemu-nbd", "mmdebstrap"),
    needs_root(),
    pytest.mark.timeout(1500),
]

COPY = "copy metal1-disk0.qcow2"
GUARD_BOUND = 90  # seconds until the guard on the source has cleaned up by itself when its collector is gone


def test_a_live_machine_becomes_a_vm_that_boots(physical_bios_lvm: PhysicalMachine, tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    physical_bios_lvm.start_writer()
    try:
        run = p2v("convert", *address(physical_bios_lvm), "--to", "libvirt", "-o", str(folder))
    finally:
        physical_bios_lvm.stop_writer()
    assert run.code in (0, 3), run.log
    data = run.envelope["data"]
    assert data["verdict"]["level"] == "boots"
    assert data["verdict"]["result"] == "pass"
    assert data["consistency"] == "crash"
    assert final_names(folder) == ["machine.json", "metal1-disk0.qcow2", "metal1.xml"]
    assert qemu_img.check(folder / "metal1-disk0.qcow2", "qcow2").clean
    disk = next(iter(data["copied"].values()))
    assert disk["read"] < disk["size"] / 4  # used blocks only: about 0.8 of 6 GiB
    assert data["bytes_read_before_copy"] < disk["read"]
    assert left_on(physical_bios_lvm) == ""

    boot = p2v("boot", str(folder))
    assert boot.code == 0, boot.log
    assert boot.envelope["data"]["verdict"]["result"] == "pass"

    again = p2v("convert", str(folder), "--to", "vmware-workstation", "-o", str(folder), "--boot-check", "none")
    assert again.code == 2  # machine.json is there already: nothing is overwritten


def test_a_machine_without_kernel_stops_before_the_copy(physical_bios_lvm: PhysicalMachine, tmp_path: Path) -> None:
    hidden = "cd /boot && for f in vmlinuz-*; do mv $f hidden-$f; done; sync"
    physical_bios_lvm.run(hidden)
    try:
        run = p2v("convert", *address(physical_bios_lvm), "--to", "libvirt", "-o", str(tmp_path))
    finally:
        physical_bios_lvm.run("cd /boot && for f in hidden-*; do mv $f ${f#hidden-}; done; sync")
    assert run.code == 70, run.log
    error = run.envelope["errors"][0]
    assert "nothing was copied" in error["message"]
    assert error["advice"]
    assert run.envelope["data"]["bytes_read_before_copy"] < 300 << 20
    assert final_names(tmp_path) == []
    assert left_on(physical_bios_lvm) == ""


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stage", ["inspect", "capture", "boot check", COPY, "second opinion on metal1-disk0.qcow2"])
def test_stopped_in_every_stage(
    physical_bios_lvm: PhysicalMachine, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    words = ["convert", *address(physical_bios_lvm), "--to", "libvirt", "-o", str(tmp_path / "vm")]
    if stage != "boot check":
        words += ["--boot-check", "none"]
    pause = 0.05 if stage.startswith("second opinion") else 1.0  # it ends within a second
    code = interrupted(words, stage, number, tmp_path / "log", pause=pause)
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 130), (tmp_path / "log").read_text()
    assert final_names(tmp_path / "vm") == []
    bound = GUARD_BOUND if number is signal.SIGKILL else 0
    assert left_on(physical_bios_lvm, within=bound) == ""


@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["link cut", "reset"])
@pytest.mark.parametrize("stage", ["inspect", "capture", "adapt", "boot check", COPY])
def test_the_source_is_lost_in_every_stage(
    physical_bios_lvm: PhysicalMachine, tmp_path: Path, stage: str, fault: str
) -> None:
    physical = physical_bios_lvm
    words = ["convert", *address(physical), "--to", "libvirt", "-o", str(tmp_path / "vm")]
    if stage not in {"adapt", "boot check"}:
        words += ["--boot-check", "none", "--no-adapt"]

    def lose(_process: object) -> None:
        if fault == "reset":
            physical.reset(wait=False)
        else:
            physical.set_link(up=False)

    log = tmp_path / "log"
    until = "([1-9][0-9] %)" if stage == COPY else ""
    try:
        code = disturbed(words, stage, lose, log, until=until)
    finally:
        physical.set_link(up=True)
        physical.wait_for_ssh()
    assert code == LinkLostError.exit_code, log.read_text()
    assert final_names(tmp_path / "vm") == []
    if fault == "reset":
        cleaned = p2v("cleanup", *address(physical))
        assert cleaned.code in {0, 3}, cleaned.log
    assert left_on(physical, within=0 if fault == "reset" else GUARD_BOUND) == ""
    if stage == COPY:
        run = p2v(*words)
        assert run.code == 3, run.log  # not seen to boot
        disk = next(iter(run.envelope["data"]["copied"].values()))
        print(f"{fault}: {disk['kept']} bytes were kept, {disk['read']} sent again")
        assert disk["kept"] > 30 << 20
        assert left_on(physical) == ""


def test_interrupted_in_the_copy_and_resumed(physical_bios_lvm: PhysicalMachine, tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    words = ["convert", *address(physical_bios_lvm), "--to", "qemu", "-o", str(folder), "--boot-check", "none"]
    log = tmp_path / "log"
    assert interrupted(words, COPY, signal.SIGINT, log, until="(10 %)|(1[0-9] %)|([2-9][0-9] %)") == 130
    assert (folder / ".metal1.part" / "metal1-disk0.qcow2").exists()  # hidden, to go on with
    assert final_names(folder) == []
    assert left_on(physical_bios_lvm) == ""

    run = p2v(*words)
    assert run.code == 3, run.log  # not seen to boot
    disk = next(iter(run.envelope["data"]["copied"].values()))
    assert disk["kept"] > 30 << 20
    assert disk["read"] < disk["kept"] + disk["read"]
    assert final_names(folder) == ["machine.json", "metal1-disk0.qcow2", "metal1.sh"]
    assert qemu_img.check(folder / "metal1-disk0.qcow2", "qcow2").clean
    assert left_on(physical_bios_lvm) == ""


def test_a_user_without_sudo(physical_bios_lvm: PhysicalMachine, tmp_path: Path) -> None:
    source = address(physical_bios_lvm, "nosudo")
    run = p2v("inspect", source[0], *source[3:], environment={"P2V_SSH_PASSWORD": "nosudo-pw"})
    assert run.code == 33, run.log
    assert "nosudo-pw" not in run.log + str(run.envelope)


def test_a_wrong_password(physical_bios_lvm: PhysicalMachine) -> None:
    source = address(physical_bios_lvm, "admin")
    run = p2v("inspect", source[0], *source[3:], environment={"P2V_SSH_PASSWORD": "not-this-one"})
    assert run.code == 32, run.log
    assert "not-this-one" not in run.log + str(run.envelope)


def test_sudo_with_a_password_does_the_job(physical_bios_lvm: PhysicalMachine) -> None:
    source = address(physical_bios_lvm, "admin")
    run = p2v("inspect", source[0], *source[3:], environment={"P2V_SSH_PASSWORD": "admin-pw"})
    assert run.code in (0, 3), run.log
    assert run.envelope["data"]["machine"]["name"] == "metal1"


def test_another_host_key(physical_bios_lvm: PhysicalMachine, tmp_path: Path) -> None:
    other = tmp_path / "known_hosts"
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
    other.write_text(f"[127.0.0.1]:{physical_bios_lvm.ssh_port} {key}\n")
    source = address(physical_bios_lvm)
    run = p2v("inspect", *source[:3], "--known-hosts", str(other))
    assert run.code == 31, run.log
