"""What the stage has to know of a Linux machine: stable names of its devices, drivers, loaders, and how its kernel is started."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from formats.machine import Disk, EfiVariable, Kernel, Machine, Volume
from p2v.drivers import CONTROLLER_DRIVERS, drivers_of, lacking
from p2v.emulator import Controller

# Words of a kernel command line that the adaptation boot must not have: other consoles, other first programs, waiting, and what
# costs memory or time. ``ro`` and ``rw`` are stated anew.
_DROPPED = re.compile(
    r"(?:BOOT_IMAGE|initrd|console|init|rdinit|resume|resume_offset|panic|crashkernel|splash|loglevel|systemd\.unit|hugepages\w*"
    r"|default_hugepagesz|isolcpus|nohz_full|rd\.break|rd\.shell|rd\.emergency|selinux|enforcing|security|root|earlyprintk|earlycon)(?:=.*)?"
    r"|quiet|rhgb|ro|rw|single|emergency|rescue|[1-5sS]|debug"
)
_KERNEL_NAME = re.compile(
    r"/dev/(?:[shv]d[a-z]+\d*|xvd[a-z]+\d*|nvme\d+n\d+(?:p\d+)?|mmcblk\d+(?:p\d+)?|cciss/c\d+d\d+(?:p\d+)?)"
)
_PARTITION = re.compile(r"^(?P<disk>.*?\d)p(?P<number>\d+)$|^(?P<letters>.*?[a-z])(?P<digits>\d+)$")
_LOAD_OPTION = re.compile(r"Boot([0-9A-F]{4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class StableName:
    """A name that follows from slot or order, and what stands for it on any hardware.

    ``file_system`` goes into fstab and crypttab, ``root`` onto the kernel's command line; both are ``UUID=`` or ``PARTUUID=``.
    """

    old: str
    file_system: str
    root: str


def choose_controller(kernel: Kernel) -> Controller | None:
    """A controller that QEMU has and this kernel's initramfs drives; None when there is none, AHCI when what it holds is not known."""
    if drivers_of(kernel) is None:
        return Controller.SATA
    # A kernel of which the built-in modules are not known may have sd_mod built in; the controller's own driver decides.
    assumed = {"sd_mod"} if kernel.builtin is None else set()
    for controller, groups in CONTROLLER_DRIVERS.items():
        if set(lacking(kernel, groups)) <= assumed:
            return controller
    return None


def stable_names(machine: Machine) -> tuple[StableName, ...]:
    """A stable name for every name of a disk or partition that would not last, from the UUIDs in the record.

    Names are the kernel's own and those below /dev/disk/by-id and by-path; LVM's names, UUIDs and labels last and are not here. What
    has neither UUID nor PARTUUID is left out: there is no better name for it.
    """
    unbooted = any(not kernel.initramfs for kernel in machine.boot.kernels)
    found: dict[str, StableName] = {}
    for volume in machine.volumes:
        if not _KERNEL_NAME.fullmatch(volume.path):
            continue
        disk, number = _place(machine, volume)
        partition = _partition_uuid(disk, number)
        identity = f"UUID={volume.uuid}" if volume.uuid and volume.content not in _MEMBERS else ""
        if not identity and not partition:
            continue
        # Without an initramfs the kernel itself looks for its root, and knows no file systems' UUIDs.
        root = partition if unbooted and partition else identity or partition
        for old in (volume.path, *_links(disk, number)):
            found.setdefault(old, StableName(old=old, file_system=identity or partition, root=root))
    return tuple(found.values())


_MEMBERS = frozenset({"LVM2_member", "linux_raid_member", "isw_raid_member", "ddf_raid_member"})


def _place(machine: Machine, volume: Volume) -> tuple[Disk | None, int]:
    """The disk that a volume is or lies on, and the number of its partition there, 0 for the whole disk."""
    name = volume.path.removeprefix("/dev/")
    by_name = {disk.name.replace("!", "/"): disk for disk in machine.disks}
    if name in by_name:
        return by_name[name], 0
    match = _PARTITION.match(name)
    if match is None:
        return None, 0
    disk = by_name.get(match["disk"] or match["letters"])
    return disk, int(match["number"] or match["digits"])


def _partition_uuid(disk: Disk | None, number: int) -> str:
    if disk is None or disk.table is None or not number:
        return ""
    found = next((p.uuid for p in disk.table.partitions if p.number == number), "")
    return f"PARTUUID={found}" if found else ""


