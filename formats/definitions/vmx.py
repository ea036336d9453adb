"""VMware Workstation, Player and Fusion: the .vmx file.

Facts: ``.encoding``, ``config.version``, ``virtualHW.version`` and ``guestOS`` make a file that registers; every value
is quoted, and inside a value ``|XX`` is the byte XX (so quotes, bars and line ends cannot end it). PCIe devices need
the ``pciBridge`` lines. From hardware version 13 on a guest sees the first three fields of ``uuid.bios`` byte-swapped.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence

from formats.definitions import DEFAULT_MEMORY, PLATFORMS, DefinedDisk, Definition, Hardware, ParsedDefinition, ordered
from formats.definitions.text import (
    display_name,
    file_stem,
    has_serial_console,
    mac_of,
    memory_of,
    topology_of,
    uuid_of,
)
from formats.errors import ImageError, ImageUnsupportedError, UnsafeImageError
from formats.machine import Bus, Cpu, Firmware, Machine, Nic, Platform

_KEY = re.compile(r"[A-Za-z0-9_.:]{1,128}")
_HEX = re.compile(r"\|([0-9A-Fa-f]{2})")
_DISK = re.compile(r"(scsi|sata|ide|nvme)([0-9]{1,2}):([0-9]{1,2})\.filename")
_NIC = re.compile(r"ethernet([0-9]{1,2})\.present")
_HARDWARE_VERSION = 14  # Workstation 14, ESXi 6.7: the oldest with all that is used here, secure boot too
_ENTRIES_MOST = 10_000

_CONTROLLERS = {Bus.SCSI: ("scsi", "lsilogic", 15), Bus.SAS: ("scsi", "lsisas1068", 15)}
_CONTROLLERS |= {Bus.SATA: ("sata", "", 30), Bus.NVME: ("nvme", "", 15), Bus.IDE: ("ide", "", 2)}
_GUESTS = {
    "debian": "debian10-64",
    "ubuntu": "ubuntu-64",
    "rhel": "rhel8-64",
    "centos": "centos8-64",
    "rocky": "rhel8-64",
    "almalinux": "rhel8-64",
    "ol": "oraclelinux8-64",
    "fedora": "fedora-64",
    "sles": "sles15-64",
    "opensuse-leap": "opensuse-64",
}


def render(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str) -> Definition:
    """The .vmx file; all names in it are relative, so ``folder`` does not matter."""
    del folder
    stem = file_stem(machine.name)
    lines = [f'{key} = "{_quoted(value)}"' for key, value in _entries(machine, disks, hardware, stem)]
    return Definition(files={f"{stem}.vmx": "\n".join(lines) + "\n"}, main=f"{stem}.vmx")


def _quoted(value: str) -> str:
    return "".join(f"|{ord(c):02X}" if c in '"|' or ord(c) < 32 or ord(c) == 127 else c for c in value)


def _entries(
    machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, stem: str
) -> Iterator[tuple[str, str]]:
    yield ".encoding", "UTF-8"
    yield "config.version", "8"
    yield "virtualHW.version", str(_HARDWARE_VERSION)
    yield "displayName", display_name(machine.name)
    yield "guestOS", _guest(machine)
    yield "firmware", "efi" if hardware.firmware is Firmware.UEFI else "bios"
    if hardware.firmware is Firmware.UEFI:
        yield "uefi.secureBoot.enabled", "TRUE" if hardware.secure_boot else "FALSE"
    yield "nvram", hardware.nvram or f"{stem}.nvram"
    _, cores, threads = topology_of(machine.cpu)
    yield "numvcpus", str(machine.cpu.count)
    yield "cpuid.coresPerSocket", str(cores * threads)
    yield "memsize", str(memory_of(machine, DEFAULT_MEMORY, PLATFORMS["vmware-workstation"].memory_step) >> 20)
    identity = uuid_of(machine)
    if identity is not None:
        raw = identity.bytes_le.hex(" ")
        yield "uuid.bios", raw[:23] + "-" + raw[24:]
    yield "uuid.action", "keep"
    if machine.clock_utc is not False:
        yield "rtc.diffFromUTC", "0"
    yield "disk.EnableUUID", "TRUE"
    yield "pciBridge0.present", "TRUE"
    for number in range(4, 8):
        yield f"pciBridge{number}.present", "TRUE"
        yield f"pciBridge{number}.virtualDev", "pcieRootPort"
        yield f"pciBridge{number}.functions", "8"
    yield "vmci0.present", "TRUE"
    yield "hpet0.present", "TRUE"
    yield from _disk_entries(disks, hardware)
    yield from _nic_entries(machine, hardware)
    if has_serial_console(machine):
        yield "serial0.present", "TRUE"
        yield "serial0.fileType", "file"
        yield "serial0.fileName", f"{stem}.serial.log"
        yield "answer.msg.serial.file.open", "Replace"
    yield "usb.present", "TRUE"
    yield "ehci.present", "TRUE"
    yield "floppy0.present", "FALSE"


def _guest(machine: Machine) -> str:
    if machine.system.family == "windows":
        return "windows9-64"
    if machine.cpu.architecture != "x86_64":
        return "other3xlinux"
    return _GUESTS.get(machine.system.id, "other3xlinux-64")


def _disk_entries(disks: Sequence[DefinedDisk], hardware: Hardware) -> Iterator[tuple[str, str]]:
    kind, model, slots = _CONTROLLERS[hardware.bus]
    places = [f"{kind}{index // slots}:{_unit(kind, index % slots)}" for index in range(len(disks))]
    for number in range(-(-len(disks) // slots)):
        yield f"{kind}{number}.present", "TRUE"
        if hardware.controller or model:
            yield f"{kind}{number}.virtualDev", hardware.controller or model
    for place, disk in zip(places, disks, strict=True):
        yield f"{place}.present", "TRUE"
        yield f"{place}.fileName", disk.file
        yield f"{place}.deviceType", "disk"
    yield "bios.bootOrder", "hdd"
    first = places[list(disks).index(ordered(disks)[0])]
    yield "bios.hddOrder", first


def _unit(kind: str, number: int) -> int:
    # Unit 7 of a SCSI bus is the controller itself.
    return number + 1 if kind == "scsi" and number >= 7 else number


def _nic_entries(machine: Machine, hardware: Hardware) -> Iterator[tuple[str, str]]:
    for number, nic in enumerate(machine.nics[:10]):
        card = f"ethernet{number}"
        yield f"{card}.present", "TRUE"
        yield f"{card}.virtualDev", hardware.nic
        if hardware.network in ("", "nat", "bridged", "hostonly"):
            yield f"{card}.connectionType", hardware.network or "nat"
        else:
            yield f"{card}.connectionType", "custom"
            yield f"{card}.vnet", display_name(hardware.network)
        if mac_of(nic.mac):
            yield f"{card}.addressType", "static"
            yield f"{card}.address", mac_of(nic.mac)
            yield f"{card}.checkMACAddress", "FALSE"  # a physical card's address is not VMware's
        else:
            yield f"{card}.addressType", "generated"


def parse(text: str) -> ParsedDefinition:
    """Read a .vmx file; ``ImageError`` when it is malformed or has no disks, ``ImageUnsupportedError`` for disks that
    are no VMDK files.
    """
    values = _values(text)
    found = _parse_disks(values)
    bus, _ = found[0]
    nics = []
    for key, value in values.items():
        match = _NIC.fullmatch(key)
        if match and value.upper() == "TRUE":
            card = f"ethernet{match.group(1)}"
            mac = values.get(f"{card}.address", "") or values.get(f"{card}.generatedaddress", "")
            nics.append(Nic(name=f"net{match.group(1)}", mac=mac_of(mac), model=values.get(f"{card}.virtualdev", "")))
    uefi = values.get("firmware", "bios").lower() == "efi"
    hardware = Hardware(
        bus=bus,
        nic=(nics[0].model or "vlance") if nics else PLATFORMS["vmware-workstation"].nics[0],
        firmware=Firmware.UEFI if uefi else Firmware.BIOS,
        secure_boot=values.get("uefi.secureboot.enabled", "").upper() == "TRUE" if uefi else None,
        controller=_controller(values, bus),
        network=values.get("ethernet0.vnet", "") or values.get("ethernet0.connectiontype", ""),
        nvram=values.get("nvram", "").replace("\\", "/").rpartition("/")[2] if uefi else "",
    )
    order = values.get("bios.hddorder", "").split(",")[0].strip().lower()
    boot = next((place for _, place in found if place == order), found[0][1])
    disks = tuple(DefinedDisk(file=values[f"{p}.filename"], format="vmdk", boot=p == boot) for _, p in found)
    machine = Machine(
        name=display_name(values.get("displayname", "")),
        firmware=hardware.firmware,
        cpu=_parse_cpu(values),
        memory=_number(values.get("memsize", ""), 0) << 20,
        nics=tuple(nics),
        platform=Platform(uuid=_parse_uuid(values.get("uuid.bios", ""))),
    )
    return ParsedDefinition(platform="vmware-workstation", machine=machine, disks=disks, hardware=hardware)


def _values(text: str) -> dict[str, str]:
    """The entries by key in lower case; the first of two with one key counts."""
    values: dict[str, str] = {}
    lines = text.split("\n")
    if len(lines) > _ENTRIES_MOST:
        raise UnsafeImageError(f"the .vmx file has more than {_ENTRIES_MOST} lines")
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = (piece.strip() for piece in line.partition("="))
        if len(value) >= 2 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if not equals or _KEY.fullmatch(key) is None or '"' in value:
            raise ImageError(f"line {number} of the .vmx file is no entry")
        values.setdefault(key.lower(), _HEX.sub(lambda m: chr(int(m.group(1), 16)), value))
    if values.get("config.version", "8") != "8" or "guestos" not in values:
        raise ImageError("the file is no .vmx file of a known version")
    return values


def _parse_disks(values: dict[str, str]) -> list[tuple[Bus, str]]:
    """Every disk as (bus, place), in the order of their places."""
    found: list[tuple[str, int, int]] = []
    for key, file in values.items():
        match = _DISK.fullmatch(key)
        if match is None:
            continue
        place = key.rpartition(".")[0]
        kind = values.get(f"{place}.devicetype", "disk").lower()
        if values.get(f"{place}.present", "TRUE").upper() != "TRUE" or "cdrom" in kind or "atapi" in kind:
            continue
        if not file.lower().endswith(".vmdk"):
            raise ImageUnsupportedError(f"the disk {place} is no VMDK file", advice="name the image file itself")
        found.append((match.group(1), int(match.group(2)), int(match.group(3))))
    if not found:
        raise ImageError("the .vmx file has no disks")
    buses = {"sata": Bus.SATA, "ide": Bus.IDE, "nvme": Bus.NVME}
    places = []
    for kind, controller, unit in sorted(found):
        model = values.get(f"{kind}{controller}.virtualdev", "").lower()
        bus = buses.get(kind) or (Bus.SAS if model == "lsisas1068" else Bus.SCSI)
        places.append((bus, f"{kind}{controller}:{unit}"))
    return places


def _controller(values: dict[str, str], bus: Bus) -> str:
    kind, default, _ = _CONTROLLERS[bus]
    model = values.get(f"{kind}0.virtualdev", "").lower() if kind == "scsi" else ""
    return "" if model == default else model


def _number(text: str, default: int, most: int = 1 << 40) -> int:
    return min(int(text), most) if re.fullmatch(r"[0-9]{1,18}", text.strip()) else default


def _parse_cpu(values: dict[str, str]) -> Cpu:
    count = max(1, _number(values.get("numvcpus", ""), 1, 4096))
    cores = max(1, _number(values.get("cpuid.corespersocket", ""), 1, 4096))
    if count % cores:
        cores = 1
    return Cpu(sockets=count // cores, cores_per_socket=cores)


def _parse_uuid(text: str) -> str:
    digits = re.sub(r"[^0-9A-Fa-f]", "", text)
    return str(uuid.UUID(bytes_le=bytes.fromhex(digits))) if len(digits) == 32 else ""
