"""Errors of taking, moving and booting machines; the tree begins in ``formats.errors``.

ToolkitError
├── HostError 30
│   ├── HostKeyError 31        ├── AuthenticationError 32   ├── PrivilegeError 33
│   ├── CommandError 34        ├── DiskVanishedError 35     ├── LinkLostError 36
│   └── ConsistencyError 37
├── EmulatorError 38
├── AdaptationError 39
├── DoesNotBootError 70
├── UnprovenError 71
└── InterruptedRunError 130
"""

from __future__ import annotations

from typing import ClassVar

from formats.errors import ToolkitError


class HostError(ToolkitError):
    """A host or hypervisor cannot be reached, or answers nonsense (exit 30)."""

    exit_code: ClassVar[int] = 30


class HostKeyError(HostError):
    """The host's key is unknown or differs from the known one; the connection was refused (exit 31)."""

    exit_code: ClassVar[int] = 31


class AuthenticationError(HostError):
    """The host refused every key and password that was offered (exit 32)."""

    exit_code: ClassVar[int] = 32


class PrivilegeError(HostError):
    """The user may not do what is needed there: no root and no working sudo, or no permission in the hypervisor (exit 33)."""

    exit_code: ClassVar[int] = 33


class CommandError(HostError):
    """A command that is needed failed on the host; its exit code and standard error are in the message (exit 34)."""

    exit_code: ClassVar[int] = 34


class PythonMissingError(CommandError):
    """The host has no Python that can run the disk agent; disks can still be read with dd."""


class DiskVanishedError(HostError):
    """A disk of the source went away or changed its size while it was read (exit 35)."""

    exit_code: ClassVar[int] = 35


class LinkLostError(HostError):
    """The connection to the host was cut in the middle of the work (exit 36)."""

    exit_code: ClassVar[int] = 36


class ConsistencyError(HostError):
    """The consistency that was asked for cannot be had on the source: snapshot or freeze failed (exit 37)."""

    exit_code: ClassVar[int] = 37


class EmulatorError(ToolkitError):
    """QEMU is missing, does not start, or broke off without the guest's doing (exit 38)."""

    exit_code: ClassVar[int] = 38


class AdaptationError(ToolkitError):
    """The machine could not be adapted to its new hardware; its disks are as they were (exit 39)."""

    exit_code: ClassVar[int] = 39


class DoesNotBootError(ToolkitError):
    """The machine was seen not to boot on the target, or preflight predicts it with certainty (exit 70)."""

    exit_code: ClassVar[int] = 70


class UnprovenError(ToolkitError):
    """It could not be shown that the machine boots; nothing was seen that says it does not (exit 71)."""

    exit_code: ClassVar[int] = 71
