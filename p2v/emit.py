"""Put a capture into a folder: disks in the platform's format, and the definition that the platform opens, last.

An ``Emission`` goes through its steps in order; until ``publish`` every output lies in a hidden work folder beside its final place
(not under another name: a VMDK's descriptor states the name of its own file):

    copy       all disks, used blocks only, each through the one copy loop
    verify     qemu-img's own check, and the image read back and compared with what was read from the source
    publish    disks and record get their final place, then the definition: its presence means "done"
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import msgspec

from formats import qemu_img
from formats.block import BlockSource
from formats.definitions import Definition, render
from formats.errors import ImageError, NoSpaceError, ToolkitError, UsageError, WriteError
from formats.images import create_sink, image_format, open_source
from formats.layers import Seeded
from formats.layouts.window import Window
from formats.machine import Machine
from formats.nbd import connect
from formats.progress import Progress
from formats.records import RECORD, FolderRecord, StoredDisk, encode
from formats.refill import Refill
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy did, in bytes: ``kept`` of what was read came from an earlier, interrupted copy, shown to be still valid."""

    done: Transferred
    kept: int = 0


class Emission:
    """The writing of one plan; a context manager. The folder is made, and held by a lock: a second run into it is a ``UsageError``.

    Its work folder is gone afterwards, unless a copy was interrupted or cut: then the disks stay there, and the next run with the same plan
    goes on with them (``resumed``). What a killed run left counts as interrupted; nothing of it is believed without a comparison.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.work = plan.folder / f".{plan.name}.part"
        self.scratch = self.work / "scratch"  # for what is never published: overlays, copies aside
        self.resumed = False
        self._copying = False
        self._stamp = msgspec.json.encode([plan.platform.name, plan.disks])
        self._sizes: dict[str, int] = {}
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
            self.resumed = self._is_ours()
            if self.resumed and not (folder / self.plan.definition).exists():
                self._take_back()
            refuse_existing(self.plan)
            self._prepare_work()
        except OSError as error:
            self._unlock()
            raise _translated(error, folder) from None
        except BaseException:
            self._unlock()
            raise
        return self

    def _is_ours(self) -> bool:
        """Whether the work folder is of the same plan, left by a run that did not come to its end."""
        with contextlib.suppress(OSError):
            return (self.work / _PLAN).read_bytes() == self._stamp
        return False

    def _take_back(self) -> None:
        """Undo a publication that broke off before the definition was in its place."""
        for file in [RECORD, *(disk.file for disk in self.plan.disks)]:
            if (path := self.plan.folder / file).exists():
                path.rename(self.work / file)

    def _prepare_work(self) -> None:
        """Keep the disks that an interrupted run of the same plan left, and nothing else."""
        wanted = self._stamp
        shutil.rmtree(self.scratch if self.resumed else self.work, ignore_errors=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        (self.work / _PLAN).write_bytes(wanted)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A full disk wants its room back, and a copy that reads back wrong is none to build on.
        useful = self.resumed or (self._copying and not isinstance(error, NoSpaceError))
        useful = useful and not isinstance(error, WriteError)
        if kind is None or not useful:
            shutil.rmtree(self.work, ignore_errors=True)
        else:
            shutil.rmtree(self.scratch, ignore_errors=True)
        self._unlock()

    @property
    def allocated(self) -> int:
        """Bytes that an interrupted run's disks take already."""
        paths = [self.pending(disk) for disk in self.plan.disks]
        return sum(path.stat().st_blocks * 512 for path in paths if path.exists())

    def pending(self, disk: DiskPlan) -> Path:
        """Where the disk lies until it is published."""
        return self.work / disk.file

    def copy(
        self, disk: DiskPlan, source: BlockSource, *, progress: Progress | None = None, total: int | None = None
    ) -> Copied:
        """Write one disk, used blocks only, flushed to stable storage. Raises what source and sink raise."""
        path = self.pending(disk)
        self._sizes[disk.disk_id] = source.size
        if self.resumed and path.exists():
            if image_format(disk.format).subformat(disk.subformat).sequential or not _sound(path, disk):
                path.unlink()
            else:
                return self._go_on(disk, source, progress, total)
        sink = create_sink(path, disk.format, source.size, subformat=disk.subformat)
        self._copying = True
        try:
            done = copy(source, sink, progress=progress, total=total)
            sink.flush()
        finally:
            sink.close()
        self._fingerprints[disk.disk_id] = done.fingerprint
        return Copied(done=done)

    def _go_on(self, disk: DiskPlan, source: BlockSource, progress: Progress | None, total: int | None) -> Copied:
        """Fill up an earlier copy: what the source's digests show to be there is not sent again."""
        self._copying = True
        copied = refill(self.pending(disk), disk.format, source, progress=progress, total=total)
        self._fingerprints[disk.disk_id] = copied.done.fingerprint
        return copied

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
            # A format's rounding of the size is no part of the disk.
            seen = fingerprint(Window(image, 0, self._sizes[disk.disk_id]), progress=progress)
        if different := self._fingerprints[disk.disk_id].differences(seen):
            where = ", ".join(f"{e.start >> 30}" for e in different[:8])
            raise WriteError(
                f"the copy reads back differently from what was read from the source, in GiB {where}",
                subject=disk.file,
                advice=_AGAIN,
            )
        return report.text

    def publish(self, machine: Machine, extra: Mapping[str, object], *, adapted: bool = False) -> Artifact:
        """Give disks and record their final names, then the definition; each is on stable storage before the next."""
        plan = self.plan
        definition = self.definition(machine)
        texts = {RECORD: encode(self._record(machine, extra, adapted=adapted))}
        for name in sorted(definition.files, key=lambda name: name == definition.main):
            texts[name] = definition.files[name].encode()
        try:
            for name, content in texts.items():
                self._write(name, content, executable=name in definition.scripts)
            disks = sorted(
                path.name for path in self.work.iterdir() if path.is_file() and path.name not in {_PLAN, *texts}
            )
            for name in (*disks, *texts):
                if (plan.folder / name).exists():
                    raise UsageError(
                        f"{plan.folder / name} is there already", advice="Remove it, then run the same command again."
                    )
            for name in (*disks, *texts):  # the definition is the last of the texts
                (self.work / name).rename(plan.folder / name)
                os.fsync(self._lock)
        except OSError as error:
            raise _translated(error, plan.folder) from None
        return Artifact(
            folder=plan.folder,
            definition=plan.folder / definition.main,
            disks=tuple(plan.folder / disk.file for disk in plan.disks),
        )

    def _record(self, machine: Machine, extra: Mapping[str, object], *, adapted: bool) -> FolderRecord:
        plan = self.plan
        disks = tuple(StoredDisk(id=d.disk_id, file=d.file, format=d.format, size=d.size) for d in plan.disks)
        return FolderRecord(
            machine=machine,
            disks=disks,
            platform=plan.platform.name,
            hardware=plan.hardware,
            adapted=adapted,
            extra=extra,
        )

    def definition(self, machine: Machine) -> Definition:
        """The definition's files, as ``publish`` writes them."""
        plan = self.plan
        named = replace(machine, name=plan.name)
        return render(plan.platform.name, named, plan.defined_disks(), plan.hardware, folder=str(plan.folder.resolve()))

    def _write(self, name: str, content: bytes, *, executable: bool) -> None:
        path = self.work / name
        with path.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if executable:
            path.chmod(0o755)

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


