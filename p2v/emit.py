"""Put a capture into a folder: disks in the platform's format, and the definition that the platform opens, last.

An ``Emission`` goes through its steps in order; until ``publish`` every output lies in a hidden work folder beside its final place
(not under another name: a VMDK's descriptor states the name of its own file):

    copy       all disks, used blocks only, each through the one copy loop
    verify     qemu-img's own check, and the image read back and compared with what was read from the source
    publish    disks and record get their final place, then the definition: its presence means "done"
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from formats import qemu_img
from formats.block import BlockSource
from formats.definitions import Definition, render
from formats.errors import NoSpaceError, UsageError, WriteError
from formats.images import create_sink, image_format, open_source
from formats.machine import Machine
from formats.progress import Progress
from formats.records import RECORD, FolderRecord, StoredDisk, encode
from formats.transfer import Fingerprint, Transferred, copy, fingerprint
from p2v.plan import DiskPlan, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What was put into the folder; ``definition`` is the file that the platform opens."""

    folder: Path
    definition: Path
    disks: tuple[Path, ...]


def refuse_existing(plan: Plan) -> None:
    """``UsageError`` when a file that the plan writes is there already: nothing is ever overwritten."""
    for file in (plan.definition, RECORD, *(d.file for d in plan.disks)):
        if (path := plan.folder / file).exists():
            raise UsageError(
                f"{path} is there already", advice="Choose another folder with -o or another --name, or remove it."
            )


def require_space(folder: Path, needed: int) -> None:
    """``NoSpaceError`` before a byte is copied when the file system of ``folder`` has less than ``needed`` bytes free."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise NoSpaceError(
            f"{folder} has {free >> 20} MiB free, the disks need up to {needed >> 20} MiB",
            advice="Choose a folder on a larger file system with -o, or free space there.",
        )


class Emission:
    """The writing of one plan; a context manager that removes its work folder, whatever happens.

    The folder is made, and held by a lock: a second run into it is refused with ``UsageError``.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.work = plan.folder / f".{plan.name}.part"
        self.scratch = self.work / "scratch"  # for what is never published: overlays, copies aside
        self._fingerprints: dict[str, Fingerprint] = {}
        self._lock = -1

    def __enter__(self) -> Self:
        folder = self.plan.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise UsageError(
                f"another run is writing into {folder}", advice="Wait for it, or choose another folder with -o."
            ) from None
        except OSError as error:
            self._unlock()
            raise UsageError(
                f"{folder} cannot be used: {error.strerror}", advice="Choose another folder with -o."
            ) from None
        try:
            refuse_existing(self.plan)
            shutil.rmtree(self.work, ignore_errors=True)  # what a killed run left
            self.scratch.mkdir(parents=True)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self._unlock()

    def pending(self, disk: DiskPlan) -> Path:
        """Where the disk lies until it is published."""
        return self.work / disk.file

    def copy(
        self, disk: DiskPlan, source: BlockSource, *, progress: Progress | None = None, total: int | None = None
    ) -> Transferred:
        """Write one disk, used blocks only, flushed to stable storage. Raises what source and sink raise."""
        path = self.pending(disk)
        sink = create_sink(path, disk.format, source.size, subformat=disk.subformat)
        try:
            done = copy(source, sink, progress=progress, total=total)
            sink.flush()
        finally:
            sink.close()
        self._fingerprints[disk.disk_id] = done.fingerprint
        return done

    def verify(self, disk: DiskPlan, *, progress: Progress | None = None) -> str:
        """Second opinions on a copied disk: the image checker's, and the image read back against what was read from the source.

        Returns what the checker said. ``WriteError`` when either finds a difference.
        """
        path = self.pending(disk)
        report = qemu_img.check(path, image_format(disk.format).driver)
        if not report.clean:
            raise WriteError(
                f"qemu-img check finds errors in the copy: {report.text}", subject=disk.file, advice=_AGAIN
            )
        with contextlib.closing(open_source(path, format=disk.format)) as image:
            seen = fingerprint(image, progress=progress)
        if different := self._fingerprints[disk.disk_id].differences(seen):
            where = ", ".join(f"{e.start >> 30}" for e in different[:8])
            raise WriteError(
                f"the copy reads back differently from what was read from the source, in GiB {where}",
                subject=disk.file,
                advice=_AGAIN,
            )
        return report.text

    def publish(self, machine: Machine, extra: Mapping[str, object]) -> Artifact:
        """Give disks and record their final names, then the definition; each is on stable storage before the next."""
        plan = self.plan
        definition = self.definition(machine)
        for file in sorted(path for path in self.work.iterdir() if path.is_file()):
            file.rename(plan.folder / file.name)
        os.fsync(self._lock)
        self._write(RECORD, encode(self._record(machine, extra)))
        for name in sorted(definition.files, key=lambda name: name == definition.main):
            self._write(name, definition.files[name].encode(), executable=name in definition.scripts)
        return Artifact(
            folder=plan.folder,
            definition=plan.folder / definition.main,
            disks=tuple(plan.folder / disk.file for disk in plan.disks),
        )

    def _record(self, machine: Machine, extra: Mapping[str, object]) -> FolderRecord:
        plan = self.plan
        disks = tuple(StoredDisk(id=d.disk_id, file=d.file, format=d.format, size=d.size) for d in plan.disks)
        return FolderRecord(
            machine=machine, disks=disks, platform=plan.platform.name, hardware=plan.hardware, extra=extra
        )

    def definition(self, machine: Machine) -> Definition:
        """The definition's files, as ``publish`` writes them."""
        plan = self.plan
        named = replace(machine, name=plan.name)
        return render(plan.platform.name, named, plan.defined_disks(), plan.hardware, folder=str(plan.folder.resolve()))

    def _write(self, name: str, content: bytes, *, executable: bool = False) -> None:
        pending = self.work / name
        with pending.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if executable:
            pending.chmod(0o755)
        pending.rename(self.plan.folder / name)
        os.fsync(self._lock)

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


_AGAIN = "Run the conversion again; if it repeats, look at the destination's memory and storage (dmesg)."
