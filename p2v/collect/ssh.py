"""A live Linux host, reached over SSH, as an origin."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from formats.block import BlockSource
from formats.capture import CapturedDisk, Mark
from formats.errors import Notice
from formats.layouts import lvm
from formats.layouts.window import Window
from formats.machine import Disk, Machine
from p2v.collect import commands, consistency, guard, inventory
from p2v.collect.agent import Agent
from p2v.collect.blockdev import DdDisk
from p2v.collect.consistency import Plan, Treatment
from p2v.collect.frozen import Opener, SshCapture, Staging, Watched
from p2v.collect.guard import SILENCE_SECONDS, Guard, new_run
from p2v.collect.hold import held
from p2v.collect.inventory import Inspection
from p2v.config import FREEZE_SECONDS
from p2v.errors import DiskVanishedError, PythonMissingError
from p2v.session import Session, SshTarget

_STAGED = (Treatment.STAGED, Treatment.STAGED_TWICE)


class SshOrigin:
    """A live Linux host; a context manager. Connects on first use; root, directly or by sudo, is needed for all that it does.

    ``notice`` receives what an inspection or capture could not do; that a disk is fuzzy is in the capture's ``notices`` alone. ``silence``
    is how many seconds after the collector's end the source cleans up by itself, ``freeze`` the most that a file system stays frozen.
    Raises the ``HostError`` family.
    """

    def __init__(
        self,
        target: SshTarget,
        *,
        notice: Callable[[Notice], None] | None = None,
        silence: int = SILENCE_SECONDS,
        freeze: int = FREEZE_SECONDS,
    ) -> None:
        self._target = target
        self._silence, self._freeze = silence, freeze
        self._notice = notice or (lambda _: None)
        self._session: Session | None = None
        self._lock = threading.Lock()
        self.adapted = False
        self.inspection: Inspection | None = None

    @property
    def session(self) -> Session:
        """The connection, made on first use."""
        with self._lock:
            if self._session is None:
                self._session = Session.connect(self._target)
            return self._session

    def inspect(self) -> Machine:
        """The machine's record; writes nothing on the source. The commands' results are in ``inspection``."""
        self.inspection = inventory.inspection(commands.collect(self.session))
        for notice in self.inspection.notices:
            self._notice(notice)
        return self.inspection.machine

    def capture(self, since: Mapping[str, Mark] | None = None) -> SshCapture:
        """One consistent view where the host allows it, else FUZZY disks with a notice each; see ``p2v.collect.consistency``.

        The record of the last ``inspect`` is used if there is one. ``ConsistencyError`` when a consistent view was possible and something
        went wrong; ``PrivilegeError`` without root. Whatever is raised, the source is left as it was.
        """
        del since  # a plain host gives no marks, so none can be known (C4)
        machine = self.inspection.machine if self.inspection is not None else self.inspect()
        if any(re.search(r"-p2v--[0-9a-f]{8}--\d+$", volume.path) for volume in machine.volumes):
            self.cleanup()
            machine = self.inspect()
        with contextlib.ExitStack() as stack:
            return self._capture(machine, stack)

    def _capture(self, machine: Machine, stack: contextlib.ExitStack) -> SshCapture:
        session = self.session
        notices: list[Notice] = []

        def tell(notice: Notice) -> None:  # at once, also while the disks are read
            if notice not in notices:
                notices.append(notice)
                self._notice(notice)

        opener = self._opener(session, stack, tell)
        live = {disk.id: self._open(disk, opener, stack) for disk in consistency.captured(machine)[0]}
        labels = _labels(machine, live)
        run = new_run()
        plan = consistency.plan(machine, labels, run)
        for notice in plan.notices:  # whether a disk stays fuzzy shows later, if its machine can be held still
            notices.append(notice) if notice.code == "fuzzy-disk" else tell(notice)
        staging = Staging(plan, live, labels)
        stack.callback(staging.close)
        keeper, snapshots = None, dict[tuple[str, str], BlockSource]()

        def let_go(_: str) -> None:  # an open device cannot be removed
            for source in list(snapshots.values()):
                source.close()

        if plan.snapshots or any(r.treatment in _STAGED for p in plan.disks for r in p.regions if not p.reason):
            keeper = Guard.start(
                session, run, plan.mounts, plan.snapshots, silence=self._silence, freeze=self._freeze, lost=let_go
            )
            stack.callback(keeper.close)
            keeper.freeze()
            staging.before_snapshots()
            apart = keeper.snapshot()
            staging.frozen(keeper)
            keeper.thaw()
            staging.unchanged(_labels(machine, live))
            for item in plan.snapshots:
                source = Watched(opener(item.path), keeper, list(live.values()))
                stack.callback(source.close)
                snapshots[item.group, item.volume] = source
            for notice in _apart(plan, apart):
                tell(notice)
        else:
            staging.before_snapshots()
        levels = {p.disk.id: p.consistency for p in plan.disks}
        disks = {
            key: CapturedDisk(source=source, mark=None, consistency=levels[key])
            for key, source in staging.compose(snapshots).items()
        }
        hold = partial(held, session, machine, plan.disks, live, silence=self._silence, freeze=self._freeze)
        return SshCapture(machine, disks, notices, guard=keeper, hold=hold, stack=stack.pop_all(), report=self._notice)

    def _opener(self, session: Session, stack: contextlib.ExitStack, tell: Callable[[Notice], None]) -> Opener:
        """What opens a device of the host: the agent, or dd where there is no Python."""
        try:
            agent = stack.enter_context(Agent.start(session, root=True, report=tell))
        except PythonMissingError as error:
            tell(Notice(code="no-python", message=error.message, advice=error.advice))
            return lambda path: DdDisk(session, path, report=tell)
        return agent.disk

    def _open(self, disk: Disk, opener: Opener, stack: contextlib.ExitStack) -> BlockSource:
        source = opener(f"/dev/{disk.name}")
        stack.callback(source.close)
        if source.size != disk.size:
            raise DiskVanishedError(
                f"{disk.name} has {source.size} bytes and had {disk.size} when the machine was inspected",
                advice="Run the command again.",
                subject=disk.id,
            )
        return source

    def cleanup(self) -> list[str]:
        """Remove the snapshots that killed runs left; those of a living run stay. Says what was removed; what could not be is a notice."""
        removed, kept = guard.cleanup(self.session)
        for line in kept:
            self._notice(
                Notice(code="snapshot-left", message=f"not removed: {line}", advice="Another run may be using it.")
            )
        return [f"LVM snapshot {name}" for name in removed]

    def retire(self, marks: Sequence[Mark]) -> None:
        """Nothing is kept on a plain host: it has no change tracking (C7)."""

    def close(self) -> None:
        """Close the connection; idempotent."""
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _labels(machine: Machine, live: Mapping[str, BlockSource]) -> dict[str, lvm.PhysicalLabel]:
    """The labels of the physical volumes that lie right on captured disks, by path."""
    found = {}
    for disk in machine.disks:
        if disk.id in live:
            for volume, start in consistency.top_volumes(machine, disk):
                if volume.content == "LVM2_member":
                    label = lvm.read_label(Window(live[disk.id], start, volume.size))
                    if label is not None:
                        found[volume.path] = label
    return found


def _apart(plan: Plan, seconds: float) -> Iterator[Notice]:
    """LVM makes one snapshot after the other: several volumes are each one instant, but not the same."""
    if len(plan.snapshots) > 1 and seconds > 0:
        names = ", ".join(f"{item.group}/{item.volume}" for item in plan.snapshots)
        yield Notice(
            code="snapshots-apart",
            message=f"the snapshots of {names} were taken within {seconds:.2f} s, not at once",
            advice="A program that keeps its data on several of these volumes should be stopped for the start of the capture.",
        )
