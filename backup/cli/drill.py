"""Commands that prove what is stored: drills, and how old the proofs are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from backup.cli.base import OUTPUT, PLACE, Place, app
from formats.errors import UsageError
from p2v.cli import Output, perform
from p2v.console import Console, human_size, human_time, record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backup.drill import Drilled
    from backup.job import DrillJob
    from backup.repository import Repository
    from backup.sabotage import Sabotage


@app.command
def drill(
    what: str = "",
    /,
    *,
    all_: Annotated[bool, Parameter(name="--all")] = False,
    job: Path | None = None,
    full_restore: Annotated[bool, Parameter(name="--full-restore")] = False,
    level: str = "boots",
    sample: str = "newest",
    to: str = "",
    timeout: float = 0.0,
    total_timeout: Annotated[float, Parameter(name="--total-timeout")] = 0.0,
    fail_on_purpose: Annotated[tuple[str, ...], Parameter(name="--fail-on-purpose", metavar="WHAT")] = (),
    report: Path | None = None,
    work: Path | None = None,
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Boot a stored machine on the emulated target, see whether it works, and keep what was seen beside the point.

    It boots straight from the repository on throw-away overlays, in a network of its own that leads nowhere. Every disk that it does not
    boot from gets a proof of its own. Exit code 70: it does not work; 71: nothing was seen that proves it.

    Parameters
    ----------
    what
        a machine's name, the id of a point or a unique beginning, `latest`, or MACHINE@latest.
    all_
        every machine of the repository.
    job
        job file (TOML) with machines in ordered groups and what each has to answer; see README, Drills.
    full_restore
        restore the disks into the work folder first and boot those: the way that a restore goes, and its true time.
    level
        how far the proof has to go; only `boots` so far.
    sample
        which point of a machine: newest, oldest or random.
    to
        platform whose kind of hardware is emulated; default: as near as possible to the machine's own.
    timeout
        seconds until a machine must have come up; 0 is a default that fits the emulator's speed.
    total_timeout
        seconds for the whole run; what is not drilled by then is unproven. 0: no limit.
    fail_on_purpose
        boot a copy in memory too that is broken in this way and must be seen failing: boot-record, root, data-disk, or all.
    report
        folder that gets report.html, junit.xml, drill.json and the evidence; default: a new one in ~/.local/state/p2v-toolkit/drills.
    work
        folder below which the run works: room for restored disks and for what the machines write; default: the temporary folder.
    """

    def action(console: Console) -> int | None:
        from backup.drill import DrillOptions, DrillRun
        from backup.place import open_repository
        from backup.report import REPORT, new_folder, write_report
        from backup.workfolder import sweep, work_folder

        if level != "boots":
            raise UsageError(f"there is no drill of level {level!r} yet", advice="only --level boots is there")
        if sum((bool(what), all_, job is not None)) != 1:
            raise UsageError("say what to drill", advice="Name a machine or a point, or give --all or --job FILE.")
        sabotages = _sabotages(fail_on_purpose)
        for left in [*sweep(work), *(sweep() if work else [])]:
            console.log(f"removed {left}, which a killed drill left behind")
        folder = report or new_folder()
        done: list[Drilled] = []
        with (
            open_repository(place.repo, notice=console.notice) as repository,
            work_folder(work) as room,
            work_folder() as sockets,
        ):
            wanted = _job(repository, what, all_=all_, job=job, sample=sample, timeout=timeout, to=to)
            options = DrillOptions(
                folder=room,
                sockets=sockets,
                full_restore=full_restore,
                sabotages=sabotages,
                timeout=total_timeout,
            )
            run = DrillRun(
                repository, options, listen=lambda text: console.log(f"  {text}"),
                progress=lambda: console.progress("restore"),
            )  # fmt: skip
            try:
                for drilled in run.run(wanted):
                    done.append(drilled)
                    _show(console, drilled)
            finally:
                if done:
                    done = write_report(folder, repository, done)
        console.data |= {
            "drills": [{**drilled.document(), "point": drilled.point, "group": drilled.group} for drilled in done],
            "report": str(folder / REPORT),
        }
        if len(done) == 1:
            console.data["verdict"] = record(done[0].verdict)
        console.say(f"report    {folder / REPORT}")
        results = {str(drilled.result) for drilled in done}
        return 70 if "fail" in results else 71 if "unproven" in results else None

    return perform("drill", output, action)


def _sabotages(names: Sequence[str]) -> list[Sabotage]:
    from backup.sabotage import Sabotage

    known = [str(kind) for kind in Sabotage]
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise UsageError(f"nothing is broken by {unknown[0]!r}", advice=f"Choose {', '.join(known)}, or all.")
    return [kind for kind in Sabotage if str(kind) in names or "all" in names]


