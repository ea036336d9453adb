"""A store on a host over SFTP: as the local one, with what the protocol offers.

T2 holds where the server knows ``fsync@openssh.com`` (OpenSSH does); folders cannot be flushed over SFTP: after a power cut of the host
the latest names may be gone, whole. T3 relies on SFTP version 3: a rename fails where the name is taken (OpenSSH links, then unlinks).
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import threading
from collections.abc import Iterable, Iterator
from typing import NoReturn

from backup.errors import ObjectDamagedError, ObjectMissingError, StoreError
from backup.store.base import NameTakenError, Stored, check_name, check_prefix
from formats.errors import NoSpaceError
from p2v.errors import LinkLostError
from p2v.session import Session
from p2v.session.sftp import RemoteFiles

_UNFINISHED = ".unfinished"


class SftpStore:
    """Objects as files below ``root`` on the session's host; the folder must exist. The session is the store's: closing closes it."""

    def __init__(self, session: Session, root: str) -> None:
        self._session, self._root = session, root.rstrip("/") or "/"
        self._files = RemoteFiles(session)
        self._folders: set[str] = set()
        self._lock = threading.Lock()

    def load(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object."""
        path = self._path(name)
        if offset < 0:
            raise ObjectDamagedError(f"{name} has nothing before its beginning", subject=name)
        try:
            data, size = self._files.read(path, offset, length)
        except FileNotFoundError:
            raise ObjectMissingError(f"the object {name} is missing", subject=name) from None
        except (OSError, LinkLostError) as error:
            self._fail(error, "read", name)
        count = size - offset if length is None else length
        if count < 0 or len(data) != count or offset > size:
            raise ObjectDamagedError(f"{name} has {size} bytes, {offset + count} are expected", subject=name)
        return data

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Write a file aside, flush it, rename it."""
        final = self._path(name)
        unfinished = f"{self._root}/{_UNFINISHED}/{secrets.token_hex(16)}"
        try:
            self._make_folders(unfinished)
            self._make_folders(final)
            try:
                self._files.write_new(unfinished, data)
                self._files.rename_new(unfinished, final)
            except BaseException:
                with contextlib.suppress(OSError, LinkLostError):
                    self._files.remove(unfinished)
                raise
        except FileExistsError:
            raise NameTakenError(f"the object {name} is there already", subject=name) from None
        except (OSError, LinkLostError) as error:
            self._fail(error, "write", name)

    def delete(self, name: str) -> None:
        """Remove the file."""
        path = self._path(name)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._files.remove(path)
        except (OSError, LinkLostError) as error:
            self._fail(error, "delete", name)

    def list(self, prefix: str) -> Iterator[Stored]:
        """The files below the folder of ``prefix``."""
        check_prefix(prefix)
        try:
            yield from self._walk(prefix)
        except (OSError, LinkLostError) as error:
            self._fail(error, "list", prefix)

    def _walk(self, prefix: str) -> Iterator[Stored]:
        try:
            entries = list(self._files.list_folder(f"{self._root}/{prefix}".rstrip("/")))
        except FileNotFoundError:
            return
        for name, size, folder in entries:
            if name.startswith("."):
                continue
            if folder:
                yield from self._walk(f"{prefix}{name}/")
            else:
                yield Stored(prefix + name, size)

    def close(self) -> None:
        """Close the connection."""
        self._files.close()
        self._session.close()

    def _path(self, name: str) -> str:
        check_name(name)
        return f"{self._root}/{name}"

    def _make_folders(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        with self._lock:
            if folder in self._folders:
                return
        parts = folder[len(self._root) + 1 :].split("/") if folder != self._root else []
        for count in range(1, len(parts) + 1):
            self._files.make_folder("/".join([self._root, *parts[:count]]))
        with self._lock:
            self._folders.add(folder)

    def _fail(self, error: Exception, verb: str, name: str) -> NoReturn:
        reason = str(error) or type(error).__name__
        # SFTP has no word for a full disk; OpenSSH says "Failure".
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"{self._session.host} is full", advice="Free space there.", subject=name) from None
        raise StoreError(
            f"cannot {verb} {name or 'objects'} on {self._session.host}: {reason}",
            advice="See whether the host can be reached, the folder be written, and its disk has room.",
            subject=name,
        ) from None
