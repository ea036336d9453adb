"""Disks, volumes and volume groups of a machine, from what lsblk, sfdisk, find, LVM and sysfs said. Pure functions."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from formats.errors import ImageError
from formats.layouts import partition
from formats.machine import Bus, Disk, Partition, PartitionTable, TableKind, Volume, VolumeGroup
from formats.memory import MemoryDisk
from p2v.collect.commands import CommandLog

_NOT_A_DISK = re.compile(r"(?:loop|ram|zram|fd|sr|nbd|dm-|md)\d")
_NODES_MOST = 100_000


@dataclass(slots=True, kw_only=True)
class Node:
    """A device as lsblk knows it: its properties by lsblk's column names in lower case, and the paths it lies on."""

    path: str
    properties: dict[str, Any]
    parents: list[str] = field(default_factory=list)

    def text(self, key: str) -> str:
        """A property as stripped text; empty when there is none."""
        value = self.properties.get(key)
        return "" if value is None else str(value).strip()

    def number(self, key: str, default: int = 0) -> int:
        """A property as a number; older versions of lsblk quote them."""
        text = self.text(key)
        return int(text) if text.isdigit() else default

    def flag(self, key: str) -> bool | None:
        """A property that is true or false; None when it is neither."""
        return {"1": True, "true": True, "0": False, "false": False}.get(self.text(key).lower())

    @property
    def mountpoints(self) -> tuple[str, ...]:
        """Where it is mounted; ``[SWAP]`` for swap in use."""
        several = self.properties.get("mountpoints")
        found = several if isinstance(several, list) else [self.properties.get("mountpoint")]
        return tuple(str(item) for item in found if item)


def nodes(log: CommandLog) -> dict[str, Node]:
    """All devices by path, each once, parents before children; from lsblk's JSON, or its pairs where it is older than 2.27."""
    found: dict[str, Node] = {}
    try:
        tree = json.loads(log.text("lsblk"))
        _walk(tree["blockdevices"], "", found, 0)
    except (ValueError, KeyError, TypeError):
        found = {}
    return found or _pairs(log.text("lsblk-pairs"))


def _walk(devices: Any, parent: str, found: dict[str, Node], depth: int) -> None:
    if not isinstance(devices, list) or depth > 32 or len(found) > _NODES_MOST:
        return
    for device in devices:
        if not isinstance(device, dict):
            continue
        name = str(device.get("name", ""))
        mapped = str(device.get("kname", "")).startswith("dm-")
        path = str(device.get("path") or (f"/dev/mapper/{name}" if mapped else f"/dev/{name}"))
        node = found.setdefault(path, Node(path=path, properties=device))
        if parent and parent not in node.parents:
            node.parents.append(parent)
        _walk(device.get("children"), path, found, depth + 1)


def _pairs(text: str) -> dict[str, Node]:
    found: dict[str, Node] = {}
    paths: dict[str, str] = {}
    for line in text.splitlines():
        try:
            pairs = dict(item.partition("=")[::2] for item in shlex.split(line))
        except ValueError:
            continue
        properties = {key.lower(): value or None for key, value in pairs.items()}
        name, kernel = pairs.get("NAME", ""), pairs.get("KNAME", "")
        path = f"/dev/mapper/{name}" if kernel.startswith("dm-") else f"/dev/{name}"
        paths[kernel] = path
        node = found.setdefault(path, Node(path=path, properties=properties))
        parent = paths.get(pairs.get("PKNAME", ""), "")
        if parent and parent not in node.parents:
            node.parents.append(parent)
    return found


def disks(log: CommandLog, devices: Mapping[str, Node]) -> tuple[Disk, ...]:
    """The machine's disks in the kernel's order, removable ones included; empty drives are left out."""
    links = _links(log.text("links"))
    found: list[Disk] = []
    for node in devices.values():
        name = node.text("kname") or node.text("name")
        if node.text("type") not in {"disk", "rom"} or node.parents or _NOT_A_DISK.match(name):
            continue
        if node.number("size") > 0:
            found.append(_disk(node, name, log, links))
    return _distinct(found)


def _disk(node: Node, name: str, log: CommandLog, links: Mapping[str, Sequence[str]]) -> Disk:
    drivers = log.text(f"drivers:{name}").split()
    sector = node.number("log-sec", 512)
    table = table_of(log, name, node.number("size"), sector)
    model, serial = node.text("model"), node.text("serial")
    return Disk(
        id=_identity(node.text("wwn"), model, serial, table, name),
        size=node.number("size"),
        name=name,
        logical_sector=sector,
        physical_sector=node.number("phy-sec", 512),
        bus=_bus(name, node.text("tran"), drivers),
        driver=next((driver for driver in drivers if driver not in {"sd", "sr", "pcieport"}), ""),
        model=model,
        serial=serial,
        wwn=node.text("wwn"),
        rotational=node.flag("rota"),
        removable=bool(node.flag("rm")) or node.text("type") == "rom",
        links=tuple(links.get(name, ())),
        table=table,
    )


def _identity(wwn: str, model: str, serial: str, table: PartitionTable | None, name: str) -> str:
    if wwn:
        return _word(f"wwn-{wwn}")
    if serial:
        return _word("-".join(part for part in ("serial", model, serial) if part))
    if table is not None and table.id.strip("0x-"):
        return _word(f"{table.kind}-{table.id}")
    return f"name-{name}"


def _word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.:_-]+", "_", text.strip())[:120]


def _distinct(found: Sequence[Disk]) -> tuple[Disk, ...]:
    """Two paths to one disk, or a maker that gives all its disks one serial number, must not share an id."""
    import dataclasses

    counts: dict[str, int] = {}
    for disk in found:
        counts[disk.id] = counts.get(disk.id, 0) + 1
    return tuple(
        disk if counts[disk.id] == 1 else dataclasses.replace(disk, id=f"{disk.id}.{disk.name}") for disk in found
    )


