"""Which points are kept: restic's rules. Pure: times come with the points and ``now`` is given.

Each rule counts on its own and a point is kept if any rule wants it; of a period the newest point counts; periods without points
do not count.
Machines are looked at one by one. A point that is dated later than ``now`` is kept and counts for nothing, so that a wrong clock
deletes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from backup.repository import Point
from formats.errors import UsageError

_PERIODS: dict[str, Callable[[datetime], object]] = {
    "hourly": lambda when: (when.year, when.month, when.day, when.hour),
    "daily": lambda when: (when.year, when.month, when.day),
    "weekly": lambda when: when.isocalendar()[:2],
    "monthly": lambda when: (when.year, when.month),
    "yearly": lambda when: when.year,
}
_WITHIN = re.compile(r"(?:(\d+)y)?(?:(\d+)m)?(?:(\d+)d)?(?:(\d+)h)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How many points each rule keeps; ``tags`` are kept for ever. Periods are those of UTC."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: timedelta = timedelta()
    tags: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it keeps nothing: then nothing is to be forgotten either."""
        return self == Policy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of a point, and why."""

    point: Point
    keep: bool
    reasons: tuple[str, ...]


def decide(points: Sequence[Point], policy: Policy, now: datetime) -> list[Decision]:
    """A decision for each point, in the order given. ``UsageError`` for a policy without a rule."""
    if policy.empty:
        raise UsageError("no rule says what to keep", advice="Give at least one --keep option.")
    machines = {point.machine.name for point in points}
    reasons: dict[str, list[str]] = {point.name: [] for point in points}
    for machine in machines:
        _one_machine([point for point in points if point.machine.name == machine], policy, now, reasons)
    return [Decision(point=p, keep=bool(reasons[p.name]), reasons=tuple(reasons[p.name])) for p in points]


def _one_machine(points: Sequence[Point], policy: Policy, now: datetime, reasons: dict[str, list[str]]) -> None:
    past = sorted((point for point in points if point.when <= now), key=lambda point: point.when, reverse=True)
    for point in points:
        if point.when > now:
            reasons[point.name].append("dated in the future")
        if set(point.tags) & set(policy.tags):
            reasons[point.name].append("tag " + ", ".join(sorted(set(point.tags) & set(policy.tags))))
    for point in past[: policy.last]:
        reasons[point.name].append("last")
    if policy.within and past:
        for point in past:
            if point.when >= past[0].when - policy.within:
                reasons[point.name].append("within")
    for rule, period in _PERIODS.items():
        left, seen = getattr(policy, rule), None
        for point in past:
            if left and (current := period(point.when.astimezone(UTC))) != seen:
                seen, left = current, left - 1
                reasons[point.name].append(rule)


def parse_within(text: str) -> timedelta:
    """A duration as restic writes it: 1y5m7d2h; a year is 365 days, a month 30."""
    found = _WITHIN.fullmatch(text)
    if not text or found is None or not any(found.groups()):
        raise UsageError(f"{text!r} is no duration", advice="Write it as 2y5m7d3h.")
    years, months, days, hours = (int(group or 0) for group in found.groups())
    return timedelta(days=365 * years + 30 * months + days, hours=hours)
