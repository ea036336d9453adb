"""See disks boot on the kind of hardware that a platform has, and hold a verdict against what is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from formats.definitions import Hardware, profile_of
from formats.errors import UsageError
from formats.machine import Firmware, Machine
from p2v.collect.files import FileOrigin
from p2v.console import Console, human_size, record
from p2v.drivers import CONTROLLER_DRIVERS, lacking
from p2v.emulator import Controller, NicModel
from p2v.errors import DoesNotBootError, UnprovenError
from p2v.target.boots import boot
from p2v.target.evidence import Patience
from p2v.target.hardware import EmulatedPlatform, platform_hardware
from p2v.target.verdict import Finding, Level, Result, Severity, Verdict
from p2v.view import View


def boot_view(
    view: View,
    machine: Machine,
    platform: str,
    hardware: Hardware,
    console: Console,
    *,
    folder: Path | None,
    timeout: int,
    fuzzy: bool = False,
    explain: bool = False,
) -> Verdict:
    """Boot the disks of a view on the platform's kind of hardware; writes are thrown away. Raises what a source failed with.

    ``explain``: the initramfs is as the machine's record has it: the verdict may say what it lacks, and is sooner there.
    """
    target = emulated(platform, hardware, machine)
    missing = _lacking(machine, target.hardware.controller) if explain else ""
    waits = patience(timeout) or (_BRIEF if missing else None)
    verdict = boot(
        machine,
        view.drives(),
        target.hardware,
        folder=folder,
        patience=waits,
        fuzzy=fuzzy,
        findings=target.findings,
        listen=lambda text: console.log(f"  seen: {text:.110}"),
    )
    view.check()
    return _explained(verdict, missing) if missing else verdict


LACKS_DRIVER = "initramfs-lacks-driver"
"""The finding that an initramfs has not what drives its disks: known from the record, and borne out by the boot."""

_NO_ROOT = frozenset(
    {"root-device-missing", "volume-group-missing", "initramfs-shell", "dracut-shell", "root-mount-failed"}
)


# A machine that lacks the driver of its disks waits for them without a word, dracut for minutes.
_BRIEF = replace(Patience.emulated(), idle=60.0, busy=100.0)


def _lacking(machine: Machine, controller: Controller) -> str:
    running = next((kernel for kernel in machine.boot.kernels if kernel.version == machine.boot.running_kernel), None)
    missing = lacking(running, CONTROLLER_DRIVERS[controller]) if running is not None else []
    return (
        f"the initramfs of {running.version} has no {', '.join(missing)} for {controller} disks"
        if running and missing
        else ""
    )


def _explained(verdict: Verdict, missing: str) -> Verdict:
    """With the drivers named that the initramfs lacks, where no root was found; a machine that waits for it without a word has failed."""
    found, seen = {finding.code for finding in verdict.findings}, {signal.code for signal in verdict.signals}
    waits = "no-signal" in found and "initramfs" in seen and "multi-user" not in seen
    if not waits and not found & _NO_ROOT:
        return verdict
    finding = Finding(
        code=LACKS_DRIVER,
        severity=Severity.ERROR,
        message=f"{missing}: it does not find its root",
        fix="let the adaptation add it (no --no-adapt, no --adapt-only), or make the initramfs on the source with all drivers",
    )
    return replace(verdict, result=Result.FAIL, findings=(finding, *verdict.findings))


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
        sources = {disk_id: disk.source for disk_id, disk in opened.disks.items()}
        with console.stage("boot") as stage, View(machine, sources) as view:
            verdict = boot_view(view, machine, profile.name, hardware, console, folder=evidence, timeout=timeout)
            stage.detail = f"{human_size(view.bytes_read)} read"
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


def demand(verdict: Verdict, *, outcome: str, unproven_stops: bool = True) -> None:
    """Raise ``DoesNotBootError`` or ``UnprovenError`` unless the verdict is a pass; ``outcome`` says what became of the copy."""
    if verdict.result is Result.PASS or (verdict.result is Result.UNPROVEN and not unproven_stops):
        return
    evidence = " and ".join(path for path in (verdict.console, verdict.screenshot) if path)
    advice = "\n".join(
        [
            *dict.fromkeys(finding.fix for finding in verdict.findings if finding.fix),
            f"Evidence: {evidence}",
            "To copy it all the same: --boot-check none.",
        ]
    )
    if verdict.result is Result.FAIL:
        raise DoesNotBootError(f"the machine does not boot: {verdict.reason}; {outcome}", advice=advice)
    raise UnprovenError(f"the machine was not seen to boot: {verdict.reason}; {outcome}", advice=advice)
