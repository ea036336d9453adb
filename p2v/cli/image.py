"""``p2v image``: disk images by themselves."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from formats.block import Kind
from formats.errors import Notice
from p2v.cli.base import OUTPUT, Output, app, perform
from p2v.console import Console, human_size, record

image = cyclopts.App(
    name="image",
    help="Disk images of any format by themselves: look, check, convert, compare.",
    default_parameter=Parameter(negative="", show_default=False),
)
app.command(image)

From = Annotated[str, Parameter(name="--from")]
_SHOWN = 20  # ranges that are shown to a person
_MOST = 1000  # different ranges that are looked for


@image.command
def info(path: Path, /, *, from_: From = "", output: Output = OUTPUT) -> int:
    """Say what an image is: format, size, what it takes on disk, and what it depends on. Reads the header only.

    Parameters
    ----------
    path
        the image.
    from_
        its format, where its header is not to be trusted: raw, qcow2, vhd, vhdx, vmdk, vdi, parallels.
    """

    def action(console: Console) -> None:
        from p2v.image import describe

        found = describe(path, format=from_ or None)
        header = found.header
        console.data["image"] = record(header) | {
            "files": [str(file) for file in found.files],
            "length": found.length,
            "allocated": found.allocated,
        }
        subformat = f" ({header.subformat})" if header.subformat else ""
        console.say(f"{path}: {header.format}{subformat}")
        console.say(f"  disk       {human_size(header.size)} ({header.size} bytes)")
        console.say(
            f"  on disk    {human_size(found.allocated)} of {human_size(found.length)} in {len(found.files)} file(s)"
        )
        for label, text in (
            ("blocks of", human_size(header.block_size) if header.block_size else ""),
            ("parent", header.backing),
            ("files", ", ".join(header.references)),
            ("features", ", ".join(header.features)),
            ("encrypted", "yes" if header.encrypted else ""),
            ("unclean", header.unclean),
        ):
            if text:
                console.say(f"  {label:10} {text}")

    return perform("image info", output, action)


@image.command(name="map")
def map_(path: Path, /, *, from_: From = "", output: Output = OUTPUT) -> int:
    """List the runs of an image's disk that hold data; everything else reads as zeroes.

    Parameters
    ----------
    path
        the image.
    from_
        its format, where its header is not to be trusted.
    """

    def action(console: Console) -> None:
        from formats.images import open_source

        data = runs = 0
        extents: list[dict[str, object]] = []
        with contextlib.closing(open_source(path, format=from_ or None)) as source:
            for extent in source.extents(0, source.size):
                if console.json_output:
                    extents.append({"start": extent.start, "length": extent.length, "kind": extent.kind.value})
                if extent.kind is Kind.DATA:
                    console.say(f"{extent.start:>20} {extent.length:>16}")
                    data, runs = data + extent.length, runs + 1
            size = source.size
        console.data |= {"size": size, "data": data, "extents": extents}
        console.say(f"{human_size(data)} of {human_size(size)} hold data, in {runs} runs")

    return perform("image map", output, action)


@image.command
def check(path: Path, /, *, from_: From = "", output: Output = OUTPUT) -> int:
    """Check an image's own structures. Exit code 20 when it is damaged; nothing is repaired.

    Parameters
    ----------
    path
        the image.
    from_
        its format, where its header is not to be trusted.
    """

    def action(console: Console) -> None:
        from formats.errors import ImageError
        from p2v.image import check as examine

        report = examine(path, format=from_ or None)
        console.data["check"] = record(report)
        if report.corruptions or not (report.clean or report.leaks):
            raise ImageError(
                f"{path} is damaged: {report.text}",
                advice="Repair a copy of it with: qemu-img check -r all COPY",
                subject=str(path),
            )
        if report.leaks:
            console.notice(Notice(code="leaks", message=f"it wastes room: {report.text}", subject=str(path)))
        console.say(f"{path}: {report.text}")

    return perform("image check", output, action)


@image.command
def convert(
    source: Path,
    target: Path,
    /,
    *,
    to: str = "",
    subformat: str = "",
    from_: From = "",
    compress: str = "",
    force: bool = False,
    dry_run: Annotated[bool, Parameter(name="--dry-run", alias="-n")] = False,
    output: Output = OUTPUT,
) -> int:
    """Make an image of another format. The new one is checked and read back before it gets its name.

    Parameters
    ----------
    source
        the image; it is only read.
    target
        the new image.
    to
        its format: raw, qcow2, vhd, vhdx, vmdk, vdi, parallels; default: by the suffix.
    subformat
        how the format lays out the disk, as streamOptimized for vmdk or fixed for vhd; see `p2v platforms` for what each target takes.
    from_
        format of the source, where its header is not to be trusted.
    compress
        zlib or zstd, for qcow2.
    force
        replace what is there under the target's name.
    dry_run
        say what would be written, do nothing.
    """

    def action(console: Console) -> None:
        from p2v.image import convert as write
        from p2v.image import plan_conversion

        plan = plan_conversion(
            source, target, source_format=from_, format=to, subformat=subformat, compress=compress, force=force
        )
        console.data["plan"] = record(plan)
        what = f"{plan.format} ({plan.subformat}{', ' + compress if compress else ''})"
        if dry_run:
            console.say(f"would write {human_size(plan.new_size)} from {plan.source_format} to {target}, {what}")
            return
        with console.stage("convert") as stage:
            done = write(plan, console.progress("copy"), console.progress("read back"))
            stage.detail = f"{human_size(done.read)} read, {human_size(done.length)} written"
        console.data["converted"] = record(done)
        console.say(f"{target}: {what}, {human_size(done.length)}; {done.checked}")

    return perform("image convert", output, action)


@image.command
def compare(
    one: Path,
    other: Path,
    /,
    *,
    from_: From = "",
    other_from: Annotated[str, Parameter(name="--other-from")] = "",
    output: Output = OUTPUT,
) -> int:
    """Compare the disks in two images of any format. Exit code 4 when they differ, 3 when one is only longer by zeroes.

    Parameters
    ----------
    one
        an image.
    other
        another one.
    from_
        format of the first, where its header is not to be trusted.
    other_from
        format of the second.
    """

    def action(console: Console) -> int | None:
        from formats.images import open_source
        from p2v.image import compare as examine

        with (
            contextlib.closing(open_source(one, format=from_ or None)) as first,
            contextlib.closing(open_source(other, format=other_from or None)) as second,
        ):
            found = examine(first, second, console.progress("compare"), most=_MOST)
        ranges = [{"start": extent.start, "length": extent.length} for extent in found.ranges]
        console.data |= {"equal": found.equal, "sizes": list(found.sizes), "ranges": ranges, "more": found.more}
        if found.resized:
            text = f"{found.sizes[0]} and {found.sizes[1]} bytes: one is longer, by zeroes alone"
            console.notice(Notice(code="size-differs", message=text, subject=str(other)))
        for extent in found.ranges[:_SHOWN]:
            console.say(f"{extent.length:>12} bytes differ at {extent.start}")
        if found.more or len(found.ranges) > _SHOWN:
            console.say("... and more")
        if found.equal:
            console.say("both hold the same disk")
        return None if found.equal else 4

    return perform("image compare", output, action)
