"""Errors of keeping machines; the tree begins in ``formats.errors``.

ToolkitError
├── RepositoryMissingError 10   ├── LockedError 11   ├── WrongPasswordError 12
└── RepositoryError 40
    ├── ObjectMissingError 41   ├── ObjectDamagedError 42   ├── RepositoryUnsupportedError 43
    └── StoreError 44           └── LeaseLostError 45
"""

from __future__ import annotations

from typing import ClassVar

from formats.errors import ToolkitError


class RepositoryMissingError(ToolkitError):
    """There is no repository at the place that was named (exit 10)."""

    exit_code: ClassVar[int] = 10


class LockedError(ToolkitError):
    """Another run holds what this one needs alone (exit 11)."""

    exit_code: ClassVar[int] = 11


class WrongPasswordError(ToolkitError):
    """No key of the repository opens with the password that was given (exit 12)."""

    exit_code: ClassVar[int] = 12


class RepositoryError(ToolkitError):
    """The repository is not as it should be (exit 40)."""

    exit_code: ClassVar[int] = 40


class ObjectMissingError(RepositoryError):
    """An object or blob that something refers to is not there (exit 41)."""

    exit_code: ClassVar[int] = 41


class ObjectDamagedError(RepositoryError):
    """Stored bytes are not what was written: flipped, cut, exchanged or forged (exit 42)."""

    exit_code: ClassVar[int] = 42


class RepositoryUnsupportedError(RepositoryError):
    """The repository was written by a later version of the toolkit, or needs a feature this one does not know (exit 43)."""

    exit_code: ClassVar[int] = 43


class StoreError(RepositoryError):
    """The storage below the repository failed or broke one of its guarantees (exit 44)."""

    exit_code: ClassVar[int] = 44


class LeaseLostError(RepositoryError):
    """The run's lease was taken away while it was writing: what it refers to may be gone, so nothing was committed (exit 45)."""

    exit_code: ClassVar[int] = 45