_PLAN = "plan.json"
_AGAIN = "Run the conversion again; if it repeats, look at the destination's memory and storage (dmesg)."


def _sound(path: Path, disk: DiskPlan) -> bool:
    """Whether what an interrupted run left can be written on: whole structures and the right size. Leaked clusters are given back."""
    driver = image_format(disk.format).driver
    try:
        whole = qemu_img.check(path, driver, repair="leaks").corruptions == 0
        return whole and qemu_img.info(path, driver).virtual_size >= disk.size
    except ImageError:
        return False


def _translated(error: OSError, folder: Path) -> ToolkitError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"{folder} is full", advice="Free space there, or choose another folder with -o.")
    return UsageError(f"{folder} cannot be written: {error.strerror}", advice="Choose another folder with -o.")


def refill(
    path: Path,
    format: str,  # noqa: A002
    source: BlockSource,
    *,
    progress: Progress | None = None,
    total: int | None = None,
) -> Copied:
    """Make an image that holds an earlier copy equal to ``source``: what its digests show to be there already is not sent again."""
    server = qemu_img.Server(path, image_format(format).driver, writable=True)
    with server, contextlib.closing(connect(server.uri)) as image:
        seeded = Seeded(source, image)
        done = copy(seeded, Refill(image, image), progress=progress, total=total, blank=False)
        image.flush()
    return Copied(done=done, kept=seeded.bytes_kept)
