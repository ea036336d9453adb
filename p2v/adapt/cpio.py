"""A writer of newc cpio archives, the form in which the kernel takes an initramfs.

Format: kernel, Documentation/driver-api/early-userspace/buffer-format.rst. Several archives may follow one another; what comes later
wins. An entry for a folder that is a symbolic link in an earlier archive would replace the link, so a caller names only
what it brings.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_NAME_MOST = 4096
_SIZE_MOST = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of an archive. ``name`` has no leading slash; ``mode`` holds the kind of file too (``stat.S_IFREG | 0o644``).

    ``data`` is the content, or where a symbolic link points.
    """

    name: str
    mode: int = stat.S_IFREG | 0o644
    data: bytes = b""


def folder(name: str, permissions: int = 0o755) -> Entry:
    """A folder."""
    return Entry(name=name, mode=stat.S_IFDIR | permissions)


def file(name: str, data: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name=name, mode=stat.S_IFREG | permissions, data=data)


def archive(entries: Iterable[Entry]) -> bytes:
    """A whole archive with its trailer, owned by root, padded to 512 bytes; the same entries give the same bytes.

    Folders must come before what they hold. ``ValueError`` for a name that is empty, absolute, too long, holds a NUL or is the trailer's,
    and for a file of 4 GiB or more.
    """
    parts: list[bytes] = []
    for number, entry in enumerate(entries, start=1):
        name = entry.name.encode("utf-8", "surrogateescape")
        if not name or name.startswith(b"/") or b"\0" in name or len(name) >= _NAME_MOST or name == b"TRAILER!!!":
            raise ValueError(f"not a name for an archive: {entry.name!r}")
        if len(entry.data) > _SIZE_MOST:
            raise ValueError(f"{entry.name} has {len(entry.data)} bytes, more than the format can say")
        parts.append(_member(number, name, entry.mode, entry.data))
    parts.append(_member(0, b"TRAILER!!!", 0, b""))
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % 512)


def _member(inode: int, name: bytes, mode: int, data: bytes) -> bytes:
    links = 2 if stat.S_ISDIR(mode) else 1
    # magic, then 13 fields of 8 hex digits: inode mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
