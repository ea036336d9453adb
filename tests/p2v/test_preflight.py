"""What is known before a byte is copied."""

from __future__ import annotations

from dataclasses import replace

import pytest

from formats.errors import UsageError
from formats.machine import Boot, Bus, Cpu, Disk, Firmware, Kernel, Machine, Nic, Volume
from p2v.collect.consistency import captured
from p2v.plan import disks_of
from p2v.preflight import Severity, examine

GIB = 1 << 30
EVERY = ("virtio_blk", "virtio_pci", "virtio_scsi", "ahci", "sd_mod", "ata_piix", "mptspi", "nvme", "hv_storvsc")
MACHINE = Machine(
    name="metal1",
    memory=GIB,
    disks=(Disk(id="disk-1", name="sda", size=6 * GIB, bus=Bus.SATA),),
    boot=Boot(
        disk="disk-1",
        running_kernel="6.1",
        kernels=(Kernel(version="6.1", image="/boot/vmlinuz", initramfs="/boot/initrd", drivers=EVERY),),
    ),
)


def codes(machine: Machine, platform: str = "libvirt", disk_format: str = "") -> dict[str, Severity]:
    return {finding.code: finding.severity for finding in examine(machine, platform, disk_format)}


def with_kernel(**facts: object) -> Machine:
    kernel = replace(MACHINE.boot.kernels[0], **facts)  # type: ignore[arg-type]
    return replace(MACHINE, boot=replace(MACHINE.boot, kernels=(kernel,)))


def test_a_machine_without_trouble_has_no_findings() -> None:
    assert codes(MACHINE) == {}


def test_a_missing_driver_is_named() -> None:
    machine = with_kernel(drivers=("ahci", "sd_mod"), host_only=True)
    (finding,) = examine(machine, "libvirt")
    assert finding.code == "initramfs-lacks-driver"
    assert finding.severity is Severity.RISK
    assert "virtio_blk" in finding.message
    assert finding.adapted
    assert codes(with_kernel(drivers=("virtio-blk",), builtin=("virtio-pci",))) == {}  # either spelling, either place


def test_an_unread_initramfs_is_left_to_the_boot_check() -> None:
    assert codes(with_kernel(drivers=None)) == {"initramfs-unread": Severity.NOTE}


@pytest.mark.parametrize("name", ["enp0s25", "eno1", "ens3", "enx525400a10001"])
def test_a_name_that_follows_the_slot_is_a_risk(name: str) -> None:
    nic = Nic(name=name, mac="52:54:00:a1:00:01", configured_by="ifupdown")
    assert codes(replace(MACHINE, nics=(nic,))) == {"nic-renamed": Severity.RISK}
    assert codes(replace(MACHINE, nics=(replace(nic, name="lan0"),))) == {}


def test_what_the_platform_refuses_is_a_blocker() -> None:
    large = replace(MACHINE, disks=(replace(MACHINE.disks[0], size=3 << 40),))
    assert codes(large, "vmware-workstation")["platform-refuses"] is Severity.BLOCKER
    assert "platform-refuses" not in codes(large, "libvirt")
    assert codes(large, "hyperv", disk_format="vhd")["platform-refuses"] is Severity.BLOCKER
    arm = replace(MACHINE, cpu=Cpu(architecture="aarch64"))
    assert codes(arm)["platform-refuses"] is Severity.BLOCKER
    no_disk = replace(MACHINE, boot=Boot(), disks=(replace(MACHINE.disks[0], removable=True),))
    assert codes(no_disk)["no-fixed-disk"] is Severity.BLOCKER


def test_the_worst_comes_first() -> None:
    machine = replace(
        MACHINE,
        disks=(replace(MACHINE.disks[0], size=3 << 40),),
        volumes=(Volume(path="/dev/sda2", kind="part", size=GIB, content="crypto_LUKS"),),
        firmware=Firmware.UEFI,
    )
    found = [finding.severity for finding in examine(machine, "vmware-workstation")]
    assert found == sorted(found, key=list(Severity).index)
    assert {"platform-refuses", "encrypted", "efi-variables-unread"} <= codes(machine, "vmware-workstation").keys()


def test_hyperv_stands_in() -> None:
    assert "stand-in-hardware" in codes(MACHINE, "hyperv")


def test_an_unknown_platform_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        examine(MACHINE, "no-such-platform")


def test_usb_disks_stay_behind_unless_the_machine_boots_from_them() -> None:
    usb = Disk(id="stick", name="sdb", size=GIB, bus=Bus.USB)
    machine = replace(MACHINE, disks=(*MACHINE.disks, usb))
    assert codes(machine) == {"removable-disk": Severity.NOTE}
    for taken in (disks_of, lambda m: captured(m)[0]):
        assert [disk.id for disk in taken(machine)] == ["disk-1"]
        from_usb = replace(machine, boot=replace(machine.boot, disk="stick"))
        assert [disk.id for disk in taken(from_usb)] == ["stick", "disk-1"]
