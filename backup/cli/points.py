"""Commands that show what is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backup.cli.base import OUTPUT, PLACE, Place, app, summary
from p2v.cli import Output, perform
from p2v.console import Console, human_size, record

if TYPE_CHECKING:
    pass


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

        with open_repository(place.repo) as repository:
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

        with open_repository(place.repo) as repository:
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
