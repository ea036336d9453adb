"""The disks of a capture as QEMU and the copy see them: straight from their sources, or through overlays that an adaptation has written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from formats import qemu_img
from formats.block import BlockSource
from formats.errors import ReadError
from formats.layers import Cached, Counted
from formats.machine import Disk, Machine
from formats.nbd import NbdServer, connect
from p2v.emulator import Drive
from p2v.plan import disks_of

_CACHE = 64 << 20  # bytes kept of each disk: a booting guest reads many blocks more than once


class View:
    """Serves the disks of a machine over NBD, read-only, the boot disk first; a context manager.

    The sources stay the caller's. ``bytes_read`` is what was read from them through the view.
    """

    def __init__(self, machine: Machine, sources: Mapping[str, BlockSource]) -> None:
        self._disks = disks_of(machine)
        self._sources = sources
        self._counted = {disk.id: Counted(sources[disk.id]) for disk in self._disks}
        self._stack = contextlib.ExitStack()
        self._overlays: dict[str, str] = {}  # disk id -> URI of its overlay's server
        self._names = {disk.id: str(number) for number, disk in enumerate(self._disks)}
        exports = {self._names[disk_id]: Cached(source, limit=_CACHE) for disk_id, source in self._counted.items()}
        self._server = self._stack.enter_context(NbdServer(exports))

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
        return self._overlays.get(disk_id) or self._server.uri(self._names[disk_id])

    def lay(self, overlays: Mapping[str, Path]) -> None:
        """From now on the disks are seen through these qcow2 overlays, read-only. Each disk takes one, once."""
        for disk_id, path in overlays.items():
            if disk_id in self._overlays:
                raise ValueError(f"{disk_id} has an overlay already")
            server = qemu_img.Server(path, "qcow2", backing=self._uri(disk_id))
            self._overlays[disk_id] = self._stack.enter_context(server).uri

    @contextlib.contextmanager
    def source(self, disk_id: str) -> Iterator[BlockSource]:
        """The disk to copy: the source itself, or what is seen through its overlay."""
        if disk_id not in self._overlays:
            yield self._sources[disk_id]
            return
        with contextlib.closing(connect(self._overlays[disk_id])) as disk:
            try:
                yield disk
            except ReadError:
                self.check()  # the true cause is behind two servers
                raise

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
