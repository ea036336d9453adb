"""Proxmox VE: a shell script of `qm` commands, run on a node; its configuration lies on a cluster's file system that nobody else writes.

Facts: Proxmox VE Administration Guide, qm(1). ``import-from`` takes any image that QEMU reads, by its absolute path, and copies it into a
storage. Signed keys are not enrolled unless Secure Boot is asked for: many Linux loaders would not start.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from formats.definitions import DEFAULT_MEMORY, PLATFORMS, DefinedDisk, Definition, Hardware, ordered
from formats.definitions.text import (
    bridge_name,
    display_name,
    file_stem,
    mac_of,
    memory_of,
    serial_of,
    topology_of,
    uuid_of,
)
from formats.errors import UsageError
from formats.machine import Bus, Firmware, Machine

_BUSES = {Bus.VIRTIO_SCSI: "scsi", Bus.VIRTIO: "virtio", Bus.SATA: "sata", Bus.IDE: "ide"}

_HEAD = """\
#!/bin/sh
# Makes the virtual machine in Proxmox VE. Run on a node, as root:
#   sh {main} [VMID] [STORAGE]       (default: the next free id, local-lvm; the bridge is $BRIDGE or vmbr0)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command -v qm >/dev/null || {{ echo "qm is missing: this script runs on a node of Proxmox VE" >&2; exit 1; }}
id=${{1:-$(pvesh get /cluster/nextid)}}
storage=${{2:-local-lvm}}
bridge={bridge}
[ -z "${{BRIDGE:-}}" ] || bridge=$BRIDGE
for disk in {disks}; do
    [ -f "$here/$disk" ] || {{ echo "$here/$disk is missing" >&2; exit 1; }}
done
"""


def render(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware, *, folder: str) -> Definition:
    """The script. It finds its disks beside itself, so ``folder`` does not matter."""
    del folder
    if any("," in disk.file for disk in disks):
        raise UsageError("qm takes no disk with a comma in its name", advice="rename the disk's file")
    main = f"{file_stem(machine.name)}{PLATFORMS['proxmox'].suffix}"
    head = _HEAD.format(
        main=main,
        bridge=bridge_name(hardware.network, "vmbr0"),
        disks=" ".join(shlex.quote(disk.file) for disk in ordered(disks)),
    )
    return Definition(
        files={main: head + "\n".join(_commands(machine, disks, hardware)) + "\n"}, main=main, scripts=frozenset({main})
    )


def _commands(machine: Machine, disks: Sequence[DefinedDisk], hardware: Hardware) -> Iterator[str]:
    prefix = _BUSES[hardware.bus]
    words = ["qm", "create", '"$id"', *_quoted(_machine(machine, hardware))]
    for number, nic in enumerate(machine.nics):
        mac = f"={mac_of(nic.mac).upper()}" if mac_of(nic.mac) else ""
        words += [f"--net{number}", f'"{hardware.nic}{mac},bridge=$bridge"']
    yield " ".join(words)
    yield "trap 'qm destroy \"$id\" --purge' EXIT"  # half a machine is none
    if hardware.firmware is Firmware.UEFI:
        keys = 1 if hardware.secure_boot else 0
        yield f'qm set "$id" --efidisk0 "$storage:1,efitype=4m,pre-enrolled-keys={keys}"'
    for number, disk in enumerate(ordered(disks)):
        serial = serial_of(machine, disk.disk_id)
        options = ",discard=on" + (f",serial={serial}" if serial else "")
        path = shlex.quote(f"/{disk.file}")
        yield f'qm set "$id" --{prefix}{number} "$storage:0,import-from=$here"{path}{options}'
    yield f'qm set "$id" --boot order={prefix}0'
    yield "trap - EXIT"
    yield 'echo "The virtual machine $id was made. Start it with: qm start $id"'


def _machine(machine: Machine, hardware: Hardware) -> Iterator[str]:
    uefi = hardware.firmware is Firmware.UEFI
    sockets, cores, threads = topology_of(machine.cpu)
    memory = memory_of(machine, DEFAULT_MEMORY, PLATFORMS["proxmox"].memory_step)
    yield from ("--name", file_stem(machine.name).replace("_", "-").replace(".", "-"))
    yield from ("--description", display_name(machine.name))  # a name there is a DNS name
    yield from ("--ostype", "win11" if machine.system.family == "windows" else "l26")
    yield from (
        "--memory",
        str(memory >> 20),
        "--sockets",
        str(sockets),
        "--cores",
        str(cores * threads),
        "--cpu",
        "host",
    )
    yield from ("--bios", "ovmf" if uefi else "seabios")
    if uefi or hardware.machine:
        yield from ("--machine", hardware.machine or "q35")
    if hardware.bus is Bus.VIRTIO_SCSI:
        yield from ("--scsihw", hardware.controller or "virtio-scsi-single")
    if machine.clock_utc is False:
        yield from ("--localtime", "1")
    identity = uuid_of(machine)
    if identity is not None:
        yield from ("--smbios1", f"uuid={identity}")
    yield from ("--serial0", "socket")


def _quoted(words: Iterator[str]) -> Iterator[str]:
    return (shlex.quote(word) for word in words)
