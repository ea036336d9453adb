"""Disk image formats: what qemu-img cannot do, or does badly, is done here.

Three verbs for every format: ``probe`` says what an image is, ``open_source`` reads it, ``create_sink`` writes a new one.

Images are untrusted input. ``probe`` reads headers in Python, bounded, and opens no other file; ``open_source`` lets QEMU at an image
only after that, with the format stated, and refuses one that reaches for files its user did not name.
"""

from __future__ import annotations

import stat
from pathlib import Path

from formats.block import BlockSink, BlockSource
from formats.errors import ImageError, ImageUnsupportedError, UnsafeImageError, UsageError
from formats.images import parallels, qcow2, vdi, vhd, vhdx, vmdk
from formats.images.catalogue import FORMATS, ImageFormat, Subformat, image_format, image_size
from formats.images.header import Headers, ImageHeader
from formats.layers import Mapped, Segment

_SECTOR = 512
_COMPRESSIONS = ("zlib", "zstd")

# Not disks, or disks in a shape that nothing here reads. Offset, signature, what it is, what to do.
_FOREIGN = (
    (0, b"\x1f\x8b\x08", "a gzip archive", "unpack it first"),
    (0, b"BZh", "a bzip2 archive", "unpack it first"),
    (0, b"\xfd7zXZ\0", "an xz archive", "unpack it first"),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (257, b"ustar", "a tar archive", "name it with the suffix .ova if it is one, else unpack it first"),
    (0, b"COWD", "an ESXi sparse disk", "clone it there with vmkfstools -i"),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", "an ESXi SEsparse disk", "clone it there with vmkfstools -i"),
    (0, b"QED\0", "a QED image", "convert it with qemu-img convert -f qed -O qcow2"),
)


def probe(path: Path, *, format: str | None = None) -> ImageHeader:  # noqa: A002 - the word of the command line
    """Read the header of an image and say what it is; raw when it looks like nothing else.

    ``format`` states what it must be: ``raw`` takes any bytes, another one raises ``ImageError`` when they are something else.
    Reads 16 MiB at most and never opens another file. Raises ``ReadError``, ``ImageError``, ``ImageUnsupportedError`` (also for
    archives and foreign formats) or ``UnsafeImageError``.
    """
    if format is not None:
        image_format(format)
    with Headers(path) as file:
        if format == "raw":
            return ImageHeader(format="raw", size=file.size)
        found = _recognise(file)
        if format not in (None, found):
            raise ImageError(
                f"{path} is not {format}: it looks like {found}",
                advice="name its real format, or none to have it found out",
                subject=str(path),
            )
        if found == "raw":
            _refuse_foreign(file)
            return ImageHeader(format="raw", size=file.size)
        return _READERS[found](file)


_READERS = {
    "qcow2": qcow2.read_header,
    "vhd": vhd.read_header,
    "vhdx": vhdx.read_header,
    "vmdk": vmdk.read_header,
    "vdi": vdi.read_header,
    "parallels": parallels.read_header,
}


def _recognise(file: Headers) -> str:
    head = file.some(0, _SECTOR)
    if head.startswith(qcow2.MAGIC):
        return "qcow2"
    if head.startswith(vhdx.MAGIC):
        return "vhdx"
    if head.startswith(parallels.MAGICS):
        return "parallels"
    if head.startswith(vmdk.MAGIC) or head.lstrip().startswith(vmdk.DESCRIPTOR):
        return "vmdk"
    if head[vdi.SIGNATURE_AT :].startswith(vdi.SIGNATURE):
        return "vdi"
    if head.startswith(vhd.COOKIE) or vhd.find_footer(file) is not None:
        return "vhd"
    return "raw"


def _refuse_foreign(file: Headers) -> None:
    head = file.some(0, _SECTOR)
    for offset, signature, what, advice in _FOREIGN:
        if head[offset:].startswith(signature):
            raise file.unsupported(f"is {what}, not a disk image", f"{advice}; if it is a disk, say its format is raw")


def open_source(path: Path, *, format: str | None = None) -> BlockSource:  # noqa: A002
    """Open an image for reading. Raw images and flat VMDKs are read natively, every other format through qemu-nbd, read-only.

    Refused: a backing or data file and extents that are not plain files in the image's own folder (``UnsafeImageError``),
    a disk that is the child of another, encryption, and a journal that must be replayed first (``ImageUnsupportedError``).
    The source must be closed: a server may be behind it.
    """
    header = probe(path, format=format)
    _refuse(path, header)
    if header.format == "raw":
        from formats.images.raw import RawFile

        return RawFile(path)
    if header.references:
        extents = _extents(path)
        if all(extent.kind != "SPARSE" for extent in extents):
            return _compose(path, extents)
    from formats.images.served import ServedSource

    return ServedSource(path, image_format(header.format).driver, header.size, header.options)


