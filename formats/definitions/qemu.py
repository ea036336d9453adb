"""QEMU: a POSIX shell script that starts the machine, readable and to be edited.

The script finds KVM, UEFI firmware and a display by itself; environment variables overrule each. What it was made from
stands in it as one comment line of JSON, ASCII only, so that it can be read back without being run.

Facts: QEMU's manual (``-drive`` and ``-device`` take a comma in a value as two; IDE and AHCI disks have 512-byte
sectors only).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence

import msgspec

from formats.definitions import DEFAULT_MEMORY, PLATFORMS, DefinedDisk, Definition, Hardware, ParsedDefinition, ordered
from formats.definitions.text import (
    display_name,
    file_stem,
    is_file_name,
    mac_of,
    memory_of,
    serial_of,
    topology_of,
    uuid_of,
)
from formats.errors import ImageError
from formats.machine import Bus, Cpu, Firmware, Machine, Nic, Platform

_MARK = "# p2v-definition: "
_LINE_MOST = 256 * 1024
_FORMATS = {"vhd": "vpc"}

_ACCELERATION = """\
# KVM where this user may use it, else plain emulation. ACCEL=tcg or ACCEL=kvm overrules.
if [ -z "${ACCEL:-}" ]; then
    if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then ACCEL=kvm; else ACCEL=tcg; fi
