"""The order of a conversion: inspect, preflight, plan, capture, boot verdict, copy, second opinion, definition."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.block import BlockSource, data_bytes
from formats.capture import Capture, Consistency, weakest
from formats.definitions import Hardware, profile_of
from formats.errors import Notice, ToolkitError, UsageError
from formats.images import open_source
from formats.machine import Machine
from p2v.console import Console, Stage, human_size, human_time, record
from p2v.emit import Artifact, Emission, refuse_existing, require_space
from p2v.errors import DoesNotBootError
from p2v.origin import OpenOrigin
from p2v.plan import Plan, plan
from p2v.preflight import Severity, examine
from p2v.prove import boot_view, demand
from p2v.target.verdict import Verdict
from p2v.view import View

BOOT_CHECKS = ("boots", "none")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for; texts as on the command line. ``boot_timeout`` is seconds, 0 the default."""

    platform: str
    destination: Path
    disk_format: str = ""
    name: str = ""
    boot_check: str = "boots"
    boot_timeout: int = 0
    dry_run: bool = False

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
            return self._take(emission)

    def _plan(self, machine: Machine, hardware: Hardware) -> Plan:
        return plan(
            machine,
            profile_of(self._request.platform),
            hardware,
            folder=self._request.destination,
            name=self._request.name or _file_name(machine.name),
            disk_format=self._request.disk_format,
        )

    def _preflight(self, machine: Machine, hardware: Hardware) -> None:
        findings = examine(machine, self._request.platform, self._request.disk_format, hardware)
        self._console.data["findings"] = [record(finding) for finding in findings]
        for finding in findings:
            subject = f"{finding.subject}: " if finding.subject else ""
            self._console.log(f"preflight {finding.severity}: {subject}{finding.message}")
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
        say(f"  boot check  {self._request.boot_check}")

    def _take(self, emission: Emission) -> Artifact:
        console = self._console
        verdict: Verdict | None = None
        with contextlib.ExitStack() as stack:
            with console.stage("capture") as stage:
                capture = stack.enter_context(self._origin.capture())
                machine, consistency = capture.machine, weakest(capture.disks)
                stage.detail = f"consistency {consistency}"
            for notice in capture.notices:
                console.notice(notice)
            self._covered(capture, emission.plan)
            fuzzy = consistency is Consistency.FUZZY
            sources = {disk_id: disk.source for disk_id, disk in capture.disks.items()}
            view = stack.enter_context(View(machine, sources))
            if self._request.boot_check == "boots":
                verdict = self._rehearse(view, machine, emission.plan, fuzzy=fuzzy)
            self._copy(view, sources, emission)
        self._verify(emission)
        if fuzzy and verdict is not None:
            verdict = self._boot_copy(machine, emission)
        if verdict is None:
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

    # -- boot ------------------------------------------------------------------------------------------------------

    def _boot(self, view: View, machine: Machine, made: Plan, *, name: str, fuzzy: bool = False) -> Verdict:
        size = sum(disk.size for disk in made.disks)
        with self._console.stage(name) as stage:
            verdict = boot_view(
                view,
                machine,
                made.platform.name,
                made.hardware,
                self._console,
                folder=self._evidence(made),
                timeout=self._request.boot_timeout,
                fuzzy=fuzzy,
            )
            stage.detail = (
                f"{verdict.level}/{verdict.result} in {human_time(verdict.seconds)}, {human_size(view.bytes_read)} of "
                f"{human_size(size)} read ({100 * view.bytes_read / max(size, 1):.1f} %)"
            )
        self._console.data["verdict"] = record(verdict)
        return verdict

    def _rehearse(self, view: View, machine: Machine, made: Plan, *, fuzzy: bool) -> Verdict:
        """Boot before the bulk copy. From a moving source it is a rehearsal: only a failure that was seen counts."""
        verdict = self._boot(view, machine, made, name="boot rehearsal" if fuzzy else "boot check", fuzzy=fuzzy)
        self._console.data["bytes_read_before_copy"] = view.bytes_read
        demand(verdict, outcome="nothing was copied", unproven_stops=not fuzzy)
        return verdict

    def _boot_copy(self, machine: Machine, emission: Emission) -> Verdict:
        with contextlib.ExitStack() as stack:
            sources = {
                disk.disk_id: stack.enter_context(
                    contextlib.closing(open_source(emission.pending(disk), format=disk.format))
                )
                for disk in emission.plan.disks
            }
            view = stack.enter_context(View(machine, sources))
            verdict = self._boot(view, machine, emission.plan, name="boot check of the copy")
        demand(verdict, outcome="the copy was thrown away")
        return verdict

    def _evidence(self, made: Plan) -> Path:
        folder = made.folder / f"{made.name}-boot"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    # -- copy ------------------------------------------------------------------------------------------------------

    def _copy(self, view: View, sources: Mapping[str, BlockSource], emission: Emission) -> None:
        console, made = self._console, emission.plan
        with console.stage("map used blocks") as stage:
            used = {disk.disk_id: data_bytes(sources[disk.disk_id]) for disk in made.disks}
            size = sum(disk.size for disk in made.disks)
            stage.detail = f"{human_size(sum(used.values()))} of {human_size(size)} are used"
        if all(disk.subformat != "streamOptimized" for disk in made.disks):
            require_space(made.folder, sum(used.values()))
        done: dict[str, object] = {}
        for disk in made.disks:
            with console.stage(f"copy {disk.file}") as stage, view.source(disk.disk_id) as source:
                started = console.clock()
                result = emission.copy(
                    disk,
                    source,
                    progress=console.progress(f"copy {disk.file}"),
                    total=used[disk.disk_id],
                )
                rate = result.read / max(console.clock() - started, 1e-6)
                stage.detail = (
                    f"{human_size(result.read)} read, {human_size(result.written)} written, {human_size(rate)}/s"
                )
            done[disk.disk_id] = {"read": result.read, "written": result.written, "size": result.size}
        console.data["copied"] = done

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
            "notices": [record(notice) for notice in console.notices],
            "stages": [_stage(stage) for stage in console.stages],
        }
        artifact = emission.publish(machine, facts)
        console.data["artifact"] = record(artifact)
        console.data["consistency"] = consistency
        seen = f"verdict {verdict.level}/{verdict.result}" if verdict else "not seen to boot"
        console.say(f"{artifact.definition}: {seen}, consistency {consistency}")
        for path in artifact.disks:
            console.say(f"  {path}  {human_size(path.stat().st_size)}")
        return artifact


def _stage(stage: Stage) -> dict[str, object]:
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


def _file_name(host: str) -> str:
    """A host name as a name for files and machines on every platform."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", host.partition(".")[0]).strip("-._")[:63]
    return cleaned or "machine"
