"""What this computer remembers of a repository, so that another one in its place, or an older copy of it, is noticed.

Everything in a repository proves itself, but not that it is the newest: whoever can write the storage can put back last month's state,
whole. Only somebody who was there sees that. Points that were forgotten on purpose are known by their sealed notes
(``Repository.forget``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from backup.errors import RepositoryError
from backup.repository import Config, Repository
from formats.errors import Notice

_MOST = 64 << 20  # bytes of a memory: half a million points


class _Memory(msgspec.Struct, kw_only=True):
    version: int
    place: str
    repository: str
    points: list[str]


class Witness:
    """The memory of one repository, by the place where it lies. A computer that cannot keep one goes without."""

    def __init__(self, folder: Path, place: str) -> None:
        self._place = place
        self.path = folder / f"{blake3(place.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"

    @classmethod
    def usual(cls, place: str) -> Witness:
        """The memory below ``$XDG_STATE_HOME``, else ``~/.local/state``. ``place`` is a folder or a URI."""
        home = os.environ.get("XDG_STATE_HOME")
        place = place if "://" in place else str(Path(place).resolve())
        return cls((Path(home) if home else Path.home() / ".local/state") / "p2v-toolkit" / "repositories", place)

    def renew(self) -> None:
        """Remember nothing: a new repository is made at the place."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _recall(self) -> _Memory | None:
        try:
            with self.path.open("rb") as file:
                return msgspec.json.decode(file.read(_MOST), type=_Memory)
        except (OSError, msgspec.DecodeError):
            return None

    def recognise(self, config: Config) -> None:
        """``RepositoryError`` when another repository lay at the place the last time."""
        memory = self._recall()
        if memory is not None and memory.repository != config.id:
            raise RepositoryError(
                f"another repository lies at {self._place} than the last time: {config.id} instead of {memory.repository}",
                advice=f"Somebody may have put it there. If you made it anew yourself, remove {self.path}.",
                subject=self._place,
            )

    def compare(self, repository: Repository) -> Iterator[Notice]:
        """A notice where points are gone that were there the last time and that nobody has forgotten on purpose."""
        memory = self._recall()
        gone = set(memory.points) - set(repository.point_names()) if memory is not None else set()
        if not gone:
            return
        for names in repository.forgotten():
            gone -= names
        if gone:
            shown = ", ".join(sorted(name[:8] for name in gone)[:5])
            yield Notice(
                code="points-gone",
                message=f"{len(gone)} points that this computer has seen are gone, and nobody has forgotten them: {shown}"
                f"{' and others' if len(gone) > 5 else ''}",
                advice="The storage was put back to an older state, or somebody deleted them. "
                f"Look at its other copies and at who can write there; to accept it, remove {self.path}.",
                subject=self._place,
            )

    def remember(self, repository: Repository) -> None:
        """Keep what is there now. What is gone without a note stays remembered, so that it is told again."""
        memory = self._recall()
        names = set(repository.point_names())
        if memory is not None and (gone := set(memory.points) - names):
            for forgotten in repository.forgotten():
                gone -= forgotten
            names |= gone
        content = msgspec.json.encode(
            _Memory(version=1, place=self._place, repository=repository.config.id, points=sorted(names))
        )
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.write_bytes(content)
            part.rename(self.path)
