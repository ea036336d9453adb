"""A real machine adapts itself, and then starts on hardware that its own knew nothing of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from formats import qemu_img
from formats.images.raw import RawFile
from formats.layouts import lvm, partition
from formats.layouts.window import Window
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


MIB = 1 << 20


def _root_offset(disk: Path) -> int:
    """Where the root file system of bios-lvm begins on its disk: the volume is in one piece."""
    image = RawFile(disk)
    try:
        table = partition.read_table(image)
        assert table is not None
        physical = table.partitions[1]
        label = lvm.read_label(Window(image, physical.start, physical.size))
    finally:
        image.close()
    assert label is not None and label.group is not None
    (segment,) = next(volume for volume in label.group.logical if volume.name == "root").segments
    return physical.start + label.group.physical[0].start + segment.areas[0].start * label.group.extent_size


def _debugfs(disk: Path, offset: int, *commands: str) -> str:
    run = ["debugfs", "-w", "-f", "-", f"{disk}?offset={offset}"]
    return subprocess.run(run, input="\n".join(commands), capture_output=True, text=True, check=True).stdout


def _fill_boot(disk: Path, folder: Path) -> None:
    """Leave 40 KiB on /boot, the first partition."""
    text = subprocess.run(["dumpe2fs", "-h", f"{disk}?offset={MIB}"], capture_output=True, text=True, check=True).stdout
    facts = {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    free = int(facts["Free blocks"]) - int(facts["Reserved block count"])
    filler = folder / "filler"
    filler.write_bytes(os.urandom((free - 12) * int(facts["Block size"]) - 40 * 1024))
    _debugfs(disk, MIB, f"write {filler} filler")


def _break_tool(disk: Path, folder: Path) -> None:
    broken = folder / "broken"
    broken.write_text("#!/bin/sh\necho the hook cryptroot is broken >&2\nexit 1\n")
    tool = "/usr/sbin/update-initramfs"
    _debugfs(disk, _root_offset(disk), f"rm {tool}", f"write {broken} {tool}", f"sif {tool} mode 0100755")


def _forbid_writing(disk: Path, _folder: Path) -> None:
    run = ["tune2fs", "-O", "read-only", f"{disk}?offset={_root_offset(disk)}"]
    subprocess.run(run, check=True, capture_output=True)


@needs("debugfs", "dumpe2fs", "tune2fs")
@pytest.mark.parametrize(
    ("spoil", "said", "advice"),
    [
        (_fill_boot, r"no room for the drivers: .* KiB free on the file system of /boot", "Make room"),
        (
            _break_tool,
            "update-initramfs failed for .*the hook cryptroot is broken",
            "Run that tool on the source",
        ),
        (_forbid_writing, "the root file system cannot be written", "is it mounted read-only"),
    ],
)
def test_a_machine_that_cannot_be_changed_says_what_to_do(
    source: LiveSource,
    tmp_path: Path,
    spoil: Callable[[Path, Path], None],
    said: str,
    advice: str,
) -> None:
    disk = tmp_path / "disk.raw"
    subprocess.run(["cp", "--sparse=always", source.disks[0], disk], check=True)
    disk.chmod(0o600)
    spoil(disk, tmp_path)
    spoiled = replace(source, disks=(disk,))
    before = disk.stat().st_mtime_ns
    with pytest.raises(AdaptationError, match=said) as caught:
        adapt(
            plan_adaptation(source.machine, rebuild=spoil is _break_tool),
            source.machine,
            source.kernel,
            spoiled.drives(tmp_path),
            tmp_path,
        )
    assert advice in caught.value.advice and "Nothing was changed" in caught.value.advice
    assert disk.stat().st_mtime_ns == before


def test_an_overlay_is_a_must(source: LiveSource, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overlay"):
        adapt(plan_adaptation(source.machine), source.machine, source.kernel, [Drive(path=source.disks[0])], tmp_path)
