"""Leases: how a run that writes is seen by the one that deletes. No decision here uses a clock (P8).

A lease says which process of which computer holds it. On the same computer a dead process is recognised by process id, its start
time and the kernel's
boot id, and its lease is removed; a lease of another computer counts as alive until ``p2v-backup unlock`` takes it away.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from backup.errors import LeaseLostError, LockedError, ObjectDamagedError, ObjectMissingError
from backup.store.base import NameTakenError, Store

LEASES, PRUNE = "leases/", "locks/prune"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease or lock; ``time`` is for people."""

    id: str
    host: str
    boot: str
    pid: int
    started: str
    command: str
    time: str = ""

    @classmethod
    def of_this_process(cls, command: str, time: str = "") -> Holder:
        """This process, with a new id."""
        return cls(
            id=secrets.token_hex(16),
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            command=command,
            time=time,
        )

    @property
    def dead(self) -> bool:
        """Whether the process is known to be gone; False in any doubt."""
        if self.host != socket.gethostname() or not self.boot or not _boot_id():
            return False
        return self.boot != _boot_id() or self.started != _started(self.pid)

    def describe(self) -> str:
        """For a person."""
        return f"{self.command} on {self.host}, process {self.pid}" + (f", since {self.time}" if self.time else "")


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started(pid: int) -> str:
    """The process's start in ticks since boot; empty when there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


class Lease:
    """A run's lease; a context manager that removes it. It is stored when the object is made."""

    def __init__(self, store: Store, command: str, time: str = "") -> None:
        self._store = store
        holder = Holder.of_this_process(command, time)
        self.name = LEASES + holder.id
        store.store(self.name, [msgspec.json.encode(holder)])

    def require(self) -> None:
        """``LeaseLostError`` when somebody has taken the lease away."""
        try:
            self._store.load(self.name)
        except ObjectMissingError:
            raise LeaseLostError(
                "this run's lease was removed while it was running; nothing was committed",
                advice="Somebody ran `p2v-backup unlock`, or removed it by hand. Run the backup again; what it stored is used.",
            ) from None

    def release(self) -> None:
        """Remove the lease."""
        self._store.delete(self.name)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holders(store: Store, prefix: str = LEASES) -> list[tuple[str, Holder | None]]:
    """All leases with their holders; None for one that cannot be read."""
    found: list[tuple[str, Holder | None]] = []
    for stored in store.list(prefix):
        try:
            found.append((stored.name, msgspec.json.decode(store.load(stored.name), type=Holder)))
        except ObjectMissingError:
            continue
        except (msgspec.DecodeError, ObjectDamagedError):
            found.append((stored.name, None))
    return found


def remove_dead(store: Store, prefix: str = LEASES) -> list[str]:
    """Remove the leases of dead processes of this computer; returns the names of those that remain."""
    remaining = []
    for name, holder in holders(store, prefix):
        if holder is not None and holder.dead:
            store.delete(name)
        else:
            remaining.append(name)
    return remaining


@contextlib.contextmanager
def exclusive(store: Store, command: str, time: str = "") -> Iterator[None]:
    """Hold ``locks/prune``; ``LockedError`` when another living run holds it."""
    holder = Holder.of_this_process(command, time)
    for attempt in range(2):
        try:
            store.store(PRUNE, [msgspec.json.encode(holder)])
            break
        except NameTakenError:
            remaining = [found for name, found in holders(store, "locks/") if name == PRUNE]
            if attempt or (remaining and (remaining[0] is None or not remaining[0].dead)):
                who = remaining[0].describe() if remaining and remaining[0] else "another run"
                raise LockedError(
                    f"the repository is being pruned by {who}",
                    advice="Wait for it; if it is dead, run `p2v-backup unlock`.",
                ) from None
            remove_dead(store, "locks/")
    try:
        yield
    finally:
        store.delete(PRUNE)
