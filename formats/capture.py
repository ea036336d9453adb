"""The second waist: one machine at one instant, and where it is taken from.

Guarantees of an ``Origin`` and its captures (``tests/contracts/origin.py`` proves each by number):

C1  ``capture.disks`` has exactly the ids of ``capture.machine.disks`` that were captured; every other disk of the machine is
    named by a notice.
C2  While the capture is open, a disk's source answers the same bytes for the same range, unless its consistency is FUZZY.
C3  ``changes(id)`` answers ``Changed`` only if every byte that may differ since the given mark lies in its extents; they are DATA
    or ZERO only, ascending and merged; bytes past the old size count as changed. In any doubt it answers ``Unknown`` with the reason.
C4  A disk without a mark, a disk that was added, and a mark that the origin no longer knows are ``Unknown``, never an error.
C5  Leaving the capture releases everything it holds on the source: snapshots, freezes, agents, leases. Leaving twice is harmless.
C6  ``mark`` values are opaque, JSON-serialisable text; one that came from ``capture`` can be given back in a later process.
C7  ``retire`` drops what only old marks need; retiring an unknown mark is harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import NewType, Protocol, Self, runtime_checkable

from formats.block import BlockSource, Extent
from formats.errors import Notice
from formats.machine import Machine

Mark = NewType("Mark", str)
"""Opaque text by which an origin recognises the state of a disk at a capture."""


class Consistency(StrEnum):
    """How far a captured disk is one instant; ordered from the strongest."""

    APPLICATION = "application"  # applications were told and had flushed
    FILESYSTEM = "filesystem"  # file systems were frozen: clean without journal replay
    CRASH = "crash"  # one instant, as after a power cut: journals replay
    FUZZY = "fuzzy"  # read while it changed: different blocks are of different instants

    @property
    def rank(self) -> int:
        """0 for the strongest; larger is weaker."""
        return list(Consistency).index(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedDisk:
    """One disk of a capture. ``mark`` is None where the origin has no change tracking."""

    source: BlockSource
    mark: Mark | None
    consistency: Consistency


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Every byte that may differ lies in one of these extents: DATA or ZERO, ascending, merged."""

    extents: Sequence[Extent]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """Nothing is known of the changes: everything is read and compared. ``reason`` is one sentence for a person."""

    reason: str


class Capture(Protocol):
    """One machine at one instant; a context manager that releases what it holds on the source (C5)."""

    @property
    def machine(self) -> Machine:
        """The record of the machine at that instant."""
        ...

    @property
    def disks(self) -> Mapping[str, CapturedDisk]:
        """Captured disks by stable id, the boot disk first."""
        ...

    @property
    def notices(self) -> Sequence[Notice]:
        """What the capture could not do as asked."""
        ...

    def changes(self, disk_id: str) -> Changed | Unknown:
        """What may differ since the mark the capture was opened with (C3, C4)."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Holdable(Protocol):
    """A FUZZY capture whose machine can be made to stand still for a short time, so that a copy of it can be made one instant."""

    def hold(self) -> AbstractContextManager[Mapping[str, BlockSource]]:
        """Within, the sources of all disks, by id, are of one instant: after a live pass what changed is compared and copied.

        Entering or leaving raises ``p2v``'s ``ConsistencyError`` when that cannot be, or was not so until the end; nothing stays frozen.
        """
        ...


class Origin(Protocol):
    """Where a machine is taken from."""

    def inspect(self) -> Machine:
        """The machine's record; writes nothing on the source."""
        ...

    def capture(self, since: Mapping[str, Mark] | None = None) -> Capture:
        """Open a capture; ``since`` gives, by disk id, the marks that ``changes`` is asked against."""
        ...

    def retire(self, marks: Sequence[Mark]) -> None:
        """Drop what only these marks need; call it after the point that replaces them is committed (C7)."""
        ...


def weakest(disks: Mapping[str, CapturedDisk]) -> Consistency:
    """The consistency of the whole: that of its weakest disk; FUZZY for no disk at all."""
    return max((d.consistency for d in disks.values()), key=lambda c: c.rank, default=Consistency.FUZZY)
