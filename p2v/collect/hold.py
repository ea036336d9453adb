"""The frozen final pass: every file system of a host held still at once, while what changed since a live copy is found and read.

For hosts whose disks cannot be snapshotted. The freeze is bounded: how long it has to last is measured on a sample first, and a guard
on the host thaws by itself at the limit. ``vfat`` cannot be frozen: it is synced, and must be the same at the start and at the end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from formats.block import BlockSource, data_bytes, digest_of
from formats.layers import UsedOnly
from formats.layouts.disk import used_of_disks
from formats.layouts.window import Window
from formats.machine import Machine, Volume
from formats.transfer import BLOCK, fingerprint, tasks
from p2v.collect.consistency import FREEZABLE, INERT, SWAP, DiskPlan, Region
from p2v.collect.guard import Guard, new_run
from p2v.errors import ConsistencyError
from p2v.session import Session

_SAMPLE = 64  # blocks that are hashed to learn how fast the host hashes
_THREADS = 8  # as many as compare while the freeze lasts
_MARGIN = 1.5
_SETTLE_SECONDS = 5.0  # to freeze, to read the maps again, to thaw
_LAYERS = frozenset({"part", "lvm", "crypt"})  # what does not write by itself under a frozen file system


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """What has to be held for disks to stand still: the mount points to freeze, and the mounted regions that cannot be frozen."""

    mounts: tuple[str, ...]
    restless: tuple[tuple[str, Region], ...]  # with the disk's id


def standstill(machine: Machine, disks: Sequence[DiskPlan]) -> Standstill:
    """How the fuzzy ones of ``disks`` can be held still; ``ConsistencyError`` with the reason when they cannot."""
    mounts: list[str] = []
    restless: list[tuple[str, Region]] = []
    for plan in disks:
        if not plan.reason:
            raise _no(f"{plan.disk.name} is of the instant of its snapshots, and the other disks would be of another")
        below = {f"/dev/{plan.disk.name}"}
        regions = {region.path: region for region in plan.regions}
        for volume in _upwards(machine, below):
            points = [point for point in volume.mountpoints if point != SWAP]
            carries = any(volume.path in other.parents for other in machine.volumes)
            if volume.path not in below and volume.kind not in _LAYERS:
                raise _no(f"{volume.path} is of kind {volume.kind}, which writes by itself")
            if not points:
                if not carries and volume.content not in INERT and SWAP not in volume.mountpoints:
                    raise _no(f"{volume.path} holds {volume.content}, which may be in use without being mounted")
            elif volume.content in FREEZABLE:
                mounts.append(points[0])
            elif volume.content == "vfat" and volume.path in regions:
                restless.append((plan.disk.id, regions[volume.path]))
            else:
                raise _no(f"{points[0]} holds {volume.content or 'something unknown'}, which cannot be frozen")
    return Standstill(mounts=tuple(sorted(set(mounts), key=len, reverse=True)), restless=tuple(restless))


def _upwards(machine: Machine, below: set[str]) -> Iterator[Volume]:
    """The volumes that lie on one of ``below``, at any height, and those themselves."""
    found = set(below)
    while more := {v.path for v in machine.volumes if found & set(v.parents)} - found:
        found |= more
    return (volume for volume in machine.volumes if volume.path in found)


def _no(why: str) -> ConsistencyError:
    return ConsistencyError(
        f"the machine cannot be held still: {why}",
        advice="Stop what writes there while the copy runs, or shut the machine down and copy its disks.",
    )


@contextlib.contextmanager
def held(
    session: Session,
    machine: Machine,
    disks: Sequence[DiskPlan],
    live: Mapping[str, BlockSource],
    *,
    silence: int,
    freeze: int,
) -> Iterator[Mapping[str, BlockSource]]:
    """Within, nothing changes on ``disks``: their sources by id, each with the map of used blocks of that instant.

    Leaving it thaws. ``ConsistencyError`` when it cannot be, when it would take longer than ``freeze`` seconds (then nothing was
    frozen), or when the freeze did not last until the end: what was read is of no single instant then.
    """
    still = standstill(machine, disks)
    _bounded(live, freeze)
    with Guard.start(session, new_run(), still.mounts, (), silence=silence, freeze=freeze) as guard:
        guard.freeze()
        before = [fingerprint(Window(live[disk], region.start, region.size)) for disk, region in still.restless]
        maps = used_of_disks(live, {plan.disk.id: plan.disk.logical_sector for plan in disks})
        yield {disk_id: UsedOnly(source, maps[disk_id].extents) for disk_id, source in live.items()}
        for (disk, region), first in zip(still.restless, before, strict=True):
            if fingerprint(Window(live[disk], region.start, region.size)) != first:
                raise _no(f"{region.mount} was written to while all else was frozen")
        guard.thaw()


def _bounded(live: Mapping[str, BlockSource], limit: int) -> None:
    """Raise ``ConsistencyError`` unless hashing all that is in use is expected to end within the limit."""
    maps = used_of_disks(live)
    used = {disk_id: UsedOnly(source, maps[disk_id].extents) for disk_id, source in live.items()}
    total = sum(map(data_bytes, used.values()))
    step = max(1, total // BLOCK // _SAMPLE)
    picked = [(live[name], task) for name, source in used.items() for task in islice(tasks(source), 0, None, step)]
    picked = picked[: 2 * _SAMPLE]
    started = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda item: digest_of(item[0], item[1].low, item[1].high - item[1].low), picked))
    if None in digests:
        raise _no("the host's Python cannot hash what it has, so that all would be read again")
    hashed = sum(task.high - task.low for _, task in picked)
    expected = _MARGIN * (time.monotonic() - started) * total / max(hashed, 1) + _SETTLE_SECONDS
    if expected > limit:
        raise ConsistencyError(
            f"the machine would have to be frozen for about {expected:.0f} s, and {limit} s are allowed",
            advice=f"Allow it with --freeze-limit {2 * int(expected / 2 + 1)}, or stop what writes while the copy runs.",
        )
