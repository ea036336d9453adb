"""The ``p2v`` command. Thin: parse, open the source, call the verb, show the result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from p2v.cli import image
from p2v.cli.base import CONNECTION, OUTPUT, Connection, Output, app, perform, run_app
from p2v.config import FREEZE_SECONDS
from p2v.console import Console, human_size, human_time, record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from formats.machine import Machine
    from p2v.preflight import Finding
    from p2v.target.verdict import Verdict


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``p2v`` command; ends the process with the run's exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return run_app(app, arguments)


# -- inspect ---------------------------------------------------------------------------------------------------------


@app.command
def inspect(source: str, /, *, connection: Connection = CONNECTION, output: Output = OUTPUT) -> int:
    """Show what a machine is: hardware, firmware, disks, layout, operating system, boot, network.

    Nothing is written on the source.

    Parameters
    ----------
    source
        root@host, ssh://user@host:port, or the path of an image or of a folder that `p2v convert` wrote.
    """

    def action(console: Console) -> None:
        from p2v.origin import open_origin

        with open_origin(source, connection.identity, connection.known_hosts, console) as origin:
            machine = origin.inspect()
        console.data["machine"] = record(machine)
        _show_machine(console, machine)

    return perform("inspect", output, action)


def _show_machine(console: Console, machine: Machine) -> None:
    say = console.say
    cpu, system, platform = machine.cpu, machine.system, machine.platform
    say(f"{machine.name}: {system.name or system.family or 'unknown system'}, {cpu.architecture}")
    if platform.vendor or platform.product:
        nature = f" (virtual: {platform.virtualization})" if platform.virtualization else ""
        say(f"  hardware   {platform.vendor} {platform.product}{nature}")
    say(f"  firmware   {machine.firmware}" + (", Secure Boot on" if machine.boot.secure_boot else ""))
    say(f"  processor  {cpu.count} x {cpu.model or cpu.vendor}, memory {human_size(machine.memory)}")
    boot = machine.boot
    say(
        f"  boot       {boot.loader or 'unknown loader'}, kernel {boot.running_kernel or '-'}, console {', '.join(boot.consoles) or '-'}"
    )
    for kernel in boot.kernels:
        drivers = "drivers unknown" if kernel.drivers is None else f"{len(kernel.drivers)} drivers in the initramfs"
        kind = "" if kernel.host_only is None else ", host-only" if kernel.host_only else ", for any hardware"
        say(f"             {kernel.version}: {drivers}{kind}")
    for nic in machine.nics:
        how = f", by {nic.configured_by}" if nic.configured_by else ""
        dhcp = " (DHCP)" if nic.dhcp else ""
        say(f"  network    {nic.name} {nic.mac} {nic.driver}: {', '.join(nic.addresses) or 'no address'}{dhcp}{how}")
    for disk in machine.disks:
        table = f", {disk.table.kind.upper()}" if disk.table else ""
        sectors = "" if disk.logical_sector == 512 else f", {disk.logical_sector}-byte sectors"
        say(
            f"  disk       {disk.name or disk.id}  {human_size(disk.size)}, {disk.bus} {disk.model} {disk.serial}{table}{sectors}".rstrip()
        )
        for volume in machine.volumes:
            if disk.name and _disk_below(machine, volume.path, f"/dev/{disk.name}"):
                mounted = f" on {', '.join(volume.mountpoints)}" if volume.mountpoints else ""
                used = f", {human_size(volume.used)} used" if volume.used is not None else ""
                say(
                    f"             {volume.path}  {human_size(volume.size)} {volume.content or volume.kind}{mounted}{used}"
                )
    for group in machine.volume_groups:
        free = human_size(group.free_extents * group.extent_size)
        say(
            f"  LVM        {group.name}: {len(group.logical_volumes)} volumes on {', '.join(group.physical_volumes)}, {free} free"
        )


def _disk_below(machine: Machine, path: str, disk: str) -> bool:
    """Whether the volume at ``path`` lies on ``disk``, through any number of layers."""
    if path == disk:
        return False
    by_path = {volume.path: volume for volume in machine.volumes}
    pending, seen = [path], set[str]()
    while pending:
        volume = by_path.get(current := pending.pop())
        if current in seen or volume is None:
            continue
        seen.add(current)
        if disk in volume.parents:
            return True
        pending += volume.parents
    return False


# -- preflight -------------------------------------------------------------------------------------------------------


@app.command
def preflight(
    source: str,
    /,
    *,
    to: str,
    disk_format: Annotated[str, Parameter(name="--disk-format")] = "",
    connection: Connection = CONNECTION,
    output: Output = OUTPUT,
) -> int:
    """Say whether a machine will boot on a platform: findings with the fix for each, before a byte is copied.

    Parameters
    ----------
    source
        as for inspect.
    to
        target platform; see `p2v platforms`.
    disk_format
        disk format to check against, instead of the platform's usual one.
    """

    def action(console: Console) -> int | None:
        from p2v.origin import open_origin
        from p2v.preflight import Severity, examine

        with open_origin(source, connection.identity, connection.known_hosts, console) as origin:
            machine = origin.inspect()
        findings = examine(machine, to, disk_format)
        console.data |= {"machine": record(machine), "findings": [record(f) for f in findings]}
        show_findings(console, findings)
        return 70 if any(f.severity is Severity.BLOCKER for f in findings) else None

    return perform("preflight", output, action)


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """List findings for a person, the worst first."""
    if not findings:
        console.say("nothing found that would keep the machine from booting there")
    for finding in findings:
        subject = f" {finding.subject}:" if finding.subject else ""
        seen_to = " (`p2v convert` of the live machine sees to it)" if finding.adapted else ""
        console.say(f"{finding.severity:8}{subject} {finding.message}{seen_to}")
        if finding.fix and not finding.adapted:
            console.say(f"         {finding.fix}")


# -- convert ---------------------------------------------------------------------------------------------------------


@app.command
def convert(
    source: str,
    /,
    *,
    to: str,
    destination: Annotated[Path, Parameter(name="--output", alias="-o")],
    disk_format: Annotated[str, Parameter(name="--disk-format")] = "",
    name: str = "",
    boot_check: Annotated[str, Parameter(name="--boot-check")] = "boots",
    boot_timeout: Annotated[int, Parameter(name="--boot-timeout")] = 0,
    no_adapt: Annotated[bool, Parameter(name="--no-adapt")] = False,
    adapt_only: Annotated[tuple[str, ...], Parameter(name="--adapt-only", metavar="ITEM")] = (),
    freeze_limit: Annotated[int, Parameter(name="--freeze-limit")] = FREEZE_SECONDS,
    dry_run: Annotated[bool, Parameter(name="--dry-run", alias="-n")] = False,
    connection: Connection = CONNECTION,
    output: Output = OUTPUT,
) -> int:
    """Make a virtual machine of a running machine, a VM or an image, and see it boot before the bulk copy.

    Order: inspect, preflight, capture (LVM snapshot where there is room), adaptation on overlays, boot check straight from the source, copy
    of the used blocks, check of the copy, definition. The definition is written last: where it is, the conversion is done.

    Parameters
    ----------
    source
        root@host, ssh://user@host:port, or the path of an image or of a folder that `p2v convert` wrote.
    to
        target platform; see `p2v platforms`.
    destination
        folder for disks and definition; made if it is not there.
    disk_format
        disk format, instead of the platform's usual one: raw, qcow2, vhd, vhdx, vmdk, vmdk:streamOptimized, vdi, parallels.
    name
        name of the virtual machine, instead of the source's host name.
    boot_check
        what has to be seen before the copy: `boots` (a login prompt or SSH banner), or `none` to copy unseen.
    boot_timeout
        seconds the machine may take to boot on the emulated target; 0 is a default that fits the emulator's speed.
    no_adapt
        leave the guest as it is: change nothing in it.
    adapt_only
        adapt this item alone; may be given several times: initramfs, names, device-map, lvm-devices, network, console, efi-fallback,
        selinux.
    freeze_limit
        the most seconds that the source's file systems may stay frozen. A machine without room for snapshots is copied while it runs, then
        frozen while what changed is compared and copied; where that would take longer, the copy is fuzzy (exit code 3).
    dry_run
        inspect, preflight and print the plan; copy nothing, snapshot nothing.
    """

    def action(console: Console) -> None:
        from p2v.convert import Conversion, Request
        from p2v.origin import open_origin

        request = Request(
            platform=to,
            destination=destination,
            disk_format=disk_format,
            name=name,
            boot_check=boot_check,
            boot_timeout=boot_timeout,
            adapt=not no_adapt,
            adapt_only=adapt_only,
            dry_run=dry_run,
        )
        with open_origin(
            source, connection.identity, connection.known_hosts, console, freeze_limit=freeze_limit
        ) as origin:
            Conversion(origin, request, console).run()

    return perform("convert", output, action)


# -- boot ------------------------------------------------------------------------------------------------------------


@app.command
def boot(
    path: Path,
    /,
    *,
    to: str = "",
    from_: Annotated[str, Parameter(name="--from")] = "",
    firmware: str = "",
    level: str = "boots",
    timeout: int = 0,
    memory: int = 0,
    evidence: Path | None = None,
    output: Output = OUTPUT,
) -> int:
    """Boot an image or a converted machine on the emulated target and say what was seen. Nothing is written to it.

    Parameters
    ----------
    path
        disk image, or folder or definition that `p2v convert` wrote.
    to
        platform whose kind of hardware is emulated; default: the definition's own, for an image qemu.
    from_
        format of a disk image (raw, qcow2, vhd, vhdx, vmdk, vdi, parallels) where its header is not to be trusted.
    firmware
        bios or uefi, where the machine's record does not say; default: from the disk.
    level
        how far the proof has to go; only `boots` so far.
    timeout
        seconds until the machine must have come up; 0 is a default that fits the emulator's speed.
    memory
        MiB of memory, instead of the machine's own.
    evidence
        folder that gets the console log and the screenshot; default: a new one below the temporary folder.
    """

    def action(console: Console) -> int | None:
        from p2v.prove import boot_path

        verdict = boot_path(
            path, console, platform=to, disk_format=from_, firmware=firmware, level=level, timeout=timeout, memory=memory << 20,
            evidence=evidence,
        )  # fmt: skip
        show_verdict(console, verdict)
        return {"pass": None, "fail": 70, "unproven": 71}[verdict.result]

    return perform("boot", output, action)


def show_verdict(console: Console, verdict: Verdict) -> None:
    """The verdict for a person; what was seen on the way has been told while it was seen, and is in the JSON."""
    console.say(
        f"verdict {verdict.level}/{verdict.result} after {human_time(verdict.seconds)}, {verdict.accelerator}: {verdict.reason}"
    )
    for finding in verdict.findings:
        console.say(f"  finding  {finding.describe()}")
    for label, path in (("console", verdict.console), ("screen", verdict.screenshot)):
        if path:
            console.say(f"  {label:8} {path}")


# -- the rest --------------------------------------------------------------------------------------------------------


@app.command
def platforms(*, output: Output = OUTPUT) -> int:
    """List the target platforms: disk formats, buses, NICs, firmware and limits of each."""

    def action(console: Console) -> None:
        from formats.definitions import PLATFORMS

        console.data["platforms"] = [record(platform) for platform in PLATFORMS.values()]
        rows = [
            [p.name, p.title, ", ".join(p.formats), ", ".join(p.buses), ", ".join(p.nics), ", ".join(p.firmwares)]
            for p in PLATFORMS.values()
        ]
        console.table(["platform", "what it is", "disk formats", "disk buses", "NICs", "firmware"], rows)

    return perform("platforms", output, action)


@app.command
def cleanup(source: str, /, *, connection: Connection = CONNECTION, output: Output = OUTPUT) -> int:
    """Remove what a killed run left on a source: snapshots named p2v-*. (Frozen file systems thaw by themselves.)

    What a run that is still alive holds is left alone.

    Parameters
    ----------
    source
        as for inspect.
    """

    def action(console: Console) -> None:
        from p2v.origin import open_origin

        with open_origin(source, connection.identity, connection.known_hosts, console) as origin:
            removed = origin.cleanup()
        console.data["removed"] = removed
        for item in removed:
            console.say(f"removed {item}")
        if not removed:
            console.say("nothing was left there")

    return perform("cleanup", output, action)


__all__ = ["Connection", "Output", "app", "image", "main", "perform", "run", "run_app", "show_findings", "show_verdict"]
