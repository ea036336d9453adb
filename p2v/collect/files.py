"""Machines at rest in files: a disk image, a definition with its disks, or a folder that ``p2v convert`` wrote.

A closed image is one instant, as after a power cut: consistency ``crash``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from formats import definitions, records
from formats.block import BlockSource
from formats.capture import CapturedDisk, Changed, Consistency, Mark, Unknown
from formats.definitions import PLATFORMS, Hardware
from formats.errors import ImageError, Notice
from formats.images import open_source
from formats.layouts.partition import read_table
from formats.machine import Boot, Bus, Disk, Firmware, Machine, PartitionTable, TableKind
from p2v.collect.at_rest import learn

_ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
_BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """One disk's file."""

    disk_id: str
    path: Path
    format: str | None


class FileOrigin:
    """A machine in files; nothing is ever written to them. ``disk_format`` states an image's format where its header is not to be trusted.

    ``platform`` and ``hardware`` are what a definition or record says, "" and None for a bare image; ``recorded`` is whether there is a
    record, ``adapted`` whether it says that the machine was fitted to any hardware.
    """

    def __init__(self, path: Path, *, disk_format: str | None = None) -> None:
        self.path = path
        self.session: None = None  # a machine at rest cannot be asked
        self.platform = ""
        self.hardware: Hardware | None = None
        self.recorded = False
        self.adapted = False
        self._format = disk_format
        self._files: tuple[_File, ...] = ()
        self._machine = self._read()

    def inspect(self) -> Machine:
        """The machine's record: what was written beside it, or what definition, partition tables and a Linux system's own files tell."""
        if not self.recorded:
            with contextlib.ExitStack() as stack:
                sources = {}
                for file in self._files:
                    source = sources[file.disk_id] = open_source(file.path, format=file.format)
                    stack.callback(source.close)
                self._machine = learn(self._machine, sources)
        return self._machine

    def capture(self, since: Mapping[str, Mark] | None = None) -> FilesCapture:
        """Open all disks for reading."""
        return FilesCapture(self._machine, self._files, since or {})

    def retire(self, marks: Sequence[Mark]) -> None:
        """Files know no marks: nothing to drop."""

    def cleanup(self) -> list[str]:
        """Reading files leaves nothing behind."""
        return []

    def _read(self) -> Machine:
        if self.path.is_dir():
            return self._folder(self.path)
        readable = {profile.suffix for profile in PLATFORMS.values() if profile.readable}
        if self._format is None and self.path.suffix.lower() in readable and self.path.is_file():
            return self._definition()
        return self._image()

    def _folder(self, folder: Path) -> Machine:
        record = records.read(folder)
        self.platform, self.hardware = record.platform, record.hardware
        self.recorded, self.adapted = True, record.adapted
        self._files = tuple(_File(disk_id=d.id, path=folder / d.file, format=d.format) for d in record.disks)
        known = {disk.id: disk for disk in record.machine.disks}
        if missing := [d.id for d in record.disks if d.id not in known]:
            raise ImageError(f"{folder / records.RECORD} has disks that its machine has not: {', '.join(missing)}")
        return replace(record.machine, disks=tuple(known[d.id] for d in record.disks))

    def _definition(self) -> Machine:
        parsed = definitions.read(self.path)
        self.platform, self.hardware = parsed.platform, parsed.hardware
        disks: list[Disk] = []
        files: list[_File] = []
        for number, defined in enumerate(definitions.ordered(parsed.disks)):
            path = definitions.locate(self.path.parent, defined)
            image_format = defined.format or None
            disk = self._disk(defined.disk_id or f"disk{number}", path, image_format, parsed.hardware.bus)
            disks.append(replace(disk, logical_sector=defined.logical_sector))
            files.append(_File(disk_id=disk.id, path=path, format=image_format))
        self._files = tuple(files)
        boot = replace(parsed.machine.boot, disk=disks[0].id if disks else "")
        return replace(parsed.machine, disks=tuple(disks), boot=boot)

    def _image(self) -> Machine:
        disk = self._disk("disk0", self.path, self._format, Bus.UNKNOWN)
        self._files = (_File(disk_id=disk.id, path=self.path, format=self._format),)
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.path.stem).strip("-_") or "machine"
        return Machine(name=name, firmware=_firmware(disk.table), disks=(disk,), boot=Boot(disk=disk.id))

    def _disk(self, disk_id: str, path: Path, image_format: str | None, bus: Bus) -> Disk:
        with contextlib.closing(open_source(path, format=image_format)) as source:
            if source.size == 0:
                raise ImageError(
                    f"{path} is empty", advice="Name a disk image with something in it.", subject=str(path)
                )
            table = read_table(source)
            return Disk(id=disk_id, size=source.size, bus=bus, table=table)


def _firmware(table: PartitionTable | None) -> Firmware:
    """A GPT disk with an EFI system partition and no BIOS boot partition was made for UEFI; any other one for BIOS."""
    if table is None or table.kind is not TableKind.GPT:
        return Firmware.BIOS
    types = {partition.type.lower() for partition in table.partitions}
    return Firmware.UEFI if _ESP in types and _BIOS_BOOT not in types else Firmware.BIOS


class FilesCapture:
    """The disks of a ``FileOrigin``, open for reading; leaving it closes them."""

    def __init__(self, machine: Machine, files: Sequence[_File], since: Mapping[str, Mark]) -> None:
        self.machine = machine
        self.notices: Sequence[Notice] = ()
        self._since = since
        opened: dict[str, BlockSource] = {}
        try:
            for file in files:
                opened[file.disk_id] = open_source(file.path, format=file.format)
        except BaseException:
            for source in opened.values():
                source.close()
            raise
        self.disks: Mapping[str, CapturedDisk] = {
            disk_id: CapturedDisk(source=source, mark=None, consistency=Consistency.CRASH)
            for disk_id, source in opened.items()
        }

    def changes(self, disk_id: str) -> Changed | Unknown:
        """Files keep no track of changes (C4)."""
        return Unknown(reason=f"image files keep no track of changes, so all of {disk_id} is compared")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for disk in self.disks.values():
            disk.source.close()
