"""vSphere: an OVF descriptor beside its streamOptimized disks, for `ovftool` and the vSphere client.

Facts: DMTF DSP0243 (OVF 1.1), and the values that VMware's importers accept; the default devices are VMware's own, which other importers
need not know. What is VMware's alone is optional (``vmw:`` elements are ``required="false"``), and memory is in units of 2^20 bytes.
There is no manifest: it is optional, and a descriptor that is edited afterwards, as they often are, would no longer fit it. Elements of
an item are in the order of the CIM schema, which is that of the alphabet.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from formats.definitions import DEFAULT_MEMORY, PLATFORMS, DefinedDisk, Definition, Hardware, ordered
from formats.definitions.text import display_name, file_stem, mac_of, memory_of
from formats.machine import Bus, Firmware, Machine

_OVF = "http://schemas.dmtf.org/ovf/envelope/1"
_RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
_VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
_VMW = "http://www.vmware.com/schema/ovf"
_STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
_HARDWARE = "vmx-14"  # ESXi 6.7 and later
_CPU, _MEMORY, _IDE, _SCSI, _NIC, _DISK, _OTHER_STORAGE = 3, 4, 5, 6, 10, 17, 20
_CONTROLLERS = {
    (Bus.SCSI, "lsilogic"): (_SCSI, "lsilogic"),
    (Bus.SCSI, "pvscsi"): (_SCSI, "VirtualSCSI"),
    (Bus.SAS, "lsisas1068"): (_SCSI, "lsilogicsas"),
    (Bus.SATA, ""): (_OTHER_STORAGE, "vmware.sata.ahci"),
    (Bus.NVME, ""): (_OTHER_STORAGE, "vmware.nvme.controller"),
    (Bus.IDE, ""): (_IDE, ""),
}
_MODELS = {Bus.SCSI: "pvscsi", Bus.SAS: "lsisas1068"}
_PLACES = {Bus.SCSI: 15, Bus.SAS: 15, Bus.SATA: 30, Bus.NVME: 15, Bus.IDE: 2}  # disks of one controller
_NICS = {"vmxnet3": "VmxNet3", "e1000": "E1000", "e1000e": "E1000e"}
# CIM_OperatingSystem.OSType, and VMware's own word.
_SYSTEMS = {"linux": ("101", "otherLinux64Guest"), "windows": ("103", "windows9Server64Guest")}
_ANY_SYSTEM = ("102", "otherGuest64")


def render(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str) -> Definition:
    """The descriptor. It names its disks relative to itself, so ``folder`` does not matter."""
    del folder
    for prefix, uri in (("ovf", _OVF), ("rasd", _RASD), ("vssd", _VSSD), ("vmw", _VMW)):
        ET.register_namespace(prefix, uri)
    placed = ordered(disks)
    envelope = ET.Element(_ovf("Envelope"))
    references = ET.SubElement(envelope, _ovf("References"))
    for number, disk in enumerate(placed):
        ET.SubElement(references, _ovf("File"), {_ovf("id"): f"file{number}", _ovf("href"): disk.file})
    section = _section(envelope, "DiskSection", "The disks")
    for number, disk in enumerate(placed):
        facts = {
            "diskId": f"disk{number}",
            "fileRef": f"file{number}",
            "capacity": str(disk.size),
            "capacityAllocationUnits": "byte",
            "format": _STREAM,
        }
        ET.SubElement(section, _ovf("Disk"), {_ovf(name): value for name, value in facts.items()})
    network = display_name(hardware.network) if hardware.network else "VM Network"
    if machine.nics:
        networks = _section(envelope, "NetworkSection", "The networks")
        _text(ET.SubElement(networks, _ovf("Network"), {_ovf("name"): network}), _ovf("Description"), network)
    _add_system(envelope, machine, len(placed), hardware, network)
    ET.indent(envelope)
    main = f"{file_stem(machine.name)}.ovf"
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return Definition(files={main: head + ET.tostring(envelope, encoding="unicode") + "\n"}, main=main)


def _ovf(name: str) -> str:
    return f"{{{_OVF}}}{name}"


def _text(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text


def _section(parent: ET.Element, tag: str, info: str, attributes: dict[str, str] | None = None) -> ET.Element:
    section = ET.SubElement(parent, _ovf(tag), attributes or {})
    _text(section, _ovf("Info"), info)
    return section


def _add_system(envelope: ET.Element, machine: Machine, disks: int, hardware: Hardware, network: str) -> None:
    name = display_name(machine.name)
    system = _section(envelope, "VirtualSystem", "The virtual machine", {_ovf("id"): file_stem(machine.name)})
    _text(system, _ovf("Name"), name)
    code, word = _SYSTEMS.get(machine.system.family, _ANY_SYSTEM)
    attributes = {_ovf("id"): code, f"{{{_VMW}}}osType": word}
    _section(system, "OperatingSystemSection", "The guest's operating system", attributes)
    section = _section(system, "VirtualHardwareSection", "The virtual hardware")
    family = ET.SubElement(section, _ovf("System"))
    for tag, text in (
        ("ElementName", "Virtual Hardware Family"),
        ("InstanceID", "0"),
        ("VirtualSystemIdentifier", name),
        ("VirtualSystemType", _HARDWARE),
    ):
        _text(family, f"{{{_VSSD}}}{tag}", text)
    for number, item in enumerate(_items(machine, disks, hardware, network)):
        facts = {**item, "InstanceID": str(number + 1)}
        element = ET.SubElement(section, _ovf("Item"))
        for tag in sorted(facts):
            _text(element, f"{{{_RASD}}}{tag}", facts[tag])
    for key, value in _settings(hardware):
        config = {_ovf("required"): "false", f"{{{_VMW}}}key": key, f"{{{_VMW}}}value": value}
        ET.SubElement(section, f"{{{_VMW}}}Config", config)


def _items(machine: Machine, disks: int, hardware: Hardware, network: str) -> Iterator[dict[str, str]]:
    """The hardware, item by item; instance ids follow from the order, controllers before their disks."""
    count, memory = machine.cpu.count, memory_of(machine, DEFAULT_MEMORY, PLATFORMS["vsphere"].memory_step) >> 20
    yield {
        "AllocationUnits": "hertz * 10^6", "ElementName": f"{count} virtual CPU(s)", "ResourceType": str(_CPU),
        "VirtualQuantity": str(count),
    }  # fmt: skip
    yield {
        "AllocationUnits": "byte * 2^20", "ElementName": f"{memory} MB of memory", "ResourceType": str(_MEMORY),
        "VirtualQuantity": str(memory),
    }  # fmt: skip
    kind, model = _CONTROLLERS[hardware.bus, hardware.controller or _MODELS.get(hardware.bus, "")]
    room = _PLACES[hardware.bus]
    controllers = -(-disks // room)
    for number in range(controllers):
        named = {"ResourceSubType": model} if model else {}
        yield {
            "Address": str(number), "ElementName": f"{hardware.bus} controller {number}", "ResourceType": str(kind), **named
        }  # fmt: skip
    for number in range(disks):
        yield {
            "AddressOnParent": str(number % room + (number % room >= 7 and kind == _SCSI)),  # 7 is the controller's own
            "ElementName": f"Hard disk {number + 1}",
            "HostResource": f"ovf:/disk/disk{number}",
            "Parent": str(3 + number // room),
            "ResourceType": str(_DISK),
        }
    for number, nic in enumerate(machine.nics):
        mac = {"Address": mac_of(nic.mac)} if mac_of(nic.mac) else {}
        yield {
            **mac,
            "AddressOnParent": str(7 + number),
            "AutomaticAllocation": "true",
            "Connection": network,
            "ElementName": f"Ethernet {number + 1}",
            "ResourceSubType": _NICS[hardware.nic],
            "ResourceType": str(_NIC),
        }


def _settings(hardware: Hardware) -> Iterator[tuple[str, str]]:
    uefi = hardware.firmware is Firmware.UEFI
    yield "firmware", "efi" if uefi else "bios"
    if uefi:
        yield "bootOptions.efiSecureBootEnabled", "true" if hardware.secure_boot else "false"
