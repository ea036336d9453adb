"""The order of a conversion: inspect, preflight, plan, capture, adapt, boot verdict, copy, second opinion, definition."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from formats.block import BlockSource, data_bytes
from formats.capture import Capture, Consistency, Holdable, weakest
from formats.definitions import Hardware, profile_of
from formats.definitions.text import file_stem
from formats.errors import InterruptedRunError, Notice, ToolkitError, UsageError
from formats.images import create_sink, open_source
from formats.machine import Machine
from formats.transfer import copy
from p2v.adapt import ITEMS, AdaptPlan, GuestKernel, adapt, fetch_kernel, plan_adaptation, repair_of
from p2v.collect.at_rest import RestFiles
from p2v.console import Console, Stage, human_size, human_time, record
from p2v.emit import Artifact, Emission, refill, refuse_existing, require_space
from p2v.errors import AdaptationError, ConsistencyError, DoesNotBootError, LinkLostError
from p2v.origin import OpenOrigin
from p2v.plan import Plan, plan
from p2v.preflight import Severity, examine
from p2v.prove import boot_view, demand
from p2v.target.verdict import Result, Verdict
from p2v.view import View

_RESUME = "Run the same command again: it goes on with what was copied."
BOOT_CHECKS = ("boots", "none")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for; texts as on the command line. ``boot_timeout`` is seconds, 0 the default.

    ``restore``: the source is a restore point; that it was not seen to boot is then no notice.
    """

    platform: str
    destination: Path
    disk_format: str = ""
    name: str = ""
    boot_check: str = "boots"
    boot_timeout: int = 0
    adapt: bool = True
    adapt_only: tuple[str, ...] = ()
    dry_run: bool = False
    restore: bool = False

    def __post_init__(self) -> None:
        if self.boot_check not in BOOT_CHECKS:
            raise UsageError(
                f"there is no boot check {self.boot_check!r}", advice=f"choose one of: {', '.join(BOOT_CHECKS)}"
            )
        if self.name and not _NAME.fullmatch(self.name):
            raise UsageError(
                f"{self.name!r} is no name for a virtual machine on every platform",
                advice="take letters, digits, '.', '_' and '-', at most 63, a letter or digit first",
            )


