"""libvirt: domain XML.

Facts: libvirt.org ``formatdomain`` (units, firmware autoselection, ``blockio``), virt-v2v's output for what guests
accept. libvirt wants absolute names of files; without a folder they are relative, and ``virsh define`` needs them made
absolute first.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from formats.definitions import DEFAULT_MEMORY, PLATFORMS, DefinedDisk, Definition, Hardware, ParsedDefinition, ordered
from formats.definitions.text import (
    display_name,
    file_stem,
    mac_of,
    memory_of,
    serial_of,
    topology_of,
    uuid_of,
)
from formats.errors import ImageError, ImageUnsupportedError, UnsafeImageError
from formats.machine import Bus, Cpu, Firmware, Machine, Nic, Platform

_FORMATS = {"qcow2": "qcow2", "raw": "raw", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}
# bus: (the target's bus, prefix of its device name, model of the SCSI controller)
_BUSES = {
    Bus.VIRTIO: ("virtio", "vd", ""),
    Bus.VIRTIO_SCSI: ("scsi", "sd", "virtio-scsi"),
    Bus.SATA: ("sata", "sd", ""),
    Bus.IDE: ("ide", "hd", ""),
    Bus.SCSI: ("scsi", "sd", "lsilogic"),
    Bus.SAS: ("scsi", "sd", "lsisas1068"),
}
_UNITS = {
    "b": 1, "bytes": 1, "KB": 10**3, "k": 1 << 10, "KiB": 1 << 10, "MB": 10**6, "M": 1 << 20, "MiB": 1 << 20,
    "GB": 10**9, "G": 1 << 30, "GiB": 1 << 30, "TB": 10**12, "T": 1 << 40, "TiB": 1 << 40,
}  # fmt: skip
_NUMBER = re.compile(r"[0-9]{1,18}")
_DISKS_MOST = 256


def render(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str) -> Definition:
    """The domain's XML, as ``virsh define`` takes it."""
    name = display_name(machine.name)
    domain = ET.Element("domain", type="kvm")
    _text(domain, "name", name)
    identity = uuid_of(machine)
    if identity is not None:
        _text(domain, "uuid", str(identity))
    memory = memory_of(machine, DEFAULT_MEMORY, PLATFORMS["libvirt"].memory_step)
    _text(domain, "memory", str(memory >> 10), unit="KiB")
    _text(domain, "vcpu", str(machine.cpu.count))
    _add_firmware(domain, hardware, folder)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if hardware.secure_boot:
        ET.SubElement(features, "smm", state="on")
    sockets, cores, threads = topology_of(machine.cpu)
    cpu = ET.SubElement(domain, "cpu", mode="host-model")
    ET.SubElement(cpu, "topology", sockets=str(sockets), cores=str(cores), threads=str(threads))
    ET.SubElement(domain, "clock", offset="localtime" if machine.clock_utc is False else "utc")
    _add_devices(domain, machine, disks, hardware, folder)
    ET.indent(domain)
    main = f"{file_stem(machine.name)}.xml"
    return Definition(files={main: ET.tostring(domain, encoding="unicode") + "\n"}, main=main)


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def _path(folder: str, file: str) -> str:
    return f"{folder.rstrip('/')}/{file}" if folder else file


def _add_firmware(domain: ET.Element, hardware: Hardware, folder: str) -> None:
    uefi = hardware.firmware is Firmware.UEFI
    system = ET.SubElement(domain, "os", {"firmware": "efi"} if uefi else {})
    _text(system, "type", "hvm", arch="x86_64", machine=_machine(hardware))
    if uefi:
        on = "yes" if hardware.secure_boot else "no"
        firmware = ET.SubElement(system, "firmware")
        ET.SubElement(firmware, "feature", enabled=on, name="enrolled-keys")
        ET.SubElement(firmware, "feature", enabled=on, name="secure-boot")
        if hardware.nvram:
            _text(system, "nvram", _path(folder, hardware.nvram))


