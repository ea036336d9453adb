"""The error tree of the toolkit, and the record of a notice.

    ToolkitError 1
    ├── UsageError 2          ├── NoSpaceError 13          ├── InterruptedRunError 130
    └── ImageError 20         ├── ImageUnsupportedError 21   ├── UnsafeImageError 22   ├── ImageToolError 23
                              ├── ReadError 24               ├── WriteError 25         └── NbdError 26

One class owns one exit code (a test proves it over this module, ``p2v.errors`` and ``backup.errors``). A subclass that does
not state ``exit_code`` shares its parent's: it is the same answer to a script, with a more exact message for a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class ToolkitError(Exception):
    """Something failed, said in facts and with what to do next.

    ``message`` is one sentence of facts; ``advice`` says what the administrator can do; ``subject`` names the disk,
    host or file it is about. None of them may hold a secret.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, advice: str = "", subject: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.subject = subject

    def __str__(self) -> str:
        return self.message


class UsageError(ToolkitError):
    """The command line, a job file or an environment variable asks for something that cannot be (exit 2)."""

    exit_code: ClassVar[int] = 2


class NoSpaceError(ToolkitError):
    """The file system or device that is written to is full (exit 13)."""

    exit_code: ClassVar[int] = 13


class ImageError(ToolkitError):
    """A disk image or VM definition is damaged or not what its name says (exit 20)."""

    exit_code: ClassVar[int] = 20


class ImageUnsupportedError(ImageError):
    """A format, subformat or feature that the toolkit or the target platform does not handle (exit 21)."""

    exit_code: ClassVar[int] = 21


class UnsafeImageError(ImageError):
    """An untrusted image reaches for files its user did not name, or states sizes out of bounds (exit 22)."""

    exit_code: ClassVar[int] = 22


class ImageToolError(ImageError):
    """qemu-img, qemu-nbd or another image program is missing or failed (exit 23)."""

    exit_code: ClassVar[int] = 23


class ReadError(ImageError):
    """Bytes of a disk could not be read: I/O error, short file, vanished device (exit 24)."""

    exit_code: ClassVar[int] = 24


class WriteError(ImageError):
    """Bytes could not be written, or what was written reads back differently (exit 25)."""

    exit_code: ClassVar[int] = 25


class NbdError(ImageError):
    """The other side of an NBD connection broke the protocol, refused, or went away (exit 26)."""

    exit_code: ClassVar[int] = 26


class InterruptedRunError(ToolkitError):
    """The run was interrupted (Ctrl-C or a termination signal) and cleaned up after itself (exit 130)."""

    exit_code: ClassVar[int] = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A warning that counts: it is listed in the result, and the run ends with exit code 3 instead of 0.

    ``code`` is a stable kebab-case name for scripts; ``subject`` the disk, file or command it is about.
    """

    code: str
    message: str
    advice: str = ""
    subject: str = ""
