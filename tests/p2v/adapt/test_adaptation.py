"""A real machine adapts itself, and then starts on hardware that its own knew nothing of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from formats import qemu_img
from formats.machine import Machine
from p2v.adapt import Adaptation, AdaptItem, AdaptPlan, GuestKernel, Kind, Status, adapt, fetch_kernel, plan_adaptation
from p2v.collect.ssh import SshOrigin
from p2v.emulator import Drive, create_overlay
from p2v.errors import AdaptationError
from p2v.session import SshTarget
from p2v.target.boots import boot
from p2v.target.hardware import platform_hardware
from p2v.target.verdict import Result
from tests.machines.builder import BuiltMachine
from tests.machines.physical import PhysicalMachine
from tests.requirement import needs

pytestmark = [pytest.mark.slow_boot, needs("qemu-system-x86_64", "qemu-img", "busybox")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What was learnt of the live machine, and its disk at rest."""

    machine: Machine
    kernel: GuestKernel
    disk: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapted:
    source: _Source
    drive: Drive
    done: Adaptation


def _drive(source: _Source, overlay: Path) -> Drive:
    if not overlay.exists():
        create_overlay(overlay, source.disk.stat().st_size)
    return Drive(path=source.disk, format="raw", overlay=overlay)


@pytest.fixture(scope="module")
def source(
    bios_lvm_disk: BuiltMachine, physical_bios_lvm: PhysicalMachine, tmp_path_factory: pytest.TempPathFactory
) -> _Source:
    physical = physical_bios_lvm
    target = SshTarget(
        host="127.0.0.1",
        user="root",
        port=physical.ssh_port,
        identity=physical.identity,
        known_hosts=physical.known_hosts,
    )
    with SshOrigin(target) as origin:
        machine = origin.inspect()
        kernel = fetch_kernel(origin.session, machine, tmp_path_factory.mktemp("kernel"))
    return _Source(machine=machine, kernel=kernel, disk=bios_lvm_disk.disk)


@pytest.fixture(scope="module")
def adapted(source: _Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Adapted]:
    folder = tmp_path_factory.mktemp("adapted")
    drive = _drive(source, folder / "disk.overlay")
    heard: list[str] = []
    done = adapt(plan_adaptation(source.machine), source.machine, source.kernel, [drive], folder, listen=heard.append)
    assert any("stage started" in text for text in heard)
    yield _Adapted(source=source, drive=drive, done=done)


def test_every_change_is_in_the_audit(adapted: _Adapted) -> None:
    changes = {change.path: change for change in adapted.done.changes}
    link = changes.pop("/etc/systemd/network/10-p2v-enp0s25.link")
    image = changes.pop(adapted.source.machine.boot.kernels[-1].initramfs)
    assert not changes
    assert link.kind is Kind.CREATED and link.after is not None
    assert "Name=enp0s25" in (link.after.text or "") and adapted.source.machine.nics[0].mac in (link.after.text or "")
    assert image.before is not None and image.after is not None and 0 < image.after.size - image.before.size < 4096
    text = adapted.done.audit.read_text()
    assert "+Name=enp0s25" in text and image.after.sha256 in text
    states = {item.name: item.status for item in adapted.done.items}
    assert states["network"] is Status.DONE and states["names"] is Status.NOTHING


def test_the_overlay_is_whole_and_small(adapted: _Adapted) -> None:
    overlay = adapted.drive.overlay
    assert overlay is not None
    assert qemu_img.check(overlay, "qcow2").clean
    assert overlay.stat().st_size < 200 << 20


def test_an_adapted_machine_boots_from_virtio_and_answers_under_its_old_name(adapted: _Adapted, tmp_path: Path) -> None:
    target = platform_hardware("qemu", adapted.source.machine)
    copy = tmp_path / "copy.overlay"
    assert adapted.drive.overlay is not None
    copy.write_bytes(adapted.drive.overlay.read_bytes())
    verdict = boot(adapted.source.machine, [_drive(adapted.source, copy)], target.hardware, folder=tmp_path)
    assert verdict.result is Result.PASS
    # ifupdown configures the NIC by its name: without it nobody could have asked sshd.
    assert any(signal.code == "ssh-banner" for signal in verdict.signals)


def test_adapting_again_finds_nothing_to_do(adapted: _Adapted, tmp_path: Path) -> None:
    copy = tmp_path / "copy.overlay"
    assert adapted.drive.overlay is not None
    copy.write_bytes(adapted.drive.overlay.read_bytes())
    source = adapted.source
    done = adapt(plan_adaptation(source.machine), source.machine, source.kernel, [_drive(source, copy)], tmp_path)
    assert not done.changed and {item.status for item in done.items} == {Status.NOTHING}


def test_a_stage_that_fails_says_why(source: _Source, tmp_path: Path) -> None:
    plan = AdaptPlan(items=(AdaptItem(name="efi-fallback", reason="a BIOS machine has no ESP"),))
    with pytest.raises(AdaptationError, match="EFI system partition was not found") as caught:
        adapt(plan, source.machine, source.kernel, [_drive(source, tmp_path / "o")], tmp_path)
    assert "Nothing was changed" in caught.value.advice


def test_an_overlay_is_a_must(source: _Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overlay"):
        adapt(plan_adaptation(source.machine), source.machine, source.kernel, [Drive(path=source.disk)], tmp_path)