class Conversion:
    """One conversion. ``run`` goes through all steps; what it did is in ``console.data``."""

    def __init__(self, origin: OpenOrigin, request: Request, console: Console) -> None:
        self._origin, self._request, self._console = origin, request, console
        self._adapted: set[str] = set()

    def run(self) -> Artifact | None:
        """Convert, and return what was written; None for a dry run.

        Raises what its steps raise: ``DoesNotBootError`` and ``UnprovenError`` before the bulk copy when the boot check does not
        pass, ``ImageUnsupportedError`` when the platform cannot take the machine. Nothing is left behind under a final name.
        """
        console = self._console
        profile = profile_of(self._request.platform)
        with console.stage("inspect") as stage:
            machine = self._origin.inspect()
            stage.detail = (
                f"{machine.name}, {len(machine.disks)} disks, {human_size(sum(d.size for d in machine.disks))}"
            )
        hardware = profile.default_hardware(machine)
        made = self._plan(machine, hardware)
        self._preflight(machine, hardware)
        console.data["plan"] = _described(made)
        if self._request.dry_run:
            refuse_existing(made)
            self._show(made, machine)
            return None
        with Emission(made) as emission:
            if emission.resumed:
                console.log("going on with what an interrupted run has copied")
            try:
                return self._take(emission)
            except KeyboardInterrupt:
                raise InterruptedRunError(
                    "the run was interrupted; nothing is held on the source", advice=_RESUME
                ) from None
            except LinkLostError as error:
                raise LinkLostError(
                    error.message, advice=f"{error.advice} {_RESUME}".strip(), subject=error.subject
                ) from error

    def _plan(self, machine: Machine, hardware: Hardware) -> Plan:
        return plan(
            machine,
            profile_of(self._request.platform),
            hardware,
            folder=self._request.destination,
            name=file_stem(self._request.name or machine.name.partition(".")[0]),
            disk_format=self._request.disk_format,
        )

    def _preflight(self, machine: Machine, hardware: Hardware) -> None:
        findings = examine(machine, self._request.platform, self._request.disk_format, hardware)
        self._console.data["findings"] = [record(finding) for finding in findings]
        for finding in findings:
            subject = f"{finding.subject}: " if finding.subject else ""
            seen_to = " (the adaptation sees to it)" if finding.adapted and self._request.adapt else ""
            self._console.log(f"preflight {finding.severity}: {subject}{finding.message}{seen_to}")
        for finding in findings:
            if finding.severity is Severity.BLOCKER:
                raise DoesNotBootError(finding.message, advice=finding.fix, subject=finding.subject)

    def _show(self, made: Plan, machine: Machine) -> None:
        say = self._console.say
        say(f"plan for {machine.name} -> {made.platform.title}, nothing is done")
        say(f"  hardware    {made.hardware.firmware}, disks on {made.hardware.bus}, NIC {made.hardware.nic}")
        for disk in made.disks:
            say(f"  disk        {made.folder / disk.file}: {human_size(disk.size)}, {disk.format} ({disk.subformat})")
        say(f"  definition  {made.folder / made.definition}")
        for item in self._adaptation(machine).items:
            say(f"  adapt       {item.name}: {item.reason}")
        say(f"  boot check  {self._request.boot_check}")

    def _take(self, emission: Emission) -> Artifact:
        console = self._console
        with contextlib.ExitStack() as stack:
            with console.stage("capture") as stage:
                capture = stack.enter_context(self._origin.capture())
                machine, consistency = capture.machine, weakest(capture.disks)
                stage.detail = f"consistency {consistency}"
            for notice in capture.notices:
                if notice.code != "fuzzy-disk":  # told when it stays so
                    console.notice(notice)
            self._covered(capture, emission.plan)
            sources = {disk_id: disk.source for disk_id, disk in capture.disks.items()}
            kernel = self._kernel(machine, sources, emission)
            if consistency is Consistency.FUZZY:
                self._rehearse(sources, machine, kernel, emission)
                sources, consistency = self._stage(capture, sources, emission, stack)
                capture.__exit__(
                    None, None, None
                )  # nothing more is read from the moving source (C5: twice is harmless)
            with View(machine, sources) as view:
                verdict = self._prove(view, machine, kernel, emission)
                self._copy(view, sources, emission)
        self._verify(emission)
        if verdict is None and not self._request.restore:
            console.notice(
                Notice(
                    code="boot-unchecked",
                    message="the machine was copied without having been seen to boot",
                    advice=f"Check it now: p2v boot {emission.plan.folder}",
                )
            )
        return self._publish(machine, emission, verdict, consistency)

    def _covered(self, capture: Capture, made: Plan) -> None:
        for disk in made.disks:
            if disk.disk_id not in capture.disks:
                raise ToolkitError(f"the capture holds no disk {disk.disk_id}", advice="Run the conversion again.")

    # -- adapt and boot ----------------------------------------------------------------------------------------------

    def _kernel(self, machine: Machine, sources: Mapping[str, BlockSource], emission: Emission) -> GuestKernel | None:
        """What the adaptation boots; None when there is nothing to adapt, or no way to: of a machine at rest that is told, and no error."""
        items = self._adaptation(machine).items
        if not items or not machine.boot.kernels:
            return None
        files = self._origin.session or RestFiles.of(machine, sources)
        try:
            if files is None:
                raise AdaptationError("neither its root nor its /boot is a file system that can be read here")
            with self._console.stage("fetch kernel") as stage:
                kernel = fetch_kernel(files, machine, emission.scratch)
                stage.detail = f"{kernel.version}, to start on {kernel.controller}"
        except AdaptationError as error:
            if self._origin.session is not None:
                raise
            self._console.log(f"not adapted: {error.message}")
            return None
        return kernel

    def _adaptation(self, machine: Machine) -> AdaptPlan:
        request = self._request
        if not request.adapt or (self._origin.adapted and not request.adapt_only):
            return AdaptPlan()
        hardware = profile_of(request.platform).default_hardware(machine)
        return plan_adaptation(machine, hardware, frozenset(request.adapt_only) or None)

    def _rehearse(
        self, sources: Mapping[str, BlockSource], machine: Machine, kernel: GuestKernel | None, emission: Emission
    ) -> None:
        """Adapt and boot a moving source before its copy. What that leaves is thrown away, and only a failure that was seen counts."""
        if self._request.boot_check != "boots":
            return
        with View(machine, sources) as view:
            try:
                self._prove(view, machine, kernel, emission, rehearsal=True)
            except AdaptationError as error:
                self._console.log(f"the rehearsal came to nothing: {error.message}")

    def _stage(
        self, capture: Capture, sources: Mapping[str, BlockSource], emission: Emission, stack: contextlib.ExitStack
    ) -> tuple[dict[str, BlockSource], Consistency]:
        """Copy a moving source aside: adaptation, boot and final copy want one view that holds still."""
        used = self._used(sources, emission.plan)
        require_space(emission.plan.folder, 2 * sum(used.values()))
        staged: dict[str, Path] = {}
        for number, disk in enumerate(emission.plan.disks):
            path = staged[disk.disk_id] = emission.scratch / f"staged{number}.qcow2"
            with self._console.stage(f"copy {disk.file} aside") as stage:
                source = sources[disk.disk_id]
                with contextlib.closing(create_sink(path, "qcow2", source.size)) as sink:
                    progress = self._console.progress(f"copy {disk.file} aside")
                    done = copy(source, sink, progress=progress, total=used[disk.disk_id])
                    sink.flush()
                stage.detail = f"{human_size(done.read)} read"
        consistency = self._settle(capture, staged)
        opened = {key: open_source(path, format="qcow2") for key, path in staged.items()}
        for source in opened.values():
            stack.callback(source.close)
        return opened, consistency

    def _settle(self, capture: Capture, staged: Mapping[str, Path]) -> Consistency:
        """Bring the copy of a moving source to one instant, by a frozen final pass over what changed; else it stays fuzzy, said loudly."""
        console, why, advice = self._console, "", ""
        if isinstance(capture, Holdable):
            try:
                with console.stage("final pass, frozen") as stage:
                    read = kept = 0
                    with capture.hold() as disks:
                        for disk_id, path in staged.items():
                            copied = refill(
                                path, "qcow2", disks[disk_id], progress=console.progress("final pass, frozen")
                            )
                            read, kept = read + copied.done.read - copied.kept, kept + copied.kept
                    stage.detail = f"{human_size(read)} had changed, {human_size(kept)} had not"
                return Consistency.CRASH
            except ConsistencyError as error:
                why, advice = f"; {error.message}", error.advice
        for notice in capture.notices:
            if notice.code == "fuzzy-disk":
                console.notice(replace(notice, message=notice.message + why, advice=advice or notice.advice))
        return Consistency.FUZZY

    def _prove(
        self, view: View, machine: Machine, kernel: GuestKernel | None, emission: Emission, *, rehearsal: bool = False
    ) -> Verdict | None:
        """Adapt the machine on overlays that the view then sees through, and boot it; None when no boot is asked for."""
        wanted = self._adaptation(machine)
        if kernel is not None:
            self._adapt(view, machine, wanted, kernel, emission)
        if self._request.boot_check != "boots":
            return None
        verdict = self._boot(view, machine, emission.plan, rehearsal=rehearsal)
        if kernel is not None and verdict.result is Result.FAIL:
            codes = [finding.code for finding in verdict.findings]
            allowed = frozenset(self._request.adapt_only or ITEMS)
            if (repair := repair_of(codes, wanted.names)) and (items := repair.items & allowed):
                self._console.log(f"repair: {', '.join(sorted(items))} after {verdict.reason}")
                again = plan_adaptation(machine, emission.plan.hardware, items, rebuild=repair.rebuild)
                self._adapt(view, machine, again, kernel, emission)
                verdict = self._boot(view, machine, emission.plan, rehearsal=rehearsal)
        demand(verdict, outcome="nothing was copied", unproven_stops=not rehearsal)
        return verdict

    def _adapt(self, view: View, machine: Machine, wanted: AdaptPlan, kernel: GuestKernel, emission: Emission) -> None:
        console, made = self._console, emission.plan
        tried = console.data.setdefault("adaptation", [])
        overlays = view.new_overlays(emission.scratch, f"adapted{len(tried)}")
        with console.stage("adapt") as stage:
            try:
                done = adapt(
                    wanted,
                    machine,
                    kernel,
                    view.drives(overlays),
                    self._evidence(made, f"adapt{len(tried) or ''}"),
                    listen=lambda text: console.log(f"  {text:.110}"),
                )
            finally:
                view.check()  # a source that was lost explains whatever the machine said
            view.lay(overlays)
            self._adapted |= wanted.names
            stage.detail = f"{len(done.changes)} files changed in {human_time(done.seconds)}, see {done.audit}"
        for item in done.items:
            console.log(f"  adapted {item.name}: {item.status}: {item.detail}")
        tried.append(
            {
                "items": [record(item) for item in done.items],
                "changes": [{"path": change.path, "kind": change.kind} for change in done.changes],
                "audit": str(done.audit),
                "seconds": done.seconds,
            }
        )

    def _boot(self, view: View, machine: Machine, made: Plan, *, rehearsal: bool) -> Verdict:
        size = sum(disk.size for disk in made.disks)
        with self._console.stage("boot rehearsal" if rehearsal else "boot check") as stage:
            verdict = boot_view(
                view,
                machine,
                made.platform.name,
                made.hardware,
                self._console,
                folder=self._evidence(made, "boot"),
                timeout=self._request.boot_timeout,
                fuzzy=rehearsal,
                explain="initramfs" not in self._adapted,
            )
            stage.detail = (
                f"{verdict.level}/{verdict.result} in {human_time(verdict.seconds)}, {human_size(view.bytes_read)} of "
                f"{human_size(size)} read ({100 * view.bytes_read / max(size, 1):.1f} %)"
            )
        self._console.data |= {"verdict": record(verdict), "bytes_read_before_copy": view.bytes_read}
        return verdict

    def _evidence(self, made: Plan, what: str) -> Path:
        folder = made.folder / f"{made.name}-{what}"
        for name in ("console.log", "screen.png", "report.log", "audit.diff"):  # an earlier run's, and nothing else
            (folder / name).unlink(missing_ok=True)
        return folder

    # -- copy ------------------------------------------------------------------------------------------------------

    def _copy(self, view: View, sources: Mapping[str, BlockSource], emission: Emission) -> None:
        console, made = self._console, emission.plan
        used = self._used(sources, made)
        if all(disk.subformat != "streamOptimized" for disk in made.disks):
            require_space(made.folder, sum(used.values()) - emission.allocated)
        done: dict[str, object] = {}
        for disk in made.disks:
            with console.stage(f"copy {disk.file}") as stage:
                started = console.clock()
                copied = emission.copy(
                    disk,
                    view.source(disk.disk_id),
                    progress=console.progress(f"copy {disk.file}"),
                    total=used[disk.disk_id],
                )
                result, sent = copied.done, copied.done.read - copied.kept
                rate = result.read / max(console.clock() - started, 1e-6)
                stage.detail = f"{human_size(sent)} read, {human_size(result.written)} written, {human_size(rate)}/s"
                if copied.kept:
                    stage.detail += f"; {human_size(copied.kept)} of an interrupted copy were still valid"
            done[disk.disk_id] = {
                "size": result.size, "read": sent, "kept": copied.kept, "written": result.written,
            }  # fmt: skip
        console.data["copied"] = done

    def _used(self, sources: Mapping[str, BlockSource], made: Plan) -> dict[str, int]:
        with self._console.stage("map used blocks") as stage:
            used = {disk.disk_id: data_bytes(sources[disk.disk_id]) for disk in made.disks}
            size = sum(disk.size for disk in made.disks)
            stage.detail = f"{human_size(sum(used.values()))} of {human_size(size)} are used"
        return used

    def _verify(self, emission: Emission) -> None:
        for disk in emission.plan.disks:
            with self._console.stage(f"second opinion on {disk.file}") as stage:
                said = emission.verify(disk, progress=self._console.progress(f"read back {disk.file}"))
                stage.detail = f"equal to what was read; qemu-img check: {said or 'clean'}"

    def _publish(
        self, machine: Machine, emission: Emission, verdict: Verdict | None, consistency: Consistency
    ) -> Artifact:
        console = self._console
        facts = {
            "verdict": None if verdict is None else record(verdict),
            "consistency": consistency,
            "adaptation": console.data.get("adaptation"),
            "notices": [record(notice) for notice in console.notices],
            "stages": [_timed(stage) for stage in console.stages],
        }
        adapted = self._origin.adapted or bool(self._adapted and self._adaptation(machine).names <= self._adapted)
        artifact = emission.publish(machine, facts, adapted=adapted)
        console.data["artifact"] = record(artifact)
        console.data["consistency"] = consistency
        seen = f"verdict {verdict.level}/{verdict.result}" if verdict else "not seen to boot"
        console.say(f"{artifact.definition}: {seen}, consistency {consistency}")
        for path in artifact.disks:
            console.say(f"  {path}  {human_size(path.stat().st_size)}")
        return artifact


def _timed(stage: Stage) -> dict[str, object]:
    return {"name": stage.name, "seconds": round(stage.seconds, 3), "detail": stage.detail}


def _described(made: Plan) -> dict[str, object]:
    return {
        "name": made.name,
        "platform": made.platform.name,
        "folder": str(made.folder),
        "definition": made.definition,
        "hardware": record(made.hardware),
        "disks": [record(disk) for disk in made.disks],
    }