def _links(disk: Disk | None, number: int) -> Iterator[str]:
    for link in disk.links if disk is not None else ():
        if link.startswith(("/dev/disk/by-id/", "/dev/disk/by-path/")):
            yield f"{link}-part{number}" if number else link


def command_line(machine: Machine, *, extra: str) -> str:
    """The kernel command line of the adaptation boot: the source's own, made stable and quiet, then ``extra``."""
    names = {name.old: name.root for name in stable_names(machine)}
    kept = []
    # Nothing behind "--" is the kernel's.
    for item in machine.boot.command_line.partition(" -- ")[0].split():
        if item.startswith("root="):
            value = item.removeprefix("root=")
            kept.append(f"root={names.get(value, value)}")
        elif not _DROPPED.fullmatch(item) and item.isprintable():
            kept.append(item)
    return " ".join((*kept, extra))


def loaders(variables: tuple[EfiVariable, ...]) -> tuple[str, ...]:
    """Files on the ESP that the machine's boot entries start, in the order of BootOrder, with slashes and no leading one."""
    entries = {match[1]: variable.data for variable in variables if (match := _LOAD_OPTION.fullmatch(variable.name))}
    order = next((variable.data for variable in variables if variable.name == "BootOrder"), b"")
    numbers = [f"{number:04X}" for (number,) in struct.iter_unpack("<H", order[: len(order) & ~1])]
    found = []
    for number in numbers:
        path = _loader_file(entries.get(number, b""))
        if re.fullmatch(r"EFI/[\w.+ -]+(?:/[\w.+ -]+)*\.efi", path, re.IGNORECASE) and ".." not in path:
            found.append(path)
    return tuple(dict.fromkeys(found))


def _loader_file(option: bytes) -> str:
    """The file of an EFI_LOAD_OPTION (UEFI specification, 3.1.3): its device path's nodes of type 4, subtype 4; empty if it has none."""
    if len(option) < 6 or not option[0] & 1:  # LOAD_OPTION_ACTIVE
        return ""
    length = int.from_bytes(option[4:6], "little")
    end = 6
    while option[end : end + 2] not in (b"\0\0", b""):
        end += 2
    nodes = option[end + 2 : end + 2 + length]
    path = ""
    while len(nodes) >= 4 and nodes[0] != 0x7F:
        size = int.from_bytes(nodes[2:4], "little")
        if size < 4 or size > len(nodes):
            return ""
        if nodes[:2] == b"\x04\x04":
            path += nodes[4:size].decode("utf-16-le", "replace").rstrip("\0")
        nodes = nodes[size:]
    return path.replace("\\", "/").lstrip("/")


def facts(machine: Machine) -> Mapping[str, str]:
    """The tables that the stage reads, by file name; fields are apart by tabs, and hold none (what does is left out)."""
    rows: dict[str, Sequence[tuple[str, ...]]] = {
        "names": [(name.old, name.file_system, name.root) for name in stable_names(machine)],
        "kernels": [_kernel_row(kernel) for kernel in machine.boot.kernels if kernel.initramfs],
        "loaders": [(path,) for path in loaders(machine.boot.efi_variables)],
        "esp": [(volume.uuid,) for volume in machine.volumes if _is_esp(machine, volume)],
    }
    tables = {name: _table(found) for name, found in rows.items()}
    for kernel in machine.boot.kernels:
        held = drivers_of(kernel)
        if held is not None and _clean((kernel.version,)) and "/" not in kernel.version:
            # The stage counts its files by their first lines, so none may be empty.
            tables[f"drivers.{kernel.version}"] = _table([("none",), *((name,) for name in sorted(held))])
    return tables


def _kernel_row(kernel: Kernel) -> tuple[str, str, str]:
    host_only = {True: "host-only", False: "generic", None: "unknown"}[kernel.host_only]
    return kernel.version, kernel.initramfs, host_only


def _is_esp(machine: Machine, volume: Volume) -> bool:
    disk, number = _place(machine, volume)
    types = {p.number: p.type for p in disk.table.partitions} if disk is not None and disk.table is not None else {}
    return bool(volume.uuid) and types.get(number) in {"c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef"}


def _clean(row: tuple[str, ...]) -> bool:
    return all(re.fullmatch(r"[^\x00-\x1f\x7f]+", cell) for cell in row)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows if _clean(row))
