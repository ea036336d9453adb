"""The order of a conversion: inspect, preflight, plan, capture, boot verdict, copy, second opinion, definition."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from formats.block import BlockSource, data_bytes
from formats.capture import Capture, Consistency, weakest
from formats.definitions import Hardware, profile_of
from formats.errors import Notice, ToolkitError, UsageError
from formats.images import image_format, probe
from formats.layers import Cached, Counted
from formats.machine import Firmware, Machine
from formats.nbd import NbdServer
from p2v.console import Console, Stage, human_size, human_time, record
from p2v.emit import Artifact, Emission, refuse_existing, require_space
from p2v.emulator import Drive, NicModel
from p2v.errors import DoesNotBootError, UnprovenError
from p2v.origin import OpenOrigin
from p2v.plan import Plan, disks_of, plan
from p2v.preflight import Severity, examine
from p2v.target.boots import boot
from p2v.target.evidence import Patience
from p2v.target.hardware import EmulatedPlatform, platform_hardware
from p2v.target.verdict import Level, Result, Verdict

BOOT_CHECKS = ("boots", "none")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_BOOT_CACHE = 64 << 20  # bytes kept of each disk while it boots: the guest reads many blocks more than once


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
                consistency = weakest(capture.disks)
                stage.detail = f"consistency {consistency}"
            self._covered(capture, emission.plan)
            for notice in capture.notices:
                console.notice(notice)
            fuzzy = consistency is Consistency.FUZZY
            if self._request.boot_check == "boots":
                verdict = self._boot_capture(capture, emission, rehearsal=fuzzy)
            self._copy(capture, emission)
            machine = capture.machine
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

    def _boot_capture(self, capture: Capture, emission: Emission, *, rehearsal: bool) -> Verdict:
        name = "boot rehearsal" if rehearsal else "boot check"
        with self._console.stage(name) as stage:
            verdict, taken = boot_sources(
                capture.machine,
                {disk_id: disk.source for disk_id, disk in capture.disks.items()},
                emission.plan.platform.name,
                emission.plan.hardware,
                self._console,
                folder=self._evidence(emission.plan),
                timeout=self._request.boot_timeout,
                fuzzy=rehearsal,
            )
            size = sum(disk.source.size for disk in capture.disks.values())
            share = (
                f"{human_size(taken)} of {human_size(size)} read from the source ({100 * taken / max(size, 1):.1f} %)"
            )
            stage.detail = f"{verdict.level}/{verdict.result} in {human_time(verdict.seconds)}, {share}"
        self._console.data |= {"verdict": record(verdict), "bytes_read_before_copy": taken}
        # A moving source can make a rehearsal come to nothing; only what it was seen to fail at counts.
        self._demand(verdict, unproven_stops=not rehearsal, before_copy=True)
        return verdict

    def _boot_copy(self, machine: Machine, emission: Emission) -> Verdict:
        made = emission.plan
        with self._console.stage("boot check of the copy") as stage:
            target = emulated(made.platform.name, made.hardware, machine)
            drives = [
                Drive(
                    path=emission.pending(disk),
                    format=image_format(disk.format).driver,
                    options=probe(emission.pending(disk), format=disk.format).options,
                    logical_sector=disk.logical_sector,
                )
                for disk in made.disks
            ]
            verdict = boot(
                machine,
                drives,
                target.hardware,
                folder=self._evidence(made),
                patience=patience(self._request.boot_timeout),
                findings=target.findings,
                listen=lambda text: self._console.debug(f"boot: {text}"),
            )
            stage.detail = f"{verdict.level}/{verdict.result} in {human_time(verdict.seconds)}"
        self._console.data["verdict"] = record(verdict)
        self._demand(verdict, unproven_stops=True, before_copy=False)
        return verdict

    def _evidence(self, made: Plan) -> Path:
        folder = made.folder / f"{made.name}-boot"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _demand(self, verdict: Verdict, *, unproven_stops: bool, before_copy: bool) -> None:
        if verdict.result is Result.PASS or (verdict.result is Result.UNPROVEN and not unproven_stops):
            return
        fixes = [finding.fix for finding in verdict.findings if finding.fix]
        advice = "\n".join(
            [
                *fixes,
                f"Evidence: {verdict.console}" + (f" and {verdict.screenshot}" if verdict.screenshot else ""),
                "To copy it all the same: --boot-check none.",
            ]
        )
        when = "nothing was copied" if before_copy else "the copy was thrown away"
        if verdict.result is Result.FAIL:
            raise DoesNotBootError(f"the machine does not boot: {verdict.reason}; {when}", advice=advice)
        raise UnprovenError(f"the machine was not seen to boot: {verdict.reason}; {when}", advice=advice)

    # -- copy ------------------------------------------------------------------------------------------------------

    def _copy(self, capture: Capture, emission: Emission) -> None:
        console, made = self._console, emission.plan
        with console.stage("map used blocks") as stage:
            used = {disk.disk_id: data_bytes(capture.disks[disk.disk_id].source) for disk in made.disks}
            size = sum(disk.size for disk in made.disks)
            stage.detail = f"{human_size(sum(used.values()))} of {human_size(size)} are used"
        if all(disk.subformat != "streamOptimized" for disk in made.disks):
            require_space(made.folder, sum(used.values()))
        done: dict[str, object] = {}
        for disk in made.disks:
            with console.stage(f"copy {disk.file}") as stage:
                started = console.clock()
                result = emission.copy(
                    disk,
                    capture.disks[disk.disk_id].source,
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


def boot_sources(
    machine: Machine,
    sources: Mapping[str, BlockSource],
    platform: str,
    hardware: Hardware,
    console: Console,
    *,
    folder: Path | None,
    timeout: int,
    fuzzy: bool = False,
) -> tuple[Verdict, int]:
    """Boot a machine's disks on the platform's kind of hardware, straight from their sources by id; writes are thrown away.

    Returns the verdict and the bytes that were read from the sources.
    """
    target = emulated(platform, hardware, machine)
    counted = {str(number): Counted(sources[disk.id]) for number, disk in enumerate(disks_of(machine))}
    cached = {name: Cached(source, limit=_BOOT_CACHE) for name, source in counted.items()}
    with NbdServer(cached) as server:
        drives = [
            Drive(
                uri=server.uri(str(number)),
                serial=disk.serial,
                logical_sector=disk.logical_sector,
                physical_sector=disk.physical_sector,
            )
            for number, disk in enumerate(disks_of(machine))
        ]
        verdict = boot(
            machine,
            drives,
            target.hardware,
            folder=folder,
            patience=patience(timeout),
            fuzzy=fuzzy,
            findings=target.findings,
            listen=lambda text: console.log(f"  seen: {text:.110}"),
        )
        if server.error is not None:
            raise server.error
    return verdict, sum(source.bytes_read for source in counted.values())


def boot_path(
    path: Path,
    console: Console,
    *,
    platform: str,
    disk_format: str,
    firmware: str,
    level: str,
    timeout: int,
    memory: int,
    evidence: Path | None,
) -> Verdict:
    """Boot what lies at ``path`` and return the verdict; texts as on the command line, empty for what the machine itself says."""
    from p2v.collect.files import FileOrigin

    if level != Level.BOOTS:
        raise UsageError(f"there is no check of level {level!r} yet", advice="only --level boots is there")
    if firmware and firmware not in tuple(Firmware):
        raise UsageError(f"there is no firmware {firmware!r}", advice="choose bios or uefi")
    origin = FileOrigin(path, disk_format=disk_format or None)
    with origin.capture() as opened:
        known = opened.machine
        machine = replace(
            known, firmware=Firmware(firmware) if firmware else known.firmware, memory=memory or known.memory
        )
        profile = profile_of(platform or origin.platform or "qemu")
        hardware = origin.hardware if origin.hardware and not platform else profile.default_hardware(machine)
        if firmware:
            hardware = replace(hardware, firmware=machine.firmware)
        with console.stage("boot") as stage:
            verdict, taken = boot_sources(
                machine,
                {disk_id: disk.source for disk_id, disk in opened.disks.items()},
                profile.name,
                hardware,
                console,
                folder=evidence,
                timeout=timeout,
            )
            stage.detail = f"{human_size(taken)} read"
    console.data["verdict"] = record(verdict)
    return verdict


def emulated(platform: str, hardware: Hardware, machine: Machine) -> EmulatedPlatform:
    """What QEMU emulates in place of the hardware that the definition asks for."""
    usual = profile_of(platform).bus_names(hardware.firmware)[0]
    card = hardware.nic if hardware.nic in tuple(NicModel) else None
    return platform_hardware(
        platform,
        machine,
        firmware=hardware.firmware,
        bus=None if hardware.bus is usual else hardware.bus,
        nic=NicModel(card) if card else None,
    )


def patience(timeout: int) -> Patience | None:
    """What the user's --boot-timeout means; None leaves it to the accelerator."""
    return replace(Patience.emulated(), total=float(timeout)) if timeout else None


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
