"""What the modules of the command share: the application, the repository's place, and a point in a few words."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Annotated

import cyclopts
from cyclopts import Parameter

from p2v.cli import Connection, Output
from p2v.console import record

if TYPE_CHECKING:
    from backup.repository import Point, Repository

app = cyclopts.App(
    name="p2v-backup",
    version=lambda: metadata.version("p2v-toolkit"),
    help="Back machines up into a repository, and bring them back as a VM for any platform, a disk, or an NBD server.",
    version_flags=["--version"],
    help_format="markdown",
    default_parameter=Parameter(negative="", show_default=False),
)
key = cyclopts.App(
    name="key", help="Passwords that open the repository, and its paper key.", default_parameter=Parameter(negative="")
)
app.command(key)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which repository. Its password comes from P2V_PASSWORD (or _FILE, _COMMAND), else the terminal is asked."""

    repo: Annotated[str, Parameter(alias="-r")] = ""
    "The repository: a directory, or sftp://USER@HOST:PORT/FOLDER. Default: P2V_REPOSITORY."


OUTPUT = Output()
CONNECTION = Connection()
PLACE = Place()


def now() -> str:
    """This moment, RFC 3339 with its zone."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def summary(point: Point, repository: Repository) -> dict[str, object]:
    """A point as `points --json` shows it."""
    from backup.check import records

    known = records(repository, point)
    latest = {str(found.get("kind")): found for found in known}
    return {
        "id": point.name,
        "machine": point.machine.name,
        "time": point.time,
        "consistency": max((disk.consistency for disk in point.disks), key=lambda c: c.rank, default=None),
        "disks": [{"id": disk.id, "size": disk.size, "consistency": disk.consistency} for disk in point.disks],
        "missing": [record(missing) for missing in point.missing],
        "tags": list(point.tags),
        "verified": latest.get("verified", {}).get("time"),
        "drilled": latest.get("drill"),
    }