def _machine(hardware: Hardware) -> str:
    # q35 has no IDE; libvirt's UEFI wants q35.
    return hardware.machine or ("pc" if hardware.bus is Bus.IDE and hardware.firmware is Firmware.BIOS else "q35")


def _add_devices(
    domain: ET.Element, machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, folder: str
) -> None:
    devices = ET.SubElement(domain, "devices")
    bus, prefix, controller = _BUSES[hardware.bus]
    if controller:
        ET.SubElement(devices, "controller", type="scsi", index="0", model=hardware.controller or controller)
    first = ordered(disks)[0]
    for index, defined in enumerate(disks):
        disk = ET.SubElement(devices, "disk", type="file", device="disk")
        ET.SubElement(
            disk, "driver", name="qemu", type=_FORMATS[defined.format], discard="unmap", detect_zeroes="unmap"
        )
        ET.SubElement(disk, "source", file=_path(folder, defined.file))
        ET.SubElement(disk, "target", dev=prefix + _letters(index), bus=bus)
        if defined.logical_sector != 512:
            size = str(defined.logical_sector)
            ET.SubElement(disk, "blockio", logical_block_size=size, physical_block_size=size)
        serial = serial_of(machine, defined.disk_id)
        if serial:
            _text(disk, "serial", serial)
        if defined is first:
            ET.SubElement(disk, "boot", order="1")
    for nic in machine.nics:
        interface = ET.SubElement(devices, "interface", type="network")
        if mac_of(nic.mac):
            ET.SubElement(interface, "mac", address=mac_of(nic.mac))
        ET.SubElement(interface, "source", network=display_name(hardware.network) if hardware.network else "default")
        ET.SubElement(interface, "model", type=hardware.nic)
    ET.SubElement(ET.SubElement(devices, "serial", type="pty"), "target", port="0")
    ET.SubElement(ET.SubElement(devices, "console", type="pty"), "target", type="serial", port="0")
    ET.SubElement(devices, "input", type="tablet", bus="usb")
    ET.SubElement(devices, "graphics", type="vnc", port="-1", listen="127.0.0.1")
    ET.SubElement(ET.SubElement(devices, "video"), "model", type=hardware.video or "vga")


