"""The .vmx file: its own quoting, and what VMware's products write."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from formats.definitions import DefinedDisk, Hardware, render, vmx
from formats.machine import Bus, Firmware
from tests.formats.definitions.sample import METAL
from tests.formats.definitions.test_definitions import NAMES

MADE_BY_VMWARE = """.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "19"
mks.enable3d = "TRUE"
# a comment
displayName = "Web |22one|22"
guestOS = "ubuntu-64"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
nvram = "web.nvram"
numvcpus = "6"
cpuid.coresPerSocket = "3"
memsize = "2048"
uuid.bios = "56 4d a1 b2 c3 d4 e5 f6-01 02 03 04 05 06 07 08"
sata0.present = "TRUE"
sata0:1.present = "TRUE"
sata0:1.fileName = "auto detect"
sata0:1.deviceType = "cdrom-raw"
scsi0.virtualDev = "pvscsi"
scsi0.present = "TRUE"
scsi0:10.fileName = "data.vmdk"
scsi0:10.present = "TRUE"
scsi0:2.fileName = "Virtual Disk.vmdk"
scsi0:2.present = "TRUE"
scsi0:3.fileName = "gone.vmdk"
scsi0:3.present = "FALSE"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.addressType = "generated"
ethernet0.generatedAddress = "00:0c:29:aa:bb:cc"
ethernet1.present = "FALSE"
"""


def test_a_machine_that_vmware_made() -> None:
    parsed = vmx.parse(MADE_BY_VMWARE.replace("\n", "\r\n"))
    assert parsed.machine.name == 'Web "one"'
    assert (parsed.machine.memory, parsed.machine.cpu.sockets, parsed.machine.cpu.count) == (2 << 30, 2, 6)
    assert parsed.machine.platform.uuid == "b2a14d56-d4c3-f6e5-0102-030405060708", "as such a guest sees it"
    assert [nic.mac for nic in parsed.machine.nics] == ["00:0c:29:aa:bb:cc"]
    assert [(disk.file, disk.boot) for disk in parsed.disks] == [("Virtual Disk.vmdk", True), ("data.vmdk", False)]
    assert (parsed.hardware.bus, parsed.hardware.controller) == (Bus.SCSI, "pvscsi")
    assert (parsed.hardware.firmware, parsed.hardware.secure_boot) == (Firmware.UEFI, True)


@given(name=NAMES, network=NAMES)
def test_every_line_is_one_entry_with_one_key(name: str, network: str) -> None:
    hardware = Hardware(bus=Bus.SATA, nic="e1000", network=network)
    definition = render(
        "vmware-workstation", replace(METAL, name=name), [DefinedDisk(file="a.vmdk", format="vmdk")], hardware
    )
    lines = definition.files[definition.main].removesuffix("\n").split("\n")
    keys = [line.partition(" = ")[0] for line in lines]
    assert len(set(keys)) == len(keys), "a key given twice is an error to VMware"
    for line in lines:
        _, _, value = line.partition(" = ")
        assert value[0] == value[-1] == '"'
        assert '"' not in value[1:-1]
        assert line.isprintable()


def test_unit_seven_of_a_scsi_bus_is_left_out() -> None:
    disks = [DefinedDisk(file=f"d{n}.vmdk", format="vmdk") for n in range(17)]
    definition = render("vmware-workstation", METAL, disks, Hardware(bus=Bus.SCSI, nic="e1000"))
    text = definition.files[definition.main]
    assert "scsi0:7." not in text
    assert 'scsi0:8.fileName = "d7.vmdk"' in text
    assert 'scsi1:0.fileName = "d15.vmdk"' in text
    assert [disk.file for disk in vmx.parse(text).disks] == [disk.file for disk in disks]
