"""A real machine adapts itself, and then starts on hardware that its own knew nothing of."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats import qemu_img
from p2v.adapt import AdaptItem, AdaptPlan, Kind, Status, adapt, plan_adaptation
from p2v.emulator import Drive
from p2v.errors import AdaptationError
from p2v.target.boots import boot
from p2v.target.hardware import platform_hardware
from p2v.target.verdict import Result
from tests.machines.physical import PhysicalMachine
from tests.p2v.adapt.live import AdaptedSource, LiveSource, adapted_source, live_source
from tests.requirement import needs

pytestmark = [pytest.mark.slow_boot, needs("qemu-system-x86_64", "qemu-img", "busybox")]


@pytest.fixture(scope="module")
def source(physical_bios_lvm: PhysicalMachine, tmp_path_factory: pytest.TempPathFactory) -> LiveSource:
    return live_source(physical_bios_lvm, tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def adapted(source: LiveSource, tmp_path_factory: pytest.TempPathFactory) -> AdaptedSource:
    done = adapted_source(source, tmp_path_factory.mktemp("adapted"))
    assert any("stage started" in text for text in done.heard)
    return done


def test_every_change_is_in_the_audit(adapted: AdaptedSource) -> None:
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


def test_the_overlay_is_whole_and_small(adapted: AdaptedSource) -> None:
    overlay = adapted.source.drives(adapted.folder)[0].overlay
    assert overlay is not None
    assert qemu_img.check(overlay, "qcow2").clean
    assert overlay.stat().st_size < 200 << 20


def test_an_adapted_machine_boots_from_virtio_and_answers_under_its_old_name(
    adapted: AdaptedSource, tmp_path: Path
) -> None:
    target = platform_hardware("qemu", adapted.source.machine)
    verdict = boot(adapted.source.machine, adapted.drives(tmp_path), target.hardware, folder=tmp_path)
    assert verdict.result is Result.PASS
    # ifupdown configures the NIC by its name: without it nobody could have asked sshd.
    assert any(signal.code == "ssh-banner" for signal in verdict.signals)


def test_adapting_again_finds_nothing_to_do(adapted: AdaptedSource, tmp_path: Path) -> None:
    source = adapted.source
    done = adapt(plan_adaptation(source.machine), source.machine, source.kernel, adapted.drives(tmp_path), tmp_path)
    assert not done.changed and {item.status for item in done.items} == {Status.NOTHING}


def test_a_stage_that_fails_says_why(source: LiveSource, tmp_path: Path) -> None:
    plan = AdaptPlan(items=(AdaptItem(name="efi-fallback", reason="a BIOS machine has no ESP"),))
    with pytest.raises(AdaptationError, match="EFI system partition was not found") as caught:
        adapt(plan, source.machine, source.kernel, source.drives(tmp_path), tmp_path)
    assert "Nothing was changed" in caught.value.advice


def test_an_overlay_is_a_must(source: LiveSource, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overlay"):
        adapt(plan_adaptation(source.machine), source.machine, source.kernel, [Drive(path=source.disks[0])], tmp_path)
