"""The third waist: names to immutable bytes.

Guarantees of a ``Store`` (``tests/contracts/store.py`` proves each by number):

T1  ``store`` makes an object wholly visible or not at all; a reader never sees a part of it, whenever the writer dies.
T2  When ``store`` returns, the object is on stable storage and every later ``load`` and ``list`` sees it.
T3  A name that is taken raises ``NameTakenError`` and its object stays as it was; of two writers of one name, exactly one succeeds.
T4  ``load`` returns exactly the asked bytes: all, or ``length`` from ``offset``. A missing object raises ``ObjectMissingError``; a range
    that is not wholly inside raises ``ObjectDamagedError``: the object is shorter than what refers to it says.
T5  ``list(prefix)`` yields every object whose name starts with ``prefix``, with its length, and nothing else: what a killed ``store`` left
    behind is not among them.
T6  ``delete`` of a missing object is no error; when it returns the object is gone for every later ``load`` and ``list``.
T7  All calls are safe from several threads and processes at once.
T8  A name is 1 to 3 parts of ``[0-9a-z-]`` joined by ``/``; any other raises ``ValueError``, whatever it would have reached.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from backup.errors import RepositoryError

_NAME = re.compile(r"[0-9a-z-]{1,80}(/[0-9a-z-]{1,80}){0,2}")
_PREFIX = re.compile(r"([0-9a-z-]{1,80}/){0,2}")


class NameTakenError(RepositoryError):
    """An object of that name is there already; it stays as it is (T3)."""


class Stored(NamedTuple):
    """An object in a listing; ``size`` is bytes."""

    name: str
    size: int


class Store(Protocol):
    """Names to immutable bytes; guarantees T1-T8 above. Failures of the storage are ``StoreError`` or ``NoSpaceError``."""

    def load(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object (T4)."""
        ...

    def store(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Make an object of the joined ``data`` (T1-T3)."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object (T6)."""
        ...

    def list(self, prefix: str) -> Iterator[Stored]:
        """The objects below ``prefix``, which is empty or ends with ``/``, in any order (T5)."""
        ...

    def close(self) -> None:
        """Release what the store holds; twice is harmless."""
        ...


def check_name(name: str) -> None:
    """``ValueError`` unless ``name`` is a name (T8)."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an object")


def check_prefix(prefix: str) -> None:
    """``ValueError`` unless ``prefix`` is empty or whole parts of a name."""
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"{prefix!r} is no prefix of names")
