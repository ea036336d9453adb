"""The hard machine: host-only initramfs, no EFI fallback loader, disks in fstab by their order, a static address on a name of its slot."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from formats.definitions import Hardware as TargetHardware
from formats.machine import Firmware, Machine
from p2v.adapt import AdaptPlan, Kind, Status, plan_adaptation
from p2v.cli import run
from p2v.emulator import Chipset, Controller, Emulator, Hardware, Network, NicModel
from p2v.errors import DoesNotBootError, HostError
from p2v.session import Session, SshTarget
from p2v.target.boots import boot
from p2v.target.hardware import platform_hardware
from p2v.target.verdict import Result
from tests.machines.builder import BuiltMachine
from tests.machines.physical import PhysicalMachine
from tests.p2v.adapt.live import AdaptedSource, LiveSource, adapted_source, live_source
from tests.requirement import needs

pytestmark = [
    pytest.mark.slow_boot,
    pytest.mark.nightly,  # it takes minutes to build and to boot so often
    needs("qemu-system-x86_64", "qemu-img", "busybox"),
]

INITRAMFS = "/boot/initrd.img-"


@pytest.fixture(scope="module")
def source(physical_uefi_dracut: PhysicalMachine, tmp_path_factory: pytest.TempPathFactory) -> LiveSource:
    return live_source(physical_uefi_dracut, tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def adapted(source: LiveSource, tmp_path_factory: pytest.TempPathFactory) -> AdaptedSource:
    return adapted_source(source, tmp_path_factory.mktemp("adapted"))


def test_the_initramfs_drives_the_source_alone(source: LiveSource) -> None:
    (kernel,) = source.machine.boot.kernels
    assert kernel.host_only and kernel.drivers is not None
    assert "ahci" in kernel.drivers and not {"virtio_blk", "virtio_scsi", "nvme"} & set(kernel.drivers)
    assert source.kernel.controller is Controller.SATA


def test_the_audit_names_each_change(adapted: AdaptedSource) -> None:
    changes = {change.path: change for change in adapted.done.changes}
    (initramfs,) = (path for path in changes if path.startswith(INITRAMFS))
    assert sorted(changes) == sorted(
        [
            initramfs,
            "/boot/efi/EFI/BOOT/BOOTX64.EFI",
            "/etc/dracut.conf.d/zz-p2v.conf",
            "/etc/fstab",
            "/etc/systemd/network/10-p2v-enp0s31f6.link",
        ]
    )
    fstab = changes["/etc/fstab"]
    assert fstab.kind is Kind.MODIFIED and fstab.before is not None and fstab.after is not None
    assert "/dev/sda1" in (fstab.before.text or "") and "/dev/sdb1" in (fstab.before.text or "")
    assert "/dev/sd" not in (fstab.after.text or "")
    text = adapted.done.audit.read_text()
    uuids = {volume.path: volume.uuid for volume in adapted.source.machine.volumes}
    assert f"+UUID={uuids['/dev/sda1']}" in text and f"+UUID={uuids['/dev/sdb1']}" in text
    states = {item.name: item.status for item in adapted.done.items}
    assert {name for name, status in states.items() if status is Status.DONE} == {
        *("initramfs", "names", "network", "efi-fallback")
    }


def answering(emulator: Emulator, built: BuiltMachine, folder: Path) -> Session:
    """A session with the booted machine, once it answers."""
    port = emulator.forwarded_port(22)
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{port} {built.keys.host_public}\n")
    target = SshTarget(
        host="127.0.0.1", user="root", port=port, identity=built.keys.identity, known_hosts=known_hosts, config=None
    )
    while True:
        emulator.check()
        try:
            return Session.connect(target)
        except HostError:
            assert emulator.seconds < 420, "the machine does not answer on its address"
            time.sleep(1)


@pytest.mark.parametrize(
    "controller", [Controller.VIRTIO_BLK, Controller.VIRTIO_SCSI, Controller.SATA, Controller.NVME]
)
def test_adapted_it_boots_as_it_was(
    adapted: AdaptedSource,
    physical_uefi_dracut: PhysicalMachine,
    uefi_dracut_disk: BuiltMachine,
    controller: Controller,
    tmp_path: Path,
) -> None:
    """Every file system is mounted, the static address answers on the same name, and no unit fails that had not failed before."""
    hardware = Hardware(
        firmware=Firmware.UEFI, chipset=Chipset.Q35, controller=controller, nic=NicModel.VIRTIO, memory=1 << 30, cpus=2
    )
    (nic,) = adapted.source.machine.nics
    network = Network(mac=nic.mac, address=nic.addresses[0], gateway=nic.gateway)
    with (
        Emulator(hardware, adapted.drives(tmp_path), folder=tmp_path, network=network) as emulator,
        answering(emulator, uefi_dracut_disk, tmp_path) as session,
    ):
        session.run("systemctl is-system-running --wait", timeout=300)
        said = session.run(
            "for m in / /boot /boot/efi /home /data; do findmnt -rno TARGET,FSTYPE $m; done; cat /home/known /data/known;"
            " ip -4 -o address show dev enp0s31f6 | tr -s ' ' | cut -d' ' -f4; ip route show default | cut -d' ' -f3,5;"
            " swapon --noheadings --show=TYPE; basename $(readlink -f /sys/class/net/enp0s31f6/device/driver)",
            check=True,
        )
        failed = session.run("systemctl --failed --plain --no-legend | cut -d' ' -f1", check=True).text.split()
    assert said.text.splitlines() == [
        *("/ xfs", "/boot ext4", "/boot/efi vfat", "/home ext4", "/data ext4"),
        *("on the home volume", "on the data disk"),
        *("10.0.2.15/24", "10.0.2.2 enp0s31f6", "partition", "virtio_net"),
    ]
    before = physical_uefi_dracut.run("systemctl --failed --plain --no-legend | cut -d' ' -f1").stdout.split()
    assert set(failed) <= set(before)


def test_unadapted_it_finds_no_loader(source: LiveSource, tmp_path: Path) -> None:
    target = platform_hardware("libvirt", source.machine)
    verdict = boot(source.machine, source.drives(tmp_path), target.hardware, folder=tmp_path)
    assert verdict.result is Result.FAIL
    assert "uefi-shell" in {finding.code for finding in verdict.findings}


def test_with_a_loader_but_no_driver_the_driver_is_named(
    physical_uefi_dracut: PhysicalMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    physical = physical_uefi_dracut
    asked = ["convert", f"ssh://root@127.0.0.1:{physical.ssh_port}", "--to", "libvirt", "-o", str(tmp_path / "out")]
    keys = ["--identity", str(physical.identity), "--known-hosts", str(physical.known_hosts)]
    assert run([*asked, *keys, "--adapt-only", "efi-fallback", "--json"]) == DoesNotBootError.exit_code
    answer = json.loads(capsys.readouterr().out)
    assert "has no virtio_blk, virtio_pci for virtio-blk disks" in str(answer["errors"])
    assert answer["data"]["verdict"]["result"] == "fail"
    assert not (tmp_path / "out" / "metal3.xml").exists()


def test_a_copy_that_does_not_find_its_root_is_repaired(
    physical_uefi_dracut: PhysicalMachine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A converted folder that nobody adapted, and a plan that forgets the initramfs: the failed boot brings it back."""
    physical, plain, repaired = physical_uefi_dracut, tmp_path / "plain", tmp_path / "repaired"
    keys = ["--identity", str(physical.identity), "--known-hosts", str(physical.known_hosts)]
    words = ["convert", f"ssh://root@127.0.0.1:{physical.ssh_port}", "--to", "libvirt", "-o", str(plain), *keys, "-q"]
    assert run([*words, "--no-adapt", "--boot-check", "none"]) == 3

    def forgetful(
        machine: Machine,
        hardware: TargetHardware | None = None,
        only: frozenset[str] | None = None,
        *,
        rebuild: bool = False,
    ) -> AdaptPlan:
        plan = plan_adaptation(machine, hardware, only, rebuild=rebuild)
        return plan if only else replace(plan, items=tuple(item for item in plan.items if item.name != "initramfs"))

    monkeypatch.setattr("p2v.convert.plan_adaptation", forgetful)
    capsys.readouterr()
    assert run(["convert", str(plain), "--to", "qemu", "-o", str(repaired), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    first, second = data["adaptation"]
    assert "initramfs" not in {item["name"] for item in first["items"]}
    assert {"name": "initramfs", "status": "done"}.items() <= next(
        item for item in second["items"] if item["name"] == "initramfs"
    ).items()
    assert data["verdict"]["result"] == "pass"
    assert (repaired / "metal3.sh").exists()
