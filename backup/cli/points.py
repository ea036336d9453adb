"""Commands that show what is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backup.cli.base import OUTPUT, PLACE, Place, app, summary
from p2v.cli import Output, perform
from p2v.console import Console, human_size, record

if TYPE_CHECKING:
    from backup.compare import DiskDifference

_SHOWN = 20  # ranges of a disk that `diff` shows to a person


@app.command
def points(*, machine: str = "", place: Place = PLACE, output: Output = OUTPUT) -> int:
    """List the points, oldest first.

    Parameters
    ----------
    machine
        only those of this machine.
    """

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo, notice=console.notice) as repository:
            found = [summary(p, repository) for p in repository.points() if machine in ("", p.machine.name)]
        console.data["points"] = found
        rows = [
            [
                str(p["id"])[:8],
                str(p["time"]),
                str(p["machine"]),
                str(p["consistency"]),
                str(len(p["disks"])) if isinstance(p["disks"], list) else "",
                str(p["verified"] or "-"),
            ]
            for p in found
        ]
        console.table(["point", "time", "machine", "consistency", "disks", "verified"], rows)

    return perform("points", output, action)


@app.command
def show(point: str, /, *, place: Place = PLACE, output: Output = OUTPUT) -> int:
    """Show a point: machine, disks, what is missing, what was learnt of it later.

    Parameters
    ----------
    point
        its id or a unique beginning, `latest`, or MACHINE@latest.
    """

    def action(console: Console) -> None:
        from backup.check import records
        from backup.place import open_repository
        from backup.restore import disk_number

        with open_repository(place.repo, notice=console.notice) as repository:
            found = repository.find_point(point)
            known = records(repository, found)
        console.data["point"] = record(found)
        console.data["records"] = known
        console.say(
            f"{found.name}\n  machine     {found.machine.name}\n  time        {found.time}\n  source      {found.source}"
        )
        for number in range(len(found.disks)):
            disk = found.disk(disk_number(found, number))
            if disk is not None:
                console.say(f"  disk {number}      {disk.id}  {human_size(disk.size)}, {disk.consistency}")
        for missing in found.missing:
            console.say(f"  not held    {missing.id}: {missing.reason}")
        for item in known:
            console.say(f"  {item.get('kind')}    {item.get('time')}")

    return perform("show", output, action)


@app.command
def diff(old: str, new: str, /, *, place: Place = PLACE, output: Output = OUTPUT) -> int:
    """Say which ranges of the disks differ between two points of a machine. Exit code 4 when any does.

    Only what is not stored once for both is read.

    Parameters
    ----------
    old
        the id of a point or a unique beginning, `latest`, or MACHINE@latest.
    new
        another one.
    """

    def action(console: Console) -> int | None:
        from backup.compare import compare
        from backup.place import open_repository

        with open_repository(place.repo, notice=console.notice) as repository:
            known = repository.points()
            before, after = (repository.find_point(text, known) for text in (old, new))
            found = list(compare(repository, before, after))
        console.data |= {"old": before.name, "new": after.name, "disks": [_difference(disk) for disk in found]}
        for disk in found:
            if disk.old_size is None or disk.new_size is None:
                console.say(f"{disk.id}  only in {(after if disk.old_size is None else before).short}")
                continue
            resized = f", size {human_size(disk.old_size)} -> {human_size(disk.new_size)}"
            console.say(
                f"{disk.id}  {human_size(disk.changed)} in {len(disk.ranges)} places"
                f"{'' if disk.old_size == disk.new_size else resized}"
            )
            for extent in disk.ranges[:_SHOWN]:
                console.say(f"    {extent.length:>12} bytes at {extent.start}")
            if len(disk.ranges) > _SHOWN:
                console.say(f"    ... and {len(disk.ranges) - _SHOWN} more, all with --json")
        return None if all(disk.same for disk in found) else 4

    return perform("diff", output, action)


def _difference(disk: DiskDifference) -> dict[str, object]:
    return {
        "id": disk.id,
        "old_size": disk.old_size,
        "new_size": disk.new_size,
        "changed": disk.changed,
        "ranges": [{"start": extent.start, "length": extent.length} for extent in disk.ranges],
    }