def _letters(index: int) -> str:
    """a, b, ... z, aa, ab, ...: the suffixes of device names."""
    letters = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def parse(text: str) -> ParsedDefinition:
    """Read a domain's XML.

    ``UnsafeImageError`` for a document type or entities, ``ImageError`` when it is no domain,
    ``ImageUnsupportedError`` for disks that are no files.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UnsafeImageError("the domain XML declares a document type, which none of libvirt's does")
    try:
        domain = ET.fromstring(text)  # noqa: S314 - bounded, and without a document type there are no entities
    except (ET.ParseError, ValueError) as error:
        raise ImageError(f"the domain XML is malformed: {error}") from error
    if domain.tag != "domain":
        raise ImageError(f"the XML describes a {domain.tag[:40]!r}, not a domain")
    nics = tuple(
        Nic(name=f"net{index}", mac=mac_of(_attribute(nic, "mac", "address")), model=_attribute(nic, "model", "type"))
        for index, nic in enumerate(domain.findall("devices/interface"))
    )
    hardware, disks = _parse_disks(domain, nics)
    clock = domain.find("clock")
    machine = Machine(
        name=display_name(domain.findtext("name", "")),
        firmware=hardware.firmware,
        cpu=_parse_cpu(domain),
        memory=_parse_memory(domain.find("memory")),
        nics=nics,
        platform=Platform(uuid=_parse_uuid(domain.findtext("uuid", ""))),
        clock_utc=None if clock is None else clock.get("offset", "utc") == "utc",
    )
    return ParsedDefinition(platform="libvirt", machine=machine, disks=disks, hardware=hardware)


def _attribute(parent: ET.Element, path: str, name: str) -> str:
    found = parent.find(path)
    return found.get(name, "") if found is not None else ""


def _number(text: str | None, default: int, least: int = 1, most: int = 1 << 60) -> int:
    if text is None or _NUMBER.fullmatch(text.strip()) is None:
        return default
    return min(max(int(text), least), most)


def _parse_uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text.strip()))
    except ValueError:
        return ""


def _parse_memory(element: ET.Element | None) -> int:
    if element is None:
        return 0
    return _number(element.text, 0) * _UNITS.get(element.get("unit", "KiB"), 1 << 10)


def _parse_cpu(domain: ET.Element) -> Cpu:
    architecture = _attribute(domain, "os/type", "arch") or "x86_64"
    count = _number(domain.findtext("vcpu"), 1, most=4096)
    topology = domain.find("cpu/topology")
    if topology is not None:
        sockets, cores, threads = (_number(topology.get(key), 1, most=4096) for key in ("sockets", "cores", "threads"))
        dies = _number(topology.get("dies"), 1, most=4096)
        if sockets * dies * cores * threads == count:
            return Cpu(
                architecture=architecture, sockets=sockets, cores_per_socket=dies * cores, threads_per_core=threads
            )
    return Cpu(architecture=architecture, sockets=count)


def _parse_disks(domain: ET.Element, nics: Sequence[Nic]) -> tuple[Hardware, tuple[DefinedDisk, ...]]:
    found: list[tuple[int, DefinedDisk, Bus]] = []
    for element in domain.findall("devices/disk"):
        if element.get("device", "disk") != "disk":
            continue
        disk, bus = _parse_disk(element, domain)
        found.append((_number(_attribute(element, "boot", "order"), 1 << 20), disk, bus))
    if len(found) > _DISKS_MOST:
        raise UnsafeImageError(f"the domain has more than {_DISKS_MOST} disks")
    if not found:
        raise ImageError("the domain has no disks")
    _, boot, bus = min(found, key=lambda entry: entry[0])
    loader = domain.find("os/loader")
    uefi = _attribute(domain, "os", "firmware") == "efi" or (loader is not None and loader.get("type") == "pflash")
    secure = next(
        (f.get("enabled") == "yes" for f in domain.findall("os/firmware/feature") if f.get("name") == "secure-boot"),
        loader.get("secure") == "yes" if loader is not None else None,
    )
    hardware = Hardware(
        bus=bus,
        nic=nics[0].model or "rtl8139" if nics else PLATFORMS["libvirt"].nics[0],
        firmware=Firmware.UEFI if uefi else Firmware.BIOS,
        secure_boot=secure if uefi else None,
        machine=_attribute(domain, "os/type", "machine"),
        video=_attribute(domain, "devices/video/model", "type"),
        network=_attribute(domain, "devices/interface/source", "network"),
        nvram=(domain.findtext("os/nvram") or "").rpartition("/")[2] if uefi else "",
    )
    disks = (
        DefinedDisk(file=d.file, format=d.format, logical_sector=d.logical_sector, boot=d is boot) for _, d, _ in found
    )
    return hardware, tuple(disks)


def _parse_disk(element: ET.Element, domain: ET.Element) -> tuple[DefinedDisk, Bus]:
    file = _attribute(element, "source", "file")
    if not file:
        raise ImageUnsupportedError(
            "a disk of the domain is no image file", advice="name the image or the device itself as the source"
        )
    kind = _attribute(element, "driver", "type") or "raw"  # libvirt's own default
    format_ = next((ours for ours, theirs in _FORMATS.items() if theirs == kind), "")
    if not format_:
        raise ImageUnsupportedError(f"a disk of the domain has the format {kind[:40]!r}, which is not handled")
    target = _attribute(element, "target", "bus")
    model = next((c.get("model", "") for c in domain.findall("devices/controller") if c.get("type") == "scsi"), "")
    bus = next(
        (ours for ours, (theirs, _, scsi) in _BUSES.items() if theirs == target and (not scsi or scsi == model)),
        Bus.SCSI if target == "scsi" else Bus.IDE if not target else Bus.UNKNOWN,
    )
    sector = _number(_attribute(element, "blockio", "logical_block_size"), 512)
    return DefinedDisk(file=file, format=format_, logical_sector=sector), bus
