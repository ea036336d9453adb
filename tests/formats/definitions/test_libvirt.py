"""Domain XML: well-formed by another parser, and what libvirt's own users write."""

from __future__ import annotations

import subprocess

import pytest

from formats.definitions import libvirt
from formats.errors import ImageUnsupportedError
from formats.machine import Bus, Firmware
from tests.formats.definitions.sample import CHOICES, FOLDER
from tests.requirement import needs

MADE_BY_HAND = """<?xml version='1.0' encoding='UTF-8'?>
<domain type='kvm' id='3'>
  <name>web</name>
  <uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <memory unit='GiB'>2</memory>
  <vcpu placement='static'>4</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>
    <nvram>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>
  </os>
  <cpu mode='host-passthrough'><topology sockets='1' dies='2' cores='2' threads='1'/></cpu>
  <devices>
    <disk type='file' device='cdrom'><source file='/iso/x.iso'/><target dev='sda' bus='sata'/></disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='vpc'/>
      <source file='/var/lib/libvirt/images/web.vhd'/>
      <target dev='sdb' bus='scsi'/>
      <blockio logical_block_size='4096'/>
      <boot order='2'/>
    </disk>
    <disk type='file'><source file='/var/lib/libvirt/images/boot.img'/><target dev='vda' bus='virtio'/><boot
    order='1'/></disk> <controller type='scsi' index='0' model='virtio-scsi'/>
    <interface type='bridge'><mac address='52:54:00:11:22:33'/><source bridge='br0'/><model type='virtio'/></interface>
  </devices>
</domain>
"""


@needs("xmllint")
@pytest.mark.parametrize("name", [name for name in CHOICES if name.startswith("libvirt")])
def test_the_xml_is_well_formed(name: str) -> None:
    checked = subprocess.run(
        ["xmllint", "--noout", FOLDER / f"{name}.xml"], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@needs("virt-xml-validate")
@pytest.mark.parametrize("name", [name for name in CHOICES if name.startswith("libvirt")])
def test_libvirts_schema_takes_the_xml(name: str) -> None:
    command = ["virt-xml-validate", str(FOLDER / f"{name}.xml"), "domain"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_domain_that_libvirt_runs() -> None:
    parsed = libvirt.parse(MADE_BY_HAND)
    machine, hardware = parsed.machine, parsed.hardware
    assert (machine.name, machine.memory, machine.cpu.count) == ("web", 2 << 30, 4)
    assert (machine.cpu.sockets, machine.cpu.cores_per_socket) == (1, 4)
    assert machine.platform.uuid == "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
    assert [(nic.mac, nic.model) for nic in machine.nics] == [("52:54:00:11:22:33", "virtio")]
    assert (hardware.firmware, hardware.secure_boot, hardware.nvram) == (Firmware.UEFI, True, "web_VARS.fd")
    assert hardware.bus is Bus.VIRTIO, "that of the disk that boots"
    assert [(disk.format, disk.logical_sector, disk.boot) for disk in parsed.disks] == [
        ("vhd", 4096, False),
        ("raw", 512, True),
    ]


@pytest.mark.parametrize("kind", ["qed", "luks", "", "rbd"])
def test_only_formats_that_are_handled(kind: str) -> None:
    text = MADE_BY_HAND.replace("'vpc'", f"'{kind}'")
    if not kind:
        assert libvirt.parse(text).disks[0].format == "raw"
        return
    with pytest.raises(ImageUnsupportedError, match=kind):
        libvirt.parse(text)


def test_device_names_go_on_behind_z() -> None:
    assert [libvirt._letters(n) for n in (0, 25, 26, 51, 52, 701, 702)] == ["a", "z", "aa", "az", "ba", "zz", "aaa"]
