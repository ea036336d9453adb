"""Which hardware stands in for which platform's."""

from __future__ import annotations

import pytest

from formats.errors import UsageError
from formats.machine import Bus, Disk, Firmware, Machine, Nic
from p2v.emulator import Chipset, Controller, NicModel
from p2v.target.hardware import PLATFORM_NAMES, own_hardware, platform_hardware
from p2v.target.verdict import Severity


@pytest.mark.parametrize("platform", PLATFORM_NAMES)
@pytest.mark.parametrize("firmware", list(Firmware))
def test_every_platform_has_hardware_of_the_asked_firmware(platform: str, firmware: Firmware) -> None:
    found = platform_hardware(platform, firmware=firmware)
    assert found.hardware.firmware is firmware
    assert all(finding.severity is Severity.NOTE and finding.fix for finding in found.findings)


def test_firmware_comes_from_the_machine_and_bus_and_nic_from_the_definition() -> None:
    machine = Machine(name="m", firmware=Firmware.UEFI)
    found = platform_hardware("vmware-workstation", machine, bus=Bus.SATA, nic=NicModel.VMXNET3).hardware
    assert (found.firmware, found.controller, found.nic) == (Firmware.UEFI, Controller.SATA, NicModel.VMXNET3)
    assert platform_hardware("libvirt", machine).hardware.chipset is Chipset.Q35
    assert platform_hardware("libvirt").hardware.chipset is Chipset.PC


def test_what_cannot_be_emulated_is_a_finding() -> None:
    (finding,) = platform_hardware("hyperv", firmware=Firmware.UEFI).findings
    assert finding.code == "hardware-stands-in"
    assert "hv_storvsc" in finding.message
    assert platform_hardware("qemu").findings == ()


def test_an_unknown_platform_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        platform_hardware("amiga")
    assert "libvirt" in caught.value.advice


@pytest.mark.parametrize(
    ("name", "firmware", "slot"),
    [
        ("enp0s25", Firmware.BIOS, "19"),
        ("enp0s31f6", Firmware.UEFI, "1f.6"),
        ("enp0s31f6", Firmware.BIOS, ""),
        ("enp0s3", Firmware.BIOS, ""),
        ("enp3s0", Firmware.BIOS, ""),
        ("eth0", Firmware.BIOS, ""),
    ],
)
def test_a_machine_s_own_hardware_has_its_drivers_and_its_card_where_it_was(
    name: str, firmware: Firmware, slot: str
) -> None:
    machine = Machine(
        name="m", firmware=firmware, disks=(Disk(id="d", size=1 << 20, bus=Bus.SATA),), nics=(Nic(name=name, mac="", driver="e1000e"),)
    )  # fmt: skip
    hardware = own_hardware(machine).hardware
    assert (hardware.controller, hardware.nic, hardware.nic_slot) == (Controller.SATA, NicModel.E1000E, slot)


def test_a_controller_is_known_by_its_driver() -> None:
    machine = Machine(name="m", disks=(Disk(id="d", size=1 << 20, bus=Bus.SCSI, driver="vmw_pvscsi"),))
    assert own_hardware(machine).hardware.controller is Controller.PVSCSI
    assert own_hardware(Machine(name="m")).hardware.controller is Controller.VIRTIO_BLK