def _job(
    repository: Repository, what: str, *, all_: bool, job: Path | None, sample: str, timeout: float, to: str
) -> DrillJob:
    from backup.job import SAMPLES, DrillGroup, DrillJob, DrillTarget, read_job
    from p2v.target.hardware import PLATFORM_NAMES

    if sample not in SAMPLES:
        raise UsageError(f"there is no sample {sample!r}", advice=f"Choose {', '.join(SAMPLES)}.")
    if to and to not in PLATFORM_NAMES:
        raise UsageError(f"no platform named {to!r}", advice=f"Known are: {', '.join(PLATFORM_NAMES)}")
    if job is not None:
        return read_job(job)
    machines = list(dict.fromkeys(point.machine.name for point in repository.points()))
    if all_:
        if not machines:
            raise UsageError("the repository holds no point", advice="Back something up first.")
        targets = [DrillTarget(machine=name, sample=sample, timeout=timeout, platform=to) for name in machines]
    elif what in machines:
        targets = [DrillTarget(machine=what, sample=sample, timeout=timeout, platform=to)]
    else:
        targets = [DrillTarget(point=what, timeout=timeout, platform=to)]
    # Machines that were not put into an order do not depend on each other: each is a group.
    return DrillJob(groups=tuple(DrillGroup(name=t.machine or t.point, targets=(t,)) for t in targets))


def _show(console: Console, drilled: Drilled) -> None:
    console.say(
        f"{drilled.machine}  point {drilled.point[:8]} of {drilled.point_time}: {drilled.verdict.level}/{drilled.result}"
        + (f", back after {human_time(drilled.rto)}" if drilled.rto else "")
    )
    console.say(f"  {drilled.reason}")
    for finding in drilled.findings:
        console.say(f"  finding  {finding.describe()}")
    for disk in drilled.disks:
        console.say(f"  disk     {disk.disk}: {disk.result} ({disk.holds or 'nothing was recognised'})")
    for detector in drilled.detectors:
        console.say(
            f"  on purpose: {'; '.join(detector.done)}: judged {detector.result}, as it {'must' if detector.held else 'MUST NOT'} be"
        )
    console.say(
        f"  {human_size(drilled.bytes_read)} read; {', '.join(f'{s.name} {s.seconds:g} s' for s in drilled.steps)}"
    )


@app.command
def status(
    *,
    machine: str = "",
    max_backup_age: Annotated[str, Parameter(name="--max-backup-age")] = "",
    max_verified_age: Annotated[str, Parameter(name="--max-verified-age")] = "",
    max_drilled_age: Annotated[str, Parameter(name="--max-drilled-age")] = "",
    place: Place = PLACE,
    output: Output = OUTPUT,
) -> int:
    """Say, machine by machine, how old the newest point is, the newest that was verified, and the newest that was drilled and passed.

    Exit code 5 when a machine is past a limit, or its newest drill did not pass. Ages as 36h, 7d, 4w or 1d12h.

    Parameters
    ----------
    machine
        only this machine.
    max_backup_age
        the newest point must not be older.
    max_verified_age
        the newest point whose stored bytes were all read and found sound must not be older.
    max_drilled_age
        the newest point that was seen to work must not be older.
    """

    def action(console: Console) -> int | None:
        from datetime import UTC, datetime

        from backup.place import open_repository
        from backup.status import Limits, parse_age, status_of

        limits = Limits(
            backup=parse_age(max_backup_age), verified=parse_age(max_verified_age), drilled=parse_age(max_drilled_age)
        )
        with open_repository(place.repo, notice=console.notice) as repository:
            found = status_of(repository, limits, datetime.now(UTC), machine=machine)
        if machine and not found:
            raise UsageError(f"there is no point of {machine}", advice="See `p2v-backup points`.")
        console.data["machines"] = [record(item) for item in found]
        rows = [
            [
                m.machine, str(m.points), _age(m.backup_age), _age(m.verified_age), _age(m.drilled_age), m.last_drill or "never",
                human_time(m.rto) if m.rto else "-", "; ".join(m.problems) or "ok",
            ]
            for m in found
        ]  # fmt: skip
        console.table(["machine", "points", "newest", "verified", "drilled", "last drill", "RTO", "state"], rows)
        return 5 if any(item.problems for item in found) else None

    return perform("status", output, action)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return f"{seconds / 86400:.1f} d" if seconds >= 86400 else f"{seconds / 3600:.1f} h"
