"""The ``p2v-backup`` command. Thin: parse, open the repository, call the verb, show the result."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts
from cyclopts import Parameter

from backup.chunk import USUAL
from formats.errors import Notice, UsageError
from p2v.cli import Connection, Output, perform
from p2v.console import Console, human_size, record

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


_OUTPUT = Output()
_CONNECTION = Connection()
_PLACE = Place()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``p2v-backup`` command; ends the process with the run's exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        result = app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        name = next((word for word in arguments[:1] if not word.startswith("-")), "p2v-backup")
        usage = UsageError(str(error).strip(), advice="See: p2v-backup --help")
        return Console(json_output="--json" in arguments).finish(name, usage)
    return result if isinstance(result, int) else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# -- init, backup ------------------------------------------------------------------------------------------------------


@app.command
def init(*, chunker: str = USUAL, place: Place = _PLACE, output: Output = _OUTPUT) -> int:
    """Make a repository in an empty directory. Everything in it is encrypted: without a password or the paper key it is lost.

    Parameters
    ----------
    chunker
        how disks are cut: aligned-MINIMUM-USUAL-MAXIMUM follows content; fixed-SIZE is a grid, for disks that hold a data base alone.
    """

    def action(console: Console) -> None:
        from backup.chunk import chunker_named
        from backup.place import open_store, password
        from backup.repository import Repository

        chunker_named(chunker, bytes(32))
        store = open_store(place.repo, make=True)
        made = Repository.create(store, password(prompt="new password: ", twice=True), chunker=chunker)
        console.data["repository"] = {"id": made.config.id}
        console.say(
            f"repository {made.config.id} made. Keep its paper key in a safe place: p2v-backup key export -o FILE"
        )

    return perform("init", output, action)


@app.command
def backup(
    source: str,
    /,
    *,
    tag: tuple[str, ...] = (),
    full: bool = False,
    level: int = 3,
    threads: int = 0,
    place: Place = _PLACE,
    connection: Connection = _CONNECTION,
    output: Output = _OUTPUT,
) -> int:
    """Store a machine as it is now. What the repository holds already is not stored again.

    Parameters
    ----------
    source
        root@host, ssh://user@host:port, or the path of an image, definition or folder that `p2v convert` wrote.
    tag
        a word to find the point by; may be given several times.
    full
        read everything, whatever the source says of changes.
    level
        zstd level of what is new, 1 to 19.
    threads
        worker threads; 0: as many as fit the computer.
    """

    def action(console: Console) -> None:
        from backup.chunk import chunker_named
        from backup.engine import Backup
        from backup.place import open_repository
        from p2v.origin import open_origin

        if not 1 <= level <= 19:
            raise UsageError(f"there is no zstd level {level}", advice="Choose 1 to 19.")
        workers = threads or min(6, (os.cpu_count() or 2) + 2)
        with (
            open_repository(place.repo, level=level) as repository,
            open_origin(source, connection.identity, connection.known_hosts, console) as origin,
            Backup(
                repository,
                chunker_named(repository.config.chunker, repository.keyring.cut_key),
                threads=workers,
                progress=console.progress("back up"),
                notice=console.notice,
            ) as work,
        ):
            with console.stage("inspect"):
                name = origin.inspect().name
            parent = next((point for point in reversed(work.points) if point.machine.name == name), None)
            marks = {d.id: d.mark for d in parent.disks if d.mark is not None} if parent and not full else {}
            with console.stage("back up") as stage, origin.capture(marks) as capture:
                for notice in capture.notices:
                    console.notice(notice)
                point = work.store(capture, source=_without_password(source), tags=tag, parent=parent)
                done = work.statistics
                stage.detail = (
                    f"{human_size(done.read)} read, {human_size(done.new_bytes)} new, {human_size(done.stored)} stored"
                )
            if marks:
                origin.retire(list(marks.values()))
        console.data |= {"point": _summary(point, repository), "statistics": done.as_mapping(), "parent": point.parent}
        console.say(f"point {point.short} of {point.machine.name}: {stage.detail}")

    return perform("backup", output, action)


def _without_password(source: str) -> str:
    user, at, host = source.rpartition("@")
    scheme, mark, name = user.rpartition("://")
    return f"{scheme}{mark}{name.partition(':')[0]}@{host}" if at else source


# -- points ------------------------------------------------------------------------------------------------------------


def _summary(point: Point, repository: Repository) -> dict[str, object]:
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


@app.command
def points(*, machine: str = "", place: Place = _PLACE, output: Output = _OUTPUT) -> int:
    """List the points, oldest first.

    Parameters
    ----------
    machine
        only those of this machine.
    """

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo) as repository:
            found = [_summary(p, repository) for p in repository.points() if machine in ("", p.machine.name)]
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
def show(point: str, /, *, place: Place = _PLACE, output: Output = _OUTPUT) -> int:
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


# -- restore, serve ----------------------------------------------------------------------------------------------------


@app.command
def restore(
    point: str,
    /,
    *,
    to: str = "",
    destination: Annotated[Path | None, Parameter(name="--output", alias="-o")] = None,
    disk_format: Annotated[str, Parameter(name="--disk-format")] = "",
    name: str = "",
    boot_check: Annotated[str, Parameter(name="--boot-check")] = "none",
    disk: int | None = None,
    device: Path | None = None,
    salvage: bool = False,
    place: Place = _PLACE,
    output: Output = _OUTPUT,
) -> int:
    """Bring a machine back as a VM for a platform (--to, -o), or one disk to a device or file (--disk, --device).

    Parameters
    ----------
    point
        its id or a unique beginning, `latest`, or MACHINE@latest.
    to
        target platform; see `p2v platforms`.
    destination
        folder for disks and definition; made if it is not there.
    disk_format
        disk format, instead of the platform's usual one.
    name
        name of the virtual machine, instead of the machine's own.
    boot_check
        `boots`: see it boot from the repository before the copy. `none`: do not.
    disk
        number of the disk to restore, the boot disk being 0.
    device
        block device to write over, or new file.
    salvage
        go on past damage: what cannot be read becomes zeroes and is listed.
    """

    def action(console: Console) -> None:
        from backup.place import open_repository
        from backup.restore import PointOrigin, disk_number, no_holes, restore_disk

        if (
            (to == "") == (device is None)
            or (device is None) != (disk is None)
            or (to != "") != (destination is not None)
        ):
            raise UsageError("say where to", advice="Either --to PLATFORM -o FOLDER, or --disk N --device DEV.")
        with open_repository(place.repo) as repository:
            found = repository.find_point(point)
            holes = no_holes(found) if salvage else None
            origin = PointOrigin(repository, found, holes=holes)
            console.data["point"] = found.name
            if destination is not None:
                from p2v.convert import Conversion, Request

                request = Request(
                    platform=to, destination=destination, disk_format=disk_format, name=name, boot_check=boot_check,
                    adapt=False, restore=True,
                )  # fmt: skip
                Conversion(origin, request, console).run()
            elif device is not None and disk is not None:
                with origin.capture() as capture, console.stage(f"restore disk {disk}") as stage:
                    source = capture.disks[disk_number(found, disk)].source
                    done = restore_disk(source, device, console.progress("restore"))
                    stage.detail = f"{human_size(done.read)} of {human_size(done.size)} written to {device}"
                console.data["restored"] = {"size": done.size, "read": done.read, "written": done.written}
            for disk_id, lost in (holes or {}).items():
                for hole in sorted(lost):
                    message = f"{hole.length} bytes at {hole.start} could not be restored; zeroes are in their place"
                    console.notice(Notice(code="hole", message=message, subject=disk_id))

    return perform("restore", output, action)


@app.command
def serve(
    point: str,
    /,
    *,
    socket: Path | None = None,
    port: int | None = None,
    writable: bool = False,
    place: Place = _PLACE,
    output: Output = _OUTPUT,
) -> int:
    """Serve the disks of a point over NBD until interrupted: a machine can start from the repository at once.

    Parameters
    ----------
    point
        its id or a unique beginning, `latest`, or MACHINE@latest.
    socket
        path of the Unix socket, instead of one in a private folder.
    port
        TCP port on the loopback address; 0: any. Open to every user of the computer.
    writable
        take writes into memory; they are gone at the end, and the point does not change.
    """

    def action(console: Console) -> None:
        from backup.place import open_repository
        from backup.reader import StoredCapture
        from backup.restore import serving

        with (
            open_repository(place.repo) as repository,
            StoredCapture(repository, repository.find_point(point)) as capture,
            serving(capture, socket=socket, port=port, writable=writable) as (server, uris),
        ):
            console.data["uris"] = uris
            for number, uri in enumerate(uris):
                console.say(f"disk {number}  {uri}")
            console.stdout.flush()
            ended = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda *_: ended.set())
            ended.wait()
            if server.error is not None:
                raise server.error

    return perform("serve", output, action)


# -- care --------------------------------------------------------------------------------------------------------------


@app.command
def check(
    *,
    read_data: Annotated[bool, Parameter(name="--read-data")] = False,
    place: Place = _PLACE,
    output: Output = _OUTPUT,
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

        with open_repository(place.repo) as repository, console.stage("check") as stage:
            result = Check(repository, read_data=read_data, progress=console.progress("read packs")).run()
            stage.detail = f"{result.points} points, {result.packs} packs, {human_size(result.bytes_read)} read"
            if read_data:
                hurt = {found.point for found in result.hurts}
                for point in repository.points() if not hurt else ():
                    add_record(repository, point, {"kind": "verified", "time": _now(), "bytes": result.bytes_read})
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
    place: Place = _PLACE,
    output: Output = _OUTPUT,
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
        with open_repository(place.repo) as repository:
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
            for decision in decisions:
                if not decision.keep:
                    repository.store.delete(f"points/{decision.point.name}")
                    for stored in list(repository.store.list(f"records/{decision.point.name}/")):
                        repository.store.delete(stored.name)
            if prune:
                _prune(console, repository, dry_run=False)

    return perform("forget", output, action)


@app.command(name="prune")
def prune_(
    *,
    dry_run: Annotated[bool, Parameter(name="--dry-run", alias="-n")] = False,
    place: Place = _PLACE,
    output: Output = _OUTPUT,
) -> int:
    """Delete what no point needs. Backups may run meanwhile: then the deletion itself is left to the next prune."""

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo) as repository:
            _prune(console, repository, dry_run=dry_run)

    return perform("prune", output, action)


def _prune(console: Console, repository: Repository, *, dry_run: bool) -> None:
    from backup.prune import Prune

    with console.stage("prune") as stage:
        result = Prune(repository, dry_run=dry_run, time=_now()).run()
        stage.detail = (
            f"{human_size(result.needed)} needed, {human_size(result.waste)} not; {human_size(result.repacked)} moved, "
            f"{result.deleted_packs} packs deleted ({human_size(result.deleted_bytes)})"
        )
    console.data["prune"] = record(result)
    console.say(stage.detail)
    if result.waiting:
        console.say(f"the deletion waits for: {', '.join(result.waiting)}")


@app.command(name="repair-index")
def repair_index_(*, place: Place = _PLACE, output: Output = _OUTPUT) -> int:
    """Make the index anew from the packs: after an index object was damaged or lost."""

    def action(console: Console) -> None:
        from backup.place import open_repository
        from backup.repair import repair_index

        with open_repository(place.repo) as repository, console.stage("repair index") as stage:
            result = repair_index(repository.store, time=_now(), progress=console.progress("walk packs"))
            stage.detail = f"{result.blobs} blobs in {result.packs} packs"
        console.data["repaired"] = record(result)
        console.say(stage.detail)
        for name in result.damaged:
            console.notice(
                Notice(code="pack-damaged", message="its bytes are not those that were stored", subject=name)
            )

    return perform("repair-index", output, action)


@app.command
def unlock(*, place: Place = _PLACE, output: Output = _OUTPUT) -> int:
    """Remove all leases and locks, those of living runs too: a backup that runs notices it and commits nothing."""

    def action(console: Console) -> None:
        from backup.lock import LEASES, holders
        from backup.place import open_repository

        with open_repository(place.repo) as repository:
            removed = []
            for prefix in (LEASES, "locks/"):
                for name, holder in holders(repository.store, prefix):
                    repository.store.delete(name)
                    removed.append(holder.describe() if holder else name)
        console.data["removed"] = removed
        for item in removed or ["nothing was locked"]:
            console.say(item)

    return perform("unlock", output, action)


# -- keys --------------------------------------------------------------------------------------------------------------


@key.command(name="add")
def key_add(*, label: str = "", place: Place = _PLACE, output: Output = _OUTPUT) -> int:
    """Add a password; it comes from P2V_NEW_PASSWORD (or _FILE, _COMMAND), else the terminal is asked."""

    def action(console: Console) -> None:
        from backup.place import open_repository, password

        with open_repository(place.repo) as repository:
            name = repository.add_key(password("P2V_NEW_PASSWORD", "new password: ", twice=True), label=label)
        console.data["key"] = name
        console.say(f"key {name[:8]} added")

    return perform("key add", output, action)


@key.command(name="list")
def key_list(*, place: Place = _PLACE, output: Output = _OUTPUT) -> int:
    """List the keys."""

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo) as repository:
            found = repository.list_keys()
        console.data["keys"] = [{"id": name, "label": label, "created": created} for name, label, created in found]
        console.table(["key", "label", "created"], [[name[:8], label, created] for name, label, created in found])

    return perform("key list", output, action)


@key.command(name="remove")
def key_remove(name: str, /, *, place: Place = _PLACE, output: Output = _OUTPUT) -> int:
    """Remove a password. Whoever opened the repository with it before may still know the master key."""

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo) as repository:
            removed = repository.remove_key(name)
        console.data["key"] = removed
        console.say(f"key {removed[:8]} removed")

    return perform("key remove", output, action)


@key.command(name="export")
def key_export(
    *,
    destination: Annotated[Path, Parameter(name="--output", alias="-o")],
    place: Place = _PLACE,
    output: Output = _OUTPUT,
) -> int:
    """Write the paper key to a new file: print it and keep it in a safe. It opens the repository as if it were a password.

    Parameters
    ----------
    destination
        new file; only you may read it.
    """

    def action(console: Console) -> None:
        from backup.place import open_repository

        with open_repository(place.repo) as repository:
            text = f"p2v-toolkit repository {repository.config.id}\n{repository.keyring.paper()}\n"
        try:
            with open(destination, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"{destination} cannot be written: {error.strerror}", advice="Name a new file.") from None
        console.data["file"] = str(destination)
        console.say(
            f"the second line of {destination} is the paper key; it opens everything: print it and remove the file"
        )

    return perform("key export", output, action)