fi
if [ "$ACCEL" = kvm ]; then CPU=${CPU:-host}; else CPU=${CPU:-max}; fi
"""

_FIRMWARE = """\
# UEFI: the firmware's code comes from the distribution; the machine's variables are kept in a copy beside this script.
# OVMF_CODE and OVMF_VARS, set together, overrule what is found.
if [ -z "${OVMF_CODE:-}" ]; then
    for pair in @PAIRS@; do
        OVMF_CODE=${pair%%:*}
        OVMF_VARS=${pair#*:}
        [ -r "$OVMF_CODE" ] && [ -r "$OVMF_VARS" ] && break
        OVMF_CODE=""
    done
fi
if [ -z "$OVMF_CODE" ]; then
    echo "no UEFI firmware found: install the package ovmf (edk2-ovmf), or set OVMF_CODE and OVMF_VARS" >&2
    exit 1
fi
[ -e "$nvram" ] || cp -- "$OVMF_VARS" "$nvram"
"""

_DISPLAY = """\
# Without a graphical session the machine's serial console is this terminal (Ctrl-A X ends it).
if [ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then
    set -- -display none -serial mon:stdio "$@"
else
    set -- -serial vc "$@"
fi
"""

_PLAIN_FIRMWARE = (
    "/usr/share/OVMF/OVMF_CODE_4M.fd:/usr/share/OVMF/OVMF_VARS_4M.fd",
    "/usr/share/OVMF/OVMF_CODE.fd:/usr/share/OVMF/OVMF_VARS.fd",
    "/usr/share/edk2/ovmf/OVMF_CODE.fd:/usr/share/edk2/ovmf/OVMF_VARS.fd",
    "/usr/share/edk2/x64/OVMF_CODE.4m.fd:/usr/share/edk2/x64/OVMF_VARS.4m.fd",
    "/usr/share/qemu/ovmf-x86_64-code.bin:/usr/share/qemu/ovmf-x86_64-vars.bin",
)
_SECURE_FIRMWARE = (
    "/usr/share/OVMF/OVMF_CODE_4M.ms.fd:/usr/share/OVMF/OVMF_VARS_4M.ms.fd",
    "/usr/share/OVMF/OVMF_CODE.ms.fd:/usr/share/OVMF/OVMF_VARS.ms.fd",
    "/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd:/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd",
    "/usr/share/edk2/x64/OVMF_CODE.secboot.4m.fd:/usr/share/edk2/x64/OVMF_VARS.4m.fd",
)


class _DiskFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk, as the script's comment holds it."""

    file: str
    format: str
    size: int
    logical_sector: int
    boot: bool
    disk_id: str
    serial: str


class _Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the script was made from, as its comment holds it."""

    version: int
    name: str
    uuid: str
    architecture: str
    sockets: int
    cores: int
    threads: int
    memory: int
    clock_utc: bool | None
    macs: list[str]
    disks: list[_DiskFacts]
    bus: Bus
    nic: str
    firmware: Firmware
    secure_boot: bool | None
    machine: str
    video: str
    network: str
    nvram: str


def render(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str) -> Definition:
    """The script. It names its files relative to itself, so ``folder`` does not matter."""
    del folder
    main = f"{file_stem(machine.name)}.sh"
    text = "\n".join(_script(machine, disks, hardware, main)) + "\n"
    return Definition(files={main: text}, main=main, scripts=frozenset({main}))


def _script(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, main: str) -> Iterator[str]:
    uefi = hardware.firmware is Firmware.UEFI
    yield "#!/bin/sh"
    yield f"# Starts the virtual machine in QEMU. Usage: ./{main} [further QEMU arguments]"
    yield _MARK + _facts(machine, disks, hardware)
    yield "set -eu"
    yield 'cd -- "$(dirname -- "$0")"'
    yield ""
    yield _ACCELERATION
    if uefi:
        yield f"nvram={shlex.quote(_nvram(machine, hardware))}"
        pairs = _SECURE_FIRMWARE if hardware.secure_boot else _PLAIN_FIRMWARE
        yield _FIRMWARE.replace("@PAIRS@", " \\\n        ".join(pairs))
    if machine.nics:
        yield "# Each card's other end: NETWORK=bridge,br=br0 is a bridge, NETWORK=user,restrict=on cuts it off."
        yield f"NETWORK=${{NETWORK:-{_network(hardware)}}}"
        yield ""
    yield _DISPLAY
    arguments = list(_arguments(machine, disks, hardware))
    if uefi:
        # In front of the other drives; the code is read-only, the variables are the machine's own.
        variables = shlex.quote("if=pflash,format=raw,unit=1,file=" + _value(_nvram(machine, hardware)))
        yield f'set -- -drive {variables} "$@"'
        yield 'set -- -drive "if=pflash,format=raw,unit=0,readonly=on,file=$OVMF_CODE" "$@"'
        yield ""
    yield 'exec "${QEMU:-qemu-system-x86_64}" \\'
    for argument in arguments:
        yield f"    {argument} \\"
    yield '    "$@"'


def _nvram(machine: Machine, hardware: Hardware) -> str:
    return "./" + (hardware.nvram or f"{file_stem(machine.name)}.nvram.fd")


def _network(hardware: Hardware) -> str:
    return f"bridge,br={file_stem(hardware.network)}" if hardware.network else "user"


def _chipset(hardware: Hardware) -> str:
    # q35 has no IDE bus, pc no AHCI one.
    return hardware.machine or ("pc" if hardware.bus is Bus.IDE else "q35")


def _value(text: str) -> str:
    """A value inside QEMU's comma-separated options."""
    return text.replace(",", ",,")


def _arguments(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware) -> Iterator[str]:
    yield f"-name {shlex.quote('guest=' + _value(display_name(machine.name)))}"
    smm = ",smm=on" if hardware.secure_boot else ""
    yield f'-machine {shlex.quote(_chipset(hardware))}{smm} -accel "$ACCEL" -cpu "$CPU"'
    if hardware.secure_boot:
        yield "-global driver=cfi.pflash01,property=secure,value=on"
    sockets, cores, threads = topology_of(machine.cpu)
    yield f"-smp {machine.cpu.count},sockets={sockets},cores={cores},threads={threads}"
    yield f"-m {memory_of(machine, DEFAULT_MEMORY, PLATFORMS['qemu'].memory_step) >> 20}"
    identity = uuid_of(machine)
    if identity is not None:
        yield f"-uuid {identity}"
    yield f"-rtc base={'localtime' if machine.clock_utc is False else 'utc'}"
    yield f"-nodefaults -vga {shlex.quote(hardware.video or 'std')}"
    yield from _disk_arguments(machine, disks, hardware)
    for nic in machine.nics:
        mac = f",mac={mac_of(nic.mac)}" if mac_of(nic.mac) else ""
        yield f'-nic "$NETWORK,model={hardware.nic}{mac}"'


def _disk_arguments(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware) -> Iterator[str]:
    controllers = {
        Bus.VIRTIO_SCSI: "virtio-scsi-pci",
        Bus.SCSI: "lsi53c895a",
        Bus.SAS: "mptsas1068",
    }
    if hardware.bus in controllers:
        yield f"-device {controllers[hardware.bus]},id=scsi0"
    if hardware.bus is Bus.SATA and _chipset(hardware) != "q35":
        yield "-device ich9-ahci,id=ahci0"
    first = ordered(disks)[0]
    for index, disk in enumerate(disks):
        # "./" keeps a name with a colon from being taken for a protocol.
        file, kind = _value("./" + disk.file), _FORMATS.get(disk.format, disk.format)
        drive = f"if=none,id=disk{index},format={kind},discard=unmap,detect-zeroes=unmap,file={file}"
        yield f"-drive {shlex.quote(drive)}"
        device = f"{_device(hardware, index)},drive=disk{index}"
        serial = serial_of(machine, disk.disk_id)
        if serial or hardware.bus is Bus.NVME:
            device += f",serial={serial or f'disk{index}'}"
        if disk.logical_sector != 512:
            device += f",logical_block_size={disk.logical_sector},physical_block_size={disk.logical_sector}"
        if disk is first:
            device += ",bootindex=1"
        yield f"-device {shlex.quote(device)}"


def _device(hardware: Hardware, index: int) -> str:
    match hardware.bus:
        case Bus.VIRTIO:
            return "virtio-blk-pci"
        case Bus.NVME:
            return "nvme"
        case Bus.SATA:
            return f"ide-hd,bus={'ide' if _chipset(hardware) == 'q35' else 'ahci0'}.{index}"
        case Bus.IDE:
            return f"ide-hd,bus=ide.{index // 2},unit={index % 2}"
        case Bus.VIRTIO_SCSI:
            return f"scsi-hd,bus=scsi0.0,channel=0,scsi-id={index % 256},lun=0"
        case _:
            return f"scsi-hd,bus=scsi0.0,scsi-id={index}"


def _facts(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware) -> str:
    sockets, cores, threads = topology_of(machine.cpu)
    identity = uuid_of(machine)
    facts = _Facts(
        version=1,
        name=display_name(machine.name),
        uuid=str(identity) if identity else "",
        architecture=machine.cpu.architecture,
        sockets=sockets,
        cores=cores,
        threads=threads,
        memory=machine.memory,
        clock_utc=machine.clock_utc,
        macs=[mac_of(nic.mac) for nic in machine.nics],
        disks=[
            _DiskFacts(
                file=disk.file,
                format=disk.format,
                size=disk.size,
                logical_sector=disk.logical_sector,
                boot=disk.boot,
                disk_id=disk.disk_id,
                serial=serial_of(machine, disk.disk_id),
            )
            for disk in disks
        ],
        bus=hardware.bus,
        nic=hardware.nic,
        firmware=hardware.firmware,
        secure_boot=hardware.secure_boot,
        machine=hardware.machine,
        video=hardware.video,
        network=hardware.network,
        nvram=hardware.nvram,
    )
    # ASCII without line ends: nothing in it can leave the comment.
    return json.dumps(msgspec.to_builtins(facts), ensure_ascii=True, separators=(",", ":"))


def parse(text: str) -> ParsedDefinition:
    """Read what a script of ours was made from; it is not run. ``ImageError`` when it is none of ours, or its comment
    was damaged.
    """
    line = next((line for line in text.split("\n")[:10] if line.startswith(_MARK)), "")
    if not line or len(line) > _LINE_MOST:
        raise ImageError("the script is none that this toolkit wrote")
    try:
        facts = msgspec.json.decode(line[len(_MARK) :].encode("utf-8", "replace"), type=_Facts)
    except msgspec.DecodeError as error:
        raise ImageError(f"the script's description is damaged: {error}") from error
    if facts.version != 1 or not facts.disks or any(not is_file_name(disk.file) for disk in facts.disks):
        raise ImageError("the script's description makes no sense")
    return ParsedDefinition(
        platform="qemu",
        machine=Machine(
            name=display_name(facts.name),
            firmware=facts.firmware,
            cpu=Cpu(
                architecture=facts.architecture,
                sockets=_bounded(facts.sockets),
                cores_per_socket=_bounded(facts.cores),
                threads_per_core=_bounded(facts.threads),
            ),
            memory=max(0, facts.memory),
            nics=tuple(Nic(name=f"net{n}", mac=mac_of(mac), model=facts.nic) for n, mac in enumerate(facts.macs)),
            platform=Platform(uuid=facts.uuid),
            clock_utc=facts.clock_utc,
        ),
        disks=tuple(
            DefinedDisk(
                file=disk.file,
                format=disk.format,
                size=max(0, disk.size),
                logical_sector=disk.logical_sector,
                boot=disk.boot,
                disk_id=disk.disk_id,
            )
            for disk in facts.disks
        ),
        hardware=Hardware(
            bus=facts.bus,
            nic=facts.nic,
            firmware=facts.firmware,
            secure_boot=facts.secure_boot,
            machine=facts.machine,
            video=facts.video,
            network=facts.network,
            nvram=facts.nvram if is_file_name(facts.nvram) else "",
        ),
    )


def _bounded(number: int) -> int:
    return min(max(number, 1), 4096)
