"""Disk images by themselves: what `p2v image` does."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from formats import qemu_img
from formats.block import BlockSource, Extent, Kind, data_bytes, is_zero
from formats.compare import data_of_either, differences
from formats.errors import UsageError, WriteError
from formats.images import FORMATS, ImageHeader, create_sink, image_format, image_size, open_source, probe
from formats.layouts.window import Window
from formats.progress import Progress
from formats.transfer import copy, fingerprint

_STEP = 8 << 20  # bytes between signs of progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What an image is. ``allocated`` is what its files take on disk, ``files`` all of them, the one that was named first; bytes."""

    header: ImageHeader
    files: tuple[Path, ...]
    length: int
    allocated: int


def describe(path: Path, *, format: str | None = None) -> ImageInfo:  # noqa: A002
    """What the image's header says, and what it takes. Opens no other file; raises what ``probe`` raises."""
    header = probe(path, format=format)
    parts = [path.parent / name for name in header.references if header.format == "vmdk"]
    files = (path, *(part for part in dict.fromkeys(parts) if part.is_file() and part.parent == path.parent))
    states = [file.stat() for file in files]
    return ImageInfo(
        header=header,
        files=files,
        length=sum(state.st_size for state in states),
        allocated=sum(state.st_blocks * 512 for state in states),
    )


def check(path: Path, *, format: str | None = None) -> qemu_img.CheckReport:  # noqa: A002
    """Whether the image's own structures fit together: our reading of its header, then qemu-img's check where the format has one."""
    header = probe(path, format=format)
    if header.references or header.backing or header.format == "raw":
        open_source(path, format=format).close()  # refuses what it would not read
        return qemu_img.CheckReport(
            clean=True, text="it can be opened; the format has nothing to check", supported=False
        )
    return qemu_img.check(path, image_format(header.format).driver)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How two disks compare. ``ranges`` are the first that differ, whole blocks of 4096 bytes; ``more`` says that there are others.

    ``resized``: one is longer and what it has more is zero.
    """

    sizes: tuple[int, int]
    ranges: tuple[Extent, ...]
    more: bool
    resized: bool

    @property
    def equal(self) -> bool:
        """Whether both hold the same bytes, zeroes at the end of the longer aside."""
        return not self.ranges


def compare(one: BlockSource, other: BlockSource, progress: Progress, *, most: int) -> Difference:
    """Compare two disks wherever either holds data, up to ``most`` different ranges."""
    shorter, longer = (one, other) if one.size <= other.size else (other, one)
    where = _watched(data_of_either(one, other), progress, data_bytes(one) if one.size else 0)
    found = list(
        islice((e for e in differences(shorter, longer, where) if not _mere_tail(longer, e, shorter.size)), most + 1)
    )
    progress.finish()
    return Difference(
        sizes=(one.size, other.size),
        ranges=tuple(found[:most]),
        more=len(found) > most,
        resized=one.size != other.size and not found,
    )


def _mere_tail(longer: BlockSource, extent: Extent, edge: int) -> bool:
    """Whether the extent lies behind the shorter disk's end and is zero."""
    if extent.start < edge:
        return False
    for start in range(extent.start, extent.end, _STEP):
        buffer = memoryview(bytearray(min(_STEP, extent.end - start)))
        longer.readinto(buffer, start)
        if not is_zero(buffer):
            return False
    return True


def _watched(extents: Iterator[Extent], progress: Progress, total: int) -> Iterator[Extent]:
    """The extents in pieces, each told when it is done."""
    progress.start("compare", total or None)
    for extent in extents:
        for start in range(extent.start, extent.end, _STEP):
            length = min(_STEP, extent.end - start)
            yield Extent(start, length, Kind.DATA)
            progress.advance(length)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """A conversion of one image: ``size`` bytes of the source's disk, ``new_size`` of the new image's."""

    source: Path
    target: Path
    source_format: str
    format: str
    subformat: str
    compress: str
    size: int
    new_size: int
    force: bool


_SUFFIXES = {chosen.suffix: name for name, chosen in FORMATS.items()} | {".img": "raw", ".vpc": "vhd"}


def plan_conversion(
    source: Path,
    target: Path,
    *,
    source_format: str = "",
    format: str = "",  # noqa: A002
    subformat: str = "",
    compress: str = "",
    force: bool = False,
) -> ConversionPlan:
    """Decide everything before a byte is written; the target's format follows from its suffix where none is given.

    ``UsageError`` where the target cannot be told or is there already (unless ``force``), ``ImageUnsupportedError`` where the format cannot
    hold the disk.
    """
    header = probe(source, format=source_format or None)
    chosen = format or _SUFFIXES.get(target.suffix.lower(), "")
    if not chosen:
        raise UsageError(f"the suffix of {target} tells no format", advice="Name it with --to.")
    layout = image_format(chosen).subformat(subformat)
    if target.is_dir() or (target.exists() and not force):
        raise UsageError(f"{target} is there already", advice="Choose another name, or replace it with --force.")
    if target.exists() and target.samefile(source):
        raise UsageError("source and target are the same file")
    return ConversionPlan(
        source=source,
        target=target,
        source_format=header.format,
        format=chosen,
        subformat=layout.name,
        compress=compress,
        size=header.size,
        new_size=image_size(chosen, header.size, subformat),
        force=force,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What a conversion did, in bytes: ``read`` of the source's disk, ``length`` of all new ``files``."""

    files: tuple[Path, ...]
    read: int
    length: int
    checked: str


def convert(plan: ConversionPlan, copying: Progress, reading_back: Progress) -> Converted:
    """Write the new image beside its place, check it, read it back and compare, and give it its name.

    ``WriteError`` when it reads back differently. When anything fails nothing is left, and what was there before stays.
    """
    work = plan.target.with_name(f".{plan.target.name}.{os.getpid()}.part")
    try:
        work.mkdir()
    except OSError as error:
        raise UsageError(f"{plan.target.parent} cannot be written: {error.strerror}") from None
    try:
        pending = work / plan.target.name  # a VMDK's descriptor states the names of its own files
        with contextlib.closing(open_source(plan.source, format=plan.source_format)) as source:
            sink = create_sink(pending, plan.format, source.size, subformat=plan.subformat, compress=plan.compress)
            with contextlib.closing(sink):
                done = copy(source, sink, progress=copying, total=data_bytes(source))
                sink.flush()
        report = check(pending, format=plan.format)
        if not report.clean:
            raise WriteError(f"qemu-img check finds errors in the new image: {report.text}", subject=str(plan.target))
        with contextlib.closing(open_source(pending, format=plan.format)) as image:
            seen = fingerprint(Window(image, 0, plan.size), progress=reading_back)
        if done.fingerprint.differences(seen):
            raise WriteError(
                f"{plan.target} reads back differently from what was read of {plan.source}",
                advice="Run it again; if it repeats, look at this computer's memory and storage (dmesg).",
                subject=str(plan.target),
            )
        files = _publish(work, plan)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Converted(
        files=files, read=done.read, length=sum(file.stat().st_size for file in files), checked=report.text
    )


def _publish(work: Path, plan: ConversionPlan) -> tuple[Path, ...]:
    """Give all files their names, the one that was asked for last."""
    folder = plan.target.parent
    names = sorted((path.name for path in work.iterdir()), key=lambda name: name == plan.target.name)
    taken = [name for name in names if (folder / name).exists()]
    if taken and not plan.force:
        raise UsageError(
            f"{folder / taken[0]} is there already", advice="Choose another name, or replace it with --force."
        )
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names:
            (work / name).rename(folder / name)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return tuple(folder / name for name in reversed(names))
