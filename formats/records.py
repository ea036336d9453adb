"""The record that lies beside a machine's disks: what a later run needs to take the folder as a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from formats.definitions import Hardware
from formats.errors import ImageError, ImageUnsupportedError, UnsafeImageError
from formats.machine import Machine

RECORD = "machine.json"
"""Name of the record's file in the folder."""

_VERSION = 1
_MOST = 16 << 20  # bytes: a machine with hundreds of disks and all EFI variables has less than one MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDisk:
    """A disk of the folder: ``file`` is a name beside the record, ``size`` the virtual size in bytes."""

    id: str
    file: str
    format: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRecord:
    """What ``machine.json`` says; ``adapted``: the disks were fitted to any hardware.

    ``extra`` (verdict, stages, notices...) is for people and scripts; nothing here reads it.
    """

    machine: Machine
    disks: tuple[StoredDisk, ...]
    platform: str
    hardware: Hardware
    version: int = _VERSION
    adapted: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def encode(record: FolderRecord) -> bytes:
    """The content of the file: JSON for people and programs, ``extra`` on the top level."""
    document = msgspec.to_builtins(record)
    document |= document.pop("extra")
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def read(folder: Path) -> FolderRecord:
    """The record in ``folder``. Only names of files beside it are accepted as disks.

    ``ImageError`` when there is none or it is malformed, ``ImageUnsupportedError`` for a later version,
    ``UnsafeImageError`` when it is out of
    bounds or names other places.
    """
    path = folder / RECORD
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST + 1)
    except OSError as error:
        raise ImageError(
            f"{path} cannot be read: {error.strerror}",
            advice="Name a folder that `p2v convert` has finished, or a disk image.",
            subject=str(folder),
        ) from None
    if len(content) > _MOST:
        raise UnsafeImageError(f"{path} is larger than {_MOST} bytes", subject=str(path))
    try:
        version = msgspec.json.decode(content, type=dict[str, Any]).get("version")
        if version != _VERSION:
            raise ImageUnsupportedError(
                f"{path} is of version {version!r}, this program knows {_VERSION}",
                advice="Use the toolkit that wrote it.",
            )
        record = msgspec.json.decode(content, type=FolderRecord)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ImageError(f"{path} is no record of a machine: {error}", subject=str(path)) from None
    if len({disk.id for disk in record.disks}) < len(record.disks):
        raise ImageError(f"{path} has two disks of the same id", subject=str(path))
    for disk in record.disks:
        if disk.file in ("", ".", "..") or Path(disk.file).name != disk.file or "\0" in disk.file:
            raise UnsafeImageError(f"{path} names a disk that is no file beside it: {disk.file!r}", subject=str(path))
    return record
