"""Where a disk is cut into chunks: the ``Chunker`` interface, and the fixed grid.

The engine gives a chunker one run of a disk at a time: a run begins at a chunk's start, lies within one span of the manifest
(``backup.manifest.SPAN``) and is never longer than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from backup.errors import RepositoryUnsupportedError

GRAIN = 4096
"""Every cut is a multiple of this many bytes, except the end of the disk."""

TARGET = 64 * 1024
"""Bytes that a chunk has as a rule."""


class Chunker(Protocol):
    """Decides the ends of chunks.

    ``name`` is stored with the point. A chunk has at most ``maximum`` bytes; one of data has at least ``minimum`` unless zeroes or the end
    of the run follow it; a span is a multiple of ``minimum``. Where a chunk ends follows from the bytes between its start and ``lookahead``
    bytes behind its end. Instances are safe from several threads.
    """

    @property
    def name(self) -> str: ...

    @property
    def minimum(self) -> int: ...

    @property
    def maximum(self) -> int: ...

    @property
    def lookahead(self) -> int: ...

    def cuts(self, data: memoryview, *, final: bool) -> Iterator[int]:
        """The ends of chunks in ``data``, ascending, relative to it. With ``final`` the last one is ``len(data)``; without, what
        lies behind
        the last cut belongs to a chunk whose end is not in sight yet. All are multiples of ``GRAIN``, but for a final one.
        """
        ...


class FixedGrid:
    """Chunks of one length: best for disks that are changed in place."""

    lookahead = 0

    def __init__(self, size: int = TARGET) -> None:
        if size % GRAIN or size <= 0:
            raise ValueError(f"the grid of {size} bytes is no multiple of {GRAIN}")
        self.name = f"fixed-{size}"
        self.minimum = self.maximum = size

    def cuts(self, data: memoryview, *, final: bool) -> Iterator[int]:
        """Every ``size`` bytes."""
        size, end = self.maximum, len(data)
        yield from range(size, end + 1, size)
        if final and end % size:
            yield end


def chunker_named(name: str) -> Chunker:
    """The chunker that ``name`` stands for. ``RepositoryUnsupportedError`` when this program does not know it."""
    kind, _, number = name.partition("-")
    if kind == "fixed" and number.isdigit() and int(number) % GRAIN == 0 and 0 < int(number) <= 4 << 20:
        return FixedGrid(int(number))
    raise RepositoryUnsupportedError(
        f"there is no way to cut disks called {name!r}", advice="fixed-65536 is the usual one."
    )
