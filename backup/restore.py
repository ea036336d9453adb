"""A point as what the rest of the toolkit takes: an origin for a conversion, a device, an NBD server."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from backup.clone import cloned
from backup.reader import StoredCapture, StoredDisk
from backup.repository import Point, PointDisk, Repository
from formats import qemu_img
from formats.block import BlockSink, BlockSource, Extent, data_bytes
from formats.capture import Mark
from formats.errors import UsageError
from formats.images import create_sink
from formats.images.raw import RawFile, RawSink
from formats.layers import Cached
from formats.machine import Machine
from formats.nbd import NbdServer
from formats.overlay import Overlay
from formats.progress import Progress
from formats.refill import Refill
from formats.transfer import Transferred, copy
from p2v.collect.agent import Agent
from p2v.device import DeviceSink, verify
from p2v.plan import disks_of
from p2v.session import Session

_CACHE = 64 << 20  # bytes of a served disk that are kept: a booting guest reads many blocks more than once


class PointOrigin:
    """A point as an origin. ``holes`` takes, by disk id, what could not be had; without it damage is an error.

    ``as_clone``: the machine is to run beside the one that it was taken from.
    """

    def __init__(
        self,
        repository: Repository,
        point: Point,
        *,
        holes: Mapping[str, list[Extent]] | None = None,
        as_clone: bool = False,
    ) -> None:
        self.session: None = None  # a machine at rest cannot be asked
        self.adapted = False  # a point is the machine as it was
        self._repository, self._point, self._holes = repository, point, holes
        self._machine = cloned(point.machine) if as_clone else point.machine

    def inspect(self) -> Machine:
        """The machine as it was, or its clone."""
        return self._machine

    def capture(self, since: Mapping[str, Mark] | None = None) -> StoredCapture:  # noqa: ARG002 - a point has no marks
        """The point's disks."""
        capture = StoredCapture(self._repository, self._point, holes=self._holes)
        capture.machine = self._machine
        return capture

    def retire(self, marks: Sequence[Mark]) -> None:
        """Nothing: a point has no marks."""

    def cleanup(self) -> list[str]:
        """Nothing is ever left."""
        return []


def no_holes(point: Point) -> dict[str, list[Extent]]:
    """Where a salvaging capture notes what it could not read."""
    return {disk.id: [] for disk in point.disks}


def disk_number(point: Point, number: int) -> str:
    """The id of the point's disk ``number``, the boot disk being 0. ``UsageError`` when there is none."""
    order = [disk.id for disk in disks_of(point.machine)]
    ids = sorted((disk.id for disk in point.disks), key=lambda disk: order.index(disk) if disk in order else len(order))
    if not 0 <= number < len(ids):
        raise UsageError(f"the point has {len(ids)} disks, counted from 0", advice="See `p2v-backup show`.")
    return ids[number]


def restore_disk(source: BlockSource, device: Path, progress: Progress) -> Transferred:
    """Write a disk over a block device, or to a new file, sparsely.

    A file is written beside its place and named last. ``UsageError`` for a file that exists or a device that is too small.
    """
    try:
        mode = device.stat().st_mode
    except FileNotFoundError:
        mode = 0
    if mode and not stat.S_ISBLK(mode):
        raise UsageError(f"{device} is there already and no block device", advice="Name a device, or a new file.")
    target = device if mode else device.with_name(f".{device.name}.part")
    try:
        sink: BlockSink = create_sink(target, "raw", source.size)
        with contextlib.closing(sink):
            done = copy(source, sink, progress=progress, total=data_bytes(source))
            sink.flush()
        if target is not device:
            os.link(target, device)
            folder = os.open(device.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        if target is not device:
            target.unlink(missing_ok=True)
    return done


def restore_to_host(
    source: BlockSource, session: Session, path: str, progress: Progress, verifying: Progress
) -> Transferred:
    """Write a disk over a block device of another host, and read back by digests what was written.

    What was written before an error stays there: the device is then neither the old disk nor the new one.
    """
    with DeviceSink.open(session, path, source.size) as sink:
        done = copy(source, sink, progress=progress, total=data_bytes(source))
        sink.flush()
    with Agent.start(session) as agent, contextlib.closing(agent.disk(path)) as disk:
        verify(source, disk, verifying)
    return done


def revert_disk(repository: Repository, disk: PointDisk, device: Path, progress: Progress) -> tuple[Transferred, int]:
    """Bring a device, or a raw image, that holds another state of the disk back to that of the point, and return the bytes that were right.

    What it holds is read and told by its chunks' ids; the rest comes from the repository, and only blocks that differ are written.
    Bytes behind the disk's end stay as they are. ``NoSpaceError`` for a device that is too small.
    """
    with (
        contextlib.closing(RawSink(device, disk.size, keep=True)) as sink,
        contextlib.closing(RawFile(device)) as there,
        contextlib.closing(StoredDisk(repository, disk, seed=there)) as source,
    ):
        done = copy(source, Refill(there, sink), progress=progress, total=data_bytes(source), blank=False)
        sink.flush()
    return done, source.bytes_kept


@contextlib.contextmanager
def serving(
    capture: StoredCapture, *, socket: Path | None = None, port: int | None = None, writable: bool = False
) -> Iterator[tuple[NbdServer, list[str]]]:
    """Serve the disks of a point over NBD: the server and the addresses, the boot disk first.

    With ``writable`` each takes writes into memory, for as long as it is served; the point never changes.
    """
    ids = [disk_number(capture.point, number) for number in range(len(capture.point.disks))]
    exports: dict[str, BlockSource] = {}
    overlays: dict[str, BlockSink] = {}
    for number, disk_id in enumerate(ids):
        below: BlockSource = Cached(capture.disks[disk_id].source, limit=_CACHE)
        if writable:
            overlay = Overlay(below)
            exports[str(number)], overlays[str(number)] = overlay, overlay
        else:
            exports[str(number)] = below
    with NbdServer(exports, socket=socket, port=port, sinks=overlays) as server:
        yield server, [server.uri(str(number)) for number in range(len(ids))]


def kept_overlays(point: Point, folder: Path, uris: Sequence[str]) -> list[Path]:
    """qcow2 images over the served disks of a point, one each: what a machine writes is kept there. Those that are there already go on.

    They name their disk's address: to be used again the point must be served with the same socket.
    """
    overlays = []
    for number, uri in enumerate(uris):
        path = folder / f"{point.short}-disk{number}.qcow2"
        disk = point.disk(disk_number(point, number))
        if not path.exists() and disk is not None:
            part = path.with_name(f".{path.name}.part")
            qemu_img.create(part, "qcow2", disk.size, {"backing_file": uri, "backing_fmt": "raw"})
            part.rename(path)
        overlays.append(path)
    return overlays
