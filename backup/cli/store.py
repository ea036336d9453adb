"""Commands that make a repository and store machines in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from backup.chunk import USUAL
from backup.cli.base import CONNECTION, OUTPUT, PLACE, Place, app, summary
from formats.errors import UsageError
from p2v.cli import Connection, Output, perform
from p2v.console import Console, human_size

if TYPE_CHECKING:
    pass


@app.command
def init(
    *,
    chunker: str = USUAL,
    probe: bool = False,
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Make a repository in an empty directory. Everything in it is encrypted: without a password or the paper key it is lost.

    Parameters
    ----------
    chunker
        how disks are cut: aligned-MINIMUM-USUAL-MAXIMUM follows content; fixed-SIZE is a grid, for disks that hold a data base alone.
    probe
        first ask the storage whether it keeps what a repository relies on (names given once, complete listings, exact reads). For network
        file systems and unknown SFTP servers.
    """

    def action(console: Console) -> None:
        from backup.chunk import chunker_named
        from backup.place import named_place, open_store, password
        from backup.repository import Repository
        from backup.witness import Witness

        chunker_named(chunker, bytes(32))
        store = open_store(place.repo, make=True)
        if probe:
            from backup.store.probe import require

            with console.stage("probe"):
                require(store)
        made = Repository.create(store, password(prompt="new password: ", twice=True), chunker=chunker)
        Witness.usual(named_place(place.repo)).renew()
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
    place: Place = PLACE,
    connection: Connection = CONNECTION,
    output: Output = OUTPUT,
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

        with (
            open_repository(place.repo, notice=console.notice, level=_level(level)) as repository,
            open_origin(source, connection.identity, connection.known_hosts, console) as origin,
            Backup(
                repository,
                chunker_named(repository.config.chunker, repository.keyring.cut_key),
                threads=_threads(threads),
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
        console.data |= {"point": summary(point, repository), "statistics": done.as_mapping(), "parent": point.parent}
        console.say(f"point {point.short} of {point.machine.name}: {stage.detail}")

    return perform("backup", output, action)


@app.command
def copy(
    *points: str,
    to_repo: Annotated[str, Parameter(name="--to-repo")],
    dry_run: Annotated[bool, Parameter(name="--dry-run", alias="-n")] = False,
    level: int = 3,
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Take points over into another repository, which has keys of its own: a second place for a machine's history.

    Points that are there already are left out, so an interrupted copy goes on. The other repository's password comes from P2V_TO_PASSWORD
    (or _FILE, _COMMAND), else the terminal is asked.

    Parameters
    ----------
    points
        ids, unique beginnings, `latest`, or MACHINE@latest; default: all points.
    to_repo
        the other repository, made by `p2v-backup init`.
    dry_run
        say which points would be copied.
    level
        zstd level of what is new there, 1 to 19.
    """

    def action(console: Console) -> None:
        from backup.chunk import chunker_named
        from backup.copy import copy_points
        from backup.engine import Backup
        from backup.place import open_repository

        with (
            open_repository(place.repo, notice=console.notice) as source,
            open_repository(
                to_repo,
                notice=console.notice,
                level=_level(level),
                variable="P2V_TO_PASSWORD",
                prompt="password of the other repository: ",
            ) as target,
        ):
            if source.config.id == target.config.id:
                raise UsageError("both are the same repository", advice="Name another one with --to-repo.")
            known = source.points()
            chosen = list({p.name: p for p in (source.find_point(text, known) for text in points)}.values()) or known
            if dry_run:
                there = {point.original for point in target.points()}
                wanted = [point for point in chosen if point.original not in there]
                console.data["would_copy"] = [point.name for point in wanted]
                for point in wanted:
                    console.say(f"would copy {point.short} of {point.machine.name}, {point.time}")
                return
            cutter = chunker_named(target.config.chunker, target.keyring.cut_key)
            run = Backup(
                target, cutter, threads=_threads(0), progress=console.progress("copy"), notice=console.notice, audit=0
            )
            done: list[dict[str, object]] = []
            console.data["copied"] = done
            with run, console.stage("copy") as stage:
                for point, made, there_already in copy_points(source, chosen, run):
                    done.append({"id": point.name, "copy": made.name, "there_already": there_already})
                    if not there_already:
                        console.say(f"{point.short} of {point.machine.name}, {point.time}: copied as {made.short}")
                fresh = sum(not item["there_already"] for item in done)
                stage.detail = (
                    f"{fresh} points copied, {len(done) - fresh} were there; "
                    f"{human_size(run.statistics.read)} read, {human_size(run.statistics.stored)} stored"
                )
            console.data["statistics"] = run.statistics.as_mapping()

    return perform("copy", output, action)


def _level(level: int) -> int:
    if not 1 <= level <= 19:
        raise UsageError(f"there is no zstd level {level}", advice="Choose 1 to 19.")
    return level


def _threads(asked: int) -> int:
    return asked or min(6, (os.cpu_count() or 2) + 2)


def _without_password(source: str) -> str:
    user, at, host = source.rpartition("@")
    scheme, mark, name = user.rpartition("://")
    return f"{scheme}{mark}{name.partition(':')[0]}@{host}" if at else source
