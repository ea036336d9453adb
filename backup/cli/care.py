"""Commands that keep a repository healthy and small."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from backup.cli.base import OUTPUT, PLACE, Place, app, now
from formats.errors import Notice, UsageError
from p2v.cli import Output, perform
from p2v.console import Console, human_size, record

if TYPE_CHECKING:
    from backup.repository import Repository


@app.command
def check(
    *,
    read_data: Annotated[bool, Parameter(name="--read-data")] = False,
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Check the repository: everything that a point refers to is there; what is damaged, and what that hurts.

    Parameters
    ----------
    read_data
        read, open and hash every byte; points that are sound are marked as verified.
    """

    def action(console: Console) -> None:
        from backup.check import Check, add_record
        from backup.errors import RepositoryError
        from backup.place import open_repository

        with open_repository(place.repo, notice=console.notice) as repository, console.stage("check") as stage:
            result = Check(repository, read_data=read_data, progress=console.progress("read packs")).run()
            stage.detail = f"{result.points} points, {result.packs} packs, {human_size(result.bytes_read)} read"
            if read_data:
                hurt = {found.point for found in result.hurts}
                for point in repository.points() if not hurt else ():
                    add_record(repository, point, {"kind": "verified", "time": now(), "bytes": result.bytes_read})
        console.data |= {
            "damages": [record(found) for found in result.damages],
            "hurts": [record(found) for found in result.hurts],
            "points": result.points, "packs": result.packs, "bytes_read": result.bytes_read, "strays": result.strays,
        }  # fmt: skip
        for damage in result.damages:
            console.say(f"damaged  {damage.subject}: {damage.message}")
        for lost in result.hurts:
            size = sum(length for _, length in lost.ranges)
            console.say(
                f"hurt     point {lost.point[:8]}, disk {lost.disk or 'all'}: {human_size(size)} in {len(lost.ranges)} places"
            )
        if not result.sound:
            raise RepositoryError(
                f"{len(result.damages)} objects are damaged, {len({found.point for found in result.hurts})} points are hurt",
                advice="Back up again: what is still at its source is stored anew. `restore --salvage` brings back all the rest.",
            )
        console.say(f"no damage: {stage.detail}")

    return perform("check", output, action)


@app.command
def forget(
    *points: str,
    keep_last: int = 0,
    keep_hourly: int = 0,
    keep_daily: int = 0,
    keep_weekly: int = 0,
    keep_monthly: int = 0,
    keep_yearly: int = 0,
    keep_within: str = "",
    keep_tag: tuple[str, ...] = (),
    machine: str = "",
    prune: bool = False,
    dry_run: Annotated[bool, Parameter(name="--dry-run", alias="-n")] = False,
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Forget points: those named, or all that no --keep rule wants. Rules count each on its own, machine by machine; periods are UTC.

    Parameters
    ----------
    points
        ids or unique beginnings; no rules then.
    keep_within
        all points this much older than the newest, as 2y5m7d3h.
    keep_tag
        points with this tag.
    machine
        look at the points of this machine only.
    prune
        delete at once what no point needs any more.
    dry_run
        say what would be forgotten and why, do nothing.
    """

    def action(console: Console) -> None:
        from backup.place import open_repository
        from backup.retention import Decision, Policy, decide, parse_within

        policy = Policy(
            last=keep_last, hourly=keep_hourly, daily=keep_daily, weekly=keep_weekly, monthly=keep_monthly,
            yearly=keep_yearly, tags=keep_tag, **({"within": parse_within(keep_within)} if keep_within else {}),
        )  # fmt: skip
        with open_repository(place.repo, notice=console.notice) as repository:
            known = [point for point in repository.points() if machine in ("", point.machine.name)]
            if points:
                if not policy.empty:
                    raise UsageError("name points, or give --keep rules, not both")
                named = [repository.find_point(text, known) for text in points]
                decisions = [Decision(point=point, keep=False, reasons=("named",)) for point in named]
            else:
                decisions = decide(known, policy, datetime.now(UTC))
            rows = [
                [
                    d.point.short,
                    d.point.time,
                    d.point.machine.name,
                    "keep" if d.keep else "forget",
                    ", ".join(d.reasons),
                ]
                for d in decisions
            ]
            console.table(["point", "time", "machine", "what", "reasons"], rows)
            console.data["decisions"] = [
                {"id": d.point.name, "keep": d.keep, "reasons": list(d.reasons)} for d in decisions
            ]
            if dry_run:
                return
            repository.forget([decision.point for decision in decisions if not decision.keep])
            if prune:
                _prune(console, repository, dry_run=False)

    return perform("forget", output, action)


@app.command(name="prune")
def prune_(
    *,
    dry_run: Annotated[bool, Parameter(name="--dry-run", alias="-n")] = False,
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Delete what no point needs. Backups may run meanwhile: then the deletion itself is left to the next prune."""

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo, notice=console.notice) as repository:
            _prune(console, repository, dry_run=dry_run)

    return perform("prune", output, action)


def _prune(console: Console, repository: Repository, *, dry_run: bool) -> None:
    from backup.prune import Prune

    with console.stage("prune") as stage:
        result = Prune(repository, dry_run=dry_run, time=now()).run()
        stage.detail = (
            f"{human_size(result.needed)} needed, {human_size(result.waste)} not; {human_size(result.repacked)} moved, "
            f"{result.deleted_packs} packs deleted ({human_size(result.deleted_bytes)})"
        )
    console.data["prune"] = record(result)
    console.say(stage.detail)
    if result.waiting:
        console.say(f"the deletion waits for: {', '.join(result.waiting)}")


@app.command(name="repair-index")
def repair_index_(*, place: Place = PLACE, output: Output = OUTPUT) -> int:
    """Make the index anew from the packs: after an index object was damaged or lost."""

    def action(console: Console) -> None:
        from backup.place import open_repository
        from backup.repair import repair_index

        with open_repository(place.repo, notice=console.notice) as repository, console.stage("repair index") as stage:
            result = repair_index(repository.store, time=now(), progress=console.progress("walk packs"))
            stage.detail = f"{result.blobs} blobs in {result.packs} packs"
        console.data["repaired"] = record(result)
        console.say(stage.detail)
        for name in result.damaged:
            console.notice(
                Notice(code="pack-damaged", message="its bytes are not those that were stored", subject=name)
            )

    return perform("repair-index", output, action)


@app.command
def unlock(*, place: Place = PLACE, output: Output = OUTPUT) -> int:
    """Remove all leases and locks, those of living runs too: a backup that runs notices it and commits nothing."""

    def action(console: Console) -> None:
        from backup.lock import LEASES, holders
        from backup.place import open_repository

        with open_repository(place.repo, notice=console.notice) as repository:
            removed = []
            for prefix in (LEASES, "locks/"):
                for name, holder in holders(repository.store, prefix):
                    repository.store.delete(name)
                    removed.append(holder.describe() if holder else name)
        console.data["removed"] = removed
        for item in removed or ["nothing was locked"]:
            console.say(item)

    return perform("unlock", output, action)
