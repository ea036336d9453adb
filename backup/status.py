"""How old the proofs are: of each machine the newest point, the newest that was verified, and the newest that was seen to work."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from backup.check import records
from backup.errors import RepositoryError
from backup.repository import Point, Repository
from formats.errors import UsageError

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE = re.compile(r"(?:\d+[mhdw])+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most seconds that may have gone by since the point was taken; None: no limit."""

    backup: float | None = None
    verified: float | None = None
    drilled: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineStatus:
    """One machine. Ages are seconds since the point was taken, None where there is no such point.

    ``verified`` and ``drilled`` are points that were sound when they were read, and that passed a drill. ``last_drill`` is the result of
    the newest drill of any point, ``rto`` its measured seconds. ``problems`` are sentences: limits that are passed, a drill that failed.
    """

    machine: str
    points: int
    newest: str
    backup_age: float
    verified: str = ""
    verified_age: float | None = None
    drilled: str = ""
    drilled_age: float | None = None
    last_drill: str = ""
    last_drill_time: str = ""
    rto: float = 0.0
    problems: tuple[str, ...] = ()


def parse_age(text: str) -> float | None:
    """Seconds of an age as 36h, 7d, 4w or 1d12h; None for an empty text. ``UsageError`` for any other."""
    if not text:
        return None
    if not _AGE.fullmatch(text):
        raise UsageError(f"{text!r} is no age", advice="Write it as 90m, 36h, 7d, 4w or 1d12h.")
    return float(sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([mhdw])", text)))


def status_of(repository: Repository, limits: Limits, now: datetime, *, machine: str = "") -> list[MachineStatus]:
    """The machines in the order of their names; ``machine`` is one of them or "" for all. A record that is damaged proves nothing."""
    points: dict[str, list[Point]] = {}
    for point in repository.points():
        if machine in ("", point.machine.name):
            points.setdefault(point.machine.name, []).append(point)
    return [_machine(repository, name, points[name], limits, now) for name in sorted(points)]


def _machine(repository: Repository, name: str, points: list[Point], limits: Limits, now: datetime) -> MachineStatus:
    known = {point.name: _records(repository, point) for point in points}
    verified = next((p for p in reversed(points) if any(d.get("kind") == "verified" for d in known[p.name])), None)
    drilled = next((p for p in reversed(points) if _passed(known[p.name])), None)
    drills = [d for documents in known.values() for d in documents if d.get("kind") == "drill"]
    last = max(drills, key=lambda d: str(d.get("time", "")), default={})
    rto = last.get("rto")
    problems = [
        problem
        for problem in (
            _late("the newest point", points[-1], limits.backup, now),
            _late("the newest verified point", verified, limits.verified, now),
            _late("the newest point that passed a drill", drilled, limits.drilled, now),
        )
        if problem
    ]
    if last and last.get("result") != "pass":
        problems.append(f"the last drill: {last.get('result')}: {last.get('reason')}"[:300])
    return MachineStatus(
        machine=name,
        points=len(points),
        newest=points[-1].name,
        backup_age=_age(points[-1], now),
        verified=verified.name if verified else "",
        verified_age=_age(verified, now) if verified else None,
        drilled=drilled.name if drilled else "",
        drilled_age=_age(drilled, now) if drilled else None,
        last_drill=str(last.get("result", "")),
        last_drill_time=str(last.get("time", "")),
        rto=float(rto) if isinstance(rto, int | float) else 0.0,
        problems=tuple(problems),
    )


def _records(repository: Repository, point: Point) -> list[dict[str, object]]:
    with contextlib.suppress(RepositoryError):
        return records(repository, point)
    return []


def _passed(documents: list[dict[str, object]]) -> bool:
    """Whether the newest drill of a point passed."""
    drills: list[Mapping[str, object]] = [document for document in documents if document.get("kind") == "drill"]
    return bool(drills) and drills[-1].get("result") == "pass"


def _age(point: Point, now: datetime) -> float:
    return max(0.0, (now - point.when).total_seconds())


def _late(what: str, point: Point | None, limit: float | None, now: datetime) -> str:
    if limit is None:
        return ""
    if point is None:
        return f"there is no {what.removeprefix('the ')}"
    return (
        f"{what} is {_age(point, now) / 3600:.1f} h old, {limit / 3600:g} h are allowed"
        if _age(point, now) > limit
        else ""
    )
