"""Drills: a restore point is booted, and what was seen is stored beside it.

By default the machine boots straight from the repository: its disks are served over NBD, writes are thrown away. With ``full_restore`` they
are written to this computer's own disk first and boot from there: the way that a restore goes, and its true time.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from backup.check import add_record, records
from backup.errors import RepositoryError
from backup.job import DrillGroup, DrillJob, DrillTarget
from backup.reader import StoredCapture
from backup.repository import Point, Repository
from backup.restore import restore_disk
from backup.sabotage import Sabotage, sabotage
from formats.block import BlockSource
from formats.errors import UsageError
from formats.images.raw import RawFile
from formats.machine import Machine
from formats.overlay import Overlay
from formats.progress import Progress
from p2v.console import record
from p2v.emulator import Drive
from p2v.plan import disks_of
from p2v.target.boots import boot
from p2v.target.disks import DiskProof, prove_data_disks
from p2v.target.evidence import Patience
from p2v.target.hardware import EmulatedPlatform, own_hardware, platform_hardware
from p2v.target.verdict import Finding, Level, Result, Severity, Signal, Verdict
from p2v.view import View

SABOTAGE_SECONDS = 600.0
"""How long a copy that was broken on purpose may take to be seen failing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A part of the way back to a running machine. ``seconds`` is how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector:
    """A copy that was broken on purpose, and whether that was seen: ``held``."""

    sabotage: Sabotage
    done: tuple[str, ...]
    result: Result
    reason: str
    held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Drilled:
    """What came out of one drill.

    ``rto`` is the measured time from the decision to restore until the machine was seen to work: seconds; 0 unless it passed. ``result`` is
    the worst of boot, probes, data disks and detectors. ``evidence`` gives SHA-256 by file name in ``folder``.
    """

    point: str
    machine: str
    point_time: str
    time: str
    mode: str
    result: Result
    verdict: Verdict
    disks: tuple[DiskProof, ...] = ()
    detectors: tuple[Detector, ...] = ()
    steps: tuple[Step, ...] = ()
    rto: float = 0.0
    bytes_read: int = 0
    folder: str = ""
    group: str = ""
    evidence: Mapping[str, str] | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings: the boot's, the disks', the detectors'."""
        blind = [
            Finding(
                code="detector-blind",
                severity=Severity.ERROR,
                message=f"a copy broken on purpose ({'; '.join(d.done)}) was judged {d.result}: the detectors no longer work",
                fix="report this: a failure was not recognised. The console of that boot is in the report's folder",
                evidence=d.reason,
            )
            for d in self.detectors
            if not d.held
        ]
        return (*self.verdict.findings, *(f for disk in self.disks for f in disk.findings), *blind)

    @property
    def reason(self) -> str:
        """One sentence: the first finding that decided, or the signal that proves."""
        return next((f.message for f in self.findings if f.severity is Severity.ERROR), self.verdict.reason)

    def moved(self, new: Path) -> Drilled:
        """The same with its evidence in another folder."""
        old = Path(self.folder)

        def there(path: str) -> str:
            return str(new / Path(path).relative_to(old)) if path and Path(path).is_relative_to(old) else path

        verdict = replace(
            self.verdict,
            console=there(self.verdict.console),
            screenshot=there(self.verdict.screenshot),
            screenshots=tuple(replace(shot, path=there(shot.path)) for shot in self.verdict.screenshots),
        )
        return replace(self, verdict=verdict, folder=str(new))

    def document(self) -> dict[str, object]:
        """The record that is stored beside the point."""
        verdict = self.verdict
        return {
            "kind": "drill", "time": self.time, "machine": self.machine, "mode": self.mode, "level": str(verdict.level),
            "result": str(self.result), "reason": self.reason, "rto": self.rto, "seconds": verdict.seconds,
            "steps": record(self.steps), "signals": record(verdict.signals), "findings": record(self.findings),
            "disks": [{"disk": d.disk, "result": str(d.result), "holds": d.holds} for d in self.disks],
            "detectors": record(self.detectors), "bytes_read": self.bytes_read, "hardware": verdict.hardware,
            "accelerator": verdict.accelerator, "evidence": dict(self.evidence or {}),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillOptions:
    """How a run drills. ``folder`` is the run's own work folder: the evidence of each machine stays in a folder there.

    ``sockets`` is where NBD is served, if not in the work folder: a Unix socket's path has less than 100 characters.
    """

    folder: Path
    sockets: Path | None = None
    full_restore: bool = False
    sabotages: Sequence[Sabotage] = ()
    timeout: float = 0.0
    patience: Patience | None = None

    def socket(self) -> Path:
        """A path for a server's socket that was not used before."""
        return (self.sockets or self.folder) / f"{secrets.token_hex(3)}.nbd"


def choose(repository: Repository, target: DrillTarget, known: Sequence[Point]) -> Point:
    """The point that a target means. ``UsageError`` where there is none."""
    if target.point:
        point = repository.find_point(target.point, known)
        if target.machine not in ("", point.machine.name):
            raise UsageError(f"the point {point.short} is of {point.machine.name}, not of {target.machine}")
        return point
    own = [point for point in known if point.machine.name == target.machine]
    if not own:
        raise UsageError(f"there is no point of {target.machine}", advice="See `p2v-backup points`.")
    return {"newest": own[-1], "oldest": own[0]}.get(target.sample) or secrets.choice(own)


class DrillRun:
    """Drills a job's machines, one after the other."""

    def __init__(
        self,
        repository: Repository,
        options: DrillOptions,
        *,
        listen: Callable[[str], None],
        progress: Callable[[], Progress],
    ) -> None:
        """``listen`` gets a few words whenever something was seen; ``progress`` makes one for a restore."""
        self._repository, self._options = repository, options
        self._listen, self._progress = listen, progress
        self._stop = threading.Event()

    def run(self, job: DrillJob) -> Iterator[Drilled]:
        """Drill everything, in order; each outcome is stored beside its point before it is given out.

        ``UsageError`` before the first boot for a target that there is not.
        """
        known = self._repository.points()
        chosen = [(group, [(t, choose(self._repository, t, known)) for t in group.targets]) for group in job.groups]
        limit = job.timeout or self._options.timeout
        timer = threading.Timer(limit, self._stop.set) if limit else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            number = 0
            for group, targets in chosen:
                broken = ""
                for target, point in targets:
                    if broken or self._stop.is_set():
                        yield _not_drilled(group, point, broken)
                        continue
                    done = self._one(group, target, point, number)
                    number += 1
                    if done.result is not Result.PASS and len(targets) > 1:
                        broken = done.machine
                    yield done
        finally:
            if timer is not None:
                timer.cancel()

    def _one(self, group: DrillGroup, target: DrillTarget, point: Point, number: int) -> Drilled:
        name = f"{number}-{re.sub('[^A-Za-z0-9._-]', '_', point.machine.name)[:40]}-{point.short}"
        folder = self._options.folder.resolve() / name
        folder.mkdir()
        with contextlib.closing(_Restored(self._repository, point, folder, self._options, self._progress)) as restored:
            done = self._drill(target, point, restored, folder)
        done = replace(done, group=group.name, evidence=_hashes(folder), folder=str(folder))
        add_record(self._repository, point, done.document())
        return done

    def _drill(self, target: DrillTarget, point: Point, restored: _Restored, folder: Path) -> Drilled:
        machine = restored.machine
        hardware = platform_hardware(target.platform, machine) if target.platform else own_hardware(machine)
        verdict, opened = self._boot(target, restored, hardware, folder)
        proofs = prove_data_disks(machine, restored.sources)
        for proof in proofs:
            self._listen(f"disk {proof.disk}: {proof.result} ({proof.holds or 'nothing recognised'})")
        detectors = tuple(self._detectors(restored, machine, hardware, folder))
        results = [verdict.result, *(proof.result for proof in proofs)]
        results += [Result.PASS if detector.held else Result.FAIL for detector in detectors]
        result = next(r for r in (Result.FAIL, Result.UNPROVEN, Result.PASS) if r in results)
        steps = [
            *restored.steps,
            Step(name="start", seconds=round(opened, 2)),
            *_stages(verdict.signals, verdict.seconds),
        ]
        return Drilled(
            point=point.name, machine=point.machine.name, point_time=point.time, time=_now(),
            mode="full-restore" if self._options.full_restore else "repository", result=result, verdict=verdict,
            disks=proofs, detectors=detectors, steps=tuple(steps), bytes_read=restored.bytes_read,
            rto=round(sum(step.seconds for step in steps), 1) if {verdict.result, *(p.result for p in proofs)} == {Result.PASS} else 0.0,
        )  # fmt: skip

    def _boot(
        self, target: DrillTarget, restored: _Restored, hardware: EmulatedPlatform, folder: Path
    ) -> tuple[Verdict, float]:
        """The verdict, and the seconds from here until the machine was switched on."""
        patience = self._options.patience
        if target.timeout:
            patience = replace(patience or Patience.emulated(), total=target.timeout)
        began = time.monotonic()
        with restored.drives() as (drives, check):
            verdict = boot(
                restored.machine, drives, hardware.hardware, folder=folder, patience=patience,
                findings=(*restored.findings, *hardware.findings), probes=target.probes,
                listen=lambda text: self._listen(f"seen: {text:.110}"), stop=self._stop,
            )  # fmt: skip
            spent = time.monotonic() - began
            check()
        # The verdict's clock begins when QEMU is started; what came before is ours.
        return verdict, max(0.0, min(spent - verdict.seconds, restored.opening))

    def _detectors(
        self, restored: _Restored, machine: Machine, hardware: EmulatedPlatform, folder: Path
    ) -> Iterator[Detector]:
        for kind in self._options.sabotages:
            overlays = {disk_id: Overlay(source) for disk_id, source in restored.sources.items()}
            done = sabotage(kind, machine, overlays)
            if not done:
                continue
            self._listen(f"on purpose: {'; '.join(done)}")
            if kind is Sabotage.DATA_DISK:
                proofs = prove_data_disks(machine, overlays)
                seen = [proof for proof in proofs if proof.result is not Result.PASS]
                result = Result.FAIL if len(seen) == len(proofs) else Result.PASS
                reason = "; ".join(f.message for proof in seen for f in proof.findings)
            else:
                place = folder / f"on-purpose-{kind}"
                place.mkdir()
                with View(machine, overlays, socket=self._options.socket()) as view:
                    patience = self._options.patience or replace(Patience.emulated(), total=SABOTAGE_SECONDS)
                    verdict = boot(
                        machine, view.drives(), hardware.hardware, folder=place, patience=patience, stop=self._stop
                    )
                    view.check()
                result, reason = verdict.result, verdict.reason
            held = result is Result.FAIL
            self._listen(f"on purpose: judged {result}{'' if held else ', which is WRONG'} ({reason:.110})")
            yield Detector(sabotage=kind, done=tuple(done), result=result, reason=reason, held=held)


class _Restored:
    """The disks of a point to boot from: in the repository, or restored into the folder."""

    def __init__(
        self,
        repository: Repository,
        point: Point,
        folder: Path,
        options: DrillOptions,
        progress: Callable[[], Progress],
    ) -> None:
        self._folder, self._options = folder, options
        self._paths: dict[str, Path] = {}
        self._stack = contextlib.ExitStack()
        self.steps: list[Step] = []
        self.bytes_read = 0
        self.opening = 0.0  # seconds between the first look at the disks and the start of QEMU
        began = time.monotonic()
        capture = self._stack.enter_context(StoredCapture(repository, point))
        self.sources: dict[str, BlockSource] = {disk_id: disk.source for disk_id, disk in capture.disks.items()}
        self.machine = replace(point.machine, disks=tuple(d for d in point.machine.disks if d.id in self.sources))
        if not disks_of(self.machine):
            raise UsageError(f"the point {point.short} holds no disk to boot from", advice="See `p2v-backup show`.")
        self.steps.append(Step(name="open", seconds=round(time.monotonic() - began, 2)))
        self.findings = tuple(
            Finding(
                code="disk-not-held",
                severity=Severity.WARNING,
                message=f"the point does not hold disk {m.id}: {m.reason}",
            )
            for m in point.missing
        )
        if options.full_restore:
            try:
                self._restore(progress)
            except BaseException:
                self._stack.close()
                raise

    def _restore(self, progress: Callable[[], Progress]) -> None:
        began = time.monotonic()
        for number, disk in enumerate(disks_of(self.machine)):
            path = self._folder / f"disk-{number}.raw"
            self.bytes_read += restore_disk(self.sources[disk.id], path, progress()).read
            self._paths[disk.id] = path
            self.sources[disk.id] = self._stack.enter_context(contextlib.closing(RawFile(path)))
        self.steps.append(Step(name="restore", seconds=round(time.monotonic() - began, 2)))

    @contextlib.contextmanager
    def drives(self) -> Iterator[tuple[list[Drive], Callable[[], None]]]:
        """What QEMU is given, and what raises the error that a disk has failed with meanwhile."""
        if self._paths:
            yield [
                Drive(
                    path=self._paths[disk.id], serial=disk.serial, logical_sector=disk.logical_sector,
                    physical_sector=disk.physical_sector,
                )
                for disk in disks_of(self.machine)
            ], lambda: None  # fmt: skip
            return
        began = time.monotonic()
        with View(self.machine, self.sources, socket=self._options.socket()) as view:
            self.opening = time.monotonic() - began
            try:
                yield view.drives(), view.check
            finally:
                self.bytes_read += view.bytes_read

    def close(self) -> None:
        """Forget everything; restored disks are removed."""
        self._stack.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def _stages(signals: Sequence[Signal], end: float) -> Iterator[Step]:
    """The boot as steps: from each kind of signal to the next, up to the one that decided."""
    names = (("loader", "firmware"), ("kernel", "loader"), ("userland", "kernel"))
    first = {signal.code: signal.seconds for signal in reversed(signals)}
    position = 0.0
    for code, name in names:
        at = first.get(code)
        if at is not None and position <= at <= end:
            yield Step(name=name, seconds=round(at - position, 1))
            position = at
    alive = min((s.seconds for s in signals if s.code in ("login-prompt", "ssh-banner")), default=end)
    if position <= alive < end:
        yield Step(name="userland", seconds=round(alive - position, 1))
        yield Step(name="probes", seconds=round(end - alive, 1))
    else:
        yield Step(name="userland", seconds=round(max(0.0, end - position), 1))


def _not_drilled(group: DrillGroup, point: Point, broken: str) -> Drilled:
    why = f"{broken}, before it in the group {group.name}, did not pass" if broken else "the time of the run was over"
    finding = Finding(
        code="not-drilled", severity=Severity.ERROR, message=f"it was not drilled: {why}", fix="drill it by itself"
    )
    verdict = Verdict(level=Level.BOOTS, result=Result.UNPROVEN, findings=(finding,))
    return Drilled(
        point=point.name, machine=point.machine.name, point_time=point.time, time=_now(), mode="repository",
        result=Result.UNPROVEN, verdict=verdict, group=group.name,
    )  # fmt: skip


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as stream:
                found[str(path.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PastDrill:
    """One drill of a machine as its record has it."""

    time: str
    point: str
    mode: str
    result: str
    rto: float


def history(repository: Repository, machine: str, known: Sequence[Point] | None = None) -> list[PastDrill]:
    """All stored drills of a machine, oldest first. A record that cannot be read is left out: `check` names it."""
    found: list[PastDrill] = []
    for point in known if known is not None else repository.points():
        if point.machine.name != machine:
            continue
        with contextlib.suppress(RepositoryError):
            found += [
                _past(point, document) for document in records(repository, point) if document.get("kind") == "drill"
            ]
    return sorted(found, key=lambda past: past.time)


def _past(point: Point, document: Mapping[str, object]) -> PastDrill:
    rto = document.get("rto")
    return PastDrill(
        time=str(document.get("time", "")),
        point=point.name,
        mode=str(document.get("mode", "")),
        result=str(document.get("result", "")),
        rto=float(rto) if isinstance(rto, int | float) else 0.0,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
