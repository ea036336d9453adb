"""A store in a directory: one file an object, made elsewhere, flushed, and then linked to its name."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from backup.errors import ObjectDamagedError, ObjectMissingError, StoreError
from backup.store.base import NameTakenError, Stored, check_name, check_prefix
from formats.errors import NoSpaceError

_UNFINISHED = ".unfinished"  # no name can reach it: names have no dots (T8)


class LocalStore:
    """Objects as files of mode 0600 below ``root``, which must exist.

    ``store`` writes a file below ``.unfinished``, flushes it, links it to its name (which fails where that is taken) and flushes
    the folder;
    a killed one leaves a file that no listing shows and ``sweep`` removes. ``delete`` flushes the folder too, so that no later
    write is on stable
    storage before it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def load(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object."""
        try:
            with self._path(name).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                count = size - offset if length is None else length
                if count < 0 or offset < 0 or offset + count > size:
                    raise ObjectDamagedError(f"{name} has {size} bytes, {offset + count} are expected", subject=name)
                return self._read(file.fileno(), name, offset, count)
        except FileNotFoundError:
            raise ObjectMissingError(f"the object {name} is missing", subject=name) from None
        except OSError as error:
            self._fail(error, "read", name)

    def _read(self, file: int, name: str, offset: int, count: int) -> bytes:
        data = os.pread(file, count, offset)
        if len(data) == count:
            return data
        parts = [data]  # Linux reads at most 2 GiB at once
        while (done := sum(map(len, parts))) < count:
            if not (part := os.pread(file, count - done, offset + done)):
                raise ObjectDamagedError(f"{name} became shorter while it was read", subject=name)
            parts.append(part)
        return b"".join(parts)

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Write, flush, link, flush the folder."""
        final = self._path(name)
        unfinished = self.root / _UNFINISHED / secrets.token_hex(16)
        try:
            self._make_folder(unfinished.parent)
            self._make_folder(final.parent)
            try:
                with open(
                    unfinished, "xb", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)
                ) as file:
                    for part in data:
                        rest = memoryview(part)
                        while rest:
                            rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                os.link(unfinished, final)
                self._flush_folder(final.parent)
            finally:
                with contextlib.suppress(OSError):
                    unfinished.unlink()
        except FileExistsError:
            raise NameTakenError(f"the object {name} is there already", subject=name) from None
        except OSError as error:
            self._fail(error, "write", name)

    def delete(self, name: str) -> None:
        """Remove the file and flush its folder."""
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
            if path.parent.exists():
                self._flush_folder(path.parent)
        except OSError as error:
            self._fail(error, "delete", name)

    def list(self, prefix: str) -> Iterator[Stored]:
        """The files below the folder of ``prefix``."""
        check_prefix(prefix)
        try:
            yield from self._walk(prefix)
        except OSError as error:
            self._fail(error, "list", prefix)

    def _walk(self, prefix: str) -> Iterator[Stored]:
        try:
            entries = list(os.scandir(self.root / prefix))
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    yield Stored(prefix + entry.name, entry.stat().st_size)

    def sweep(self) -> None:
        """Remove what killed runs left unfinished. Only while no other run writes."""
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.root / _UNFINISHED):
                Path(entry.path).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The file of an object, to be mapped into memory."""
        return self._path(name)

    def close(self) -> None:
        """Nothing is held."""

    def _path(self, name: str) -> Path:
        check_name(name)
        return self.root / name

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        while folder != self.root:
            folder = folder.parent
            self._flush_folder(folder)

    def _flush_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _fail(self, error: OSError, verb: str, name: str) -> NoReturn:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{self.root} is full",
                advice="Free space there. `p2v-backup forget` with `--prune` frees what old points alone need.",
                subject=name,
            ) from None
        raise StoreError(f"cannot {verb} {name or 'objects'} in {self.root}: {reason}", subject=name) from None