def _refuse(path: Path, header: ImageHeader) -> None:
    subject = str(path)
    if header.backing and header.format in ("vhd", "vhdx", "vdi"):
        raise ImageUnsupportedError(
            f"{path} is a differencing disk: it holds only what differs from its parent {header.backing}",
            advice="merge it into its parent, or export the disk, where it was made",
            subject=subject,
        )
    if header.backing:
        raise UnsafeImageError(
            f"{path} is based on another file, {header.backing}, which is not opened because it was not named",
            advice="flatten it first where it was made, for example: qemu-img convert -O qcow2 IMAGE FLAT",
            subject=subject,
        )
    if header.references and header.format != "vmdk":
        raise UnsafeImageError(
            f"{path} keeps its data in another file, {header.references[0]}, which is not opened because it was not named",
            advice="convert it to a single file where it was made",
            subject=subject,
        )
    if header.encrypted:
        raise ImageUnsupportedError(f"{path} is encrypted", advice="decrypt it where it was made", subject=subject)
    if header.unclean and header.format in ("vhdx", "qcow2"):
        driver = image_format(header.format).driver
        raise ImageError(
            f"{path} was not closed well: {header.unclean}",
            advice=f"repair a copy of it with: qemu-img check -f {driver} -r all IMAGE",
            subject=subject,
        )


def _check_extent(path: Path, name: str) -> None:
    """An extent must be a plain file beside its descriptor: an image may not point anywhere else."""
    plain = name.isprintable() and not set(name) & set('/\\:"') and name not in (".", "..")
    if not plain:
        raise UnsafeImageError(
            f"{path} names a file outside its own folder: {''.join(c if c.isprintable() else '?' for c in name[:200])}",
            advice="put all parts of the image into one folder and let its descriptor name them without a path",
            subject=str(path),
        )
    extent = path.parent / name
    try:
        mode = extent.lstat().st_mode
    except OSError as error:
        raise ImageError(f"a part of {path} is missing: {name}", subject=str(path)) from error
    if not stat.S_ISREG(mode):
        raise UnsafeImageError(f"{path} names {name}, which is no plain file", subject=str(path))


def _extents(path: Path) -> tuple[vmdk.Extent, ...]:
    """The extents of a VMDK descriptor, each looked at before it is opened for its content.

    QEMU would follow a sparse extent that is a descriptor again to whatever that one names.
    """
    with Headers(path) as file:
        extents = vmdk.parse_descriptor(file, file.at(0, file.size)).extents
    for extent in extents:
        if extent.file:
            _check_extent(path, extent.file)
        if extent.kind == "SPARSE":
            with Headers(path.parent / extent.file) as part:
                vmdk.read_extent(part)
    return extents


def _compose(path: Path, extents: tuple[vmdk.Extent, ...]) -> BlockSource:
    """A disk from the plain files of a flat VMDK."""
    from formats.images.raw import RawFile

    segments: list[Segment] = []
    opened: dict[str, RawFile] = {}
    position = 0
    try:
        for extent in extents:
            length = extent.sectors * _SECTOR
            if extent.file:
                if extent.file not in opened:
                    opened[extent.file] = RawFile(path.parent / extent.file)
                part, start = opened[extent.file], extent.start * _SECTOR
                if start + length > part.size:
                    raise ImageError(f"{extent.file} is shorter than {path} says", subject=str(path))
                if length:
                    segments.append(Segment(position, length, part, start))
            position += length
        return Mapped(position, segments)
    except BaseException:
        for part in opened.values():
            part.close()
        raise


def create_sink(path: Path, format: str, size: int, *, subformat: str = "", compress: str = "") -> BlockSink:  # noqa: A002
    """Create an image of ``size`` bytes that reads as zeroes, and return the sink that fills it.

    ``subformat`` is one of the format's (``FORMATS``), the first by default. ``compress`` is ``zlib`` or ``zstd``, for qcow2: such a
    sink is sequential, as is streamOptimized VMDK. The sink's ``size`` is rounded up to 512 bytes (raw: not at all), the image's
    is ``image_size``. An existing file is overwritten. Too large a disk raises ``ImageUnsupportedError`` before anything is
    written. Formats of several files (monolithicFlat, twoGbMaxExtentSparse) must be created under their final name.
    """
    chosen = image_format(format)
    layout = chosen.subformat(subformat)
    rounded = image_size(format, size, subformat)
    if compress and (chosen.name != "qcow2" or compress not in _COMPRESSIONS):
        raise UsageError(f"{format} cannot be compressed with {compress!r}", advice="qcow2 takes zlib and zstd")
    if chosen.name == "raw":
        from formats.images.raw import RawSink

        return RawSink(path, rounded)
    if layout.sequential:
        from formats.images.vmdk_stream import create_stream

        return create_stream(path, rounded)
    if compress:
        from formats.images.qcow2_stream import create_compressed

        version = 2 if layout.options.get("compat") == "0.10" else 3
        return create_compressed(path, rounded, compress, version=version)
    from formats import qemu_img
    from formats.images.served import ServedSink

    qemu_img.create(path, chosen.driver, rounded, layout.options)
    return ServedSink(path, chosen.driver, rounded)


__all__ = [
    "FORMATS",
    "ImageFormat",
    "ImageHeader",
    "Subformat",
    "create_sink",
    "image_format",
    "image_size",
    "open_source",
    "probe",
]
