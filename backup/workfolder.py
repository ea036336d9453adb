"""The folder that a run works in, and what killed runs have left of theirs.

A run holds a lock on a file in its folder as long as it lives; the kernel drops the lock with the process, whatever ends it. A folder whose
lock can be had is of a run that is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "p2v-drill-"
_LOCK = "lock"
_NEWBORN = 60.0  # seconds in which a folder may be without its lock


@contextlib.contextmanager
def work_folder(parent: Path | None = None) -> Iterator[Path]:
    """A private folder below ``parent`` (None: the temporary folder) for this run, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = os.open(folder / f".{_LOCK}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f".{_LOCK}").rename(folder / _LOCK)  # under this name it is never seen without its lock
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path | None = None) -> list[Path]:
    """Remove the folders below ``parent`` of this user's runs that are gone; returns which."""
    root = Path(tempfile.gettempdir() if parent is None else parent)
    return [folder for folder in sorted(root.glob(f"{_PREFIX}*")) if _removed(folder)]


def _removed(folder: Path) -> bool:
    try:
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            return False
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _NEWBORN:
                folder.rmdir()  # only where it is empty
                return True
        return False
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(lock)
