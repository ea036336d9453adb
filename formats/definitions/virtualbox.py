"""VirtualBox: a shell script of `VBoxManage` commands. Its own .vbox file states UUIDs that lie in the disks, and is its own to write.

Facts: VirtualBox user manual, chapter "VBoxManage". ``unregistervm --delete`` removes the disks that are attached too, so a failed run
unregisters only. One controller takes all disks.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from formats.definitions import DEFAULT_MEMORY, PLATFORMS, DefinedDisk, Definition, Hardware, ordered
from formats.definitions.text import display_name, file_stem, mac_of, memory_of, uuid_of
from formats.machine import Bus, Firmware, Machine

# Bus -> kind of controller, its model, disks of one port.
_CONTROLLERS = {
    Bus.SATA: ("sata", "IntelAhci", 1),
    Bus.SCSI: ("scsi", "LSILogic", 1),
    Bus.SAS: ("sas", "LSILogicSAS", 1),
    Bus.NVME: ("pcie", "NVMe", 1),
    Bus.VIRTIO_SCSI: ("virtio", "VirtIO", 1),
    Bus.IDE: ("ide", "PIIX4", 2),
}
_NICS = {"e1000": "82540EM", "virtio": "virtio", "pcnet": "Am79C973"}
_SYSTEMS = {"linux": "Linux_64", "windows": "Windows2016_64"}
_CARDS = 8

_HEAD = """\
#!/bin/sh
# Makes the virtual machine in VirtualBox:  sh {main} [NAME]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command -v VBoxManage >/dev/null || {{ echo "VBoxManage is missing: install VirtualBox" >&2; exit 1; }}
name={name}
[ $# -eq 0 ] || name=$1
for disk in {disks}; do
    [ -f "$here/$disk" ] || {{ echo "$here/$disk is missing" >&2; exit 1; }}
done
"""


def render(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str) -> Definition:
    """The script. It finds its disks beside itself, so ``folder`` does not matter."""
    del folder
    main = f"{file_stem(machine.name)}{PLATFORMS['virtualbox'].suffix}"
    head = _HEAD.format(
        main=main,
        name=shlex.quote(display_name(machine.name)),
        disks=" ".join(shlex.quote(disk.file) for disk in ordered(disks)),
    )
    text = head + "\n".join(_commands(machine, disks, hardware)) + "\n"
    return Definition(files={main: text}, main=main, scripts=frozenset({main}))


def _commands(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware) -> Iterator[str]:
    identity = uuid_of(machine)
    known = f" --uuid {identity}" if identity is not None else ""
    system = _SYSTEMS.get(machine.system.family, "Other_64")
    yield f'VBoxManage createvm --name "$name" --ostype {system}{known} --register'
    yield "trap 'VBoxManage unregistervm \"$name\"' EXIT"  # half a machine is none; its disks stay
    yield f'VBoxManage modifyvm "$name" {shlex.join(_machine(machine, hardware))}'
    for number, nic in enumerate(machine.nics[:_CARDS], 1):
        words = [f"--nic{number}", "bridged" if hardware.network else "nat", f"--nictype{number}", _NICS[hardware.nic]]
        words += [f"--bridgeadapter{number}", display_name(hardware.network)] if hardware.network else []
        mac = mac_of(nic.mac).replace(":", "").upper()
        words += [f"--macaddress{number}", mac] if mac else []
        yield f'VBoxManage modifyvm "$name" {shlex.join(words)}'
    kind, model, room = _CONTROLLERS[hardware.bus]
    ports = f" --portcount {-(-len(disks) // room)}" if kind not in ("ide", "scsi") else ""
    yield f'VBoxManage storagectl "$name" --name disks --add {kind} --controller {model}{ports} --bootable on'
    for number, disk in enumerate(ordered(disks)):
        port, device = divmod(number, room)
        place = f"--storagectl disks --port {port} --device {device} --type hdd"
        yield f'VBoxManage storageattach "$name" {place} --medium "$here"{shlex.quote(f"/{disk.file}")}'
    yield "trap - EXIT"
    yield 'echo "The virtual machine $name was made. Start it with: VBoxManage startvm \\"$name\\""'


def _machine(machine: Machine, hardware: Hardware) -> Iterator[str]:
    uefi = hardware.firmware is Firmware.UEFI
    memory = memory_of(machine, DEFAULT_MEMORY, PLATFORMS["virtualbox"].memory_step)
    yield from (
        "--memory",
        str(memory >> 20),
        "--cpus",
        str(machine.cpu.count),
        "--firmware",
        "efi" if uefi else "bios",
    )
    yield from ("--chipset", hardware.machine or ("ich9" if uefi else "piix3"), "--ioapic", "on")
    yield from (
        "--rtcuseutc",
        "off" if machine.clock_utc is False else "on",
        "--graphicscontroller",
        "vmsvga",
        "--vram",
        "16",
    )
    yield from ("--boot1", "disk", "--boot2", "none", "--boot3", "none", "--boot4", "none")
