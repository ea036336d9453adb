"""Names and sizes as definitions write them."""

from __future__ import annotations

import re
import uuid

from formats.machine import Cpu, Machine

_FILE_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,255}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_NAME_MOST = 80
_SERIAL = re.compile(r"[^A-Za-z0-9_.+-]+")


def is_file_name(name: str) -> bool:
    """Whether it is the plain name of a file: no folder, no control character, not ``.`` or ``..``, and no option."""
    return (
        _FILE_NAME.fullmatch(name) is not None
        and name not in (".", "..")
        and not name.startswith("-")
        and _encodable(name)
    )


def _encodable(name: str) -> bool:
    try:
        return len(name.encode("utf-8")) <= 255
    except UnicodeEncodeError:
        return False


def file_stem(name: str) -> str:
    """A name for files made from a machine's: ASCII letters, digits, ``.``, ``_`` and ``-``, at most 64 of them."""
    return _UNSAFE.sub("-", name).strip("-.")[:64].rstrip("-.") or "machine"


def bridge_name(name: str, usual: str) -> str:
    """The name of a network bridge among a program's options: what a Linux interface may be called, else ``usual``."""
    return "".join(c for c in name if c.isascii() and (c.isalnum() or c in "._-"))[:15] or usual


def display_name(name: str) -> str:
    """The machine's name on one line: without control characters and what XML cannot hold, at most 80 characters."""
    kept = "".join(c if c.isprintable() and c not in "/\ufffe\uffff" else " " for c in name)
    return " ".join(kept.split())[:_NAME_MOST].strip() or "machine"


def serial_of(machine: Machine, disk_id: str, most: int = 20) -> str:
    """The disk's serial number as a guest may see it again; empty when the machine knows no such disk or serial."""
    serial = next((disk.serial for disk in machine.disks if disk.id == disk_id), "")
    return _SERIAL.sub("", serial)[:most]


def mac_of(mac: str) -> str:
    """The address in lower case with colons; empty when it is none, or a multicast one."""
    mac = mac.strip().lower().replace("-", ":")
    if _MAC.fullmatch(mac) is None or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        return ""
    return mac


def uuid_of(machine: Machine) -> uuid.UUID | None:
    """The machine's SMBIOS UUID; None when it has none that means anything."""
    try:
        found = uuid.UUID(machine.platform.uuid)
    except ValueError:
        return None
    return None if found.int in (0, (1 << 128) - 1) else found


def memory_of(machine: Machine, default: int, step: int) -> int:
    """Bytes of memory, rounded up to ``step``."""
    return -(-(machine.memory or default) // step) * step


def topology_of(cpu: Cpu) -> tuple[int, int, int]:
    """Sockets, cores of a socket, threads of a core; each at least 1."""
    return max(1, cpu.sockets), max(1, cpu.cores_per_socket), max(1, cpu.threads_per_core)


def has_serial_console(machine: Machine) -> bool:
    """Whether the machine speaks on a serial port."""
    return any(console.startswith("ttyS") for console in machine.boot.consoles)