def _bus(name: str, transport: str, drivers: Sequence[str]) -> Bus:
    named = {"nvme": Bus.NVME, "vd": Bus.VIRTIO, "xvd": Bus.XEN, "mmcblk": Bus.MMC, "hd": Bus.IDE}
    for prefix, bus in named.items():
        if name.startswith(prefix):
            return bus
    by_driver = {
        "virtio_blk": Bus.VIRTIO,
        "virtio_scsi": Bus.VIRTIO_SCSI,
        "vbd": Bus.XEN,
        "usb-storage": Bus.USB,
        "uas": Bus.USB,
    }
    for driver in drivers:
        if driver in by_driver:
            return by_driver[driver]
    by_transport = {
        "sata": Bus.SATA,
        "ata": Bus.IDE,
        "sas": Bus.SAS,
        "nvme": Bus.NVME,
        "usb": Bus.USB,
        "virtio": Bus.VIRTIO,
        "mmc": Bus.MMC,
    }
    if transport in by_transport:
        return by_transport[transport]
    return Bus.SCSI if "sd" in drivers or name.startswith("sd") else Bus.UNKNOWN


def _links(text: str) -> dict[str, list[str]]:
    """Persistent names below /dev/disk by kernel name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        path, _, target = line.partition(" ")
        if path.startswith("/dev/disk/by-") and not path.startswith("/dev/disk/by-diskseq/"):
            found.setdefault(target.rsplit("/", 1)[-1], []).append(path)
    return {name: sorted(paths) for name, paths in found.items()}


def table_of(log: CommandLog, name: str, size: int, sector: int) -> PartitionTable | None:
    """The partition table: sfdisk's account of it, else read from the disk's first 64 KiB (no logical partitions then)."""
    try:
        found = json.loads(log.text(f"table:{name}"))["partitiontable"]
        return _sfdisk_table(found, sector)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    head = log.stdout(f"head:{name}")[: min(size, 65536)]
    try:
        return partition.read_table(MemoryDisk(size, head), sector) if head else None
    except ImageError:
        return None


def _sfdisk_table(found: Mapping[str, Any], sector: int) -> PartitionTable | None:
    gpt = found["label"] == "gpt"
    if not gpt and found["label"] != "dos":
        return None
    sector = int(found.get("sectorsize", sector))
    entries = []
    for entry in found.get("partitions", []):
        number = int(re.search(r"(\d+)$", entry["node"])[1])  # type: ignore[index] # a TypeError means: no such table
        kind = str(entry["type"]).lower()
        identity = str(found.get("id", ""))
        entries.append(
            Partition(
                number=number,
                start=int(entry["start"]) * sector,
                size=int(entry["size"]) * sector,
                type=kind if gpt else f"{int(kind, 16):#04x}",
                uuid=str(entry.get("uuid", "")).lower() if gpt else f"{identity.removeprefix('0x')}-{number:02d}",
                label=str(entry.get("name", "")),
                bootable=bool(entry.get("bootable", False)),
                logical=not gpt and number > 4,
            )
        )
    return PartitionTable(
        kind=TableKind.GPT if gpt else TableKind.MBR,
        id=str(found.get("id", "")).lower(),
        partitions=tuple(entries),
    )


def volumes(devices: Mapping[str, Node]) -> tuple[Volume, ...]:
    """The storage tree without the bare disks: every partition and what lies on it, and disks that have content themselves."""
    return tuple(_volume(node) for node in devices.values() if _is_volume(node))


def _is_volume(node: Node) -> bool:
    name = node.text("kname")
    if node.text("type") in {"loop", "rom"} or re.match(r"(?:ram|zram|fd|nbd)\d", name):
        return False
    return node.text("type") != "disk" or bool(node.text("fstype"))


def _volume(node: Node) -> Volume:
    return Volume(
        path=node.path,
        kind=node.text("type"),
        size=node.number("size"),
        parents=tuple(node.parents),
        content=node.text("fstype"),
        uuid=node.text("uuid"),
        label=node.text("label"),
        mountpoints=node.mountpoints,
        used=node.number("fsused") if node.text("fsused").isdigit() else None,
    )


def volume_groups(log: CommandLog) -> tuple[VolumeGroup, ...]:
    """LVM's volume groups; empty when there are none or LVM could not be asked."""
    return tuple(_groups(log.text("lvm")))


def _groups(text: str) -> Iterator[VolumeGroup]:
    try:
        reports = json.loads(text)["report"] if text.strip() else []
    except (ValueError, KeyError, TypeError):
        return
    for report in reports if isinstance(reports, list) else []:
        try:
            group = report["vg"][0]
            yield VolumeGroup(
                name=group["vg_name"],
                uuid=group["vg_uuid"],
                extent_size=int(group["vg_extent_size"]),
                extent_count=int(group["vg_extent_count"]),
                free_extents=int(group["vg_free_count"]),
                physical_volumes=tuple(pv["pv_name"] for pv in report.get("pv", [])),
                logical_volumes=tuple(lv["lv_dm_path"] for lv in report.get("lv", []) if lv.get("lv_dm_path")),
            )
        except (KeyError, IndexError, ValueError, TypeError):
            continue


def disk_below(path: str, devices: Sequence[Volume], found: Sequence[Disk]) -> list[Disk]:
    """The disks that the device ``path`` lies on, in the order of ``found``."""
    parents = {volume.path: volume.parents for volume in devices}
    names, todo = set[str](), [path]
    while todo:
        current = todo.pop()
        if current in names:
            continue
        names.add(current)
        todo.extend(parents.get(current, ()))
    return [disk for disk in found if f"/dev/{disk.name}" in names]
