"""The disks of a capture as QEMU and the copy see them: straight from their sources, or through overlays that an adaptation has written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from formats import qemu_img
from formats.block import BlockSource
from formats.images import open_source
from formats.layers import Cached, Counted, Overlaid
from formats.machine import Disk, Machine
from formats.nbd import NbdServer
from p2v.emulator import Drive, create_overlay
from p2v.plan import disks_of

_CACHE = 64 << 20  # bytes kept of each disk: a booting guest reads many blocks more than once


class View:
    """Serves the disks of a machine over NBD, read-only, the boot disk first; a context manager.

    The sources stay the caller's. ``bytes_read`` is what was read from them through the view.
    """

    def __init__(self, machine: Machine, sources: Mapping[str, BlockSource], *, socket: Path | None = None) -> None:
        """``socket`` is where the server listens, instead of in a private folder below the temporary one."""
        self._disks = disks_of(machine)
        self._sources = sources
        self._counted = {disk.id: Counted(sources[disk.id]) for disk in self._disks}
        self._stack = contextlib.ExitStack()
        self._overlays: dict[str, list[Path]] = {}  # by disk id, the lowest first
        self._served: dict[str, str] = {}  # disk id -> URI of the server of its highest overlay
        self._names = {disk.id: str(number) for number, disk in enumerate(self._disks)}
        exports = {self._names[disk_id]: Cached(source, limit=_CACHE) for disk_id, source in self._counted.items()}
        self._server = self._stack.enter_context(NbdServer(exports, socket=socket))

    @property
    def bytes_read(self) -> int:
        """Bytes read from the sources so far, reads of a later direct copy not among them."""
        return sum(source.bytes_read for source in self._counted.values())

    def drives(self, overlays: Mapping[str, Path] | None = None) -> list[Drive]:
        """The disks for an emulated machine. Writes go to the kept ``overlays`` by disk id, where given, else they are thrown away."""
        kept = overlays or {}
        return [self._drive(disk, kept.get(disk.id)) for disk in self._disks]

    def _drive(self, disk: Disk, overlay: Path | None) -> Drive:
        return Drive(
            uri=self._uri(disk.id),
            overlay=overlay,
            serial=disk.serial,
            logical_sector=disk.logical_sector,
            physical_sector=disk.physical_sector,
        )

    def _uri(self, disk_id: str) -> str:
        return self._served.get(disk_id) or self._server.uri(self._names[disk_id])

    def new_overlays(self, folder: Path, name: str) -> dict[str, Path]:
        """Empty qcow2 overlays for all disks, in ``folder``, by disk id."""
        made = {disk.id: folder / f"{name}-{self._names[disk.id]}.overlay" for disk in self._disks}
        for disk_id, path in made.items():
            create_overlay(path, self._sources[disk_id].size)
        return made

    def lay(self, overlays: Mapping[str, Path]) -> None:
        """From now on the disks are seen through these qcow2 overlays too, which nobody writes any more. Later ones lie on top."""
        for disk_id, path in overlays.items():
            server = qemu_img.Server(path, "qcow2", backing=self._uri(disk_id))
            self._served[disk_id] = self._stack.enter_context(server).uri
            self._overlays.setdefault(disk_id, []).append(path)

    def source(self, disk_id: str) -> BlockSource:
        """The disk to copy: its source, below what the overlays hold. It is the view's: it lives as long as this does."""
        disk = self._sources[disk_id]
        for path in self._overlays.get(disk_id, ()):
            top = open_source(path, format="qcow2")
            self._stack.callback(top.close)
            disk = Overlaid(disk, top, qemu_img.written(path))
        return disk

    def check(self) -> None:
        """Raise what a source failed with, behind the I/O error that its reader saw."""
        if self._server.error is not None:
            raise self._server.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
